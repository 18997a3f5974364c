"""What programs do with connect() that is not the usual, against what they saw."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from tcpscope.lab.hosts import held
from tests.conftest import until
from tests.puppets import Puppet
from tests.tools.connect.site import (
    CALLS,
    IPPROTO_MPTCP,
    NOWHERE,
    SILENT,
    TCP_FASTOPEN_CONNECT,
    Site,
    new_port,
    span_us,
)

pytestmark = pytest.mark.kernel

# io_uring without a library: one entry, IORING_OP_CONNECT, waited for.
URING = r"""
import mmap
def uring_connect(address, port):
    made(address)
    parameters = ctypes.create_string_buffer(120)
    ring = libc.syscall(425, 4, parameters)
    if ring < 0:
        return name(ctypes.get_errno()), None
    words = struct.unpack_from("30I", parameters)
    sq_entries, cq_entries = words[:2]
    sq_tail, sq_array, cq_head, cq_tail, cqes = words[11], words[16], words[20], words[21], words[25]
    sq = mmap.mmap(ring, sq_array + sq_entries * 4, offset=0)
    cq = mmap.mmap(ring, cqes + cq_entries * 16, offset=0x8000000)
    entries = mmap.mmap(ring, sq_entries * 64, offset=0x10000000)
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + b"\0" * 8
    place = ctypes.create_string_buffer(target, 16)
    entry = struct.pack("=BBHiQQIIQ", 16, 0, 0, s.fileno(), 16, ctypes.addressof(place), 0, 0, 7)
    entries[0:64] = entry.ljust(64, b"\0")
    sq[sq_array:sq_array + 4] = struct.pack("=I", 0)
    sq[sq_tail:sq_tail + 4] = struct.pack("=I", 1)
    begin = time.monotonic()
    if libc.syscall(426, ring, 1, 1, 1, None, 0) < 0:
        return name(ctypes.get_errno()), None
    end = time.monotonic()
    data, result, _ = struct.unpack_from("=QiI", cq, cqes)
    os.close(ring)
    assert data == 7
    return name(-result), (begin, end)
