"""bpf/child.bpf.h: a child belongs to the listener that the kernel has chosen, not to the one that has its address."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.filters import Filter
from tcpscope.kernel.features import Kernel
from tcpscope.lab.hosts import Lab
from tcpscope.session import Session
from tests import steer
from tests.conftest import until
from tests.lacks import built_without
from tests.puppets import Puppet

pytestmark = [pytest.mark.kernel, pytest.mark.every_kernel]

PORT, OTHER = 7001, 7002
LISTEN = (
    "listener = socket.socket(); listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
    "listener.bind(('127.0.0.1', port)); listener.listen()"
)
STATE, CLOSE = "client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]", 7
CONNECT = "client = socket.create_connection(('127.0.0.1', port))"


class Children:
    """The rows of the children of a namespace."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.rows: list[Any] = []

    def until_states(self, states: list[str]) -> list[Any]:
        """Their rows, once they have been in these states, without those of the part before."""
        assert self._session.layout is not None
        decode = self._session.layout.decoder().rows

        def there() -> bool:
            for batch in self._session.batches():
                self.rows += [row for row in decode(batch) if row.lport in (PORT, OTHER) and row.rport]
            return [row.new_state for row in self.rows] == states

        until(there, f"children in {states}")
        rows, self.rows = self.rows, []
        return rows


def test_a_program_has_chosen_the_listener(lab: Lab) -> None:
    """sk_lookup: another listener has the connection's address."""
    named, steered, client = Puppet(lab.client, "named"), Puppet(lab.client, "steered"), Puppet(lab.client)
    with Session("transition", "transition", Filter(netns=lab.client.inode)) as session:
        children = Children(session)
        named.do(LISTEN, port=PORT)
        steered.do(LISTEN, port=OTHER)
        steered.do(Path(steer.__file__).read_text() + "link = to(listener.fileno())")
        client.do(CONNECT, port=PORT)
        rows = children.until_states(["SYN_RECV", "ESTABLISHED"])
        assert {(row.lport, row.comm, row.pid) for row in rows} == {(PORT, "steered", steered.pid)}
        steered.do("os.close(link)")
        client.do(CONNECT.replace("client", "second"), port=PORT)
        rows = children.until_states(["SYN_RECV", "ESTABLISHED"])
        assert {(row.lport, row.comm, row.pid) for row in rows} == {(PORT, "named", named.pid)}
        session.end()


def test_a_transparent_proxy(lab: Lab) -> None:
    """TPROXY: the connection's address is another host's. A listener of this host has its port, and does not get it."""
    elsewhere, mark = "198.51.100.1", "7"
    for host, *words in (
        (lab.client, "ip", "route", "add", f"{elsewhere}/32", "via", lab.server.ipv4),
        (lab.server, "ip", "rule", "add", "fwmark", mark, "lookup", "100"),
        (lab.server, "ip", "route", "add", "local", "default", "dev", "lo", "table", "100"),
        (lab.server, "nft", "add table ip proxy"),
        (lab.server, "nft", "add chain ip proxy before { type filter hook prerouting priority mangle; }"),
    ):
        assert host.spawn(words).wait() == 0, words
    rule = f"add rule ip proxy before tcp dport {PORT} tproxy to :{OTHER} meta mark set {mark}"
    if lab.server.spawn(["nft", rule]).wait():
        assert built_without("NFT_TPROXY", "nft_tproxy")
        pytest.skip("this kernel is built without nft_tproxy")
    named, proxy, client = Puppet(lab.server, "named"), Puppet(lab.server, "proxy"), Puppet(lab.client)
    with Session("transition", "transition", Filter(netns=lab.server.inode)) as session:
        children = Children(session)
        any_address = LISTEN.replace("127.0.0.1", "0.0.0.0")
        named.do(any_address, port=PORT)
        transparent = "socket.SOL_IP, 19, 1"  # IP_TRANSPARENT
        proxy.do(any_address.replace("listener.bind", f"listener.setsockopt({transparent}); listener.bind"), port=OTHER)
        client.do(CONNECT.replace("127.0.0.1", elsewhere), port=PORT)
        rows = children.until_states(["SYN_RECV", "ESTABLISHED"])
        assert {(row.laddr, row.lport, row.comm, row.pid) for row in rows} == {(elsewhere, PORT, "proxy", proxy.pid)}
        session.end()


