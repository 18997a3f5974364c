"""`tcpscope reset`: every RST that a host sends or receives, as the kernel counts them, and what made it so."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab, held
from tests.conftest import RunningTool, until
from tests.record import Host, Process, Script, Seen, Socket, Test, Watch, recorded
from tests.record.script import IPPROTO_TCP, POLLIN, SO_LINGER, SOL_SOCKET, STATES, TCP_LINGER2

PORT, NOBODYS_PORT = 6741, 6742
RESET = Watch("reset", "--port", f"{PORT},{NOBODYS_PORT}")
TIMEOUTS = Watch("reset", "--timeouts", "--port", f"{PORT},{NOBODYS_PORT}")
COUNTED = Watch("reset", "--count", "--by", "netns,direction,cause", "--port", f"{PORT},{NOBODYS_PORT}")
STACKS = Watch("reset", "--stack", "--port", f"{PORT}", every_kernel=False)
SO_KEEPALIVE, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT = 9, 4, 5, 6, 18
SYN, RST, ACK = 2, 4, 16
IPPROTO_MPTCP = 262
MP_JOIN = bytes((30, 12, 1 << 4, 1)) + b"nonenone"
"""The option of a SYN that asks a connection for a further subflow. Its token is that of none."""

Row = dict[str, Any]


class Site:
    """A server that listens, and a client. `unheard`: RSTs that arrive at a host and end no connection there."""

    def __init__(self, script: Script, family: str = "4", *, backlog: int = 16, protocol: int = 0) -> None:
        self.script, self.family = script, family
        self.server, self.client = script.server.process("server"), script.client.process("client")
        address = script.server.address(family)
        may_fail = self.listener_may_fail = protocol != 0
        self.listener = self.server.listener(PORT, address, backlog=backlog, protocol=protocol, may_fail=may_fail)
        self.unheard = {script.client: 0, script.server: 0}

    def connect(self) -> Socket:
        near = self.client.socket(self.family)
        near.connect(self.script.server.address(self.family), PORT)
        return near

    def pair(self) -> tuple[Socket, Socket]:
        near = self.connect()
        self.local = near.name()
        return near, self.listener.accept()

    def end(self) -> None:
        """Nothing is left that could send a RST later."""
        self.listener("close", may_fail=self.listener_may_fail)
        for host in self.script.hosts:
            host.flush()
        self.counters = {host: host.counters() for host in self.script.hosts}

    def process(self, host: Host) -> Process:
        return self.server if host is self.script.server else self.client

    def rows(self, seen: Seen, host: Host, direction: str) -> list[Row]:
        return seen.rows(RESET, host, direction=direction)

    def check(self, seen: Seen) -> None:
        """As many rows as the hosts count RSTs, at both ends of the link."""
        for host in self.script.hosts:
            sent = self.counters[host].counters["TcpOutRsts"]
            heard = self.counters[host.peer].counters["TcpOutRsts"] - self.unheard[host]
            assert len(self.rows(seen, host, "SENT")) == sent
            assert len(self.rows(seen, host, "RECEIVED")) == heard
            for row in seen.rows(RESET, host):
                assert (row["laddr"], row["raddr"]) == (host.address(self.family), host.peer.address(self.family))
                assert PORT in (row["lport"], row["rport"]) or NOBODYS_PORT in (row["lport"], row["rport"])
                assert row["family"] == (6 if self.family == "6" else 4)

    def sent(self, seen: Seen, host: Host, cause: str, state: str | None, reason: str, *, owned: bool = True) -> Row:
        """The only RST that this host has sent."""
        self.check(seen)
        (row,) = self.rows(seen, host, "SENT")
        owner = self.process(host)
        assert (row["cause"], row["state"]) == (cause, state)
        assert (row["pid"], row["comm"]) == ((owner.pid, owner.comm) if owned else (None, None))
        assert row["reason"] == (reason if has_reasons(seen) else None)
        return row

    def received(self, seen: Seen, host: Host, state: str) -> Row:
        """The only RST that this host has received."""
        (row,) = self.rows(seen, host, "RECEIVED")
        owner = self.process(host)
        assert (row["state"], row["cause"], row["reason"]) == (state, None, None)
        assert (row["pid"], row["comm"]) == (owner.pid, owner.comm)
        return row


def has_reasons(seen: Seen) -> bool:
    return seen.machine.kernel.enumerator("SK_RST_REASON_NO_SOCKET") is not None


@pytest.mark.parametrize("family", ["4", "6"])
@recorded(RESET)
def test_a_closed_port(script: Script, family: str) -> Test:
    site = Site(script, family)
    near = site.client.socket(family)
    call = near.connect(script.server.address(family), NOBODYS_PORT, may_fail=True)
    near.close()
    site.end()
    seen = yield
    assert call.errno == "ECONNREFUSED"
    row = site.sent(seen, script.server, "NO_LISTENER", None, "NO_SOCKET", owned=False)
    assert (row["lport"], row["cookie"]) == (NOBODYS_PORT, None)
    assert site.received(seen, script.client, "SYN_SENT")["rport"] == NOBODYS_PORT


@pytest.mark.parametrize("family", ["4", "6"])
@pytest.mark.parametrize("why", ["unread", "linger"])
@pytest.mark.parametrize("closed", [False, True], ids=["first", "second"])
@recorded(RESET)
def test_close(script: Script, why: str, closed: bool, family: str) -> Test:
    """With unread data, or SO_LINGER of 0; before the other end has closed, or after it."""
    site = Site(script, family)
    near, far = site.pair()
    if why == "unread":
        near.send("never read")
        far.until_ready()
    else:
        far.linger(0)
    if closed:
        near.shutdown()
        far.until_state("CLOSE_WAIT")
        near.until_state("FIN_WAIT2")
    far.close()
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    cause, reason = ("UNREAD_DATA", "TCP_ABORT_ON_CLOSE") if why == "unread" else ("LINGER", "TCP_STATE")
    row = site.sent(seen, script.server, cause, "CLOSE_WAIT" if closed else "ESTABLISHED", reason)
    assert (row["lport"], row["rport"]) == (PORT, site.local.ret)
    site.received(seen, script.client, "FIN_WAIT2" if closed else "ESTABLISHED")
    resets = site.counters[script.server].counters["TcpEstabResets"]
    assert resets == 1  # close() in ESTABLISHED or CLOSE_WAIT without a FIN


@recorded(RESET)
def test_close_in_last_ack(script: Script) -> Test:
    """The peer has closed. The application shuts down without having read, and closes before its FIN is answered."""
    site = Site(script)
    near, far = site.pair()
    near.send("never read")
    far.until_ready()
    near.shutdown()
    far.until_state("CLOSE_WAIT")
    near.until_state("FIN_WAIT2")
    with script.server.losing():
        far.shutdown("both")
        far.until_state("LAST_ACK")
        far.close()
    near.close()
    site.end()
    seen = yield
    site.unheard[script.client] = 1
    site.sent(seen, script.server, "UNREAD_DATA", "LAST_ACK", "TCP_ABORT_ON_CLOSE")


@recorded(RESET)
def test_a_process_that_is_killed(script: Script) -> Test:
    """The kernel closes its sockets. It was there before the tool."""
    with script.older():
        site = Site(script)
        other = script.server.process("killed")
        listener = other.listener(NOBODYS_PORT)
        near = site.client.socket()
        near.connect(script.server.ipv4, NOBODYS_PORT)
        far = listener.accept()
        near.send("never read")
        far.until_ready()
    other.kill()
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    site.check(seen)
    (row,) = site.rows(seen, script.server, "SENT")
    assert (row["cause"], row["state"]) == ("UNREAD_DATA", "ESTABLISHED")
    assert (row["pid"], row["comm"]) == (other.pid, "killed")
    site.received(seen, script.client, "ESTABLISHED")


@recorded(RESET)
def test_data_after_close(script: Script) -> Test:
    """The kernel keeps a timewait socket in FIN_WAIT2."""
    site = Site(script)
    near, far = site.pair()
    far.close()
    near.until_state("CLOSE_WAIT")
    script.server.until_sockets(0, "==", state="FIN_WAIT1")
    near.send("to nobody")
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    site.sent(seen, script.server, "DATA_AFTER_CLOSE", "FIN_WAIT2", "TCP_TIMEWAIT_SOCKET")
    site.received(seen, script.client, "CLOSE_WAIT")


@recorded(RESET)
def test_data_for_a_socket_that_was_closed(script: Script) -> Test:
    """With a long TCP_LINGER2 it stays a full socket. The kernel acts as if it had received a RST."""
    site = Site(script)
    near, far = site.pair()
    far.option(IPPROTO_TCP, TCP_LINGER2, 120)
    far.close()
    near.until_state("CLOSE_WAIT")
    script.server.until_sockets(state="FIN_WAIT2", lport=PORT)
    near.send("to nobody")
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    site.sent(seen, script.server, "DATA_AFTER_CLOSE", "FIN_WAIT2", "TCP_ABORT_ON_DATA")
    site.received(seen, script.client, "CLOSE_WAIT")


@recorded(RESET)
def test_data_for_a_socket_that_was_shut_down(script: Script) -> Test:
    """Its process holds it still. The data crosses the FIN."""
    site = Site(script)
    near, far = site.pair()
    with script.server.held():
        far.shutdown("both")
        far.until_state("FIN_WAIT1")
        near.send("to nobody")
        far.until_state("CLOSE")
    near.until_state("CLOSE")
    near.close()
    far.close()
    site.end()
    seen = yield
    first, *again = site.rows(seen, script.server, "SENT")
    assert (first["cause"], first["state"]) == ("DATA_AFTER_CLOSE", "FIN_WAIT1")
    assert (first["pid"], first["rport"]) == (site.server.pid, site.local.ret)
    # The client may acknowledge the FIN before it gets the RST. It has no socket for the answer.
    assert [(row["cause"], row["state"]) for row in again] == [("NO_CONNECTION", "LISTEN")] * len(again)
    site.unheard[script.client] = len(again)
    site.check(seen)
    site.received(seen, script.client, "CLOSE_WAIT")


@recorded(RESET)
def test_data_after_close_with_the_ack_of_the_fin(script: Script) -> Test:
    """The socket goes from FIN_WAIT1 through FIN_WAIT2 to its end for one packet."""
    site = Site(script)
    near, far = site.pair()
    segments = near.field("tx_segs")
    with script.client.losing():
        far.close()
        near.until_field("tx_segs", segments + 1)  # an acknowledgement that is lost
        script.server.lose()  # no further FIN, and no acknowledgement of one without data
    near.send("to nobody")
    script.server.until_sockets(0, "==", lport=PORT, rport=site.local)
    script.server.find()
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    first, *again = site.rows(seen, script.server, "SENT")
    assert 1 + len(again) == site.counters[script.server].counters["TcpOutRsts"]
    assert (first["cause"], first["state"], first["pid"]) == ("DATA_AFTER_CLOSE", "FIN_WAIT2", site.server.pid)
    # The first RST was lost. The data is sent again, and the listener answers.
    assert [(row["cause"], row["state"]) for row in again] == [("NO_CONNECTION", "LISTEN")] * len(again)
    site.received(seen, script.client, "CLOSE_WAIT")


@recorded(RESET)
def test_a_reset_for_a_socket_that_was_closed(script: Script) -> Test:
    """In the states in which the tool must tell a RST from data."""
    site = Site(script)
    near, far = site.pair()
    far.option(IPPROTO_TCP, TCP_LINGER2, 120)
    far.close()
    script.server.until_sockets(state="FIN_WAIT2", lport=PORT)
    near.linger(0)
    near.close()
    script.server.until_sockets(0, "==", state="FIN_WAIT2", lport=PORT)
    site.end()
    seen = yield
    row = site.sent(seen, script.client, "LINGER", "CLOSE_WAIT", "TCP_STATE")
    assert (row["lport"], row["rport"]) == (site.local.ret, PORT)
    row = site.received(seen, script.server, "FIN_WAIT2")
    assert (row["lport"], row["rport"]) == (PORT, site.local.ret)


@recorded(RESET)
def test_no_wait_for_the_fin(script: Script) -> Test:
    """TCP_LINGER2 below zero: a RST in place of FIN_WAIT2."""
    site = Site(script)
    near, far = site.pair()
    far.option(IPPROTO_TCP, TCP_LINGER2, -1)
    far.close()
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    site.sent(seen, script.server, "LINGER2", "FIN_WAIT2", "TCP_ABORT_ON_DATA")
    site.received(seen, script.client, "CLOSE_WAIT")


@recorded(RESET)
def test_no_wait_for_the_fin_that_is_acknowledged(script: Script) -> Test:
    """TCP_LINGER2 below zero: close() itself sends the RST."""
    site = Site(script)
    near, far = site.pair()
    far.option(IPPROTO_TCP, TCP_LINGER2, -1)
    far.shutdown()
    far.until_state("FIN_WAIT2")
    far.close()
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    site.sent(seen, script.server, "LINGER2", "FIN_WAIT2", "TCP_ABORT_ON_LINGER")
    site.received(seen, script.client, "CLOSE_WAIT")


@recorded(RESET)
def test_disconnect(script: Script) -> Test:
    """connect() to AF_UNSPEC."""
    site = Site(script)
    near, far = site.pair()
    near.disconnect()
    far.until_state("CLOSE")
    near.close()
    far.close()
    site.end()
    seen = yield
    row = site.sent(seen, script.client, "DISCONNECT", "ESTABLISHED", "TCP_STATE")
    assert (row["lport"], row["rport"]) == (site.local.ret, PORT)
    site.received(seen, script.server, "ESTABLISHED")


@recorded(RESET)
def test_a_listener_is_closed(script: Script) -> Test:
    """Its process is gone, and nobody has accepted the connection."""
    site = Site(script)
    near = site.connect()
    script.server.until_sockets(1, field="recv_q", state="LISTEN", lport=PORT)
    site.listener.close()
    near.until_state("CLOSE")
    near.close()
    site.listener = site.server.listener(PORT)
    site.end()
    seen = yield
    site.sent(seen, script.server, "LISTENER_CLOSED", "ESTABLISHED", "TCP_STATE")
    site.received(seen, script.client, "ESTABLISHED")


@recorded(RESET)
def test_keepalive(script: Script) -> Test:
    """The peer has vanished. Its end hears nothing of the RST."""
    site = Site(script)
    near, far = site.pair()
    with script.client.losing():
        near.option(SOL_SOCKET, SO_KEEPALIVE, 1)
        for option in (TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT):
            near.option(IPPROTO_TCP, option, 1)
        near.until_state("CLOSE")
    near.close()
    far.linger(0)
    far.close()
    script.client.flush()
    site.unheard = {script.server: 1, script.client: 1}
    site.end()
    seen = yield
    site.check(seen)
    (row,) = site.rows(seen, script.client, "SENT")
    assert (row["cause"], row["state"], row["pid"]) == ("KEEPALIVE", "ESTABLISHED", site.client.pid)
    assert row["reason"] == ("TCP_KEEPALIVE_TIMEOUT" if has_reasons(seen) else None)


@recorded(RESET, TIMEOUTS)
def test_an_end_without_a_reset(script: Script) -> Test:
    """The peer has vanished, and TCP_USER_TIMEOUT ends the retransmissions."""
    site = Site(script)
    near, far = site.pair()
    near.option(IPPROTO_TCP, TCP_USER_TIMEOUT, 500)
    before = script.client.counter("TcpExtTCPAbortOnTimeout")
    with script.client.losing():
        near.send("to nobody")
        near.until_state("CLOSE")
    near.close()
    far.linger(0)
    far.close()
    script.client.flush()
    site.unheard = {script.server: 0, script.client: 1}
    site.end()
    seen = yield
    site.check(seen)
    (row,) = [row for row in seen.rows(TIMEOUTS, script.client) if row["direction"] == "NONE"]
    assert (row["cause"], row["state"], row["pid"]) == ("TIMEOUT", "ESTABLISHED", site.client.pid)
    assert site.counters[script.client].counters["TcpExtTCPAbortOnTimeout"] == before.ret + 1
    others = [row["cause"] for row in seen.rows(TIMEOUTS) if row["direction"] != "NONE"]
    assert others == [row["cause"] for row in seen.rows(RESET)]


@pytest.mark.parametrize("answered", [False, True], ids=["waits", "answered"])
@recorded(RESET)
def test_a_request_that_is_reset(script: Script, answered: bool) -> Test:
    """The answer comes some jiffies after the request, or not at all."""
    site = Site(script)
    near, far = site.pair()
    near.send("request")
    far.receive()
    if answered:
        site.server.pause(30_000)
        far.send("answer")
        near.until_received(6)
    far.linger(0)
    far.close()
    near.until_state("CLOSE")
    near.close()
    site.end()
    seen = yield
    assert site.received(seen, script.client, "ESTABLISHED")["unanswered"] is not answered
    assert site.sent(seen, script.server, "LINGER", "ESTABLISHED", "TCP_STATE")["unanswered"] is None


@recorded(RESET)
def test_killed(script: Script) -> Test:
    """By `ss -K`, where the kernel has it (CONFIG_INET_DIAG_DESTROY)."""
    site = Site(script)
    near, far = site.pair()
    error = script.server.destroy(PORT, site.local)
    script.client.flush()  # the RST
    far.shutdown("both", may_fail=True)  # only where it was not killed
    near.shutdown("both", may_fail=True)
    far.until_state("CLOSE")
    near.until_state("CLOSE")
    near.close()
    far.close()
    site.end()
    seen = yield
    if error.errno == "EOPNOTSUPP":
        assert seen.machine.kernel.parameters("tcp_diag_destroy") is None
        pytest.skip("this kernel has no ss -K")
    site.sent(seen, script.server, "KILLED", "ESTABLISHED", "TCP_STATE")
    site.received(seen, script.client, "ESTABLISHED")


@recorded(RESET)
def test_a_full_accept_queue(script: Script) -> Test:
    """With tcp_abort_on_overflow. Each client believes that it is connected; six are. Then the listener is closed."""
    script.server.sysctl("tcp_abort_on_overflow", 1)
    site = Site(script, backlog=5)
    clients = [site.connect() for _ in range(5)]
    script.server.until_sockets(5, "==", "recv_q", state="LISTEN", lport=PORT)
    with script.server.held():
        late = [site.client.socket() for _ in range(3)]
        for near in late:
            near.start(script.server.ipv4, PORT)
        script.server.until_sockets(3, "==", state="SYN_RECV", lport=PORT)
    script.server.until_counter("TcpExtEmbryonicRsts", 2, "==")
    script.server.until_sockets(0, "==", state="SYN_RECV", lport=PORT)
    site.listener.close()
    for near in (*clients, *late):
        near.until_state("CLOSE")
        near.close()
    site.listener = site.server.listener(PORT)
    site.end()
    seen = yield
    site.check(seen)
    rows = site.rows(seen, script.server, "SENT")
    assert [(row["cause"], row["state"]) for row in rows] == [
        *[("ABORT_ON_OVERFLOW", "LISTEN")] * 2,
        *[("LISTENER_CLOSED", "ESTABLISHED")] * 6,
    ]
    assert {(row["pid"], row["comm"]) for row in rows} == {(site.server.pid, "server")}
    assert {row["cookie"] for row in rows[:2]} == {None}  # that of the listener is not the connection's
    reasons = {"INVALID_SYN"} if has_reasons(seen) else {None}
    assert {row["reason"] for row in rows[:2]} == reasons
    assert {row["state"] for row in site.rows(seen, script.client, "RECEIVED")} == {"ESTABLISHED"}


@recorded(RESET)
def test_segments_that_belong_to_nothing(script: Script) -> Test:
    """They come in the client's name. It knows nothing of them, and nothing of the answers."""
    script.server.sysctl("tcp_abort_on_overflow", 1)
    site = Site(script)
    client, server = script.client.ipv4, script.server.ipv4
    script.client.segment(client, 2001, server, PORT, flags=ACK)
    script.server.until_counter("TcpOutRsts", 1, "==")
    script.client.segment(client, 2002, server, NOBODYS_PORT, flags=ACK)
    script.server.until_counter("TcpOutRsts", 2, "==")
    script.client.segment(client, 2003, server, NOBODYS_PORT, flags=SYN)
    script.server.until_counter("TcpOutRsts", 3, "==")
    script.client.segment(client, 2004, server, NOBODYS_PORT, flags=SYN | ACK)
    script.server.until_counter("TcpOutRsts", 4, "==")
    script.client.segment(client, 2005, server, NOBODYS_PORT, flags=RST)
    script.client.segment(client, 2006, server, PORT, flags=RST)
    script.server.flush()
    site.unheard[script.client] = 4
    site.end()
    seen = yield
    site.check(seen)
    rows = site.rows(seen, script.server, "SENT")
    assert [(row["rport"], row["cause"], row["state"], row["pid"]) for row in rows] == [
        (2001, "NO_CONNECTION", "LISTEN", site.server.pid),
        (2002, "NO_CONNECTION", None, None),
        (2003, "NO_LISTENER", None, None),
        (2004, "NO_CONNECTION", None, None),
    ]
    reasons = ["TCP_FLAGS", *["NO_SOCKET"] * 3]
    if has_reasons(seen):
        assert [row["reason"] for row in rows][1:] == reasons[1:]
        assert rows[0]["reason"] in ("TCP_FLAGS", "NOT_SPECIFIED")


