"""How an attempt can end, against what the client programs saw: their errno, their clock, their addresses."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.record import Script, Test, recorded
from tests.tools.connect.site import (
    BEHIND,
    BY_INTERVAL,
    CONNECT,
    COUNTED,
    FAILED,
    FAMILIES,
    NOBODY,
    NOWHERE,
    OTHER,
    PORT,
    REFUSED,
    SILENT,
    SYNCNT_1,
    Attempt,
    Row,
    Started,
    in_networks,
    listening,
    made,
    rows,
    shown,
    silence,
    syn_retransmissions,
    version,
)


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_established(script: Script, family: str, call: str) -> Test:
    listening(script)
    address = script.server.address(family)
    saw = Attempt(script.client.process("client"), address, PORT, call)
    local, cookie, info = saw.socket.name(), saw.socket.cookie(), saw.socket.info()
    saw.socket.close()
    seen = yield
    assert saw.errno == "none"
    (row,) = rows(seen, script, {
        "saw": saw, "rport": PORT, "outcome": "ESTABLISHED", "syn_sent": True, "syn_retrans": info.info["retrans"],
        "raddr": shown(address), "lport": local.ret, "laddr": shown(local.data), "family": version(family),
    })  # fmt: skip
    assert row["latency_us"] is not None
    assert row["cookie"] == cookie.ret if seen.machine.gives_cookies else row["cookie"] in (cookie.ret, None)


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_refused(script: Script, family: str, call: str) -> Test:
    client, address = script.client.process("client"), script.server.address(family)
    saw = Attempt(client, address, REFUSED, call)
    # Whoever asks again after the error was fetched is not told why, and no new attempt was made.
    again = saw.socket.connect(address, REFUSED, may_fail=True)
    saw.socket.close()
    repeated = syn_retransmissions(script.client)
    seen = yield
    assert saw.errno == "ECONNREFUSED"
    assert again.errno == ("ECONNABORTED" if call == "nonblocking" else "ECONNREFUSED")
    local = script.client.address("6" if family == "6" else "4")
    wanted = {"by": client, "rport": REFUSED, "outcome": "REFUSED", "errno": "ECONNREFUSED", "syn_sent": True,
              "raddr": shown(address), "laddr": local, "family": version(family)}  # fmt: skip
    found = rows(seen, script, *[wanted] * (1 if call == "nonblocking" else 2))
    assert sum(row["syn_retrans"] for row in found) == repeated.ret
    assert found[0]["lport"] is not None
    assert found[0]["latency_us"] <= saw.span_us + 1


@recorded(CONNECT)
def test_the_second_call_fetches_the_error(script: Script) -> Test:
    client, address = script.client.process("client"), script.server.ipv4
    started = Started(client, address, REFUSED)
    started.socket.until_ready(4)
    fetched = started.socket.connect(address, REFUSED, may_fail=True)
    # From here on the socket is as good as new.
    again = started.socket.connect(NOWHERE["4"], OTHER, may_fail=True)
    started.socket.close()
    seen = yield
    assert started.first.errno in ("EINPROGRESS", "ECONNREFUSED")
    assert (fetched.errno, again.errno) == ("ECONNREFUSED", "ENETUNREACH")
    rows(seen, script,
         {"by": client, "rport": REFUSED, "outcome": "REFUSED", "errno": "ECONNREFUSED"},
         {"by": client, "rport": OTHER, "outcome": "UNREACHABLE", "errno": "ENETUNREACH",
          "syn_sent": False})  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@recorded(CONNECT)
def test_latency_with_a_retransmission(script: Script, family: str) -> Test:
    """The answer waits until the SYN was sent again: the client's clock says how long, at least and at most."""
    listening(script)
    client = script.client.process("client")
    with script.server.held():
        saw = Started(client, script.server.address(family), PORT)
        script.client.until_sockets(1, ">=", "retransmits", rport=PORT)
        waited = client.now()
    info = saw.finish().socket.info()
    saw.socket.close()
    seen = yield
    again = info.info["retrans"]
    (row,) = rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "ESTABLISHED", "syn_retrans": again,
                                 "syn_sent": True})  # fmt: skip
    assert saw.errno == "none"
    assert again >= 1  # a third SYN may come a second after the second
    assert row["latency_us"] >= max(waited.begin_us - saw.first.end_us - 1, 900_000)