"""


def test_calls_that_say_nothing_new(site: Site) -> None:
    """EINPROGRESS, EALREADY, EISCONN: one attempt, one row."""
    port, address = site.listen(), site.target("4")
    with held(site.lab.server):
        assert site.call("started", address, port) == "EINPROGRESS"
        assert site.call("again", address, port)[0] == "EALREADY"
        assert site.call("again", address, port)[0] == "EALREADY"
    saw = site.client.ask("outcome()")
    assert site.call("again", address, port)[0] == "none"  # the first call after it says that it is
    assert site.call("again", address, port)[0] == "EISCONN"
    site.close()
    site.row(port, saw, outcome="ESTABLISHED")


def test_on_a_listener(site: Site) -> None:
    """connect() of a socket that listens is refused: not an attempt."""
    port = new_port()
    site.client.do("made('192.0.2.1').listen()")
    assert site.call("again", site.target("4"), port)[0] == "EISCONN"
    site.close()
    site.expected[port] = 0


@pytest.mark.parametrize("how", ["signal", "timeout"])
def test_an_interrupted_call(site: Site, how: str) -> None:
    """It returns early; the row comes with the outcome."""
    port, address = site.listen(), site.target("4")
    site.client.do("made(address)", address=address)
    if how == "signal":
        # Again and again: the first one may come before the call.
        interruption = "signal.signal(signal.SIGALRM, lambda *_: 0); signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)"
    else:
        interruption = "s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack('ll', 0, 50000))"
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)
    with held(site.lab.server):
        site.client.do(f"{interruption}\nbegin = time.monotonic()")
        error = site.client.ask("raw_connect(target, 16)", target=target.hex())
        site.client.do("signal.setitimer(signal.ITIMER_REAL, 0)")
        assert error == ("EINTR" if how == "signal" else "EINPROGRESS")
        assert not [row for row in site.tool.rows if row["rport"] == port]
    saw = site.client.ask("outcome()")
    site.close()
    row = site.row(port, saw, outcome="ESTABLISHED")
    if how == "timeout":
        assert row["latency_us"] >= 50_000 - 10_000  # the time is counted in jiffies


@pytest.mark.parametrize("bound", [False, True])
def test_a_socket_is_used_again_after_a_failure(site: Site, bound: bool) -> None:
    """Refused, then aborted after a second, then established: the figures are those of each attempt alone."""
    refused, port, address = new_port(), site.listen(), site.target("4")
    local = [site.lab.client.ipv4, 31002] if bound else None
    first = site.call("blocking", address, refused, local=local)
    row = site.row(refused, first, outcome="REFUSED")
    lports = [row["lport"]]
    before = site.syn_retransmissions()
    with held(site.lab.server):
        site.client.do("s.setblocking(False)")
        assert site.call("again", address, port)[0] == "EINPROGRESS"
        lports.append(site.client.ask("local()[1]"))
        until(lambda: site.retransmitted(port), "a second SYN")
        assert site.client.ask("disconnect()") == "none"
    repeated = [site.syn_retransmissions() - before]
    site.client.do("s.setblocking(True)")
    last = site.call("again", address, port)
    # What was kept back may meet this one, which then sends its SYN again. A disconnect sets the count to zero.
    repeated.append(site.client.ask("retransmissions()"))
    lports.append(site.client.ask("local()[1]"))
    site.close()
    aborted, established = site.rows(port, 2, pid=site.client.pid)
    assert [row["lport"], aborted["lport"], established["lport"]] == lports
    assert (aborted["outcome"], established["outcome"]) == ("ABORTED", "ESTABLISHED")
    assert [aborted["syn_retrans"], established["syn_retrans"]] == repeated
    assert aborted["syn_retrans"] >= 1
    assert established["latency_us"] <= span_us(last) + 1
    assert aborted["latency_us"] >= 900_000
    assert set(lports) == {31002} if bound else None not in lports


def test_the_error_of_an_earlier_attempt_is_not_its_own(site: Site) -> None:
    """A disconnect leaves ECONNRESET in the socket, and the next attempt fails before that is erased."""
    aborted, port, address = new_port(), site.listen(), site.target("4")
    how = {"local": [site.lab.client.ipv4, 31005],
           "options": [(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)]}  # fmt: skip
    assert site.call("blocking", address, port, **how)[0] == "none"
    site.client.do("first = s")
    assert site.call("started", SILENT["4"], aborted, **how) == "EINPROGRESS"
    assert site.client.ask("disconnect()") == "none"
    saw = site.call("again", address, port)
    site.client.do("first.close(), s.close()")
    assert saw[0] == "EADDRNOTAVAIL"
    site.row(aborted, outcome="ABORTED")
    established, failed = site.rows(port, 2)
    assert established["outcome"] == "ESTABLISHED"
    assert (failed["outcome"], failed["errno"], failed["syn_sent"]) == ("FAILED", "EADDRNOTAVAIL", False)


def test_a_socket_is_used_again_after_a_connection(site: Site) -> None:
    one, two, address = site.listen(), site.listen(), site.target("4")
    assert site.call("blocking", address, one)[0] == "none"
    lports = [site.client.ask("local()[1]")]
    assert site.client.ask("disconnect()") == "none"
    assert site.call("again", address, two)[0] == "none"
    lports.append(site.client.ask("local()[1]"))
    assert site.client.ask("disconnect()") == "none"
    nowhere = new_port()
    saw = site.call("again", NOWHERE["4"], nowhere)
    assert saw[0] == "ENETUNREACH"
    site.close()
    rows = [site.row(one, outcome="ESTABLISHED"), site.row(two, outcome="ESTABLISHED")]
    assert [row["lport"] for row in rows] == lports
    site.row(nowhere, saw, outcome="UNREACHABLE", lport=None, laddr="0.0.0.0")


def test_an_address_at_the_end_of_memory(site: Site) -> None:
    """An IPv4 address is shorter than one of IPv6: nothing behind it is read."""
    port = new_port()
    target = struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(NOWHERE["4"]) + bytes(8)
    site.client.do(
        "import mmap; pages = mmap.mmap(-1, 2 * mmap.PAGESIZE); made(address)\n"
        "start = ctypes.addressof(ctypes.c_char.from_buffer(pages)); end = start + mmap.PAGESIZE\n"
        "assert libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0\n"
        "pages[mmap.PAGESIZE - 16:mmap.PAGESIZE] = bytes.fromhex(target)\n"
        "error = name(libc.connect(s.fileno(), ctypes.c_void_p(end - 16), 16) and ctypes.get_errno())",
        address=NOWHERE["4"], target=target.hex(),
    )  # fmt: skip
    assert site.client.ask("error") == "ENETUNREACH"
    site.close()
    site.row(port, outcome="UNREACHABLE", errno="ENETUNREACH", raddr=NOWHERE["4"])


def test_what_is_in_use_may_not_be_disconnected(site: Site) -> None:
    """connect() with AF_UNSPEC is no attempt, whatever comes of it."""
    port = site.listen()
    assert site.call("blocking", site.target("4"), port)[0] == "none"
    site.server.do("child, _ = listeners[port].accept()", port=port)
    site.client.do("reader = threading.Thread(target=s.recv, args=(1,), daemon=True); reader.start()")
    assert site.client.ask("disconnect()") in ("none", "EBUSY")
    site.server.do("child.close()")
    site.client.do("reader.join(); s.close()")
    site.row(port, outcome="ESTABLISHED")


def test_addresses_that_are_none(site: Site) -> None:
    """Too short, or of another family: what was not given is not made up."""
    target = (socket.AF_INET.to_bytes(2, "little") + (7999).to_bytes(2, "big") + socket.inet_aton("203.0.113.9")).hex()
    site.client.do("made('192.0.2.1')")
    assert site.client.ask("raw_connect(target, 8)", target=target) == "EINVAL"
    assert site.client.ask("raw_connect(target, 16)", target="01" + target[2:] + "00" * 8) == "EAFNOSUPPORT"
    site.close()
    short, other = site.rows(None, 2, outcome="FAILED", syn_sent=False, raddr=None, lport=None, pid=site.client.pid)
    assert [short["errno"], other["errno"]] == ["EINVAL", "EAFNOSUPPORT"]


def test_fast_open(site: Site, sees_every_call: bool) -> None:
    """sendto() connects: with the cookie of the first connection the second one's SYN carries data."""
    client, address = site.lab.client, site.target("4")
    site.lab.server.sysctl("tcp_fastopen", 3)
    client.sysctl("tcp_fastopen", 1)
    port = site.listen(fastopen=16)
    for count in (1, 2):
        saw = site.call("fast", address, port)
        lport = site.client.ask("local()[1]")
        assert saw[0] == "none"
        row = site.rows(port, count, outcome="ESTABLISHED", errno="none", syn_sent=True, pid=site.client.pid)[-1]
        assert row["lport"] == lport
        site.close()
    assert client.counters()["TcpExtTCPFastOpenActive"] == 1

    # TCP_FASTOPEN_CONNECT: connect() does nothing, and the SYN leaves with the first write.
    deferred = [(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)]
    opens = client.counters()["TcpActiveOpens"]
    begin = site.call("blocking", address, port, options=deferred)
    assert begin[0] == "none"
    assert client.counters()["TcpActiveOpens"] == opens
    site.client.do("s.send(b'x'); poll = select.poll(); poll.register(s, select.POLLOUT); poll.poll()\n"
                   "end, lport = time.monotonic(), local()[1]")  # fmt: skip
    end, lport = site.client.ask("(end, lport)")
    row = site.rows(port, 3, outcome="ESTABLISHED", errno="none", syn_sent=True)[-1]
    site.close()
    assert row["lport"] == lport
    assert row["latency_us"] <= (end - begin[1]) * 1e6 + 1

    # Given up before anything was written. connect() has returned 0: no call failed.
    assert site.call("blocking", address, port, options=deferred)[0] == "none"
    site.close()
    row = site.rows(port, 4)[-1]
    assert (row["outcome"], row["errno"], row["syn_sent"]) == ("ABORTED", "none", False)

    refused = new_port()
    saw = site.call("fast", address, refused)
    site.close()
    assert saw[0] == "ECONNREFUSED"
    site.row(refused, saw, outcome="REFUSED")
    nowhere = new_port()
    assert site.call("fast", NOWHERE["4"], nowhere)[0] == "ENETUNREACH"
    site.close()
    site.expected[nowhere] = 0
    if sees_every_call:
        site.row(nowhere, outcome="UNREACHABLE", errno="ENETUNREACH", syn_sent=False, latency_us=None)


