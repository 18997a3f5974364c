"""The sock_diag dump against getsockopt and getsockname of sockets that we made ourselves."""

import socket
import struct

import pytest

from tcpscope.lab.hosts import Lab

pytestmark = pytest.mark.kernel

SO_COOKIE = 57


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_listener_and_connection(family: socket.AddressFamily) -> None:
    with Lab() as lab:
        address = lab.server.address(family)
        listener = lab.server.socket(family)
        listener.bind((address, 0))
        listener.listen(7)
        port = listener.getsockname()[1]
        client = lab.client.socket(family)
        client.connect((address, port))
        client.sendall(b"hello")
        lab.freeze()  # the five bytes have arrived

        by_state = {found.state: found for found in lab.server.sockets()}
        assert set(by_state) == {"LISTEN", "ESTABLISHED"}
        listening, child = by_state["LISTEN"], by_state["ESTABLISHED"]
        assert (listening.laddr, listening.lport, listening.rport) == (address, port, 0)
        assert (listening.recv_q, listening.send_q) == (1, 7)
        assert listening.inode > 0
        cookie = struct.unpack("=Q", listener.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]
        assert listening.cookie == cookie
        assert (child.raddr, child.rport) == client.getsockname()[:2]
        assert (child.family, child.recv_q, child.inode) == (family, 5, 0)  # nobody has accepted it

        (mine,) = lab.client.sockets()
        assert (mine.state, mine.lport, mine.rport) == ("ESTABLISHED", child.rport, port)
