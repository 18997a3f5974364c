"""Buffers of fixed size over a long path: netem's, where the kernel has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding
from tcpscope.diagnose.rules.window_limited import rule
from tests.diagnose.rules.connections import connection, faults, track
from tests.record import Call, Script, Seen, Socket, Test, recorded
from tests.record.script import SOL_SOCKET
from tests.tools.queue.refusals import DIAGNOSE
from tests.tools.rtt.site import skip_without_netem

PORT = 8330
RTT_MS = 50
SIZE = 16_384
SO_RCVBUF = 8
BYTES = 6_000_000  # in 15 s: a busy machine looks every two or three


def transfer(script: Script, *, rcvbuf: int = 0, number: int = BYTES) -> tuple[Socket, Socket, list[Call]]:
    """One over such a path: the client's socket, the server's, and the calls of netem."""
    delays = [host.netem(RTT_MS / 2) for host in script.hosts]
    owner = script.server.process("archive")
    listener = owner.socket()
    if rcvbuf:
        listener.option(SOL_SOCKET, SO_RCVBUF, rcvbuf)
    listener.bind(script.server.ipv4, PORT)
    listener.listen()
    client = script.client.process("backup").socket()
    client.connect(script.server.ipv4, PORT)
    served = listener.accept()
    if rcvbuf:
        script.rest()  # a busy machine looks too seldom, and its round trips take longer
    reading = served("read", number, wait=False)
    client.send_all(number)
    reading.join()
    script.stay()
    return client, served, delays


def only(seen: Seen, script: Script, delays: list[Call]) -> dict[str, Any]:
    if any(call.ret for call in delays):
        assert faults(seen, script) == []  # the path is short
    skip_without_netem(seen, delays)
    (finding,) = faults(seen, script)
    assert (finding["rule"], finding["severity"]) == ("window_limited", "warning")
    facts = finding["facts"]
    assert (facts["netns"], facts["count"]) == (script.client.inode, 1)
    assert facts["rate_bytes_per_s"] == pytest.approx(facts["window_bytes"] / (RTT_MS / 1000), rel=0.4)
    assert finding["remedies"][0]["present"] == SIZE
    return finding


@recorded(DIAGNOSE)
def test_a_receive_buffer_that_was_set(script: Script) -> Test:
    _, served, delays = transfer(script, rcvbuf=SIZE)
    seen = yield
    facts = only(seen, script, delays)["facts"]
    assert (facts["buffer"], facts["pid"], facts["buffer_bytes"]) == ("SO_RCVBUF", served.process.pid, 2 * SIZE)


@recorded(DIAGNOSE)
def test_buffers_that_the_kernel_sizes_are_no_fault(script: Script) -> Test:
    _, _, delays = transfer(script, number=60_000_000)
    seen = yield
    assert faults(seen, script) == []
    skip_without_netem(seen, delays)


LIMITED = {"rwnd_us": 450_000, "busy_us": 1_000_000, "sent_bytes": 400_000, "peer_window": 20_000}


def rows(looks: int, **more: Any) -> list[Any]:
    """Each second 400 KB, of a window of 20 KB in 50 ms; limited in 45 % of the time."""
    values = LIMITED | {name: value for name, value in more.items() if name in LIMITED}
    other = {"srtt_us": 50_000, "min_rtt_us": 48_000} | {n: v for n, v in more.items() if n not in LIMITED}
    return [
        connection(**{name: value * (1 if name == "peer_window" else look) for name, value in values.items()} | other)
        for look in range(looks)
    ]


def check(*tracks: Any) -> list[Finding]:
    evidence: Any = SimpleNamespace(sockets=SimpleNamespace(now=list(tracks)))
    return list(rule.check(evidence))


def test_three_looks_that_found_it_limited() -> None:
    assert check(track(rule, rows(3))) == []
    (finding,) = check(track(rule, rows(4)))
    assert (finding.facts["rate_bytes_per_s"], finding.facts["whose"]) == (400_000, "remote")


@pytest.mark.parametrize(
    "other",
    [
        {"rwnd_us": 299_000},  # below the share
        {"busy_us": 490_000, "rwnd_us": 300_000},  # idle for more than half
        {"sent_bytes": 270_000},  # something else limits it
        {"srtt_us": 110_000, "sent_bytes": 181_818},  # packets wait in a queue: a larger window would make that longer
        {"min_rtt_us": 900, "srtt_us": 1_000, "sent_bytes": 20_000_000},  # the path is short
    ],
)
def test_what_is_no_small_buffer(other: dict[str, Any]) -> None:
    assert check(track(rule, rows(9, **other))) == []


def test_before_the_first_round_trip_nothing_is_known() -> None:
    """As of a connection whose SYN, or SYN-ACK, was sent again."""
    first, *rest = rows(4)
    first.srtt_us = first.min_rtt_us = None
    assert check(track(rule, [first, *rest])) == []
    assert check(track(rule, [first, *rest, rows(5)[4]]))


@pytest.mark.parametrize(("set_", "number"), [(False, 0), (True, 1)])
def test_a_receiver_on_this_host_whose_buffer_the_kernel_sizes(set_: bool, number: int) -> None:
    ends = {"laddr": "192.0.2.2", "lport": 80, "raddr": "192.0.2.1", "rport": 40000, "netns": 2, "pid": 22}
    receiver = track(rule, [connection(rcvbuf_set=set_, rcvbuf=40_000, **ends)] * 4)
    found = check(track(rule, rows(4)), receiver)
    assert [finding.facts["pid"] for finding in found] == [22] * number
    assert all("or twice net.core.rmem_max if that is less" in finding.observed[2] for finding in found)


def test_a_send_buffer_counts_only_if_it_was_set() -> None:
    limited = {"sndbuf_us": 450_000, "unacked": 15_000, "unsent": 5_000}

    def made(set_: bool) -> Any:
        seconds = rows(4, rwnd_us=0)
        for look, row in enumerate(seconds):
            vars(row).update(limited | {"sndbuf_us": look * 450_000, "sndbuf_set": set_, "sndbuf": 40_000})
        return track(rule, seconds)

    assert check(made(False)) == []
    full = {"unacked": 20_000, "memory": 30_000, "sndbuf": 40_000, "sndbuf_set": True, "peer_window": 60_000}
    assert len(check(track(rule, rows(5, rwnd_us=0, **full)))) == 1
    for other in ({"peer_window": 30_000}, {"cwnd_limited": True}, {"unsent": 1}, {"memory": 20_000}):
        assert check(track(rule, rows(5, rwnd_us=0, **full | other))) == []
    (finding,) = check(made(True))
    assert (finding.facts["buffer"], finding.remedies[0].present) == ("SO_SNDBUF", 20_000)
    assert "or twice net.core.wmem_max if that is less" in finding.observed[2]


def test_a_sender_whose_clock_did_not_run() -> None:
    """What a look showed of SO_SNDBUF 16384 over 50 ms on 6.12, where the application wrote 64 KB at a time."""
    seen = {"unacked": 65536, "peer_window": 1_091_328, "srtt_us": 50_572, "min_rtt_us": 50_124, "memory": 70_336}
    (finding,) = check(
        track(
            rule,
            [
                connection(**seen, sndbuf=32_768, sndbuf_set=True, busy_us=n * 1_004_000, sent_bytes=n * 1_270_290)
                for n in range(5)
            ],
        )
    )
    assert (finding.facts["buffer"], finding.facts["rate_bytes_per_s"]) == ("SO_SNDBUF", 1_265_229)


def looks(seen: list[tuple[int, ...]], names: tuple[str, ...], **always: Any) -> list[Any]:
    """A look each second. What `seen` says of `busy_us`, the sent bytes and the clocks is that second's."""
    made, sums = [], dict.fromkeys(("busy_us", "sent_bytes", "sndbuf_us", "rwnd_us"), 0)
    for number, values in enumerate(seen):
        row = {"busy_us": 1_000_000} | dict(zip(names, values, strict=True))
        for name in sums if number else ():
            sums[name] += row.get(name, 0)
        made.append(connection(**row | sums | always))
    return made


