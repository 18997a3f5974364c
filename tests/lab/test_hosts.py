"""Two hosts: made, usable at once, apart from each other and from the machine, gone afterwards."""

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tcpscope.errors import UnsupportedError, UsageError
from tcpscope.lab.hosts import Lab, _flush_backlogs, held
from tcpscope.lab.namespaces import NAMES, start_time
from tests.lacks import no_netem

FAMILIES = [socket.AF_INET, socket.AF_INET6]
DEADLINE = 60.0  # seconds; far more than the slowest guest needs


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def listen(lab: Lab, family: int, backlog: int = 16) -> tuple[socket.socket, tuple[str, int]]:
    listener = lab.server.socket(family)
    listener.bind((lab.server.address(family), 0))
    listener.listen(backlog)
    return listener, listener.getsockname()[:2]


@pytest.mark.parametrize("family", FAMILIES)
def test_connects_at_once_in_both_directions(lab: Lab, family: int) -> None:
    listener, address = listen(lab, family)
    client = lab.client.socket(family)
    client.connect(address)
    accepted, peer = listener.accept()
    assert peer[0] == lab.client.address(family)
    client.sendall(b"there")
    assert accepted.recv(5) == b"there"
    accepted.sendall(b"back")
    assert client.recv(4) == b"back"
    for made in (accepted, client, listener):
        made.close()


def test_a_program_runs_in_the_host(lab: Lab) -> None:
    child = lab.server.spawn(["readlink", "/proc/self/ns/net"], stdout=subprocess.PIPE, text=True)
    assert child.communicate()[0].strip() == f"net:[{lab.server.inode}]"
    assert lab.server.inode != lab.client.inode
    with pytest.raises(FileNotFoundError):
        lab.server.spawn(["/nonexistent"])


@pytest.mark.root
def test_sysctls_are_the_hosts_own() -> None:
    outside = Path("/proc/sys/net/ipv4/tcp_syncookies").read_text()
    with Lab() as lab:
        elsewhere = lab.client.sysctl("tcp_syncookies")
        for value in ("0", "2", "1"):
            assert lab.server.sysctl("tcp_syncookies", value) == value
            assert lab.client.sysctl("tcp_syncookies") == elsewhere
        for name in ("somaxconn", "tcp_max_syn_backlog", "tcp_abort_on_overflow", "tcp_synack_retries"):
            assert lab.server.sysctl(name, 1) == "1"
        assert lab.server.sysctl("ipv6/conf/veth0/accept_ra") == "0"
        with pytest.raises(UnsupportedError, match="tcp_no_such"):
            lab.server.sysctl("tcp_no_such", 1)
        with pytest.raises(UsageError, match="many"):
            lab.server.sysctl("tcp_syncookies", "many")
    assert Path("/proc/sys/net/ipv4/tcp_syncookies").read_text() == outside


def test_counters_are_those_of_the_host(lab: Lab) -> None:
    before = lab.server.counters()
    listener, address = listen(lab, socket.AF_INET)
    lab.client.socket(socket.AF_INET).connect(address)
    until(lambda: lab.server.counters()["TcpPassiveOpens"] - before["TcpPassiveOpens"] == 1)
    after = lab.server.counters()
    assert {"TcpExtListenOverflows", "TcpExtTCPReqQFullDrop", "Ip6InReceives"} <= set(after)

    # The same file, read by a process whose only thread lives there.
    child = lab.server.spawn(["cat", "/proc/net/snmp"], stdout=subprocess.PIPE, text=True)
    names, values = (line.split() for line in child.communicate()[0].splitlines() if line.startswith("Tcp:"))
    seen = dict(zip(names[1:], values[1:], strict=True))
    later = lab.server.counters()
    for name in ("PassiveOpens", "InSegs"):
        assert after[f"Tcp{name}"] <= int(seen[name]) <= later[f"Tcp{name}"]
    listener.close()


@pytest.mark.kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_held_packets_leave_in_order(lab: Lab, family: int) -> None:
    listener, address = listen(lab, family)
    clients = [lab.client.socket(family) for _ in range(10)]
    retransmitted = lab.client.counters()["TcpRetransSegs"]
    with held(lab.server):
        for number, client in enumerate(clients, start=1):
            client.setblocking(False)
            assert client.connect_ex(address) == errno.EINPROGRESS
            until(partial(has_requests, lab, number))
        assert select.select([], clients, [], 0)[1] == []  # not one of them is connected
    for client in clients:
        assert select.select([], [client], [], DEADLINE)[1] == [client]
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    accepted = [listener.accept()[1][:2] for _ in clients]
    assert sorted(accepted) == sorted(client.getsockname()[:2] for client in clients)
    if lab.client.counters()["TcpRetransSegs"] == retransmitted:  # a slow guest takes over a second
        assert accepted == [client.getsockname()[:2] for client in clients]
    for made in (*clients, listener):
        made.close()


def has_requests(lab: Lab, number: int) -> bool:
    return sum(found.state == "SYN_RECV" for found in lab.server.sockets()) == number


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline


