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
    assert (finding.facts["buffer"], finding.facts["rate_bytes_per_s"]) == ("SO_SNDBUF", 1_270_290)
