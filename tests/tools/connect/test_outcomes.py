"""How an attempt can end, against what the client programs saw: their errno, their clock, their addresses."""

from __future__ import annotations

import socket
import subprocess

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import held
from tests.conftest import until
from tests.puppets import Puppet
from tests.tools.connect.site import (
    BEHIND,
    CALLS,
    FAMILIES,
    NOBODY,
    NOWHERE,
    SILENT,
    SYNCNT_1,
    Site,
    new_port,
    shown,
    span_us,
    version,
)

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_established(site: Site, family: str, call: str) -> None:
    port, address = site.listen(), site.target(family)
    saw = site.call(call, address, port)
    laddr, lport = site.client.ask("local()")
    cookie = site.client.ask("cookie()")
    again = site.client.ask("retransmissions()")
    site.close()
    assert saw[0] == "none"
    row = site.row(port, saw, outcome="ESTABLISHED", syn_sent=True, syn_retrans=again, raddr=shown(address),
                   lport=lport, laddr=shown(laddr), family=version(family))  # fmt: skip
    assert row["latency_us"] is not None
    everywhere = Kernel().enumerator("BPF_FUNC_check_mtu") is not None
    assert row["cookie"] == cookie if everywhere else row["cookie"] in (cookie, None)


@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
@pytest.mark.parametrize("family", FAMILIES)
def test_refused(site: Site, family: str, call: str) -> None:
    port, address = new_port(), site.target(family)
    before = site.syn_retransmissions()
    saw = site.call(call, address, port)
    assert saw[0] == "ECONNREFUSED"
    # Whoever asks again after the error was fetched is not told why, and no new attempt was made.
    assert site.call("again", address, port)[0] == ("ECONNABORTED" if call == "nonblocking" else "ECONNREFUSED")
    site.close()
    local = site.lab.client.address(socket.AF_INET6 if family == "6" else socket.AF_INET)
    count = 1 if call == "nonblocking" else 2
    rows = site.rows(port, count, outcome="REFUSED", errno="ECONNREFUSED", syn_sent=True, raddr=shown(address),
                     laddr=local, family=version(family), pid=site.client.pid)  # fmt: skip
    row = rows[0]
    assert sum(row["syn_retrans"] for row in rows) == site.syn_retransmissions() - before
    assert row["lport"] is not None
    assert row["latency_us"] <= span_us(saw) + 1


def test_the_second_call_fetches_the_error(site: Site) -> None:
    port, address = new_port(), site.target("4")
    assert site.call("started", address, port) == "EINPROGRESS"
    site.client.ask("outcome(fetch=False)")
    assert site.call("again", address, port)[0] == "ECONNREFUSED"
    site.row(port, outcome="REFUSED", errno="ECONNREFUSED")
    # From here on the socket is as good as new.
    assert site.call("again", NOWHERE["4"], port + 1000)[0] == "ENETUNREACH"
    site.row(port + 1000, outcome="UNREACHABLE", errno="ENETUNREACH", syn_sent=False)
    site.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_latency_with_a_retransmission(site: Site, family: str) -> None:
    """The answer waits until the SYN was sent again: the client's clock says how long, at least and at most."""
    port, address = site.listen(), site.target(family)
    with held(site.lab.server):
        assert site.call("started", address, port) == "EINPROGRESS"
        until(lambda: site.retransmitted(port), "a second SYN")
        waited = site.client.ask("time.monotonic() - after")
    saw = site.client.ask("outcome()")
    again = site.client.ask("retransmissions()")
    site.close()
    row = site.row(port, saw, outcome="ESTABLISHED", syn_retrans=again, syn_sent=True)
    assert again >= 1  # a third SYN may come a second after the second
    assert row["latency_us"] >= max(waited * 1e6 - 1, 900_000)


def test_timed_out(site: Site) -> None:
    """All families at the same time, blocking and not."""
    calls = [(Puppet(site.lab.client, f"patient-{family}"), family, new_port(), how)
             for family, how in zip((*FAMILIES, "4"), ("blocking", "nonblocking", "blocking", "nonblocking"),
                                    strict=True)]  # fmt: skip
    for puppet, *_ in calls:
        puppet.do(CALLS)
    before, retransmitted = site.syn_retransmissions(), 0
    for puppet, family, port, how in calls:
        puppet.tell(f"saw = {how}(address, port, options=options)",
                    address=SILENT[family], port=port, options=SYNCNT_1)  # fmt: skip
    for puppet, family, port, _ in calls:
        puppet.answer()
        saw = puppet.ask("saw")
        assert saw[0] == "ETIMEDOUT"
        site.close(puppet)
        row = site.row(port, saw, owner=puppet, outcome="TIMED_OUT", syn_sent=True, raddr=shown(SILENT[family]),
                       family=version(family))  # fmt: skip
        retransmitted += row["syn_retrans"]
        # Two SYNs of 1 and 2 s; since 6.5 the first timers are of 1 s each, and there are more of them.
        assert row["latency_us"] >= max(2.9, row["syn_retrans"] + 0.9) * 1e6
        assert row["lport"] is not None
        puppet.kill()
    assert retransmitted == site.syn_retransmissions() - before >= len(calls)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("call", ["blocking", "nonblocking"])