@pytest.mark.kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_link_moves_nothing_and_thaws(family: int) -> None:
    with Lab() as lab:
        listener, address = listen(lab, family)
        client = lab.client.socket(family)
        client.connect(address)
        accepted, _ = listener.accept()
        lab.freeze()
        frozen = lab.server.counters()["TcpInSegs"]
        client.send(b"x")
        assert select.select([accepted], [], [], 0)[0] == []
        assert lab.server.counters()["TcpInSegs"] == frozen
        lab.thaw()
        assert select.select([accepted], [], [], DEADLINE)[0] == [accepted]  # retransmitted
        assert accepted.recv(2) == b"x"
        again = lab.client.socket(family)
        again.connect(address)


@pytest.mark.kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_blackhole_swallows(lab: Lab, family: int) -> None:
    prefix, inside = {
        socket.AF_INET: ("198.51.100.0/24", "198.51.100.7"),
        socket.AF_INET6: ("2001:db8:51::/64", "2001:db8:51::7"),
    }[socket.AddressFamily(family)]
    lab.client.blackhole(prefix)
    before = lab.server.counters(), lab.client.counters()
    out, into = "UdpOutDatagrams", "IpInReceives"
    if family == socket.AF_INET6:  # on its own account IPv6 sends, too, but no UDP
        out, into = "Udp6OutDatagrams", "Ip6InReceives"
    with lab.server.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"x", (inside, 9))
        lab.client.run(_flush_backlogs)
    after = lab.server.counters(), lab.client.counters()
    assert after[0][out] - before[0][out] == 1
    assert after[1][into] - before[1][into] >= 1
    assert after[0]["IcmpInMsgs"] == before[0]["IcmpInMsgs"]
    assert after[0]["Icmp6InDestUnreachs"] == before[0]["Icmp6InDestUnreachs"]


@pytest.mark.kernel
def test_netem_delays_and_loses_or_says_that_it_cannot() -> None:
    with Lab() as lab:
        if no_netem():
            with pytest.raises(UnsupportedError, match="netem"):
                lab.client.netem(delay_ms=40)
            lab.client.netem()  # what is not there can be removed
            pytest.skip("this kernel is built without sch_netem")
        _, address = listen(lab, socket.AF_INET)
        client = lab.client.socket(socket.AF_INET)
        lab.client.netem(delay_ms=40)
        started = time.monotonic()
        client.connect(address)
        assert time.monotonic() - started >= 0.040
        until(lambda: lab.server.counters()["TcpPassiveOpens"] == 1)  # the last ACK is not under way any more
        lab.client.netem(loss_percent=100)
        sent = lab.server.counters()["TcpInSegs"]
        client.send(b"x")
        lab.client.run(_flush_backlogs)
        assert lab.server.counters()["TcpInSegs"] == sent
        lab.client.netem()
        lab.client.netem()  # twice is no error
        until(lambda: lab.server.counters()["TcpInSegs"] > sent)  # the lost byte comes again


def test_two_labs_at_once_do_not_meet(lab: Lab) -> None:
    with Lab() as other:
        assert len({host.netns for host in (*lab.hosts, *other.hosts)}) == 4
        ours, theirs = lab.server.socket(socket.AF_INET), other.server.socket(socket.AF_INET)
        for listener in (ours, theirs):
            listener.bind(("192.0.2.2", 9999))  # the same address in both
            listener.listen()
        other.client.socket(socket.AF_INET).connect(("192.0.2.2", 9999))
        assert select.select([ours, theirs], [], [], DEADLINE)[0] == [theirs]
        ours.close()
    listener, address = listen(lab, socket.AF_INET)
    lab.client.socket(socket.AF_INET).connect(address)  # the first one goes on
    listener.close()


@pytest.mark.root
def test_nothing_is_left_behind() -> None:
    def traces() -> tuple[object, ...]:
        devices = sorted(Path("/sys/class/net").iterdir())
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "net:[" in line]
        return devices, mounts, sorted(NAMES.glob(f"tcpscope-{os.getpid()}-*")), threading.active_count()

    before = traces()
    with pytest.raises(RuntimeError, match="in the middle"), Lab() as lab:
        child = lab.server.spawn(["sleep", "1000"])
        made = lab.client.socket(socket.AF_INET)
        raise RuntimeError("in the middle")
    assert traces() == before
    assert child.returncode == -signal.SIGKILL
    assert made.fileno() == -1
    assert not Path(f"/proc/{child.pid}").exists()


KILLED = """
import sys
from tcpscope.lab.hosts import Lab
with Lab() as lab:
    child = lab.server.spawn(["sleep", "1000"])
    print(lab.client.netns, lab.server.netns, child.pid, flush=True)
    sys.stdin.read()
"""


def test_a_killed_lab_is_removed_by_the_next_one(lab: Lab) -> None:
    victim = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    *names, child = victim.stdout.readline().split()
    victim.kill()
    victim.communicate()
    assert all((NAMES / name).exists() for name in names)
    until(lambda: start_time(int(child)) is None)  # PR_SET_PDEATHSIG
    with Lab():
        assert not any((NAMES / name).exists() for name in names)
        assert all((NAMES / host.netns).exists() for host in lab.hosts)


@pytest.mark.root
def test_closing_twice_is_no_error() -> None:
    with Lab() as lab:
        pass
    lab.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="is closed"):
        lab.server.counters()