def test_mptcp(site: Site) -> None:
    """To a server of plain TCP: one subflow, which is the connection."""
    address, port = site.target("4"), site.listen()
    if not Path("/proc/sys/net/mptcp").exists():
        pytest.skip("this kernel has no MPTCP")
    enabled = site.lab.client.sysctl("mptcp/enabled")
    if enabled == "0":
        site.lab.client.sysctl("mptcp/enabled", 1)
    for call in ("blocking", "nonblocking"):
        count = 1 if call == "blocking" else 2
        saw = site.call(call, address, port, protocol=IPPROTO_MPTCP)
        lport = site.client.ask("local()[1]")
        site.close()
        assert saw[0] == "none"
        row = site.rows(port, count, outcome="ESTABLISHED", errno="none", pid=site.client.pid, comm="client")[-1]
        assert row["lport"] == lport
        assert row["latency_us"] <= span_us(saw) + 1
    refused, nowhere = new_port(), new_port()
    saw = site.call("blocking", address, refused, protocol=IPPROTO_MPTCP)
    site.close()
    assert saw[0] == "ECONNREFUSED"
    site.row(refused, saw, outcome="REFUSED")
    saw = site.call("blocking", NOWHERE["4"], nowhere, protocol=IPPROTO_MPTCP)
    site.close()
    assert saw[0] == "ENETUNREACH"
    site.row(nowhere, saw, outcome="UNREACHABLE")


