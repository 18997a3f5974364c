"""The sampler without a kernel: snapshots go in, refusals come out."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tcpscope.listeners import LISTENERS_AT_MOST, Listener, NetCounters
from tcpscope.sampling import Sampler, _divide
from tests import examples  # noqa: F401  for its settings

NETNS = 4026531840
LISTENER = Listener(
    socket=1,
    cookie=1,
    netns=NETNS,
    family=4,
    laddr="0.0.0.0",
    lport=80,
    holders=(),
    accept_queue=0,
    accept_limit=5,
    syn_queue=0,
    somaxconn=4096,
    max_syn_backlog=256,
    syncookies=1,
    abort_on_overflow=False,
    drops=0,
    accepts=0,
    since_accept_us=None,
    oldest_wait_us=None,
    counters=NetCounters(0, 0, 0),
)


def at(drops: int, *counters: int, **more: object) -> Listener:
    return replace(LISTENER, drops=drops, counters=NetCounters(*counters), **more)  # type: ignore[arg-type]


def looks(*snapshots: list[Listener]) -> list[list[tuple[int, int, str | None, str | None]]]:
    sampler = Sampler()
    return [[(s.listener.socket, s.count, s.cause, s.step) for s in sampler.look(each)] for each in snapshots]


def test_the_first_look_sets_the_start() -> None:
    assert looks([at(7, 5, 5, 0)], [at(7, 5, 5, 0)]) == [[], []]


def test_refused_syns() -> None:
    assert looks([at(0, 0, 0, 0)], [at(3, 3, 3, 0)]) == [[], [(1, 3, "ACCEPT_QUEUE_FULL", "SYN")]]
    assert looks([at(0, 0, 0, 0)], [at(3, 3, 0, 3)]) == [[], [(1, 3, "SYN_QUEUE_FULL", "SYN")]]


def test_refusals_of_several_causes_in_one_look() -> None:
    mixed = [(1, 35, "ACCEPT_QUEUE_FULL", "SYN"), (1, 5, "SYN_QUEUE_FULL", "SYN"), (1, 10, "OTHER", "SYN")]
    assert looks([at(0, 0, 0, 0)], [at(50, 50, 35, 5)]) == [[], mixed]
    off = {"syncookies": 0}  # the rest may be the reserved quarter of the SYN queue
    assert looks([at(0, 0, 0, 0, **off)], [at(50, 50, 35, 5, **off)])[1][-1] == (1, 10, None, "SYN")
    waits = looks([at(0, 0, 0, 0)], [at(0, 50, 35, 5)], [at(50, 50, 35, 5)])
    assert waits == [[], [], mixed]


def test_several_causes_at_several_listeners() -> None:
    """The one with a full accept queue has refused for that cause, if the numbers say so. Else nobody knows."""
    other, full = {"socket": 2, "cookie": 2}, {"accept_queue": 6}
    start = [at(0, 0, 0, 0), at(0, 0, 0, 0, **other)]
    assert looks(start, [at(3, 5, 3, 2, **full), at(2, 5, 3, 2, **other)])[1] == [
        (1, 3, "ACCEPT_QUEUE_FULL", "SYN"),
        (2, 2, "SYN_QUEUE_FULL", "SYN"),
    ]
    for more in ({}, {"accept_queue": 6}):
        assert [row[2] for row in looks(start, [at(2, 5, 3, 2, **more), at(3, 5, 3, 2, **other)])[1]] == [None, None]


def test_a_cause_that_is_counted_before_its_drop_waits() -> None:
    early = looks([at(0, 0, 0, 0)], [at(0, 0, 1, 0)], [at(1, 1, 1, 0)], [at(1, 1, 1, 0)])
    assert early == [[], [], [(1, 1, "ACCEPT_QUEUE_FULL", "SYN")], []]


def test_cookies_are_of_the_listener_with_a_full_syn_queue() -> None:
    sent = (1, 159, "COOKIE_SENT", "SYN")
    assert looks([at(0, 0, 0, 0, 1)], [at(0, 0, 0, 0, 160)]) == [[], [sent]]
    other = {"socket": 2, "cookie": 2}
    start = [at(0, 0, 0, 0, 1), at(0, 0, 0, 0, 1, **other)]
    assert looks(start, [at(0, 0, 0, 0, 160, syn_queue=5), at(0, 0, 0, 0, 160, **other)])[1] == [sent]


def test_cookies_without_a_certain_listener_are_counted() -> None:
    sampler, other = Sampler(), {"socket": 2, "cookie": 2}
    for cookies in (1, 160):
        found = sampler.look([at(0, 0, 0, 0, cookies, syn_queue=6), at(0, 0, 0, 0, cookies, syn_queue=6, **other)])
        assert found == []
    assert sampler.unnamed_cookies == 159


def test_the_sole_listener_sent_the_cookies_only_if_it_was_the_sole_one_before() -> None:
    other, later = {"socket": 2, "cookie": 2}, at(0, 0, 0, 0, 160)
    start = [at(0, 0, 0, 0, 1), at(0, 0, 0, 0, 1, **other)]
    assert looks(start, [later])[1] == []
    assert looks([start[1]], [later])[1] == []
    full = at(0, 0, 0, 0, 160, syn_queue=5)
    assert looks(start, [full])[1] == [(1, 159, "COOKIE_SENT", "SYN")]
    assert looks(start, [later], [at(0, 0, 0, 0, 170)])[2] == [(1, 10, "COOKIE_SENT", "SYN")]


def test_cookies_that_an_earlier_listener_sent_are_not_those_of_the_next() -> None:
    assert looks([], [at(0, 0, 0, 0, 159)]) == [[], []]


def test_a_refused_ack_is_two_packets() -> None:
    assert looks([at(0, 0, 0, 0)], [at(4, 2, 2, 0)]) == [[], [(1, 2, "ACCEPT_QUEUE_FULL", None)]]


def test_packets_that_were_not_refused() -> None:
    assert looks([at(0, 0, 0, 0)], [at(4, 0, 0, 0)], [at(4, 0, 0, 0)]) == [[], [], []]


def test_two_listeners() -> None:
    other = {"socket": 2, "cookie": 2}
    start = [at(0, 0, 0, 0), at(0, 0, 0, 0, **other)]
    assert looks(start, [at(3, 5, 5, 0), at(2, 5, 5, 0, **other)])[1] == [
        (1, 3, "ACCEPT_QUEUE_FULL", "SYN"),
        (2, 2, "ACCEPT_QUEUE_FULL", "SYN"),
    ]
    assert [row[:2] for row in looks(start, [at(6, 5, 5, 0), at(2, 5, 5, 0, **other)])[1]] == [(1, 4), (2, 1)]


def test_a_refusal_under_way_waits_for_its_other_half() -> None:
    counter_first = looks([at(0, 0, 0, 0)], [at(0, 1, 1, 0)], [at(1, 1, 1, 0)], [at(1, 1, 1, 0)])
    packet_first = looks([at(0, 0, 0, 0)], [at(1, 0, 0, 0)], [at(1, 1, 1, 0)], [at(1, 1, 1, 0)])
    assert counter_first == packet_first == [[], [], [(1, 1, "ACCEPT_QUEUE_FULL", "SYN")], []]


def test_a_refusal_whose_listener_is_gone_does_not_wait_for_ever() -> None:
    assert looks([at(0, 0, 0, 0)], [at(0, 1, 1, 0)], [at(0, 1, 1, 0)], [at(1, 1, 1, 0)]) == [[], [], [], []]


def test_a_new_listener_at_the_same_address() -> None:
    born = at(2, 9, 9, 0, cookie=5)
    assert looks([at(7, 7, 7, 0)], [born]) == [[], [(1, 2, "ACCEPT_QUEUE_FULL", "SYN")]]
    no_cookie = [at(7, 7, 7, 0, cookie=None)], [at(2, 9, 9, 0, cookie=None)]
    assert looks(*no_cookie) == [[], [(1, 2, "ACCEPT_QUEUE_FULL", "SYN")]]


def test_the_count_of_packets_wraps() -> None:
    assert looks([at(2**32 - 1, 5, 5, 0)], [at(1, 7, 7, 0)])[1] == [(1, 2, "ACCEPT_QUEUE_FULL", "SYN")]


def test_without_counters_packets_stand_for_refusals() -> None:
    bare = replace(LISTENER, counters=None)
    assert looks([bare], [replace(bare, drops=4)]) == [[], [(1, 4, None, None)]]


def test_the_first_listener_of_a_namespace() -> None:
    assert looks([], [at(2, 2, 2, 0)])[1] == [(1, 2, "ACCEPT_QUEUE_FULL", "SYN")]
    assert looks([], [at(2, 9, 9, 0)])[1] == [(1, 2, None, "SYN")]  # the others are older


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 1 << 32), min_size=1).filter(any))
def test_divide(total: int, shares: list[int]) -> None:
    parts = _divide(total, shares)
    assert sum(parts) == total
    assert all(abs(part - total * share / sum(shares)) <= 1 for part, share in zip(parts, shares, strict=True))
    assert all(part == 0 for part, share in zip(parts, shares, strict=True) if not share)


def test_a_namespace_whose_number_another_one_has_had() -> None:
    """The kernel gives the number of a namespace that is gone to the next one, whose counters begin at zero."""
    gone, born = at(9, 9, 9, 0), at(0, 0, 0, 0, socket=2, cookie=2)
    later = at(2, 2, 2, 0, socket=2, cookie=2)
    assert looks([gone], [born], [later]) == [[], [], [(2, 2, "ACCEPT_QUEUE_FULL", "SYN")]]
    assert looks([gone], [later]) == [[], [(2, 2, "ACCEPT_QUEUE_FULL", "SYN")]]


def test_a_namespace_with_the_number_of_another_is_known_by_its_cookie() -> None:
    """Its counters have passed those of the one before it when it is first seen: nothing falls."""
    gone = at(9, 9, 9, 0, net_cookie=1)
    born = at(30, 30, 30, 0, socket=2, cookie=2, net_cookie=2)
    assert looks([gone], [born]) == [[], [(2, 30, "ACCEPT_QUEUE_FULL", "SYN")]]


def test_the_sampler_forgets_what_is_gone() -> None:
    sampler = Sampler()
    for number in range(3 * LISTENERS_AT_MOST):
        sampler.look([at(1, 1, 1, 0, socket=number, cookie=number, netns=number, net_cookie=number)])
    assert len(sampler._counters) <= 2 * LISTENERS_AT_MOST + 1
    assert len(sampler._drops) == 1
    assert len(sampler._packets) <= 1
    assert len(sampler._refusals) <= 1
