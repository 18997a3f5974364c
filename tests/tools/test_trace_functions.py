"""The hops of `trace` at functions, and chains of nf_tables, where the kernel lets functions be hooked."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from socket import IPPROTO_TCP, MSG_DONTWAIT, SO_RCVBUF, SO_SNDBUF, SOL_SOCKET
from typing import Any

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.filters import Filter, PortRange
from tcpscope.kernel.features import Kernel
from tcpscope.request import Request
from tcpscope.tool import find
from tests.record import Call, Script, Seen, Test, recorded
from tests.record.script import NOBODYS_MAC, SENDTO, Host
from tests.tools.pair import exchange, pair, without_timers
from tests.tools.test_trace import AT_FUNCTIONS, OUT, PORT, TRACE, hops, us_since

TCP_CORK = 3
PAUSE_US = 20_000
"""TCP keeps what is corked for 200 ms, and then sends it all the same."""
NOT_ALWAYS = ("NETFILTER", "BACKLOG")
"""Where a kernel has rules of its own, and where a process happens to hold the socket."""
ALL_OUT = ("WRITE", "TRANSMIT", "IP_OUT", *OUT)
ALL_IN = ("RECEIVE", "IP_IN", "DELIVER", "TCP_IN", "TCP", "READ")


def always(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["hop"] for row in rows if row["hop"] not in NOT_ALWAYS]


def without_functions(seen: Seen, rows: list[dict[str, Any]]) -> bool:
    """Whether this kernel lets no functions be hooked. Then no row is of one."""
    if seen.machine.functions_can_be_hooked:
        return False
    assert not {row["hop"] for row in rows} & AT_FUNCTIONS
    assert {(row["where"], row["chain"]) for row in rows} == {(None, None)}
    return True


@pytest.mark.parametrize("family", ["4", "6", "mapped"])
@recorded(TRACE)
def test_every_hop(script: Script, family: str) -> Test:
    made = pair(script, PORT, family)
    exchange(made.near, made.far)
    sent = made.near.send_all(1001)
    made.far.read(1001)
    made.near.until_acknowledged()
    seen = yield
    out = seen.rows(TRACE, script.client, data_bytes=1001)
    into = seen.rows(TRACE, script.server, data_bytes=1001)
    if without_functions(seen, [*out, *into]):
        return
    assert (always(out), always(into)) == (list(ALL_OUT), list(ALL_IN))
    assert len({row["packet"] for row in (*out, *into)}) == 1
    assert {(row["pid"], row["direction"]) for row in out} == {(made.client.pid, "SENT")}
    assert {(row["pid"], row["direction"]) for row in into} == {(made.server.pid, "RECEIVED")}
    assert out[0]["before"] is None
    assert into[0]["before"] == "XMIT"
    for before, row in (*pairwise(out), *pairwise(into)):
        assert row["before"] == before["hop"]
        assert row["time"] >= before["time"]
        assert us_since(row) >= 0
    assert us_since(out[1]) <= sent.took_us + 1
    assert {row["packet_bytes"] for row in out[:3]} <= {None, out[3]["packet_bytes"]}  # before it has an IP header


@recorded(TRACE)
def test_the_handshake_begins_at_tcp(script: Script) -> Test:
    """The SYN is of a socket. The SYN-ACK is not: it begins at the device."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    seen = yield
    syn = seen.rows(TRACE, script.client, flags="SYN")
    answer = seen.rows(TRACE, script.server, flags="SYN|ACK")
    if without_functions(seen, [*syn, *answer]):
        return
    assert always(syn) == ["TRANSMIT", "IP_OUT", *OUT]
    assert hops(answer) == list(OUT[:3])