@recorded(RESET)
def test_bad_segments(script: Script) -> Test:
    """A second SYN for a handshake, and a SYN-ACK that acknowledges what was never sent. The RSTs are lost."""
    site = Site(script)
    with script.server.losing():
        for sequence in (1_000_000, 1_000_005):
            script.client.segment(script.client.ipv4, 2001, script.server.ipv4, PORT, sequence, flags=SYN)
        script.server.until_counter("TcpOutRsts", 1, "==")
    with script.client.losing():
        near = site.client.socket()
        near.start(script.server.ipv4, PORT)
        local = near.name()
        script.server.segment(script.server.ipv4, PORT, script.client.ipv4, local, acknowledged=1, flags=SYN | ACK)
        script.client.until_counter("TcpOutRsts", 1, "==")
        near.close()
    site.unheard = dict.fromkeys(script.hosts, 1)
    site.end()
    seen = yield
    row = site.sent(seen, script.server, "BAD_SEGMENT", "LISTEN", "INVALID_SYN")
    assert row["rport"] == 2001
    row = site.sent(seen, script.client, "BAD_SEGMENT", "SYN_SENT", "TCP_INVALID_ACK_SEQUENCE")
    assert (row["lport"], row["rport"]) == (local.ret, PORT)


def no_mptcp(site: Site, seen: Seen) -> bool:
    made = site.listener.made.ret >= 0
    assert made == seen.machine.kernel.has_type("mptcp_sock")
    return not made


