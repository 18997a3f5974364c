"""A mix of connections of all kinds, many at a time: what tools are held against the kernel's counters with.

The order is the same each time (a fixed seed); what the programs saw comes back. One program in each host of a lab:
this file is both of them, and the class that runs them. They need nothing but the standard library.

    with Lab() as lab:
        saw = Mix(lab).run(2000)
"""

from __future__ import annotations

import errno
import json
import random
import select
import socket
import struct
import subprocess
import sys
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcpscope.lab.hosts import Lab

PORT = 9000
REFUSED_PORT = 9001
SILENT = {"4": "198.51.100.77", "6": "2001:db8:51::77", "mapped": "::ffff:198.51.100.77"}
FAMILIES = tuple(SILENT)
AT_ONCE = 100
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends a RST

# What is done, and how often among a hundred.
KINDS = {
    "client closes": 30,  # one exchange, then the client closes first
    "server closes": 20,  # the server closes when it has been told to
    "server resets": 10,
    "client resets": 10,
    "unread": 5,  # the client closes with data unread
    "kept": 5,  # stays open until everything else has ended
    "refused": 10,
    "silent": 5,  # blackholed: times out
    "given up": 3,  # blackholed, and closed while it waits
    "shut down": 2,  # blackholed, and shut down while it waits
}


@dataclass(frozen=True)
class Saw:
    """What the programs saw: connections by kind, by the errno that the clients got, and how many were accepted."""

    kinds: Counter[str]
    errnos: Counter[str]
    accepted: int


class Mix:
    """The programs. Connections are to the port `port` of the server; `run` may be called once."""

    port = PORT

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        lab.server.blackhole("198.51.100.0/24")
        lab.server.blackhole("2001:db8:51::/64")
        for host in lab.hosts:
            host.sysctl("tcp_tw_reuse", 0)
        lab.server.sysctl("somaxconn", 4096)
        lab.server.sysctl("tcp_max_syn_backlog", 4096)

    def run(self, number: int, seed: int = 1) -> Saw:
        """Returns when every connection has ended."""
        server = self._start(self.lab.server, "server")
        assert server.stdout is not None and server.stdin is not None
        assert server.stdout.readline() == b"ready\n"
        targets = {"4": self.lab.server.ipv4, "6": self.lab.server.ipv6, "mapped": f"::ffff:{self.lab.server.ipv4}"}
        client = self._start(self.lab.client, "client", str(number), str(seed), json.dumps(targets))
        out, _ = client.communicate()
        assert client.returncode == 0
        answer = json.loads(out)
        out, _ = server.communicate(b"end\n")
        assert server.returncode == 0
        return Saw(Counter(answer["kinds"]), Counter(answer["errnos"]), json.loads(out)["accepted"])

    @staticmethod
    def _start(host: Any, *arguments: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-I", "-S", __file__, *arguments]
        started: subprocess.Popen[bytes] = host.spawn(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return started


# The programs


def serve() -> None:
    """Accept everything. A client's first byte says what becomes of its connection."""
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", PORT))
    listener.listen(4096)
    listener.setblocking(False)
    print("ready", flush=True)
    poll = select.epoll()
    poll.register(listener, select.EPOLLIN)
    poll.register(sys.stdin, select.EPOLLIN)
    children: dict[int, socket.socket] = {}
    accepted, asked = 0, False
    while not asked or children or not drained(listener):
        for number, _ in poll.poll(None if not asked or children else 0):
            if number == listener.fileno():
                while (child := accept(listener)) is not None:
                    accepted += 1
                    child.setblocking(False)
                    children[child.fileno()] = child
                    poll.register(child, select.EPOLLIN)
            elif number == sys.stdin.fileno():
                asked = True
                poll.unregister(sys.stdin)
            elif (child := children.get(number)) is not None and not answer(child):
                del children[number]
                child.close()
    print(json.dumps({"accepted": accepted}))


def drained(listener: socket.socket) -> bool:
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    return not poll.poll(0)


def accept(listener: socket.socket) -> socket.socket | None:
    try:
        return listener.accept()[0]
    except BlockingIOError:
        return None


def answer(child: socket.socket) -> bool:
    """False when the connection is over on this side."""
    try:
        said = child.recv(4096)
        if not said:
            return False
        if said == b"reset":
            child.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            return False
        child.send(said)
    except OSError:
        return False
    return said != b"close"


SAYS = {"server closes": b"close", "server resets": b"reset"}


class Client:
    """One connection: begun when made, then moved on by what poll() says."""

    def __init__(self, kind: str, family: str, target: str) -> None:
        self.kind, self.connected = kind, False
        self.socket = socket.socket(socket.AF_INET if family == "4" else socket.AF_INET6)
        self.socket.setblocking(False)
        if kind == "silent":  # all others have time, on slow machines too
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
        port = REFUSED_PORT if kind == "refused" else PORT
        self.began = self.socket.connect_ex((target, port))

    def give_up(self) -> None:
        if self.kind == "shut down":
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def move(self) -> bool:
        """Go on as far as it goes. False when it is over; `error` is what connect() came to."""
        if not self.connected:
            self.error = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if self.error:
                return False
            self.connected = True
            self.socket.send(SAYS.get(self.kind, b"hello"))
            return True
        if self.kind == "unread":
            return False
        try:
            heard = self.socket.recv(4096)
        except OSError:
            return False
        if self.kind == "client resets":  # not before: a RST may overtake the ACK that makes the child
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        return bool(heard) and self.kind == "server closes"


def connect(number: int, seed: int, targets: dict[str, str]) -> None:
    chance = random.Random(seed)
    todo = deque(chance.choices(list(KINDS), list(KINDS.values()), k=number))
    kinds, errnos = Counter(todo), Counter[str]()
    poll, running, kept, waiting = select.epoll(), dict[int, Client](), list[Client](), deque[Client]()
    silent = 0
    while todo or running or waiting:
        while todo and len(running) - silent < AT_ONCE:
            kind, family = todo.popleft(), chance.choice(FAMILIES)
            unanswered = kind in ("silent", "given up", "shut down")
            client = Client(kind, family, (SILENT if unanswered else targets)[family])
            if client.began not in (0, errno.EINPROGRESS):
                raise OSError(client.began, kind)
            if kind in ("given up", "shut down"):
                waiting.append(client)
                continue
            silent += kind == "silent"
            running[client.socket.fileno()] = client
            poll.register(client.socket, select.EPOLLIN | select.EPOLLOUT)
        while waiting and (len(waiting) > 5 or not todo):
            waiting.popleft().give_up()
            errnos["given up"] += 1
        for fd, _ in poll.poll() if running else ():
            client = running[fd]
            was_connected = client.connected
            goes_on = client.move()
            if not was_connected:
                errnos[errno.errorcode.get(client.error, "none")] += 1
                poll.modify(fd, select.EPOLLIN)
            if goes_on:
                continue
            poll.unregister(fd)
            del running[fd]
            silent -= client.kind == "silent"
            if client.kind == "kept" and client.connected:
                kept.append(client)
            else:
                client.socket.close()
    for client in kept:
        client.socket.close()
    print(json.dumps({"kinds": kinds, "errnos": errnos}))


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve()
    else:
        connect(int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