def test_io_uring(site: Site, sees_every_call: bool) -> None:
    address, port, refused, nowhere = site.target("4"), site.listen(), new_port(), new_port()
    puppet = Puppet(site.lab.client, "ring")
    puppet.do(CALLS + URING)
    error, times = puppet.ask("uring_connect(address, port)", address=address, port=port)
    if times is None:
        assert error in ("ENOSYS", "EPERM")
        pytest.skip(f"this kernel has no io_uring for us: io_uring_setup() says {error}")
    assert error == "none"
    site.row(port, [error, *times], owner=puppet, outcome="ESTABLISHED")
    error, times = puppet.ask("uring_connect(address, port)", address=address, port=refused)
    assert error == "ECONNREFUSED"
    site.row(refused, [error, *times], owner=puppet, outcome="REFUSED")
    error, times = puppet.ask("uring_connect(address, port)", address=NOWHERE["4"], port=nowhere)
    assert error == "ENETUNREACH"
    site.expected[nowhere] = 0
    if sees_every_call:
        site.row(nowhere, [error, *times], owner=puppet, outcome="UNREACHABLE")
    puppet.kill()


def test_older_than_the_tool(site: Site) -> None:
    """The owner is known, the beginning is not."""
    laddr, lport = site.older.ask("local()")
    site.close(site.older)
    row = site.row(6999, owner=site.older, latency_us=None, laddr=laddr, lport=lport, syn_sent=True,
                   raddr=SILENT["4"])  # fmt: skip
    assert (row["outcome"], row["errno"]) == ("ABORTED", "none")


@pytest.mark.parametrize("ending", ["established", "reset", "closed"])
def test_both_ends_begin(site: Site, ending: str) -> None:
    """SYNs that cross on their way: each end opens actively, and there is no listener."""
    client, server, port = site.lab.client, site.lab.server, new_port()
    lport = 32000 + ["established", "reset", "closed"].index(ending)
    opens = client.counters()["TcpActiveOpens"]
    with held(client):
        with held(server):
            site.client.ask("started(address, port, local=local_)", address=server.ipv4, port=port,
                            local_=[client.ipv4, lport])  # fmt: skip
            site.server.do("s = socket.socket(); s.setblocking(False); s.bind((mine, port)); s.connect_ex((to, lport))",
                           mine=server.ipv4, port=port, to=client.ipv4, lport=lport)  # fmt: skip
        until(lambda: any(s.rport == port and s.state == "SYN_RECV" for s in client.sockets()), "the other SYN")
        if ending == "reset":
            site.server.do("s.close()")
        elif ending == "closed":
            site.close()
    if ending == "closed":
        site.row(port, outcome="ABORTED", errno="none", lport=lport, syn_sent=True)
        site.server.do("s.close()")
        return
    saw = site.client.ask("outcome()")
    site.close()
    site.server.do("s.close()")
    assert client.counters()["TcpActiveOpens"] == opens + 1
    if ending == "established":
        assert saw[0] == "none"
        site.row(port, saw, outcome="ESTABLISHED", lport=lport, syn_sent=True)
    else:
        assert saw[0] == "ECONNRESET"
        site.row(port, saw, outcome="RESET", lport=lport, syn_sent=True)


def test_together(site: Site) -> None:
    site.compare_others()