@recorded(TRACE)
def test_bytes_that_wait_to_be_sent(script: Script) -> Test:
    """TCP_CORK keeps them. One packet has the bytes of two writes: it begins with the first one."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    made.near.option(IPPROTO_TCP, TCP_CORK, 1)
    first = made.near.send_all(300)
    made.client.pause(PAUSE_US)
    made.near.send_all(400)
    made.client.pause(PAUSE_US)
    uncorked = made.near.option(IPPROTO_TCP, TCP_CORK, 0)
    made.far.read(700)
    made.near.until_acknowledged()
    seen = yield
    rows = seen.rows(TRACE, script.client, data_bytes=700)
    if without_functions(seen, rows):
        return
    assert always(rows) == list(ALL_OUT)
    assert 2 * PAUSE_US <= us_since(rows[1]) <= uncorked.end_us - first.begin_us + 1
    assert us_since(rows[1]) >= uncorked.begin_us - first.end_us - 1


@recorded(TRACE)
def test_a_write_that_waits_while_another_thread_tries(script: Script) -> Test:
    """Whose bytes are those that come later is not known: no packet begins with the other thread's call."""
    made = pair(script, PORT)
    exchange(made.near, made.far)
    for end, option in ((made.near, SO_SNDBUF), (made.far, SO_RCVBUF)):
        end.option(SOL_SOCKET, option, 1)
    other = made.client.thread()
    sending = made.near.send_all(60_000, wait=False)  # one call
    script.client.until_waiting(SENDTO, made.client)
    other.at(made.near).send("x", MSG_DONTWAIT, may_fail=True)  # some kernels find room for a byte
    made.far.read(60_000)
    sending.join()
    seen = yield
    rows = [row for row in seen.rows(TRACE, script.client) if row["data_bytes"] > 100]  # an exchange has 100
    if without_functions(seen, rows):
        return
    writes = [row for row in rows if row["hop"] == "WRITE"]
    assert 0 < len(writes) < sum(row["hop"] == "TRANSMIT" for row in rows)
    assert len({row["time"] for row in writes}) == 1


@recorded(TRACE)
def test_a_socket_that_a_process_holds(script: Script) -> Test:
    """Its packets wait in the backlog."""
    without_timers(script)
    made = pair(script, PORT)
    exchange(made.near, made.far)
    with made.far.locked():
        made.near.send_all(555)
        script.server.flush()
        held = made.server.pause(50_000)
    made.far.read(555)
    made.near.until_acknowledged()
    seen = yield
    rows = seen.rows(TRACE, script.server, data_bytes=555)
    if without_functions(seen, rows):
        return
    assert [row["hop"] for row in rows] == [*ALL_IN[:4], "BACKLOG", *ALL_IN[4:]]
    assert us_since(rows[5]) >= held.took_us - 1


def without_rules(host: Host) -> None:
    """A firewall that discards nothing yet. The module that knows chains is there before the tool."""
    with host.script.older():
        host.exec("nft", "add table inet trace")


def firewall(host: Host, hook: str) -> None:
    """Discard what a host sends to the port of this test, or receives for it. A chain before lets it pass."""
    host.exec(
        "nft",
        f"add chain inet trace before {{ type filter hook {hook} priority -1 ; }}; "
        f"add chain inet trace it {{ type filter hook {hook} priority 0 ; }}; "
        f"add rule inet trace it tcp dport {PORT} counter drop",
    )


def chain(host: Host, hook: str, rule: str) -> Call:
    """A chain behind NAT, with a rule for what is sent to the port of this test. A kernel may lack queues."""
    return host.exec(
        "nft",
        f"add chain inet trace it {{ type filter hook {hook} priority 200 ; }}; "
        f"add rule inet trace it tcp dport {PORT} {rule}",
        may_fail=True,
    )


def no_firewall(host: Host) -> None:
    host.exec("nft", "delete table inet trace")


def names_chains(seen: Seen) -> bool:
    """Whether programs can hook functions of modules: these have BTF (5.11)."""
    kernel = seen.machine.kernel
    return seen.machine.functions_can_be_hooked and kernel.parameters("btf_module_notify") is not None


def check_discarded(seen: Seen, rows: list[dict[str, Any]], hook: str, chain: str = "inet:trace:it") -> None:
    """The row of the rule, and the one before it."""
    reasons = {row["reason"] for row in rows if row["hop"] == "DROPPED"}
    known = "SKB_DROP_REASON_NETFILTER_DROP" in seen.machine.kernel.enumerators("skb_drop_reason").values()
    assert reasons == ({"NETFILTER_DROP"} if known else {None})
    if not seen.machine.functions_can_be_hooked:
        return
    last = [row for row in rows if row["hop"] in ("NETFILTER", "DROPPED")][:2]
    assert [(row["hop"], row["where"]) for row in last] == [("NETFILTER", hook), ("DROPPED", hook)]
    assert [row["chain"] for row in last] == [None, chain if names_chains(seen) else None]
    assert last[1]["before"] == "NETFILTER"
    assert us_since(last[1]) >= 0