@pytest.mark.parametrize(("family", "how"), [
    ("4", "blocking"), ("6", "nonblocking"), ("mapped", "blocking"), ("4", "nonblocking"),
])  # fmt: skip
@recorded(CONNECT)
def test_timed_out(script: Script, family: str, how: str) -> Test:
    silence(script)
    saw = Attempt(script.client.process("patient"), SILENT[family], PORT, how, options=SYNCNT_1)
    saw.socket.close()
    repeated = syn_retransmissions(script.client)
    seen = yield
    assert saw.errno == "ETIMEDOUT"
    (row,) = rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "TIMED_OUT", "syn_sent": True,
                                 "raddr": shown(SILENT[family]), "family": version(family)})  # fmt: skip
    assert row["syn_retrans"] == repeated.ret >= 1
    # Two SYNs of 1 and 2 s; since 6.5 the first timers are of 1 s each, and there are more of them.
    assert row["latency_us"] >= max(2.9, row["syn_retrans"] + 0.9) * 1e6
    assert row["lport"] is not None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@recorded(CONNECT)
def test_no_route(script: Script, family: str, call: str) -> Test:
    saw = Attempt(script.client.process("client"), NOWHERE[family], PORT, call)
    saw.socket.close()
    seen = yield
    assert saw.errno == "ENETUNREACH"
    rows(seen, script, {
        "saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "syn_sent": False, "syn_retrans": 0, "latency_us": None,
        "lport": None, "raddr": shown(NOWHERE[family]), "family": version(family),
        "laddr": "::" if family == "6" else "0.0.0.0",
    })  # fmt: skip


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(CONNECT)
def test_no_route_from_a_port(script: Script, family: str) -> Test:
    """Bound before: that end is known though no SYN was sent."""
    local = script.client.address(family)
    saw = Attempt(script.client.process("client"), NOWHERE[family], PORT, local=(local, 31000))
    saw.socket.close()
    seen = yield
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "errno": "ENETUNREACH", "laddr": local,
                        "lport": 31000, "syn_sent": False})  # fmt: skip


@recorded(CONNECT)
def test_routes_that_say_no(script: Script) -> Test:
    """Each kind of route has its errno, which connect() returns before a SYN."""
    client, tried = script.client.process("client"), []
    for number, kind in enumerate(("prohibit", "unreachable", "blackhole")):
        address = f"203.0.113.{200 + number}"
        script.client.exec("ip", "route", "add", kind, address)
        tried.append((address, Attempt(client, address, PORT + number)))
    seen = yield
    outcomes = {"EACCES": "FAILED", "EHOSTUNREACH": "UNREACHABLE", "EINVAL": "FAILED"}
    assert {saw.errno for _, saw in tried} == outcomes.keys()
    rows(seen, script, *(
        {"saw": saw, "rport": PORT + number, "syn_sent": False, "latency_us": None, "raddr": address,
         "outcome": outcomes[saw.errno]}
        for number, (address, saw) in enumerate(tried)
    ))  # fmt: skip


@recorded(CONNECT)
def test_a_neighbour_that_is_not_there(script: Script) -> Test:
    """The kernel looks for its link address in vain, and tells itself so by ICMP."""
    script.client.sysctl("ipv4/neigh/veth0/app_solicit", 1)
    pause = script.client.sysctl("ipv4/neigh/veth0/retrans_time_ms")
    saw = Attempt(script.client.process("client"), NOBODY, PORT)
    saw.socket.close()
    seen = yield
    assert saw.errno == "EHOSTUNREACH"
    (row,) = rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "syn_sent": True,
                                 "raddr": NOBODY})  # fmt: skip
    assert row["latency_us"] >= pause.ret * 1000 - 10_000  # jiffies


@recorded(CONNECT)
def test_unreachable_behind_a_router(script: Script) -> Test:
    """The router answers with ICMP. What comes while connect() is still at it decides nothing: the next SYN does."""
    script.server.sysctl("ip_forward", 1)
    script.server.exec("ip", "route", "add", "unreachable", BEHIND)
    script.client.exec("ip", "route", "add", BEHIND, "via", script.server.ipv4)
    saw = Attempt(script.client.process("client"), BEHIND, PORT)
    saw.socket.close()
    seen = yield
    assert saw.errno == "EHOSTUNREACH"
    rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "UNREACHABLE", "syn_sent": True, "raddr": BEHIND})