def mptcp(script: Script) -> Site:
    """The server listens for MPTCP, where the kernel has it."""
    for host in script.hosts:
        host.agent("sysctl", "mptcp/enabled", 1, may_fail=True)
    return Site(script, protocol=IPPROTO_MPTCP)


def mptcp_pair(site: Site) -> tuple[Socket, Socket]:
    near = site.client.socket(protocol=IPPROTO_MPTCP, may_fail=True)
    near.connect(site.script.server.ipv4, PORT, may_fail=True)
    return near, site.listener.accept(may_fail=True)


@recorded(RESET)
def test_mptcp_that_is_closed_with_unread_data(script: Script) -> Test:
    """The RST of its subflow has the option MP_FASTCLOSE."""
    site = mptcp(script)
    near, far = mptcp_pair(site)
    near.send("never read", may_fail=True)
    far("poll", POLLIN, -1, may_fail=True)
    far("close", may_fail=True)
    near("poll", POLLIN, -1, may_fail=True)
    near("close", may_fail=True)
    site.end()
    seen = yield
    if no_mptcp(site, seen):
        pytest.skip("this kernel has no MPTCP")
    assert site.counters[script.server].counters["MPTcpExtMPFastcloseTx"] == 1
    site.sent(seen, script.server, "MPTCP", "ESTABLISHED", "TCP_ABORT_ON_CLOSE")
    site.received(seen, script.client, "ESTABLISHED")