def test_no_route(site: Site, family: str, call: str) -> None:
    port = new_port()
    saw = site.call(call, NOWHERE[family], port)
    site.close()
    assert saw[0] == "ENETUNREACH"
    row = site.row(port, saw, outcome="UNREACHABLE", syn_sent=False, syn_retrans=0, latency_us=None, lport=None,
                   raddr=shown(NOWHERE[family]), family=version(family))  # fmt: skip
    assert row["laddr"] == ("::" if family == "6" else "0.0.0.0")


@pytest.mark.parametrize("family", ["4", "6"])
def test_no_route_from_a_port(site: Site, family: str) -> None:
    """Bound before: that end is known though no SYN was sent."""
    port, host = new_port(), site.lab.client
    local = host.ipv6 if family == "6" else host.ipv4
    saw = site.call("blocking", NOWHERE[family], port, local=[local, 31000])
    site.close()
    site.row(port, saw, outcome="UNREACHABLE", errno="ENETUNREACH", laddr=local, lport=31000, syn_sent=False)


def test_routes_that_say_no(site: Site) -> None:
    """Each kind of route has its errno, which connect() returns before a SYN."""
    outcomes = {"EACCES": "FAILED", "EHOSTUNREACH": "UNREACHABLE", "EINVAL": "FAILED"}
    for number, kind in enumerate(("prohibit", "unreachable", "blackhole")):
        address, port = f"203.0.113.{200 + number}", new_port()
        done = site.lab.client.spawn(["ip", "route", "add", kind, address])
        assert done.wait() == 0
        saw = site.call("blocking", address, port)
        site.close()
        row = site.row(port, saw, syn_sent=False, latency_us=None, raddr=address)
        assert row["outcome"] == outcomes.pop(saw[0])
    assert not outcomes


def test_a_neighbour_that_is_not_there(site: Site) -> None:
    """The kernel looks for its link address in vain, and tells itself so by ICMP."""
    port, client = new_port(), site.lab.client
    probes = client.sysctl("ipv4/neigh/veth0/app_solicit")
    client.sysctl("ipv4/neigh/veth0/app_solicit", 1)
    try:
        saw = site.call("blocking", NOBODY, port)
    finally:
        client.sysctl("ipv4/neigh/veth0/app_solicit", probes)
    site.close()
    assert saw[0] == "EHOSTUNREACH"
    row = site.row(port, saw, outcome="UNREACHABLE", syn_sent=True, raddr=NOBODY)
    assert row["latency_us"] >= int(client.sysctl("ipv4/neigh/veth0/retrans_time_ms")) * 1000 - 10_000  # jiffies


def test_unreachable_behind_a_router(site: Site) -> None:
    """The router answers with ICMP. What comes while connect() is still at it decides nothing: the next SYN does."""
    port, server = new_port(), site.lab.server
    server.sysctl("ip_forward", 1)
    assert server.spawn(["ip", "route", "add", "unreachable", BEHIND]).wait() == 0
    assert site.lab.client.spawn(["ip", "route", "add", BEHIND, "via", server.ipv4]).wait() == 0
    saw = site.call("blocking", BEHIND, port)
    site.close()
    server.sysctl("ip_forward", 0)
    assert saw[0] == "EHOSTUNREACH"
    site.row(port, saw, outcome="UNREACHABLE", syn_sent=True, raddr=BEHIND)


def test_no_free_port(site: Site) -> None:
    port, address, client = site.listen(), site.target("4"), site.lab.client
    usual = client.sysctl("ip_local_port_range")
    client.sysctl("ip_local_port_range", "40000 40001")
    try:
        lports = set()
        for number in range(2):
            assert site.call("blocking", address, port)[0] == "none"
            lports.add(site.client.ask("local()[1]"))
            site.client.do(f"full_{number} = s")
        saw = site.call("blocking", address, port)
        also = site.call("nonblocking", address, port)
    finally:
        client.sysctl("ip_local_port_range", usual.replace("\t", " "))
    site.client.do("full_0.close(), full_1.close(), s.close()")
    assert (saw[0], also[0]) == ("EADDRNOTAVAIL", "EADDRNOTAVAIL")
    rows = site.rows(port, 4, pid=site.client.pid, raddr=address)
    assert {row["lport"] for row in rows[:2]} == lports == {40000, 40001}
    for row, seen in zip(rows[2:], (saw, also), strict=True):
        assert (row["outcome"], row["errno"]) == ("FAILED", "EADDRNOTAVAIL")
        assert (row["syn_sent"], row["lport"], row["syn_retrans"]) == (False, None, 0)
        assert row["latency_us"] is not None
        assert row["latency_us"] <= span_us(seen) + 1