@recorded(CONNECT)
def test_no_free_port(script: Script) -> Test:
    listening(script)
    client, address = script.client.process("client"), script.server.ipv4
    script.client.sysctl("ip_local_port_range", "40000 40001")
    fits = [Attempt(client, address, PORT) for _ in range(2)]
    lports = [saw.socket.name() for saw in fits]
    late = [Attempt(client, address, PORT, how) for how in ("blocking", "nonblocking")]
    seen = yield
    assert [saw.errno for saw in (*fits, *late)] == ["none", "none", "EADDRNOTAVAIL", "EADDRNOTAVAIL"]
    assert {local.ret for local in lports} == {40000, 40001}
    found = rows(
        seen, script,
        *({"saw": saw, "rport": PORT, "raddr": address, "outcome": "ESTABLISHED", "lport": local.ret}
          for saw, local in zip(fits, lports, strict=True)),
        *[{"by": client, "rport": PORT, "raddr": address, "outcome": "FAILED", "errno": "EADDRNOTAVAIL",
           "syn_sent": False, "lport": None, "syn_retrans": 0}] * 2,
    )  # fmt: skip
    for row, saw in zip(found[2:], late, strict=True):
        assert row["latency_us"] is not None
        assert row["latency_us"] <= saw.span_us + 1


@recorded(CONNECT)
def test_both_ends_are_taken(script: Script) -> Test:
    """Two sockets at the same local port cannot be connected to the same remote one."""
    listening(script)
    client, local = script.client.process("client"), (script.client.ipv4, 31001)
    both = [Attempt(client, script.server.ipv4, PORT, local=local, options=((1, 2, 1),)) for _ in range(2)]
    seen = yield
    assert [saw.errno for saw in both] == ["none", "EADDRNOTAVAIL"]
    ends = {"lport": 31001, "laddr": script.client.ipv4, "rport": PORT}
    rows(seen, script, {"saw": both[0], "outcome": "ESTABLISHED", **ends},
         {"saw": both[1], "outcome": "FAILED", "syn_sent": False, **ends})  # fmt: skip


@pytest.mark.parametrize("way", ["close", "shutdown", "shutdown-write", "disconnect"])
@pytest.mark.parametrize("family", ["4", "6"])
@recorded(CONNECT)
def test_aborted(script: Script, way: str, family: str) -> Test:
    silence(script)
    saw = Started(script.client.process("client"), SILENT[family], PORT)
    local = saw.socket.name()
    if way == "close":
        end = saw.socket.close()
    elif way == "disconnect":
        end = saw.socket.disconnect()
    else:
        end = saw.socket.shutdown("write" if way == "shutdown-write" else "both")
    # The row does not wait until the socket is destroyed.
    fails, repeated = script.client.counter("TcpAttemptFails"), syn_retransmissions(script.client)
    seen = yield
    assert saw.first.errno == "EINPROGRESS"
    (row,) = rows(seen, script, {
        "by": saw.process, "rport": PORT, "outcome": "ABORTED", "errno": "none", "syn_sent": True, "laddr": local.data,
        "lport": local.ret, "raddr": SILENT[family], "syn_retrans": repeated.ret,
    })  # fmt: skip
    assert end.begin_us - saw.first.end_us - 1 <= row["latency_us"] <= end.end_us - saw.first.begin_us + 1
    assert fails.ret == 0  # it is nobody's failure


@pytest.mark.parametrize("way", ["shutdown", "disconnect"])
@recorded(CONNECT)
def test_aborted_while_another_thread_waits(script: Script, way: str) -> Test:
    """The waiting call returns an error that nobody on the network has sent. There are kernels that refuse to
    disconnect what a thread waits for: the attempt goes on."""
    silence(script)
    client = script.client.process("client")
    mine = made(client, SILENT["4"], options=SYNCNT_1)
    waiting = client.thread().at(mine).connect(SILENT["4"], PORT, wait=False)
    script.client.until_sockets(state="SYN_SENT", rport=PORT)
    end = mine.disconnect(may_fail=True) if way == "disconnect" else mine.shutdown("both", may_fail=True)
    waiting.join()
    mine.close()
    seen = yield
    if waiting.errno == "ETIMEDOUT":
        assert end.errno == "EBUSY" or waiting.took_us >= 2_900_000  # or all of this came too late
        rows(seen, script, {"by": client, "rport": PORT, "outcome": "TIMED_OUT", "errno": "ETIMEDOUT"})
    else:
        assert end.errno == "none"
        assert waiting.errno in ("ECONNRESET", "ECONNABORTED", "EPIPE")
        rows(seen, script, {"by": client, "rport": PORT, "outcome": "ABORTED", "syn_sent": True,
                            "errno": waiting.errno})  # fmt: skip


