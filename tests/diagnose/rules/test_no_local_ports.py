"""Local ports that are used up by open connections, by TIME_WAIT, or by bind(); and pools that only look full."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose.pools import Pools
from tcpscope.diagnose.rules.no_local_ports import rule
from tests.diagnose.rules.connecting import HERE, NETNS, THERE, check, found, times
from tests.record import Script, Test, recorded
from tests.tools.queue.refusals import DIAGNOSE

PORT, FIRST, NUMBER, MORE = 9201, 40_000, 20, 4


@pytest.mark.parametrize("cause", ["open", "time_wait"])
@recorded(DIAGNOSE)
def test_used_up(script: Script, cause: str) -> Test:
    script.client.sysctl("ip_local_port_range", f"{FIRST} {FIRST + NUMBER - 1}")
    # On a busy machine a FIN that has arrived is sent again. Nobody is there any more: the RST would end TIME_WAIT.
    script.client.sysctl("tcp_rfc1337", 1)
    server, client = script.server.process("server"), script.client.process("proxy")
    listener = server.listener(PORT, backlog=64)
    made = []
    for _ in range(NUMBER):
        near = client.socket()
        near.connect(script.server.ipv4, PORT)
        far = listener.accept()
        made.append((near, far))
    if cause == "time_wait":
        for near, far in made:
            near.close()
            far.close()
        script.client.until_sockets(NUMBER, "==", state="TIME_WAIT", rport=PORT)
    failed = [client.socket().connect(script.server.ipv4, PORT, may_fail=True) for _ in range(MORE)]
    script.stay()
    seen = yield
    assert {call.errno for call in failed} == {"EADDRNOTAVAIL"}
    (finding,) = found(seen, script.client, script.server)
    facts = finding["facts"]
    assert (finding["rule"], finding["severity"]) == ("no_local_ports", "critical")
    assert facts["failed"] == facts["count"] == MORE
    assert (facts["netns"], facts["raddr"], facts["rport"]) == (script.client.inode, script.server.ipv4, PORT)
    assert (facts["pid"], facts["comm"], facts["failed_pid"]) == (client.pid, "proxy", client.pid)
    assert (facts["cause"], facts["used"], facts["available"]) == (cause, NUMBER, NUMBER)
    assert facts["established" if cause == "open" else "time_wait"] == NUMBER
    remedies = {remedy["name"]: remedy for remedy in finding["remedies"]}
    wider = remedies["net.ipv4.ip_local_port_range"]
    assert wider["present"] == f"{FIRST} {FIRST + NUMBER - 1}"
    assert wider["command"].startswith(f"nsenter -t {client.pid} -n sysctl -w net.ipv4.ip_local_port_range=")
    reuse = remedies.get("net.ipv4.tcp_tw_reuse")
    assert (reuse and (reuse["present"], reuse["proposed"])) == ((2, 1) if cause == "time_wait" else None)


def row(**columns: Any) -> Any:
    given = dict.fromkeys(
        ("held", "search_max_us", "failed", "errno", "failed_pid", "failed_comm", "step_width", "rport")
    )
    given |= dict.fromkeys(("syn_sent", "established", "closing", "time_wait", "bound", "reserved"), 0)
    given |= {"netns": NETNS, "family": 4, "laddr": HERE, "raddr": THERE, "rport": 80, "pid": None, "comm": "proxy"}
    given |= {"first_port": 32768, "last_port": 60999, "available": 28232, "tw_reuse": 2} | columns
    used = given["established"] + given["time_wait"] + given["bound"]
    percent = 100 * used / given["available"] if given["available"] else None
    return SimpleNamespace(**given | {"used": used, "percent": percent})


def findings(*rows: Any, failed: int = 0) -> list[Any]:
    pools = Pools.__new__(Pools)
    pools.now = list(rows)
    pools.first = {Pools.key(each): each for each in rows}
    pools.failed = {Pools.key(each): {("EADDRNOTAVAIL", 7, "proxy"): times(failed)} for each in rows if failed}
    pools.at_failure = pools.first
    return check(rule, ports=pools)


@pytest.mark.parametrize(("established", "expected"), [(14_115, []), (14_116, ["warning"]), (28_232, ["warning"])])
def test_half_of_the_range(established: int, expected: list[str]) -> None:
    assert [finding.severity for finding in findings(row(established=established))] == expected


@pytest.mark.parametrize(
    ("laddr", "tw_reuse", "expected"),
    [(HERE, 0, 1), (HERE, 1, 0), (HERE, 2, 1), ("127.0.0.1", 2, 0), ("127.0.0.1", 0, 1)],
)
def test_ports_in_time_wait_that_are_taken_again_are_free(laddr: str, tw_reuse: int, expected: int) -> None:
    assert len(findings(row(time_wait=20_000, laddr=laddr, tw_reuse=tw_reuse))) == expected


def test_a_busy_proxy_below_half_is_healthy() -> None:
    assert findings(row(time_wait=14_000)) == []


def test_a_socket_with_a_range_of_its_own_may_fill_it() -> None:
    narrow = {"first_port": 50_000, "last_port": 50_009, "available": 10}
    assert findings(row(established=10, **narrow)) == []
    (finding,) = findings(row(established=10, **narrow), failed=1)
    assert finding.severity == "critical"


def test_ports_that_bind_has_taken_ask_for_an_option() -> None:
    (finding,) = findings(row(bound=20_000, raddr=None, rport=None))
    assert finding.facts["cause"] == "bound"
    assert finding.remedies[0].name == "IP_BIND_ADDRESS_NO_PORT"


def test_the_search_steps_over_reserved_ports_where_the_kernel_can() -> None:
    def names(**columns: Any) -> list[str | None]:
        (finding,) = findings(row(established=20_000, **columns))
        return [remedy.name for remedy in finding.remedies]

    assert "net.ipv4.ip_local_port_step_width" in names(step_width=0, reserved=100)
    assert "net.ipv4.ip_local_port_step_width" not in names(step_width=0)
    assert "net.ipv4.ip_local_port_step_width" not in names(step_width=None, reserved=100)


def test_a_wide_range_is_not_widened() -> None:
    wide = {"first_port": 10_240, "last_port": 65_535, "available": 55_296}
    (finding,) = findings(row(established=40_000, **wide))
    assert "net.ipv4.ip_local_port_range" not in [remedy.name for remedy in finding.remedies]