def test_both_ends_are_taken(site: Site) -> None:
    """Two sockets at the same local port cannot be connected to the same remote one."""
    port, address = site.listen(), site.target("4")
    how = {"local": [site.lab.client.ipv4, 31001],
           "options": [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]}  # fmt: skip
    assert site.call("blocking", address, port, **how)[0] == "none"
    site.client.do("first = s")
    saw = site.call("blocking", address, port, **how)
    site.client.do("first.close(), s.close()")
    assert saw[0] == "EADDRNOTAVAIL"
    first, second = site.rows(port, 2, lport=31001, laddr=site.lab.client.ipv4)
    assert (first["outcome"], second["outcome"]) == ("ESTABLISHED", "FAILED")
    assert (second["errno"], second["syn_sent"]) == ("EADDRNOTAVAIL", False)


ABORTS = {
    "close": "s.close()",
    "shutdown": "s.shutdown(socket.SHUT_RDWR)",
    "shutdown-write": "s.shutdown(socket.SHUT_WR)",
    "disconnect": "assert disconnect() == 'none'",
}


@pytest.mark.parametrize("way", ABORTS)
@pytest.mark.parametrize("family", ["4", "6"])
def test_aborted(site: Site, way: str, family: str) -> None:
    port = new_port()
    before, fails = site.syn_retransmissions(), site.lab.client.counters()["TcpAttemptFails"]
    assert site.call("started", SILENT[family], port) == "EINPROGRESS"
    begin, after, laddr, lport = site.client.ask("(begin, after, *local())")
    site.client.do(f"closing = time.monotonic()\n{ABORTS[way]}\nend = time.monotonic()")
    closing, end = site.client.ask("(closing, end)")
    # The row does not wait until the socket is destroyed.
    row = site.row(port, outcome="ABORTED", errno="none", syn_sent=True, laddr=laddr, lport=lport, raddr=SILENT[family])
    site.close()
    assert row["syn_retrans"] == site.syn_retransmissions() - before
    assert (closing - after) * 1e6 - 1 <= row["latency_us"] <= (end - begin) * 1e6 + 1
    assert site.lab.client.counters()["TcpAttemptFails"] == fails  # it is nobody's failure


@pytest.mark.parametrize("way", ["shutdown", "disconnect"])
def test_aborted_while_another_thread_waits(site: Site, way: str) -> None:
    """The waiting call returns an error that nobody on the network has sent. There are kernels that refuse to
    disconnect what a thread waits for: the attempt goes on."""
    port = new_port()
    site.client.do(
        "made(address, options=options); seen = []\n"
        "waiter = threading.Thread(target=lambda: seen.extend(again(address, port))); waiter.start()",
        address=SILENT["4"], port=port, options=SYNCNT_1,
    )  # fmt: skip
    until(lambda: any(s.rport == port for s in site.lab.client.sockets()), "a SYN")
    site.client.do(
        "try: error = disconnect() if way == 'disconnect' else s.shutdown(socket.SHUT_RDWR) or 'none'\n"
        "except OSError as problem: error = name(problem.errno)\n"
        "waiter.join()",
        way=way,
    )  # fmt: skip
    error, seen = site.client.ask("(error, seen)")
    site.close()
    if seen[0] == "ETIMEDOUT":
        assert error == "EBUSY" or span_us(seen) >= 2_900_000  # or all of this came too late
        site.row(port, seen, outcome="TIMED_OUT")
    else:
        assert error == "none"
        assert seen[0] in ("ECONNRESET", "ECONNABORTED", "EPIPE")
        site.row(port, seen, outcome="ABORTED", syn_sent=True)


def test_its_process_is_killed(site: Site) -> None:
    port = new_port()
    mortal = Puppet(site.lab.client, "mortal")
    mortal.do(CALLS)
    mortal.tell("blocking(address, port)", address=SILENT["4"], port=port)
    until(lambda: any(s.rport == port for s in site.lab.client.sockets()), "a SYN")
    mortal.kill()
    site.row(port, owner=mortal, outcome="ABORTED", errno="none", syn_sent=True)


def test_killed(site: Site) -> None:
    port = new_port()
    assert site.call("started", SILENT["4"], port) == "EINPROGRESS"
    ss = site.lab.client.spawn(["ss", "-K", "dport", "=", f":{port}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, complaint = ss.communicate()
    if b"not supported" in complaint:
        site.close()
        site.row(port, outcome="ABORTED")
        pytest.skip(f"CONFIG_INET_DIAG_DESTROY is not set: {complaint.decode().strip()}")
    saw = site.client.ask("outcome()")
    site.close()
    assert saw[0] == "ECONNABORTED"
    row = site.row(port, saw, outcome="KILLED", syn_sent=True)
    assert row["latency_us"] is not None


def test_together(site: Site) -> None:
    site.compare_others()
