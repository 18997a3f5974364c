"""What the looks tell of clients that are answered, and whether so many are silent that it is one fault."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import answers
from tcpscope.diagnose.answers import Answers, answered_s, silence, took_full
from tests.diagnose.rules.connections import connection, track

MANY = answers.MANY
NOW_S = 100.0


class NoMarks:
    marks: dict[str, Any] = {}


def looks(*rows: dict[str, Any]) -> Any:
    """The connection of a client, as it was in looks at 100 s, 101 s, ..."""
    return track(NoMarks(), [connection(role="PASSIVE", **row) for row in rows])  # type: ignore[arg-type]


def addresses(*at_s: float, first: int = 0) -> dict[str, float]:
    return {f"198.51.100.{first + n}": each for n, each in enumerate(at_s)}


@pytest.mark.parametrize(
    ("rows", "at_s"),
    [
        ([{"acked_seq": 1}, {"acked_seq": 2, "out_segs": 1, "since_ack_us": 250_000}], 100.75),
        ([{"acked_seq": 1}, {"acked_seq": 1, "out_segs": 1, "since_ack_us": 0}], None),
        ([{"data_segs_out": 1, "since_sent_us": 500_000}], 99.5),  # all that was sent has arrived
        ([{"data_segs_out": 1, "since_sent_us": 500_000, "unsent": 1}], None),  # it could not be sent
        ([{"data_segs_out": 1, "since_sent_us": 500_000, "out_segs": 1}], None),
        ([{"since_received_us": 0}], None),  # a request has come: that tells nothing of the way back
        ([{"out_segs": 1, "opened_ns": 99_000_000_000}], 99.0),  # its handshake
    ],
)
def test_an_answer_is_an_ack_of_something(rows: list[dict[str, Any]], at_s: float | None) -> None:
    assert answered_s(looks(*rows)) == at_s


@pytest.mark.parametrize(
    ("row", "before", "taken"),
    [
        ({"sent_bytes": 2000, "data_segs_out": 2}, None, True),
        ({"sent_bytes": 1447, "data_segs_out": 1}, None, False),
        ({"sent_bytes": 2000, "data_segs_out": 3}, None, False),
        ({"sent_bytes": 2000, "data_segs_out": 2, "unacked": 1448, "out_segs": 1}, None, False),
        ({"sent_bytes": 2000, "data_segs_out": 2, "opened_ns": 1}, None, False),  # it may have arrived before the fault
        ({"sent_bytes": 4000, "data_segs_out": 4}, {"sent_bytes": 2000, "data_segs_out": 2}, True),
        ({"sent_bytes": 4000, "data_segs_out": 4}, {"sent_bytes": 3900, "data_segs_out": 3}, False),
        ({"sent_bytes": 4000, "data_segs_out": 4, "opened_ns": 1}, {"sent_bytes": 2000, "data_segs_out": 2}, True),
    ],
)
def test_full_segments_that_have_arrived(row: dict[str, int], before: dict[str, int] | None, taken: bool) -> None:
    opened = {"opened_ns": 60_000_000_000}
    rows = [opened | before] * 2 if before is not None else []
    assert took_full(looks(*rows, opened | row), began_s=50.0) == taken


@pytest.mark.parametrize(
    ("stalled", "answered", "began_s", "since_s"),
    [
        ([80.0] * MANY, [], 0.0, 80.0),
        ([80.0] * (MANY - 1), [], 0.0, None),
        ([91.0] * MANY, [], 0.0, None),  # somebody may still answer
        ([80.0] * MANY, [], 91.0, None),
        ([80.0] * MANY, [79.0] * 10 * MANY, 0.0, 80.0),  # all that was in flight when the uplink died
        ([80.0] * MANY, [80.5] * (10 * MANY + 1), 0.0, None),  # sent to all at once: nearly all have answered
        ([80.0] * MANY, [95.0] * (MANY // 10), 0.0, 80.0),  # who checks the health of this host from nearby
        ([80.0] * MANY, [95.0] * (MANY // 10 + 1), 0.0, None),
        ([10.0, 20.0, 30.0] + [80.0] * MANY, [40.0] * 50, 0.0, 80.0),  # three had vanished before
    ],
)
def test_many_are_silent_and_nearly_nobody_answers(
    stalled: list[float], answered: list[float], began_s: float, since_s: float | None
) -> None:
    found = silence(addresses(*stalled), addresses(*answered, first=1000), NOW_S, began_s)
    assert (found.since_s if found else None) == since_s


def test_hosts_that_vanish_one_by_one_show_that_others_lived() -> None:
    """Nobody else is in a look: the others are idle. Each had answered five seconds before it stalled."""
    vanished = addresses(*(20.0 + 3 * n for n in range(25)))
    assert silence(vanished, {raddr: at_s - 5 for raddr, at_s in vanished.items()}, NOW_S, 0.0) is None
    assert silence(vanished, {}, NOW_S, 0.0) is not None


def test_each_look_is_kept_and_the_oldest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "_CONNECTIONS_AT_MOST", 3)
    known = Answers()
    for rport in (1, 2, 1, 3, 4):
        known.take([looks({"rport": rport, "lport": 443, "data_segs_out": 1})], 0.0)
    assert [rport for _, rport in known.ports[1, 443]] == [1, 3, 4]
    assert known.connections(1, "192.0.2.2", 99.0, {443}) == 3
    assert known.connections(1, "192.0.2.2", 100.0, {443}) == 0
    known.take([looks({"rport": 9, "lport": 443, "data_segs_out": 1, "raddr": "127.0.0.1"})], 0.0)
    assert known.clients((1, 443)) == {"192.0.2.2": 100.0}  # a client on this host tells nothing of the way
    known.forget(100.1)
    assert (known.ports, known._number) == ({}, 0)


def test_a_look_is_taken_once() -> None:
    sockets = SimpleNamespace(now=[looks({"lport": 443, "data_segs_out": 1})])
    seen: Any = SimpleNamespace(now_s=100.0, began_s=0.0, sockets=sockets)
    assert answers.answers(seen).clients((1, 443))
    sockets.now = []
    seen.now_s = 101.0
    assert answers.answers(seen).clients((1, 443))  # it is in no look any more
    seen.sockets = SimpleNamespace(now=[])
    assert not answers.answers(seen).clients((1, 443))  # another watch