SENDER = ("sent_bytes", "sndbuf_us", "unacked", "unsent", "srtt_us", "memory")
SENDER_OF_32K = {"sndbuf": 65_536, "sndbuf_set": True, "min_rtt_us": 40_072, "peer_window": 287_744}
PACED = [  # bbr over 40 ms with SO_SNDBUF 32768, as looks of 6.18 showed it
    (1_025_000, 280_000, 36_576, 36_200, 41_152, 85_256),
    (1_081_000, 310_000, 50_680, 0, 41_590, 65_656),
    (1_044_000, 310_000, 65_536, 0, 41_242, 85_504),
    (1_082_000, 330_000, 40_920, 24_616, 40_981, 78_848),
    (1_063_000, 340_000, 41_992, 0, 41_969, 54_472),
    (1_071_000, 300_000, 42_368, 33_304, 41_211, 89_816),
    (1_146_000, 370_000, 52_504, 13_032, 41_382, 82_176),
]


@pytest.mark.parametrize("late_us", [41_242, 95_000])
def test_a_send_buffer_where_the_sender_paces(late_us: int) -> None:
    """A part of the buffer waits for its turn, so the rate is far below buffer / RTT. A late look is no matter."""
    seen = [values if n != 2 else (*values[:4], late_us, values[5]) for n, values in enumerate(PACED)]
    (finding,) = check(track(rule, looks(seen, SENDER, **SENDER_OF_32K)))
    assert (finding.facts["buffer"], finding.remedies[0].present) == ("SO_SNDBUF", 32_768)
    assert finding.facts["rate_bytes_per_s"] * 1.3 < finding.facts["window_bytes"] / (finding.facts["srtt_us"] / 1e6)
    assert "are at most" in finding.observed[0]
    assert finding.observed[3].startswith("by the kernel's clock, nothing was left to send for 33% of the busy time")