@recorded(RESET)
def test_a_listener_for_mptcp(script: Script) -> Test:
    """It refuses a subflow of an unknown connection. TCP decides about other segments, and about a TCP client."""
    site = mptcp(script)
    client, server = script.client.ipv4, script.server.ipv4
    script.client.segment(client, 2001, server, PORT, flags=SYN, options=MP_JOIN)
    script.server.until_counter("TcpOutRsts", 1, "==")
    script.client.segment(client, 2002, server, PORT, flags=ACK)
    script.server.until_counter("TcpOutRsts", 2, "==")
    near = site.client.socket()
    near.connect(server, PORT, may_fail=True)
    far = site.listener.accept(may_fail=True)
    far.option(SOL_SOCKET, SO_LINGER, (1).to_bytes(4, "little") + bytes(4), may_fail=True)
    far("close", may_fail=True)
    near.until_state("CLOSE")
    near.close()
    site.unheard[script.client] = 2
    site.end()
    seen = yield
    if no_mptcp(site, seen):
        pytest.skip("this kernel has no MPTCP")
    site.check(seen)
    rows = site.rows(seen, script.server, "SENT")
    assert [(row["rport"], row["cause"], row["state"]) for row in rows[:2]] == [
        (2001, "MPTCP", "LISTEN"),
        (2002, "NO_CONNECTION", "LISTEN"),
    ]
    assert [(row["cause"], row["state"]) for row in rows[2:]] == [("LINGER", "ESTABLISHED")]
    assert {(row["pid"], row["comm"]) for row in rows} == {(site.server.pid, "server")}
    assert site.counters[script.server].counters["MPTcpExtMPJoinNoTokenFound"] == 1
    assert rows[0]["reason"] == ("MPTCP_RST_EMPTCP" if has_reasons(seen) else None)


