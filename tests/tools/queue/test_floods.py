"""`queue --events` of a full SYN queue and of SYN cookies."""

from __future__ import annotations

import pytest

from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import (
    BACKLOG,
    EVENTS,
    FAMILIES,
    SMALL_BACKLOG,
    TRACED,
    Run,
    all_events,
    needs_exact,
    values,
)


@pytest.mark.parametrize("family", FAMILIES)
@recorded(EVENTS, TRACED)
def test_without_cookies_syns_are_dropped(script: Script, family: str) -> Test:
    script.server.sysctl("tcp_syncookies", 0)
    script.server.sysctl("tcp_max_syn_backlog", 256)
    run = Run(script, family, SMALL_BACKLOG)
    run.flood(40)
    requests = run.requests()
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert len(rows) == 40 - requests.ret == run.change("TCPReqQFullDrop") == run.change("ListenDrops")
    assert values(rows, "cause", "step", "answer") == {("SYN_QUEUE_FULL", "SYN", "NONE")}
    assert values(rows, "syn_queue", "accept_queue") == {(requests.ret, 0)}
    assert values(rows, "syncookies") == {0}
    assert len(values(rows, "raddr")) == len(rows)


@pytest.mark.parametrize("family", FAMILIES)
@recorded(EVENTS, TRACED)
def test_cookies_when_the_queue_is_full(script: Script, family: str) -> Test:
    script.server.sysctl("tcp_syncookies", 1)
    run = Run(script, family, SMALL_BACKLOG)
    run.flood(40)
    requests = run.requests()
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert len(rows) == 40 - requests.ret == run.change("TCPReqQFullDoCookies") == run.change("SyncookiesSent")
    assert values(rows, "cause", "step", "answer") == {("COOKIE_SENT", "SYN", "SYN_COOKIE")}
    assert run.change("ListenDrops") == 0


@pytest.mark.parametrize("family", FAMILIES)
@recorded(EVENTS, TRACED)
def test_cookies_always(script: Script, family: str) -> Test:
    script.server.sysctl("tcp_syncookies", 2)
    run = Run(script, family)
    run.flood(20)
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert len(rows) == 20 == run.change("TCPReqQFullDoCookies") == run.change("SyncookiesSent")
    assert values(rows, "cause", "answer", "syn_queue") == {("COOKIE_SENT", "SYN_COOKIE", 0)}


@recorded(EVENTS, TRACED)
def test_the_last_quarter_is_reserved(script: Script) -> Test:
    script.server.sysctl("tcp_syncookies", 0)
    script.server.sysctl("tcp_max_syn_backlog", 16)
    run = Run(script, backlog=64)
    run.flood(40)
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert run.change("TCPReqQFullDrop") == run.change("ListenOverflows") == 0
    assert values(rows, "cause", "step", "answer") == {("SYN_QUEUE_RESERVED", "SYN", "NONE")}
    assert values(rows, "syn_queue") == {13}  # 16 - 13 is less than a quarter of 16
    assert len(rows) == 40 - 13 == run.change("ListenDrops")


@recorded(EVENTS, TRACED)
def test_the_final_ack_of_a_cookie(script: Script) -> Test:
    """It finds the queue full like any other, but tcp_abort_on_overflow does not reach it."""
    script.server.sysctl("tcp_abort_on_overflow", 1)
    script.server.sysctl("tcp_syncookies", 2)
    run = Run(script)
    run.fill(BACKLOG)
    sent, before = script.server.counter("TcpExtSyncookiesSent"), run.overflows()
    resets = script.server.counter("TcpOutRsts")
    with script.server.held():
        late = run.start(4)
        script.server.until_counter("TcpExtSyncookiesSent", sent + 4)
    outcomes = [made.outcome() for made in late]
    run.until_overflows(before, 3)
    script.server.flush()
    silent = script.server.counter("TcpOutRsts")
    run.end()
    seen = yield
    needs_exact(seen)
    assert [call.ret for call in outcomes] == [0] * 4
    rows = all_events(seen, run)
    refused = [row for row in rows if row["cause"] != "COOKIE_SENT"]
    assert values(refused, "cause", "step", "answer", "syn_queue") == {("ACCEPT_QUEUE_FULL", "ACK", "NONE", 0)}
    assert len(values(refused, "rport")) == 3
    assert silent.ret == resets.ret
    assert len(rows) - len(refused) == run.change("SyncookiesSent") == run.change("TCPReqQFullDoCookies")


@recorded(EVENTS, TRACED)
def test_no_cookie_is_sent_when_both_queues_are_full(script: Script) -> Test:
    """The kernel counts a cookie (TCPReqQFullDoCookies) before it looks at the accept queue and drops the SYN."""
    script.server.sysctl("tcp_syncookies", 2)
    run = Run(script)
    late = run.overflow_at_syn(2)
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    refused = [row for row in rows if row["cause"] != "COOKIE_SENT"]
    assert values(refused, "cause", "step", "answer") == {("ACCEPT_QUEUE_FULL", "SYN", "NONE")}
    assert values(refused, "rport") == run.ports(*late)
    cookies = len(rows) - len(refused)
    assert cookies >= BACKLOG + 1  # more where a SYN came twice
    assert run.change("TCPReqQFullDoCookies") == cookies + run.change("ListenOverflows")