def test_a_port_that_is_handed_over(lab: Lab) -> None:
    """A reload: the new process listens before the old one closes. Each child belongs to whose queue it is in."""
    old, new, client = Puppet(lab.client, "old"), Puppet(lab.client, "new"), Puppet(lab.client)
    with Session("transition", "transition", Filter(netns=lab.client.inode)) as session:
        children = Children(session)
        old.do(LISTEN, port=PORT)
        client.do(CONNECT, port=PORT)
        assert {row.pid for row in children.until_states(["SYN_RECV", "ESTABLISHED"])} == {old.pid}
        new.do(LISTEN, port=PORT)
        old.do("child, _ = listener.accept(); listener.close()")
        client.do(CONNECT.replace("client", "second"), port=PORT)
        assert {row.pid for row in children.until_states(["SYN_RECV", "ESTABLISHED"])} == {new.pid}
        session.end()


def test_migration(lab: Lab) -> None:
    """A listener closes while a connection waits. If the kernel migrates it, the process that accepts it owns it."""
    try:
        lab.client.sysctl("tcp_migrate_req", 1)
    except UnsupportedError as error:
        pytest.skip(str(error))
    old, new, client = Puppet(lab.client, "old"), Puppet(lab.client, "new"), Puppet(lab.client)
    with Session("transition", "transition", Filter(netns=lab.client.inode)) as session:
        children = Children(session)
        old.do(LISTEN, port=PORT)
        client.do(CONNECT, port=PORT)
        assert {row.pid for row in children.until_states(["SYN_RECV", "ESTABLISHED"])} == {old.pid}
        new.do(LISTEN, port=PORT)
        old.do("listener.close()")
        new.do("listener.settimeout(0.1); child = None")

        def is_settled() -> bool:
            new.do("try: child, _ = listener.accept()\nexcept TimeoutError: pass")
            return bool(new.ask("child is not None")) or client.ask(STATE) == CLOSE

        until(is_settled, "the connection to be accepted, or reset")
        if client.ask(STATE) == CLOSE:  # 5.10.0-46 has the switch, and nothing that it switches
            assert Kernel().parameters("reuseport_migrate_sock") is None
            pytest.skip("this kernel does not migrate connections")
        client.do("client.close()")
        assert {row.pid for row in children.until_states(["CLOSE_WAIT"])} == {new.pid}
        session.end()


def test_a_further_subflow(lab: Lab) -> None:
    """The kernel opens it when it likes; it belongs to the process of the MPTCP socket. Witness: the process itself."""
    server, client = Puppet(lab.server), Puppet(lab.client, "client")
    try:
        server.do("listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)")
    except AssertionError as error:
        assert "Protocol not supported" in str(error) and not Kernel().has_type("mptcp_sock")
        pytest.skip("this kernel has no MPTCP")
    second = "192.0.2.101"
    for host, *words in (
        (lab.client, "addr", "add", f"{second}/24", "dev", "veth0"),
        (lab.client, "mptcp", "limits", "set", "subflows", "2", "add_addr_accepted", "2"),
        (lab.server, "mptcp", "limits", "set", "subflows", "2", "add_addr_accepted", "2"),
        (lab.client, "mptcp", "endpoint", "add", second, "dev", "veth0", "subflow"),
    ):
        assert host.spawn(["ip", *words]).wait() == 0, words
    with Session("transition", "transition", Filter(netns=lab.client.inode)) as session:
        assert session.layout is not None
        decode = session.layout.decoder().rows
        server.do("listener.bind((address, port)); listener.listen()", address=lab.server.ipv4, port=PORT)
        client.do(
            "client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262); client.connect((address, port))",
            address=lab.server.ipv4,
            port=PORT,
        )
        server.do("child, _ = listener.accept(); child.send(b'x')")
        client.do("client.recv(1); client.send(b'x')")
        # The server does not know the way back to the second address: the subflow stays in SYN_SENT.
        until(lambda: any(each.laddr == second for each in lab.client.sockets()), "a second subflow")
        session.end()
        rows = [row for batch in session.batches() for row in decode(batch)]
    assert {row.laddr for row in rows} == {lab.client.ipv4, second}
    assert {(row.comm, row.pid) for row in rows} == {("client", client.pid)}