@recorded(TRACE)
def test_a_rule_that_discards_what_arrives(script: Script) -> Test:
    without_rules(script.server)
    made = pair(script, PORT)
    exchange(made.near, made.far)
    firewall(script.server, "input")
    before = script.client.counter("TcpRetransSegs")
    made.near.send_all(666)
    script.client.until_counter("TcpRetransSegs", before + 1)
    no_firewall(script.server)
    made.far.read(666)
    made.near.until_acknowledged()
    seen = yield
    rows = seen.rows(TRACE, script.server, data_bytes=666)
    number = next(row["packet"] for row in rows if row["hop"] == "DROPPED")
    rows = [row for row in rows if row["packet"] == number]
    check_discarded(seen, rows, "INPUT")
    if not without_functions(seen, rows):
        assert [row["hop"] for row in rows] == ["RECEIVE", "IP_IN", "DELIVER", "NETFILTER", "DROPPED"]


@recorded(TRACE)
def test_a_rule_that_discards_what_is_sent(script: Script) -> Test:
    """No device gets it: without functions there is no row of it."""
    without_rules(script.client)
    made = pair(script, PORT)
    exchange(made.near, made.far)
    firewall(script.client, "output")
    made.near.send_all(667)
    no_firewall(script.client)
    made.far.read(667)
    made.near.until_acknowledged()
    seen = yield
    rows = seen.rows(TRACE, script.client, data_bytes=667)
    if not seen.machine.functions_can_be_hooked:
        assert "DROPPED" not in hops(rows)
        return
    number = next(row["packet"] for row in rows if row["hop"] == "DROPPED")
    rows = [row for row in rows if row["packet"] == number]
    check_discarded(seen, rows, "OUTPUT")
    assert [row["hop"] for row in rows][:4] == ["WRITE", "TRANSMIT", "NETFILTER", "DROPPED"]


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(TRACE)
def test_what_is_forwarded(script: Script, family: str) -> Test:
    """To a host that nobody is. The second SYN is discarded, by a chain whose policy is to drop."""
    far, option = ("198.51.100.9", "-4") if family == "4" else ("2001:db8:1::9", "-6")
    router, conf = script.server, "ipv4/conf" if family == "4" else "ipv6/conf"
    without_rules(router)
    router.sysctl(f"{conf}/all/forwarding", 1)
    for where in ("all", "veth0"):
        script.client.sysctl(f"{conf}/{where}/accept_redirects", 0)
    router.exec("ip", option, "route", "add", far, "dev", "veth0")
    router.exec("ip", option, "neigh", "replace", far, "lladdr", NOBODYS_MAC, "dev", "veth0")
    script.client.exec("ip", option, "route", "add", far, "via", router.address(family))
    client = script.client.process("client")
    ports = []
    for drops in (False, True):
        if drops:
            router.exec("nft", "add chain inet trace it { type filter hook forward priority 0 ; policy drop ; }")
        made = client.socket(family)
        made.start(far, PORT)
        ports.append(made.name())
        router.flush()
        made.close()
    seen = yield
    there, kept = ([row for row in seen.rows(TRACE, router) if row["rport"] == port.ret] for port in ports)
    assert {row["direction"] for row in (*there, *kept)} == {"RECEIVED"}
    # On a slow machine the SYN is sent again.
    there, kept = ([row for row in rows if row["packet"] == rows[0]["packet"]] for rows in (there, kept))
    check_discarded(seen, kept, "FORWARD")
    if without_functions(seen, [*there, *kept]):
        return
    assert always(there) == ["RECEIVE", "IP_IN", "FORWARD", "IP_OUT", *OUT[:3]]
    assert always(kept) == ["RECEIVE", "IP_IN", "FORWARD", "DROPPED"]
    for before, row in (*pairwise(there), *pairwise(kept)):
        assert row["before"] == before["hop"]
        assert us_since(row) >= 0


