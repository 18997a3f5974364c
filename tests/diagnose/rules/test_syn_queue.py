"""The rule about SYN queues, on real floods, with cookies off, on demand, and always."""

from __future__ import annotations

from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE, Run, findings

SYNS = 64


def flooded(script: Script, syncookies: int) -> Run:
    with script.older():
        script.server.sysctl("tcp_syncookies", syncookies)
        script.server.sysctl("tcp_synack_retries", 0)  # no SYN-ACK is sent again: it cannot be known that none answers
        script.server.sysctl("tcp_max_syn_backlog", 256)
        run = Run(script)
    run.flood(SYNS)
    run.end()
    script.stay()
    return run


@recorded(DIAGNOSE)
def test_without_cookies_syns_are_dropped(script: Script) -> Test:
    run = flooded(script, syncookies=0)
    seen = yield
    (finding,) = findings(seen, run)
    assert run.change("TCPReqQFullDrop") > 0
    assert (finding["rule"], finding["severity"]) == ("syn_queue", "critical")
    facts = finding["facts"]
    assert facts["dropped"] == run.change("TCPReqQFullDrop")
    assert facts["dropped"] + facts["reserved"] == run.change("ListenDrops")
    cookies = finding["remedies"][0]
    assert (cookies["name"], cookies["present"], cookies["proposed"]) == ("net.ipv4.tcp_syncookies", 0, 1)


@recorded(DIAGNOSE)
def test_with_cookies_on_demand_it_is_a_warning(script: Script) -> Test:
    run = flooded(script, syncookies=1)
    seen = yield
    assert run.change("TCPReqQFullDoCookies") > 0
    (finding,) = findings(seen, run)
    assert (finding["rule"], finding["severity"]) == ("syn_queue", "warning")
    assert finding["facts"]["cookies"] == run.change("TCPReqQFullDoCookies")
    assert all(remedy["name"] != "net.ipv4.tcp_syncookies" for remedy in finding["remedies"])


@recorded(DIAGNOSE)
def test_cookies_always_are_no_finding(script: Script) -> Test:
    run = flooded(script, syncookies=2)
    seen = yield
    assert run.change("TCPReqQFullDoCookies") == SYNS
    assert findings(seen, run) == []