@recorded(CONNECT)
def test_its_process_is_killed(script: Script) -> Test:
    silence(script)
    mortal = script.client.process("mortal")
    made(mortal, SILENT["4"]).connect(SILENT["4"], PORT, wait=False)
    script.client.until_sockets(state="SYN_SENT", rport=PORT)
    mortal.kill()
    script.client.until_sockets(0, "==", rport=PORT)
    seen = yield
    rows(seen, script, {"by": mortal, "rport": PORT, "outcome": "ABORTED", "errno": "none", "syn_sent": True})


@recorded(CONNECT)
def test_killed(script: Script) -> Test:
    """By `ss -K`, where the kernel has it (CONFIG_INET_DIAG_DESTROY)."""
    silence(script)
    saw = Started(script.client.process("client"), SILENT["4"], PORT)
    said = script.client.exec("ss", "-K", "dport", "=", f":{PORT}", may_fail=True)
    error = saw.socket("get", 1, 4, 4)
    known = saw.process.now()
    saw.socket.close()
    seen = yield
    if "not%20supported" in said.data:
        rows(seen, script, {"by": saw.process, "rport": PORT, "outcome": "ABORTED"})
        pytest.skip(f"CONFIG_INET_DIAG_DESTROY is not set: {said.data}")
    assert error.ret == 103  # ECONNABORTED
    (row,) = rows(seen, script, {"by": saw.process, "rport": PORT, "outcome": "KILLED", "errno": "ECONNABORTED",
                                 "syn_sent": True})  # fmt: skip
    assert row["latency_us"] is not None
    assert row["latency_us"] <= known.end_us - saw.first.begin_us + 1


@recorded(CONNECT, FAILED, COUNTED, BY_INTERVAL)
def test_together(script: Script) -> Test:
    """The other three tools against the rows: the same connections of all tests, put together."""
    listening(script)
    client = script.client.process("client")
    refused, established = (Attempt(client, script.server.ipv4, port) for port in (REFUSED, PORT))
    seen = yield
    rows(seen, script, {"saw": refused, "rport": REFUSED, "outcome": "REFUSED"},
         {"saw": established, "rport": PORT, "outcome": "ESTABLISHED"})  # fmt: skip

    every = [row for row in seen.of_all(CONNECT) if in_networks(row)]
    wanted = [row for row in every if row["outcome"] != "ESTABLISHED"]
    # Each tool has read the clock for itself.
    texts = [[json.dumps({name: row[name] for name in row if name not in ("time", "latency_us", "cookie")})
              for row in each] for each in (seen.of_all(FAILED), wanted)]  # fmt: skip
    assert sorted(texts[0]) == sorted(texts[1])
    stats = seen.run(FAILED).stats
    assert stats is not None
    assert stats["filtered"] >= len(every) - len(wanted)

    def kinds(found: list[Row], *names: str) -> Counter[Any]:
        counts: Counter[Any] = Counter()
        for row in found:
            counts[tuple(row[name] for name in ("netns", *names))] += row.get("count", 1)
        return counts

    assert kinds(seen.of_all(COUNTED), "raddr", "rport") == kinds(every, "raddr", "rport")
    total = seen.run(COUNTED).rows
    assert [row["count"] for row in total] == sorted((row["count"] for row in total), reverse=True)
    assert all(row["total"] for row in total)

    by_interval = seen.of_all(BY_INTERVAL)
    for whole in (True, False):
        parts = [row for row in by_interval if row["total"] == whole]
        assert kinds(parts, "comm", "outcome") == kinds(every, "comm", "outcome")
    assert set(by_interval[0]) == {"netns", "comm", "outcome", "count", "total"}