@pytest.mark.parametrize(
    "other",
    [
        {"sndbuf_set": False},  # the kernel sizes it
        {"min_rtt_us": 900},  # the path is short
        {"min_rtt_us": 19_000},  # packets wait in a queue
    ],
)
def test_what_is_no_small_send_buffer(other: dict[str, Any]) -> None:
    assert check(track(rule, looks(PACED, SENDER, **SENDER_OF_32K | other))) == []
    slower = [(values[0], 290_000, *values[2:]) for values in PACED]
    assert check(track(rule, looks(slower, SENDER, **SENDER_OF_32K))) == []


def test_a_sender_that_the_buffer_does_not_hold_up() -> None:
    """The kernel asks for room for a new packet, not for what it adds to one of which a part was sent. With Nagle's
    algorithm a write leaves such a part. What looks showed of cubic over 40 ms, with SO_SNDBUF 32768.
    """
    seen = [
        (2_728_000, 0, 65_160, 0, 41_561, 77_640),
        (9_607_000, 0, 65_160, 0, 42_086, 68_488),
        (9_990_000, 0, 65_160, 0, 41_762, 67_656),
        (5_894_000, 0, 65_536, 0, 41_297, 69_696),
        (4_735_000, 50_000, 585_856, 65_160, 43_938, 689_288),
        (5_775_000, 0, 65_536, 0, 41_380, 69_696),
        (5_837_000, 0, 625_328, 65_160, 41_737, 723_768),
        (7_757_000, 0, 262_144, 0, 43_533, 279_616),
    ]
    assert check(track(rule, looks(seen, SENDER, **SENDER_OF_32K | {"peer_window": 4_450_304}))) == []


@pytest.mark.parametrize(("last_us", "number"), [(41_200, 1), (150_000, 0)])
def test_a_receive_buffer_on_a_busy_machine(last_us: int, number: int) -> None:
    """bbr, with SO_RCVBUF 32768 over 40 ms. In three of ten seconds the machine had no time for the packets. What the
    last look shows is said of now.
    """
    names = ("sent_bytes", "rwnd_us", "srtt_us")
    seen = [
        (890_000, 420_000, 41_455),
        (861_000, 430_000, 41_686),
        (880_000, 420_000, 41_513),
        (934_000, 380_000, 41_675),
        (100_000, 280_000, 95_000),
        (100_000, 400_000, 120_000),
        (100_000, 400_000, 130_000),
        (880_000, 440_000, 41_513),
        (934_000, 420_000, 41_413),
        (886_000, 400_000, 41_512),
        (849_000, 430_000, last_us),
    ]
    found = check(track(rule, looks(seen, names, min_rtt_us=40_111, peer_window=39_096)))
    told = [(each.facts["buffer"], each.facts["rate_bytes_per_s"], each.facts["window_bytes"]) for each in found]
    assert told == [("SO_RCVBUF", 849_000, 39_096)] * number