@recorded(RESET)
def test_a_subflow_that_is_not_allowed(script: Script) -> Test:
    """The client opens it from a second address. The server answers the last ACK of its handshake, or the SYN."""
    site = mptcp(script)
    second, device = "192.0.2.101", ("dev", "veth0")
    script.client.exec("ip", "address", "add", f"{second}/24", *device)
    script.server.exec("ip", "neighbour", "replace", second, "lladdr", script.client.mac, *device)
    script.server.exec("ip", "mptcp", "limits", "set", "subflows", 0, may_fail=True)
    script.client.exec("ip", "mptcp", "limits", "set", "subflows", 1, may_fail=True)
    script.client.exec("ip", "mptcp", "endpoint", "add", second, *device, "subflow", may_fail=True)
    near = site.client.socket(protocol=IPPROTO_MPTCP, may_fail=True)
    connected = near.connect(site.script.server.ipv4, PORT, may_fail=True)
    far = site.listener.accept(may_fail=True)
    near.send("more", may_fail=True)
    far.receive(may_fail=True)
    script.server.until_counter("TcpOutRsts", connected + 1)  # none without MPTCP
    for end in (near, far):
        end.shutdown(may_fail=True)
    for end in (near, far):
        end.receive(may_fail=True)
        end("close", may_fail=True)
    site.end()
    seen = yield
    if no_mptcp(site, seen):
        pytest.skip("this kernel has no MPTCP")
    sent, answered = site.rows(seen, script.server, "SENT"), site.rows(seen, script.client, "SENT")
    assert [(row["cause"], row["state"], row["comm"]) for row in sent] == [("MPTCP", "LISTEN", "server")]
    assert sent[0]["reason"] == ("MPTCP_RST_EPROHIBIT" if has_reasons(seen) else None)
    (row,) = site.rows(seen, script.client, "RECEIVED")
    assert (row["laddr"], row["lport"], row["pid"]) == (second, sent[0]["rport"], site.client.pid)
    assert {(row["laddr"], row["cause"], row["pid"]) for row in answered} <= {(second, "MPTCP", site.client.pid)}
    assert [site.counters[host].counters["TcpOutRsts"] for host in script.hosts] == [len(answered), len(sent)]


