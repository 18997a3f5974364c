"""The rule about SYN queues, on real floods, with cookies off, on demand, and always."""

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.scenarios.syn_flood import SynFlood

pytestmark = pytest.mark.kernel


def flood(lab, run_tool, **parameters):
    scenario = SynFlood(**parameters)
    scenario.setup(lab)
    with run_tool("diagnose", "--netns", str(lab.server.inode), "-d", "300") as tool:
        scenario.fault(lab)
        outcome = scenario.settle(lab)
    return [row for row in tool.done.rows if row.get("rule") == "syn_queue"], outcome.counters


def exact() -> bool:
    return bool(Kernel().fentry or Kernel().kprobe)


def test_without_cookies_syns_are_dropped(lab, run_tool):
    (finding,), counters = flood(lab, run_tool, syncookies=0)
    assert counters["TcpExtTCPReqQFullDrop"] > 0
    assert finding["severity"] == "critical"
    facts = finding["facts"]
    assert facts["dropped"] == counters["TcpExtTCPReqQFullDrop"]
    assert facts["dropped"] + facts["reserved"] == counters["TcpExtListenDrops"]
    cookies = finding["remedies"][0]
    assert (cookies["name"], cookies["present"], cookies["proposed"]) == ("net.ipv4.tcp_syncookies", 0, 1)


def test_with_cookies_on_demand_it_is_a_warning(lab, run_tool):
    found, counters = flood(lab, run_tool, syncookies=1)
    assert counters["TcpExtTCPReqQFullDoCookies"] > 0
    if not exact():  # a cookie is no drop: nothing that a listener counts shows it
        return
    (finding,) = found
    assert (finding["severity"], finding["facts"]["cookies"]) == ("warning", counters["TcpExtTCPReqQFullDoCookies"])
    assert all(remedy["name"] != "net.ipv4.tcp_syncookies" for remedy in finding["remedies"])


def test_cookies_always_are_no_finding(lab, run_tool):
    found, counters = flood(lab, run_tool, syncookies=2)
    assert counters["TcpExtTCPReqQFullDoCookies"] > 0
    assert found == []
