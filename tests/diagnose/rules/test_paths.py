"""Thresholds of the rules about the way to an address, over evidence that is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from tcpscope.diagnose import Finding, Rule, causes
from tcpscope.diagnose.rules import host_queue_full, loss, mtu_hole, no_ack, queue_on_path, spurious_retrans
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.tallies import Tally

NETNS, PEER = 7, "192.0.2.2"
ALL = (host_queue_full, loss, mtu_hole, no_ack, queue_on_path, spurious_retrans)
ROW = {
    "netns": NETNS,
    "raddr": PEER,
    "laddr": "192.0.2.1",
    "lport": 40_000,
    "rport": 5432,
    "pid": None,
    "comm": "orders",
    "role": "ACTIVE",
    "state": "ESTABLISHED",
    "has_file": True,
    "out_segs": 0,
    "sacked_segs": 0,
    "backoff": 0,
    "retransmits": 0,
    "retrans_segs": 0,
    "total_retrans": 0,
    "srtt_us": 1000,
    "min_rtt_us": 1000,
    "rto_us": 200_000,
    "mss": 1448,
    "unacked": 0,
    "unsent": 0,
    "timer": "NONE",
    "peer_window": 65_536,
    "acked_seq": 0,
    "since_ack_us": 1000,
    "since_sent_us": 0,
    "opened_ns": 0,
    "sent_bytes": 0,
    "retrans_bytes": 0,
    "received_bytes": 0,
    "data_segs_out": 0,
    "keepalive": False,
    "keepalive_s": 7200,
    "user_timeout_ms": 0,
    "mtu_probing": 0,
}
STALLED = {"out_segs": 1, "backoff": 4, "retransmits": 4, "rto_us": 3_200_000, "unacked": 1000, "since_ack_us": 10**7}


class Group(NamedTuple):
    """One of `retrans`, `drops` and `attempts` at a time."""

    netns: int = NETNS
    pid: int | None = None
    comm: str = "orders"
    laddr: str = "192.0.2.1"
    lport: int = 40_000
    raddr: str = PEER
    rport: int = 5432
    kind: str = "FAST"
    errno: str = "none"
    outcome: str = ""
    direction: str = "SENT"
    reason: str | None = None
    location: str | None = None


def track(**columns: Any) -> Track:
    """In four looks, a second apart."""
    row = SimpleNamespace(**ROW | columns)
    made = Track(row, row, 0.0, 0.0)
    marks = {name: mark for module in ALL for name, mark in module.rule.marks.items()}
    for second in range(4):
        made._look(row if second == 0 else SimpleNamespace(**vars(row)), float(second), marks)
    return made


def tallies(*groups: tuple[Group, int]) -> SimpleNamespace:
    found = {}
    for group, number in groups:
        found[group] = Tally()
        found[group].add(99.5, number, number)
    return SimpleNamespace(tallies=found)


def evidence(
    *tracks: Track,
    sent: tuple[int, int] = (0, 0),
    twice: int = 0,
    retrans: tuple[tuple[Group, int], ...] = (),
    attempts: tuple[tuple[Group, int], ...] = (),
    drops: tuple[tuple[Group, int], ...] = (),
    counters: dict[str, int] | None = None,
    ended: bool = False,
) -> Any:
    """`sent`: segments sent and retransmitted by connections that were looked at."""
    sums: list[dict[tuple[int, str], Tally]] = []
    for count, number in (sent, (twice, 0)):
        sums.append({(NETNS, PEER): Tally()})
        sums[-1][NETNS, PEER].add(99.5, count, number)
    return SimpleNamespace(
        now_s=100.0,
        began_s=0.0,
        watched_s=100.0,
        ended=ended,
        sockets=SimpleNamespace(now=list(tracks), sent=sums[0], twice=sums[1]),
        retrans=tallies(*retrans),
        attempts=tallies(*attempts),
        drops=tallies(*drops),
        counters=SimpleNamespace(grown=lambda netns, name: (counters or {}).get(name)),
    )


def found(seen: Any) -> list[Finding]:
    rules: list[Rule] = [module.rule for module in ALL]
    for module in ALL:
        module.rule.name = module.__name__.rpartition(".")[2]
    return causes([each for rule in rules for each in rule.check(seen)], rules)


def names(seen: Any) -> list[str]:
    return [each.rule for each in found(seen)]


@pytest.mark.parametrize(
    ("sent", "again", "rules"),
    [
        ((2000, 20), 20, ["loss"]),
        ((2000, 19), 19, []),
        ((2001, 20), 20, []),
        ((20_000, 20), 20, []),  # a path that loses one in a thousand
        ((100_000, 1000), 1000, ["loss"]),
        ((39, 20), 20, []),  # half of it: nothing arrives
    ],
)
def test_loss_is_one_in_a_hundred_and_twenty(sent: tuple[int, int], again: int, rules: list[str]) -> None:
    assert names(evidence(sent=sent, retrans=((Group(), again),))) == rules


def test_of_connections_that_were_too_short_the_namespace_tells_the_share() -> None:
    counters = {"TcpOutSegs": 1000, "TcpRetransSegs": 30}
    (finding,) = found(evidence(retrans=((Group(), 25),), counters=counters))
    assert (finding.rule, finding.facts["sent"]) == ("loss", 1000)
    assert (finding.title, finding.facts["share"]) == (f"25 segments to {PEER} were lost", None)
    assert found(evidence(retrans=((Group(), 30),))) == []  # nobody knows of how many


@pytest.mark.parametrize("needless", [0, 40])
def test_losses_of_further_connections_are_the_same_finding(needless: int) -> None:
    one = (Group(lport=40_000), 40)
    given = [((one,), 1), ((one, (Group(lport=40_001), 40)), 2)]
    found_ = [found(evidence(sent=(1000, 40 * n), twice=needless * n, retrans=groups))[0] for groups, n in given]
    assert [finding.facts["count"] for finding in found_] == [1, 2]
    assert found_[0].about != found_[1].about
    assert found_[0].key == found_[1].key


@pytest.mark.parametrize(("retransmits", "number", "rules"), [(2, 10, []), (2, 6, ["loss"]), (0, 10, ["loss"])])
def test_what_waits_for_its_ack_may_not_be_lost(retransmits: int, number: int, rules: list[str]) -> None:
    """Ten connections whose ACKs are late have each sent a segment again three times."""
    late = {"retransmits": retransmits, "retrans_segs": 1, "backoff": 2}
    waiting = [track(lport=40_000 + n, **late) for n in range(number)]
    again = [(Group(lport=40_000 + n), 3) for n in range(number)] + [(Group(lport=50_000), 38 - 3 * number)]
    assert names(evidence(*waiting, sent=(1000, 33), retrans=tuple(again))) == rules


def test_what_was_sent_again_before_the_watch_hides_no_loss() -> None:
    """Nor do SYNs: they do not count as segments sent again. What waits is not in the share."""
    older = track(lport=41_000, retransmits=9, retrans_segs=1, backoff=9)
    syns = [track(lport=42_000 + n, state="SYN_SENT", retransmits=3, retrans_segs=1) for n in range(6)]
    waits = track(retransmits=9, retrans_segs=1)
    groups = ((Group(), 5), (Group(lport=40_001), 35))
    (finding,) = found(evidence(older, *syns, waits, sent=(1000, 40), retrans=groups))
    assert (finding.rule, finding.facts["needed"], finding.facts["retransmitted"]) == ("loss", 35, 40)
    assert finding.title == f"3.5% of the segments to {PEER} are lost"
    assert "5 of these wait for their ACK, and do not count" in finding.observed


def test_the_share_is_of_what_was_lost() -> None:
    (finding,) = found(evidence(sent=(1000, 40), twice=10, retrans=((Group(), 40),)))
    assert (finding.title, finding.facts["share"]) == (f"3.0% of the segments to {PEER} are lost", 0.03)
    assert finding.observed[0].endswith("were sent again (4.0%)")


@pytest.mark.parametrize(
    ("again", "needless", "rule"), [(40, 20, "spurious_retrans"), (41, 20, "loss"), (40, 19, "loss")]
)
def test_what_was_needless_for_the_most_part_is_no_loss(again: int, needless: int, rule: str) -> None:
    assert names(evidence(sent=(1000, again), twice=needless, retrans=((Group(), again),))) == [rule]
    spurious = ((Group(), again), (Group(kind="SPURIOUS"), needless))
    assert names(evidence(sent=(1000, again), retrans=spurious)) == [rule]


@pytest.mark.parametrize(
    ("kinds", "case", "severity"),
    [
        ({"FAST": 30, "RTO": 10}, "order", "info"),
        ({"LOSS_PROBE": 31, "RTO": 9}, "delay", "info"),
        ({"LOSS_PROBE": 30, "RTO": 10}, "delay", "warning"),
    ],
)
def test_needless_timeouts_are_felt(kinds: dict[str, int], case: str, severity: str) -> None:
    retrans = tuple((Group(kind=kind), segs) for kind, segs in kinds.items())
    (finding,) = found(evidence(sent=(1000, 40), twice=40, retrans=retrans))
    assert (finding.rule, finding.facts["case"], finding.severity) == ("spurious_retrans", case, severity)


def test_an_address_that_is_silent_is_one_finding() -> None:
    """Its retransmissions are no loss."""
    seen = evidence(track(**STALLED), sent=(100, 20), retrans=((Group(kind="RTO"), 20),))
    (finding,) = found(seen)
    assert (finding.rule, finding.severity, finding.facts["case"]) == ("no_ack", "critical", "gone")


def test_packets_still_come_from_an_address_that_gets_none() -> None:
    (finding,) = found(evidence(track(**STALLED | {"since_ack_us": 100_000})))
    assert finding.facts["case"] == "one_way"


@pytest.mark.parametrize(
    ("since_ack_s", "case", "remedies", "said"),
    [
        (4, "others", ["TCP_USER_TIMEOUT"], []),
        (10, "others", ["TCP_USER_TIMEOUT"], ["they were idle before that for 7.0 s"]),
        (62.9, "others", ["TCP_USER_TIMEOUT"], ["they were idle before that for 59.9 s"]),
        (63, "idle", ["SO_KEEPALIVE", "net.ipv4.tcp_keepalive_time"], ["they were idle before that for 60.0 s"]),
    ],
)
def test_others_are_answered_meanwhile(since_ack_s: float, case: str, remedies: list[str], said: list[str]) -> None:
    stalled = STALLED | {"since_ack_us": round(since_ack_s * 1e6), "pid": 0x7FFFFFFF}
    (finding,) = found(evidence(track(**stalled), track()))
    assert finding.facts["case"] == case
    assert [remedy.name for remedy in finding.remedies if remedy.name] == remedies
    assert [line for line in finding.observed if "idle" in line] == said
    assert not any("its host is alive" in remedy.what for remedy in finding.remedies)


def test_keepalive_after_half_of_the_idle_time() -> None:
    (finding,) = found(evidence(track(**STALLED | {"since_ack_us": 103_000_000}), track()))
    remedy = finding.remedies[1]
    assert (remedy.name, remedy.present, remedy.proposed) == ("net.ipv4.tcp_keepalive_time", 7200, 50)


def test_clients_that_vanish_are_told_by_port_until_three_of_one_address_do() -> None:
    client = STALLED | {"role": "PASSIVE", "lport": 443}
    (finding,) = found(evidence(track(**client), track(**client), track(**client | {"raddr": "192.0.2.9"})))
    assert (finding.severity, finding.facts["clients"], finding.facts["count"]) == ("info", 2, 3)
    (finding,) = found(evidence(*(track(**client) for _ in range(3))))
    assert finding.severity == "critical"


FULL = STALLED | {"unacked": 1448}


def test_three_connections_with_a_full_segment_while_small_ones_are_answered() -> None:
    three = [track(**FULL) for _ in range(3)]
    small = track(sent_bytes=4000, data_segs_out=40)
    assert names(evidence(*three, small)) == ["mtu_hole"]
    assert names(evidence(*three)) == []  # as a dead host, or an MTU hole
    assert names(evidence(*three, ended=True)) == ["no_ack"]
    assert names(evidence(*three[:2], small)) == ["no_ack"]
    assert names(evidence(*three[:2], track(**STALLED), small)) == ["no_ack"]
    large = track()
    large.last.sent_bytes, large.last.data_segs_out = 14_480, 10
    assert names(evidence(*three, large)) == ["no_ack"]


def test_a_small_segment_behind_a_full_one_shows_the_hole() -> None:
    (finding,) = found(evidence(*(track(**FULL | {"out_segs": 2, "sacked_segs": 1}) for _ in range(3))))
    assert (finding.rule, finding.facts["answered_behind"]) == ("mtu_hole", 3)
    assert "on 3 of them smaller segments behind it have arrived (SACK)" in finding.observed


@pytest.mark.parametrize(
    ("columns", "only_full"),
    [
        ({"rto_us": 10_700_000}, True),  # it has waited for ten seconds
        ({"rto_us": 10_600_000}, None),
        ({"unacked": 1447}, False),
        ({"sent_bytes": 6 * 1448, "data_segs_out": 6}, False),  # five have arrived
        ({"sent_bytes": 4 * 1448, "data_segs_out": 4}, None),
    ],
)
def test_a_dead_host_that_may_be_a_hole_is_told_later_and_as_one_of_both(
    columns: dict[str, int], only_full: bool | None
) -> None:
    told = found(evidence(*(track(**FULL | columns) for _ in range(3))))
    assert [(each.rule, each.facts["only_full"]) for each in told] == [("no_ack", only_full)] * (only_full is not None)
    if only_full:
        assert "MTU hole" in told[0].why
        assert "each waits for the ACK of a full segment, and nothing smaller was sent since" in told[0].observed


@pytest.mark.parametrize(
    ("srtt_us", "min_rtt_us", "number", "rules"),
    [
        (100_000, 10_000, 3, ["queue_on_path"]),
        (99_999, 10, 3, []),
        (199_999, 20_000, 3, []),  # far away, and a little slower than at best
        (100_000, 10_000, 2, []),
    ],
)
def test_three_slow_connections(srtt_us: int, min_rtt_us: int, number: int, rules: list[str]) -> None:
    slow = [track(srtt_us=srtt_us, min_rtt_us=min_rtt_us, unacked=2 * 1448) for _ in range(number)]
    assert names(evidence(*slow)) == rules


def test_who_fills_the_queue_can_act() -> None:
    slow = {"srtt_us": 150_000, "min_rtt_us": 200}
    waiting = [track(**slow, unacked=100, pid=0x7FFFFFFE, comm="shell") for _ in range(3)]
    filling = track(**slow, unacked=100_000, pid=0x7FFFFFFF, comm="backup")
    marks = {name: mark for module in ALL for name, mark in module.rule.marks.items()}
    filling._look(SimpleNamespace(**vars(filling.last) | {"sent_bytes": 10**6}), 4.0, marks)
    (finding,) = found(evidence(*waiting, filling))
    assert (finding.who or "").startswith("backup (PID 2147483647")
    assert (finding.facts["bulk_comm"], finding.facts["comm"]) == ("backup", "shell")
    assert "backup" in finding.remedies[0].what


@pytest.mark.parametrize(
    ("columns", "moved", "rules"),
    [
        ({}, {}, []),
        ({"unacked": 100}, {"sent_bytes": 300}, []),  # ACKs of small segments may come late
        ({"unacked": 2 * 1448}, {}, ["queue_on_path"]),
        ({}, {"sent_bytes": 10 * 1448}, ["queue_on_path"]),
        ({}, {"received_bytes": 10 * 1448}, ["queue_on_path"]),
        ({"srtt_us": 1000, "unacked": 100_000}, {"sent_bytes": 10**7}, []),  # no queue stands in its way
        ({"srtt_us": 1000}, {"received_bytes": 10**7}, ["queue_on_path"]),  # its last round trip may be old
    ],
)
def test_slow_round_trips_are_a_queue_beside_somebody_who_fills_it(
    columns: dict[str, int], moved: dict[str, int], rules: list[str]
) -> None:
    """Three connections with small pushes, to a stack that delays its ACKs, and another one."""
    late = {"srtt_us": 150_000, "min_rtt_us": 200}
    other = track(**late | columns)
    marks = {name: mark for module in ALL for name, mark in module.rule.marks.items()}
    other._look(SimpleNamespace(**vars(other.last) | moved), 4.0, marks)
    assert names(evidence(*(track(**late, unacked=100) for _ in range(3)), other)) == rules


QDISC = Group(reason="QDISC_DROP", errno="none", kind="LOST")


@pytest.mark.parametrize(("drops", "sent", "rules"), [(20, 2000, ["host_queue_full"]), (19, 100, []), (20, 2001, [])])
def test_a_queue_that_discards_one_in_a_hundred(drops: int, sent: int, rules: list[str]) -> None:
    assert names(evidence(drops=((QDISC, drops),), counters={"TcpOutSegs": sent})) == rules
    received = QDISC._replace(direction="RECEIVED")
    assert names(evidence(drops=((received, drops),), counters={"TcpOutSegs": sent})) == []


def test_a_part_is_never_more_than_its_whole() -> None:
    counters = {"TcpOutSegs": 10, "TcpRetransSegs": 4, "TcpExtTCPRetransFail": 6}  # OutSegs has only what is new
    (finding,) = found(evidence(drops=((QDISC, 20),), counters=counters))
    assert finding.facts["sent"] == 20
    waits = ((Group(kind="RTO", errno="EBUSY"), 20),)
    (finding,) = found(evidence(track(**STALLED), retrans=waits, counters=counters | {"TcpRetransSegs": 3}))
    assert finding.facts["sent"] is None
    assert "segments were sent" not in "".join(finding.observed)


def test_without_reasons_the_function_tells() -> None:
    freed = QDISC._replace(reason=None, location="kfree_skb_list+0x1b")
    counters = {"TcpOutSegs": 2000}
    assert names(evidence(drops=((freed, 20),), counters=counters)) == ["host_queue_full"]
    assert names(evidence(drops=((freed._replace(location="tcp_v4_rcv+0x1"), 20),), counters=counters)) == []


def test_a_share_of_an_unknown_number_is_not_known() -> None:
    assert names(evidence(drops=((QDISC, 20),))) == []
    waits = ((Group(kind="RTO", errno="EBUSY"), 20),)
    (finding,) = found(evidence(track(**STALLED), retrans=waits))
    assert (finding.rule, finding.facts["sent"]) == ("host_queue_full", None)


def test_a_connection_that_cannot_send_at_all_is_held_up_here() -> None:
    waits = ((Group(kind="RTO", errno="EBUSY"), 3),)
    (finding,) = found(evidence(track(**STALLED), retrans=waits))
    assert (finding.rule, finding.severity, finding.facts["waited"]) == ("host_queue_full", "critical", 3)