@recorded(RESET)
def test_no_reset(script: Script) -> Test:
    """A connect() that is given up, one that is shut down, and connections that end by FINs."""
    site = Site(script)
    near, far = site.pair()
    for end in (near, far):
        end.shutdown()
    for end in (near, far):
        end.until_end()
        end.close()
    with script.client.losing():
        waiting = site.client.socket()
        waiting.start(script.server.ipv4, PORT)
        waiting.close()
    site.end()
    seen = yield
    site.check(seen)
    assert seen.rows(RESET) == []
    assert {site.counters[host].counters["TcpOutRsts"] for host in script.hosts} == {0}


@recorded(RESET, COUNTED)
def test_count(script: Script) -> Test:
    site = Site(script)
    for _ in range(3):
        near = site.client.socket()
        near.connect(script.server.ipv4, NOBODYS_PORT, may_fail=True)
        near.close()
    near, far = site.pair()
    far.linger(0)
    far.close()
    near.until_state("CLOSE")
    near.close()
    near, far = site.pair()
    far.option(IPPROTO_TCP, TCP_LINGER2, 120)
    far.close()
    near.until_state("CLOSE_WAIT")
    script.server.until_sockets(state="FIN_WAIT2", lport=PORT)
    near.linger(0)
    near.close()
    script.server.until_sockets(0, "==", state="FIN_WAIT2", lport=PORT)
    site.end()
    seen = yield
    site.check(seen)
    counted = {
        host: {(row["direction"], row["cause"]): row["count"] for row in seen.rows(COUNTED, host)}
        for host in script.hosts
    }
    assert counted == {
        script.server: {("SENT", "NO_LISTENER"): 3, ("SENT", "LINGER"): 1, ("RECEIVED", None): 1},
        script.client: {("RECEIVED", None): 4, ("SENT", "LINGER"): 1},
    }