@pytest.mark.parametrize("rule", ["accept", "queue num 4321 bypass"])
@recorded(TRACE)
def test_a_discard_behind_a_chain(script: Script, rule: str) -> Test:
    """NAT gives two connections the same ends. Behind all chains connection tracking discards the second SYN.

    Nobody reads the queue.
    """
    far, client = "198.51.100.9", script.client
    without_rules(client)
    client.exec("ip", "route", "add", far, "dev", "veth0")
    client.exec("ip", "neigh", "replace", far, "lladdr", NOBODYS_MAC, "dev", "veth0")
    made_chain = chain(client, "postrouting", rule)
    client.exec(
        "nft",
        "add chain inet trace nat { type nat hook postrouting priority 100 ; }; "
        f"add rule inet trace nat ip daddr {far} tcp dport {PORT} snat ip to {client.ipv4}:20000",
    )
    process = client.process("client")
    made = [process.socket() for _ in range(2)]
    for one in made:
        one.start(far, PORT)
    ports = [one.name() for one in made]
    for one in made:
        one.close()
    seen = yield
    first, second = ([row for row in seen.rows(TRACE, client) if row["lport"] == port.ret] for port in ports)
    if not seen.machine.functions_can_be_hooked:
        assert hops(second) == []  # no device gets it
        return
    assert made_chain.ret == 0
    assert "XMIT" in hops(first)
    assert [(row["hop"], row["where"], row["chain"]) for row in second][-2:] == [
        ("NETFILTER", "POSTROUTING", None),
        ("DROPPED", "POSTROUTING", None),
    ]


@recorded(TRACE)
def test_a_queue_that_nobody_reads(script: Script) -> Test:
    """The packet cannot go on without it: its rule's chain discards it."""
    client = script.client
    without_rules(client)
    made = pair(script, PORT)
    exchange(made.near, made.far)
    made_chain = chain(client, "output", "queue num 4321")
    made.near.send_all(668)
    no_firewall(client)
    made.far.read(668)
    made.near.until_acknowledged()
    seen = yield
    rows = [row for row in seen.rows(TRACE, client, data_bytes=668) if row["hop"] == "DROPPED"]
    if not seen.machine.functions_can_be_hooked:
        assert rows == []
        return
    assert made_chain.ret == 0
    name = "inet:trace:it" if names_chains(seen) else None
    assert {(row["where"], row["chain"]) for row in rows} == {("OUTPUT", name)}


def asked(names: str) -> Request:
    options = {"min": None, "summary": None, "by": None, "functions": names}
    return Request(filter=Filter(port=(PortRange(PORT, PORT),)), options=options)


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_functions_of_the_user(lab, run_tool) -> None:  # type: ignore[no-untyped-def]
    if not Kernel().fentry:
        with pytest.raises(UnsupportedError, match=r"--functions ip_rcv: .*; without --functions there are the hops"):
            find("trace").open(asked("ip_rcv"))
        return
    listener = lab.server.socket(socket.AF_INET)
    listener.bind((lab.server.address(socket.AF_INET), PORT))
    listener.listen()
    tool = run_tool("trace", "--port", f"{PORT}", "--functions", "ip_rcv,tcp_v4_do_r*")
    with listener, lab.client.socket(socket.AF_INET) as near:
        with tool:
            near.connect(listener.getsockname())
            far, _ = listener.accept()
            for _ in range(5):
                near.sendall(bytes(100))
                far.recv(100)
                far.sendall(bytes(50))
                near.recv(50)
        far.close()
    rows = [row for row in tool.done.rows if row["data_bytes"]]  # the last ACKs may come while the tool detaches
    received = Counter(row["packet"] for row in rows if row["hop"] == "RECEIVE")
    assert len(received) >= 10
    functions = [row for row in rows if row["hop"] == "FUNCTION"]
    assert {row["where"] for row in functions} == {"ip_rcv", "tcp_v4_do_rcv"}
    assert Counter(row["packet"] for row in functions if row["where"] == "ip_rcv") == received
    assert {row["before"] for row in functions if row["where"] == "ip_rcv"} <= {"RECEIVE", "NETFILTER"}
    assert {row["before"] for row in functions if row["where"] == "tcp_v4_do_rcv"} <= {"TCP_IN", "BACKLOG"}
