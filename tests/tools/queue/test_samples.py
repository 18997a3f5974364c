"""`queue --events` where neither functions nor tracepoints show refusals: samples, against the kernel's counters.

A listener's last moment is in no sample. So listeners stay until the tool has looked for the last time, or close when
their row is there. They are older than the tool, so that no refusal races with the first look at their host.
"""

from __future__ import annotations

from typing import Any

import pytest

import tcpscope
from tcpscope.errors import UnsupportedError
from tcpscope.kernel.features import Kernel
from tests.lacks import FUNCTIONS, pretend
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import (
    BACKLOG,
    FAMILIES,
    PORT,
    SAMPLED,
    SMALL_BACKLOG,
    TABLE,
    Run,
    all_samples,
    values,
)


class Beat:
    """Another listener of the server refuses a client of its own once. Its row tells that the tool has just looked.

    What follows is over before it looks again: of what is refused during a look the step is not certain.
    """

    def __init__(self, script: Script) -> None:
        self._host, self._process = script.server, script.server.process("beat")
        self.port = PORT + 9
        self._process.listener(self.port, backlog=0)
        self._process.socket().connect(self._host.ipv4, self.port)
        self._host.until_sockets(1, "==", "recv_q", state="LISTEN", lport=self.port)

    def wait(self) -> None:
        """Until the tool has looked. At most once in a scenario."""
        made = self._process.socket()
        made.start(self._host.ipv4, self.port)
        self._host.flush()
        made.close()
        self._host.until_rows(SAMPLED, 1, since=0, lport=self.port)


@pytest.mark.parametrize("family", FAMILIES)
@recorded(SAMPLED)
def test_refusals_are_sampled(script: Script, family: str) -> Test:
    with script.older():
        beat, run, _ = Beat(script), Run(script, family), Run(script, port=PORT + 1)
    run.fill()
    before = run.overflows()
    with script.client.held():
        run.start(2)
        beat.wait()
    run.until_overflows(before, 3)
    run.end()
    script.stay()
    seen = yield
    found = all_samples(seen, run)
    rows = [row for row in found if row["lport"] != beat.port]
    assert sum(row["count"] for row in found) == run.change("ListenOverflows")
    assert sum(row["count"] for row in rows) == run.change("ListenOverflows") - 1 >= 2
    assert values(rows, "laddr", "lport", "netns", "pid") == {(run.laddr, run.port, run.host.inode, run.owner.pid)}
    assert values(rows, "accept_queue", "accept_limit") == {(BACKLOG + 1, BACKLOG)}
    assert values(rows, "cause", "step") == {("ACCEPT_QUEUE_FULL", "SYN")}
    assert values(rows, "answer", "raddr", "rport") == {(None, None, None)}
    assert "sampled" in seen.run(SAMPLED).stderr


@recorded(SAMPLED, TABLE)
def test_a_packet_that_is_thrown_away_is_no_refusal(script: Script) -> Test:
    """A refused ACK counts twice in sk_drops, and the RST that ends its request once more."""
    with script.older():
        beat, run = Beat(script), Run(script)
    run.overflow_at_ack(4, first=beat.wait)
    run.end()
    script.server.until_rows(TABLE, lport=run.port)
    script.stay()
    seen = yield
    rows = [row for row in all_samples(seen, run) if row["lport"] != beat.port]
    counted = sum(row["count"] for row in rows)
    assert counted == run.change("ListenOverflows") - 1 >= 4
    assert values(rows, "cause") == {"ACCEPT_QUEUE_FULL"}
    assert seen.rows(TABLE, run.host, lport=run.port)[-1]["drops"] >= 2 * counted + 4


@recorded(SAMPLED)
def test_a_full_syn_queue_is_sampled(script: Script) -> Test:
    with script.older():
        script.server.sysctl("tcp_syncookies", 0)
        beat = Beat(script)
        runs = [Run(script, backlog=SMALL_BACKLOG, port=port) for port in (PORT, PORT + 1)]
    sent = (20, 30)
    with script.client.held():
        for run, number in zip(runs, sent, strict=True):
            run.flood(number)
        beat.wait()
    script.server.flush()
    requests = [run.requests() for run in runs]
    for run in runs:
        run.end()
    script.stay()
    seen = yield
    rows = [row for row in all_samples(seen, *runs) if row["lport"] != beat.port]
    assert sum(row["count"] for row in rows) == runs[-1].change("TCPReqQFullDrop")
    assert values(rows, "cause", "step") == {("SYN_QUEUE_FULL", "SYN")}
    for run, number, kept in zip(runs, sent, requests, strict=True):
        assert sum(row["count"] for row in rows if row["lport"] == run.port) == number - kept.ret > 0


@recorded(SAMPLED)
def test_the_next_socket_at_an_address_begins_anew(script: Script) -> Test:
    """The count of drops goes back to zero with each new listener, and the kernel reuses its memory."""
    server, client = script.server.process("server"), script.client.process("client")
    with script.older():
        Run(script, port=PORT + 1, owner=server, client=client)
    runs, rows_so_far = [], 0
    for number in (3, 1, 2):
        run = Run(script, owner=server, client=client)
        run.fill()
        for _ in range(number):
            before = run.overflows()
            (made,) = run.start()
            run.until_overflows(before, 1)
            run.give_up(made)
            rows_so_far += 1
            script.server.until_rows(SAMPLED, rows_so_far, since=0, lport=run.port)
        run.end()
        run.listener.close()
        runs.append(run)
    seen = yield
    rows = all_samples(seen, runs[0], runs[-1])
    assert values(rows, "lport") == {PORT}
    assert [row["count"] for row in rows] == [1] * 6


@pytest.mark.root
@pytest.mark.parametrize("given", [{"rport": [1]}, {"stack": True}])
def test_what_samples_do_not_know_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    monkeypatch.setattr(Kernel, "can", Kernel.can)  # as it was, afterwards
    pretend((*FUNCTIONS, "consume_skb"))
    with pytest.raises(UnsupportedError, match=f"--{next(iter(given))}"):
        tcpscope.open("queue", events=True, **given)