@pytest.mark.parametrize("answer", ["tcp reset", "icmp port-unreachable"])
@recorded(RESET)
def test_a_rule_that_rejects(script: Script, answer: str) -> Test:
    """The RST of a rule passes no tracepoint, and TcpOutRsts does not count it. An ICMP message is no RST."""
    site = Site(script)
    rule = (
        "add table ip rejecting; add chain ip rejecting in { type filter hook input priority filter; };"
        f" add rule ip rejecting in tcp dport {NOBODYS_PORT} counter reject with {answer}"
    )
    added = script.server.exec("nft", rule, may_fail=True)
    near = site.client.socket()
    call = near.connect(script.server.ipv4, NOBODYS_PORT, may_fail=True)
    near.close()
    site.end()
    seen = yield
    if added.ret:
        assert seen.machine.kernel.parameters("nf_send_reset") is None
        pytest.skip("this kernel is built without nft_reject")
    assert call.errno == "ECONNREFUSED"
    assert [site.counters[host].counters["TcpOutRsts"] for host in script.hosts] == [0, 0]
    assert seen.rows(RESET, script.server) == []
    states = [row["state"] for row in seen.rows(RESET, script.client)]
    assert states == (["SYN_SENT"] if answer == "tcp reset" else [])


@recorded(STACKS)
def test_stacks(script: Script) -> Test:
    """Of a RST that is sent, and of one that the tool has held back."""
    site = Site(script)
    near, far = site.pair()
    far.option(IPPROTO_TCP, TCP_LINGER2, 120)
    far.close()
    script.server.until_sockets(state="FIN_WAIT2", lport=PORT)
    near.linger(0)
    near.close()
    script.server.until_sockets(0, "==", state="FIN_WAIT2", lport=PORT)
    site.end()
    seen = yield
    for host, function in ((script.client, "tcp_disconnect"), (script.server, "tcp_v4_rcv")):
        row = seen.row(STACKS, host)
        assert any(frame.startswith(f"{function}+") for frame in row["stack"]), row["stack"]


@pytest.mark.kernel
@pytest.mark.parametrize("words", [(), ("--count", "-i", "0.2")], ids=["rows", "count"])
def test_what_is_held_back_comes_while_the_tool_runs(
    lab: Lab, run_tool: type[RunningTool], words: tuple[str, ...]
) -> None:
    listener, near = (host.socket(socket.AF_INET) for host in lab.hosts[::-1])
    listener.bind((lab.server.ipv4, PORT))
    listener.listen()
    with run_tool("reset", "--netns", str(lab.server.inode), *words) as tool:
        near.connect((lab.server.ipv4, PORT))
        far, _ = listener.accept()
        with far:
            far.shutdown(socket.SHUT_RDWR)
            until(lambda: state_of(far) == "FIN_WAIT2", "the FIN to be acknowledged")
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            near.close()
            tool.wait_for(lambda rows: [row for row in rows if row["direction"] == "RECEIVED"])
            assert tool.process.poll() is None


MAX_ORPHANS = Path("/proc/sys/net/ipv4/tcp_max_orphans")


@pytest.fixture
def no_orphans() -> Iterator[Callable[[], int]]:
    """Call it: from then on each orphaned socket of this machine is one too many, until the test ends."""
    if not os.environ.get("TCPSCOPE_GUEST"):
        pytest.skip("tcp_max_orphans is the whole machine's, and others use TCP here")
    before = MAX_ORPHANS.read_text()
    yield lambda: MAX_ORPHANS.write_text("-1\n")
    MAX_ORPHANS.write_text(before)


@pytest.mark.kernel
@pytest.mark.every_kernel
@pytest.mark.parametrize("when", ["close", "close in FIN_WAIT2", "retransmission"])
def test_too_many_orphans(lab: Lab, run_tool: type[RunningTool], no_orphans: Callable[[], int], when: str) -> None:
    """close() leaves a socket that no process holds. The kernel asks then, and when a timer of it expires."""
    listener, near = (host.socket(socket.AF_INET) for host in lab.hosts[::-1])
    listener.bind((lab.server.ipv4, PORT))
    listener.listen()
    with run_tool("reset", "--netns", f"{lab.server.inode},{lab.client.inode}") as tool:
        near.connect((lab.server.ipv4, PORT))
        far, peer = listener.accept()
        far.setsockopt(socket.IPPROTO_TCP, TCP_LINGER2, 120)  # a full socket, not TIME_WAIT's
        if when == "close in FIN_WAIT2":
            far.shutdown(socket.SHUT_WR)
            until(lambda: state_of(far) == "FIN_WAIT2", "the FIN to be acknowledged")
            no_orphans()
            far.close()
        else:
            with held(lab.client):  # no ACK
                if when == "close":
                    no_orphans()
                far.send(b"never acknowledged")
                far.close()
                no_orphans()
                until(lambda: lab.server.counters()["TcpExtTCPAbortOnMemory"], "the end of the orphan")
        until(lambda: state_of(near) == "CLOSE", "the RST")
        lab.flush()
        counters = lab.server.counters()
        rows = tool.stop().rows
    sent = [row for row in rows if row["direction"] == "SENT"]
    assert (counters["TcpExtTCPAbortOnMemory"], counters["TcpOutRsts"]) == (1, len(sent))
    (row,) = [row for row in sent if row["cause"] == "NO_MEMORY"]
    sent.remove(row)
    assert {(row["cause"], row["state"]) for row in sent} <= {("NO_CONNECTION", "LISTEN")}  # answers to the held ACKs
    assert [row["netns"] for row in rows if row["direction"] == "RECEIVED"] == [lab.client.inode]
    state = "FIN_WAIT2" if when.endswith("FIN_WAIT2") else "FIN_WAIT1"
    assert (row["state"], row["pid"], row["netns"]) == (state, os.getpid(), lab.server.inode)
    assert (row["lport"], row["rport"]) == (PORT, peer[1])
    named = Kernel().enumerator("SK_RST_REASON_NO_SOCKET") is not None
    assert row["reason"] == ("TCP_ABORT_ON_MEMORY" if named else None)


def state_of(made: socket.socket) -> str:
    number = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return next(name for name, value in STATES.items() if value == number)
