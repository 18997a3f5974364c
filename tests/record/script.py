"""Scenarios, written down before they are played: what a test says is done becomes a line for the actor (actor/).

    @recorded(STATES)
    def test_refused(script):
        client = script.client.process("client")
        made = client.socket()
        call = made.connect(script.server.ipv4, 7000, may_fail=True)
        made.close()
        seen = yield                # from here on it has been played, on one kernel
        assert call.errno == "ECONNREFUSED"
        assert [row["pid"] for row in seen.rows(STATES, script.client)] == [client.pid] * 2

A `Call` has what came of it once it was played: `ret`, `errno`, `data`, and `begin_us` and `end_us`, the clock before
and after the system call (CLOCK_MONOTONIC, in which the kernel stamps its events). Before that it can be given to
another call in place of a number: a port that the kernel will have chosen, say.
"""

from __future__ import annotations

import errno
import re
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tcpscope.lab.sockets import STATES as _STATES
from tcpscope.lab.sockets import Socket as Found
from tests.record.watch import Watch

AF_INET, AF_INET6 = int(socket.AF_INET), int(socket.AF_INET6)
SOL_SOCKET, SO_ERROR, SO_REUSEADDR, SO_LINGER, SO_REUSEPORT = 1, 4, 2, 13, 15
IPPROTO_TCP, IPPROTO_IPV6, IPV6_V6ONLY = 6, 41, 26
TCP_NODELAY, TCP_SYNCNT, TCP_LINGER2, TCP_FASTOPEN = 1, 7, 8, 23
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_REPAIR_ON, TCP_REPAIR_OFF_NO_WP = 1, -1
MSG_FASTOPEN = 0x20000000
POLLIN, POLLOUT = 1, 4
SENDTO, RECVFROM = 44, 45  # the system calls that send() and recv() make, on x86-64
TIOCOUTQ, FIONREAD = 0x5411, 0x541B
STATES = {name: number for number, name in _STATES.items() if number != 12}
PATIENCE_S = 100
"""How long `until` waits, in the time of the machine that plays."""
NOBODYS_MAC = "02:00:c0:00:02:ff"

_SAFE = re.compile(r"[^!-#&-~]")

# Fields of struct tcp_info: include/uapi/linux/tcp.h.
_U8 = {"state": 0, "ca_state": 1, "backoff": 4}
_U32 = {
    "rto_us": 8,
    "unacked": 24,
    "sacked": 28,
    "lost": 32,
    "ssthresh": 76,
    "cwnd": 80,
    "srtt_us": 68,
    "retrans": 100,
    "tx_segs": 136,
    "rx_segs": 140,
    "min_rtt_us": 148,
    "rx_data_segs": 152,
    "tx_data_segs": 156,
}
_U64 = {"acked": 120, "received": 128, "rwnd_us": 176, "tx_bytes": 200, "bytes_retrans": 208}


class ScriptError(Exception):
    """A script that cannot be, or something asked of a call that was not played."""


def encoded(word: object) -> str:
    """A word of a line: without blanks, dollar and percent signs, and what is no ASCII."""
    if isinstance(word, Call | Reference):
        return str(word)
    text = "".join(_SAFE.sub(lambda found: f"%{ord(found[0]):02X}", chr(byte)) for byte in str(word).encode())
    return text or "%20"


@dataclass(frozen=True)
class Reference:
    """What a call will return, and so much more."""

    number: int
    more: int = 0

    def __str__(self) -> str:
        return f"${self.number}{f'{self.more:+d}' if self.more else ''}"


class Call:
    """A step of a script, and what came of it."""

    def __init__(self, script: Script, number: int) -> None:
        self._script, self.number = script, number

    def __str__(self) -> str:
        return str(Reference(self.number))

    def __add__(self, more: int) -> Reference:
        return Reference(self.number, more)

    def join(self) -> Call:
        """Of a call that is not waited for (`wait=False`): wait for it now."""
        self._script.conduct("join", self.number)
        return self

    @property
    def _came(self) -> Came:
        return self._script.came(self.number)

    @property
    def ret(self) -> int:
        """What it returned: of a call that makes or asks, the port, the number, the size; -1 for an error."""
        return self._came.ret

    @property
    def errno(self) -> str:
        """The error's name, "none" without one."""
        number = self._came.error
        return errno.errorcode[number] if number else "none"

    @property
    def begin_us(self) -> float:
        return self._came.begin_ns / 1000

    @property
    def end_us(self) -> float:
        return self._came.end_ns / 1000

    @property
    def took_us(self) -> float:
        return self.end_us - self.begin_us

    @property
    def data(self) -> str:
        """An address, the bytes in hex: what the command says."""
        return self._came.data

    @property
    def info(self) -> dict[str, int]:
        """TCP_INFO."""
        raw = bytes.fromhex(self.data)
        found = {name: int.from_bytes(raw[at : at + 4], "little") for name, at in _U32.items()}
        found |= {name: int.from_bytes(raw[at : at + 8], "little") for name, at in _U64.items()}
        return found | {name: raw[at] for name, at in _U8.items()}

    @property
    def counters(self) -> Counter[str]:
        """Every SNMP counter of a host, by the name that `nstat` gives it; those that are zero are missing."""
        return Counter({name: int(value) for name, _, value in (word.partition("=") for word in self.data.split())})

    @property
    def sockets(self) -> list[Found]:
        """What `ss -tan` shows."""
        found = []
        for line in filter(None, self.data.split(";")):
            family, state, laddr, lport, raddr, rport, *numbers = line.split(",")
            found.append(Found(int(family), state, laddr, int(lport), raddr, int(rport), *map(int, numbers)))
        return found


@dataclass(frozen=True)
class Came:
    """What the actor wrote down of a call."""

    begin_ns: int
    end_ns: int
    ret: int
    error: int
    data: str


class Script:
    """The steps of one scenario, in their order. `client` and `server` are its hosts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._played: Any = None
        self._processes = 0
        self._tools = False
        self._premises: list[tuple[Call, int, str]] = []
        self.client = Host(self, "client", 0)
        self.server = Host(self, "server", 1)
        self.client.peer, self.server.peer = self.server, self.client
        for host in self.hosts:
            host.agent = Process(self, host, f"{host.role}-agent")

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.client, self.server

    @property
    def text(self) -> str:
        if not self._tools:
            raise ScriptError("nothing was done")
        return "".join(f"{line}\n" for line in self.lines)

    @contextmanager
    def older(self) -> Iterator[None]:
        """What is done inside of the block is done before the tools run. It comes first in a scenario."""
        if self._tools:
            raise ScriptError("the tools run already")
        self._tools = True
        yield
        self.conduct("tools")

    def rest(self) -> Call:
        """Wait until all other scenarios have ended or wait, too: `moment()` comes soon. For what does not last."""
        return self.conduct("rest")

    def moment(self) -> Call:
        """Wait until the tools that only look (`Watch(..., moment=True)`) have looked. At most once in a scenario."""
        if not self._tools:
            self._tools = True
            self.conduct("tools")
        return self.conduct("moment")

    def stay(self) -> None:
        """Let its processes live until the tools have ended: for what these look at last. The end of a scenario."""
        self.conduct("played")

    def step(self, process: object, mode: str, *words: object) -> Call:
        if not self._tools:
            self._tools = True
            self.conduct("tools")
        call = Call(self, len(self.lines))
        self.lines.append(f"{call.number} {process} {mode} {' '.join(map(encoded, words))}")
        return call

    def conduct(self, *words: object) -> Call:
        """A step of the conductor itself."""
        call = Call(self, len(self.lines))
        self.lines.append(f"{call.number} * ! {' '.join(map(encoded, words))}")
        return call

    def next_process(self) -> int:
        self._processes += 1
        return self._processes - 1

    def suppose(self, call: Call, ret: int, what: str) -> None:
        """That the machine lets a call return this, which no tool has a hand in. What is played here is played again
        if it did not, as `what` says."""
        self._premises.append((call, ret, what))

    # When it has been played

    def resolve(self, played: Any) -> None:
        """From now on calls have what came of them."""
        self._played = played

    def came(self, number: int) -> Came:
        if self._played is None:
            raise ScriptError("it is asked before the yield what came of a call")
        came: Came = self._played.calls[number]
        return came

    @property
    def unmet(self) -> list[str]:
        """Of what was supposed."""
        return [what for call, ret, what in self._premises if call.ret != ret]

    def pid_of(self, process: int) -> int:
        if self._played is None:
            raise ScriptError("a process has its number after the yield")
        return int(self._played.pids[process])

    def inode_of(self, host: int) -> int:
        if self._played is None:
            raise ScriptError("a network namespace has its number after the yield")
        return int(self._played.inodes[host])


class Host:
    """A network namespace with addresses of its own. What it is asked is asked by a process of its own, the agent."""

    agent: Process
    peer: Host

    def __init__(self, script: Script, role: str, number: int) -> None:
        self.script, self.role, self.number = script, role, number
        self.ipv4, self.ipv6 = f"192.0.2.{number + 1}", f"2001:db8::{number + 1}"
        self.mac = f"02:00:c0:00:02:{number + 1:02x}"

    def address(self, family: int | str) -> str:
        """Its address in AF_INET or AF_INET6, or "4", "6", "mapped"."""
        if family == "mapped":
            return f"::ffff:{self.ipv4}"
        return self.ipv6 if family in (AF_INET6, "6") else self.ipv4

    @property
    def inode(self) -> int:
        return self.script.inode_of(self.number)

    def process(self, comm: str) -> Process:
        """A new process, called so."""
        return Process(self.script, self, comm)

    # What the kernel says about it

    def sysctl(self, name: str, value: object = None) -> Call:
        """Set it (when a value is given) and ask for it: `ret` is the number, `data` the text."""
        return self.agent("sysctl", name, *(() if value is None else (value,)))

    @contextmanager
    def sysctls(self, **values: object) -> Iterator[None]:
        """Inside of the block these sysctls have these values."""
        before = {name: self.sysctl(name) for name in values}
        for name, value in values.items():
            self.sysctl(name, value)
        yield
        for name, old in before.items():
            self.sysctl(name, old)

    def counters(self) -> Call:
        return self.agent("counters")

    def counter(self, name: str, *minus: str) -> Call:
        """`ret` is its value, or by how much it is more than another one's."""
        return self.agent("counter", name, *minus)

    def until_counter(self, name: str, value: object, op: str = ">=") -> Call:
        """Wait until a counter is at least so much: a number, or the call that asked for it before, plus so many."""
        return self.agent.until("counter", name, op=op, value=value)

    def sockets(self) -> Call:
        return self.agent("sockets")

    def diag(self, field: str = "count", *, state: str = "any", lport: object = 0, rport: object = 0) -> Call:
        """`ret`: how many sockets there are (count), or are a process's (owned), or the sum of their recv_q, send_q,
        retransmits."""
        return self.agent("diag", field, state, lport, rport)

    def until_sockets(
        self,
        value: object = 1,
        op: str = ">=",
        field: str = "count",
        *,
        state: str = "any",
        lport: object = 0,
        rport: object = 0,
    ) -> Call:
        """Wait until there are so many sockets in that state and with these ports, or their field is so much in sum."""
        return self.agent.until("diag", field, state, lport, rport, op=op, value=value)

    def until_rows(self, watch: Watch, number: int = 2, *, since: int | None = None, **columns: object) -> Call:
        """Wait until a tool has written so many rows of this host in which these columns have these numbers.

        For tools that look again and again, which nothing in the kernel tells of. They count from now on: the second
        row of a listener is of a look that began after this call. With `since=0` all are counted.
        """
        file, netns = f"{watch.name}.out", self.agent("netns")
        start = self.agent("bytes", file) if since is None else since
        wanted = [word for name, value in columns.items() for word in (name, value)]
        return self.agent.until("rows", file, start, "netns", netns, *wanted, op=">=", value=number)

    # What lies between it and its peer

    @contextmanager
    def held(self) -> Iterator[None]:
        """What it sends inside of the block leaves at its end, in order."""
        self.agent("neighbour", self.number)
        yield
        self.agent("neighbour", self.number, self.peer.mac)

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Inside of the block nothing arrives that it sends: it goes to a link address that nobody has."""
        self.lose()
        yield
        self.find()

    def lose(self) -> Call:
        """From now on nothing arrives that it sends, until `find()`."""
        return self.agent("neighbour", self.number, NOBODYS_MAC)

    def find(self) -> Call:
        return self.agent("neighbour", self.number, self.peer.mac)

    def blackhole(self, prefix: str) -> None:
        """Swallow what arrives for `prefix`, and let the peer send it here: its addresses never answer."""
        family = "-6" if ":" in prefix else "-4"
        self.exec("ip", family, "route", "replace", "blackhole", prefix)
        via = self.ipv6 if ":" in prefix else self.ipv4
        self.peer.exec("ip", family, "route", "replace", prefix, "via", via)

    def netem(self, delay_ms: float) -> Call:
        """Delay what it sends. Fails where the kernel has no netem: `ret` is not 0 then."""
        netem = ("netem", "delay", f"{delay_ms}ms")
        return self.exec("tc", "qdisc", "replace", "dev", "veth0", "root", *netem, may_fail=True)

    def exec(self, *argv: object, may_fail: bool = False) -> Call:
        """Run a program to its end: `ret` is its status, `data` what it wrote."""
        return self.script.step(self.agent.number, "-" if may_fail else "=", "exec", *argv)

    def until_waiting(self, syscall: int, *processes: Process, number: int | None = None) -> Call:
        """Wait until these processes, or so many of them, wait in a system call: its number on x86-64."""
        wanted = len(processes) if number is None else number
        pids = [process.made for process in processes]
        return self.agent.until("waiting", syscall, *pids, op="==", value=wanted)

    def flush(self) -> Call:
        """Wait until everything that was sent to it before has been handled."""
        return self.agent("flush")

    def destroy(self, lport: object, rport: object, *, family: str = "4", to: str | None = None) -> Call:
        """What `ss -K` does to one connection, with the peer or another address: the error is the kernel's."""
        here, there = self.address(family), to or self.peer.address(family)
        return self.agent("destroy", here, lport, there, rport, may_fail=True)

    def segment(
        self,
        source: str,
        sport: object,
        target: str,
        dport: object,
        sequence: int = 1_000_000,
        acknowledged: int = 0,
        flags: int = 2,
        wrong: int = 0,
        options: bytes = b"",
    ) -> Call:
        """Send a TCP segment without data in whosever name that is; flags: FIN 1, SYN 2, RST 4, ACK 16.

        Its checksum is wrong by `wrong`. The size of its options is a multiple of four.
        """
        words = (options.hex(),) if options else ()
        return self.agent("tcp", source, sport, target, dport, sequence, acknowledged, flags, wrong, *words)


class Process:
    """A process, or a thread of one: `pid` once it was played. It does one call after the other."""

    made: Call
    """`ret` is its PID; 0 of a thread."""

    def __init__(self, script: Script, host: Host, comm: str, number: int | None = None) -> None:
        self.script, self.host, self.comm = script, host, comm
        self._slots = [0]
        if number is None:
            self.number = script.next_process()
            self.made = script.conduct("spawn", self.number, host.number, comm)
        else:
            self.number = number

    def __call__(self, *words: object, may_fail: bool = False, wait: bool = True) -> Call:
        """A command: actor/*.c have them. With `wait=False` the next step does not wait for it: `join()` does."""
        mode = "&" if not wait else "-" if may_fail else "!"
        return self.script.step(self.number, mode, *words)

    @property
    def pid(self) -> int:
        return self.script.pid_of(self.number)

    def until(self, *words: object, op: str, value: object, may_fail: bool = False) -> Call:
        """Repeat a command until it returns what is asked for."""
        return self("until", op, value, PATIENCE_S, *words, may_fail=may_fail)

    def socket(self, family: str = "4", *, protocol: int = 0, kind: int = 1, may_fail: bool = False) -> Socket:
        """A new one: "4", or "6" and "mapped" for AF_INET6. `made` is what socket() returned."""
        made = Socket(self, self.slot())
        made.family = family
        number = AF_INET if family == "4" else AF_INET6
        made.made = self("socket", made.slot, number, kind, protocol, may_fail=may_fail)
        return made

    def slot(self) -> int:
        self._slots[0] += 1
        return self._slots[0] - 1

    def listener(
        self,
        port: object,
        address: str | None = None,
        *,
        backlog: int = 16,
        dual: bool = False,
        reuse_port: bool = False,
        protocol: int = 0,
        may_fail: bool = False,
    ) -> Socket:
        """A socket that listens, at the host's IPv4 address or another one; `dual` takes IPv4 at an IPv6 one, too."""
        address = address or self.host.ipv4
        made = self.socket("6" if ":" in address else "4", protocol=protocol, may_fail=may_fail)
        made.option(SOL_SOCKET, SO_REUSEPORT if reuse_port else SO_REUSEADDR, 1, may_fail=may_fail)
        if ":" in address:
            made.option(IPPROTO_IPV6, IPV6_V6ONLY, int(not dual), may_fail=may_fail)
        made.bind(address, port, may_fail=may_fail)
        made.listen(backlog, may_fail=may_fail)
        return made

    def fork(self, comm: str | None = None) -> Process:
        """A child, with the same sockets in the same places. `made` is what fork() returned."""
        other = Process(self.script, self.host, comm or self.comm, self.script.next_process())
        other._slots = [self._slots[0]]
        other.made = self.script.conduct("fork", other.number, self.number)
        if comm:
            other("write", "/proc/self/comm", comm)
        return other

    def thread(self) -> Process:
        """A thread of this process: its sockets are those of the process."""
        other = Process(self.script, self.host, self.comm, self.script.next_process())
        other._slots = self._slots
        other.made = self.script.conduct("thread", other.number, self.number)
        return other

    def kill(self, number: int = signal.SIGKILL) -> Call:
        """End it without warning. It is gone, and reaped, when the next step comes."""
        return self.script.conduct("kill", self.number, int(number))

    def exit(self) -> Call:
        return self("exit", 0)

    def now(self) -> Call:
        return self("now")

    def pause(self, us: int) -> Call:
        """Let so much time pass: for what a duration must be at least, never to wait for something."""
        return self("pause", us)

    def at(self, other: Socket) -> Socket:
        """A socket that was inherited: the same place here."""
        return Socket(self, other.slot, other.family)

    def take(self, other: Socket) -> Socket:
        """Get a socket from another process, as over a Unix socket."""
        mine = Socket(self, self.slot(), other.family)
        self.script.conduct("pass", other.process.number, other.slot, self.number, mine.slot)
        return mine


class Socket:
    """A socket of a process. Calls that may fail in a test say so: `may_fail=True`."""

    made: Call
    accepted: Call
    """What accept() returned: `ret` is the remote port, `data` the remote address."""

    def __init__(self, process: Process, slot: int, family: str = "4") -> None:
        self.process, self.slot, self.family = process, slot, family

    def __call__(self, command: str, *words: object, **how: bool) -> Call:
        return self.process(command, self.slot, *words, **how)

    def option(self, level: int, name: int, value: int | bytes, **how: bool) -> Call:
        return self("option", level, name, f"x{value.hex()}" if isinstance(value, bytes) else value, **how)

    def linger(self, seconds: int = 0) -> Call:
        """SO_LINGER: with 0 close() sends a RST."""
        value = (1).to_bytes(4, "little") + seconds.to_bytes(4, "little")
        return self.option(SOL_SOCKET, SO_LINGER, value)

    def bind(self, address: str, port: object, **how: bool) -> Call:
        return self("bind", address, port, **how)

    def listen(self, backlog: int = 16, **how: bool) -> Call:
        return self("listen", backlog, **how)

    def connect(self, address: str, port: object, **how: bool) -> Call:
        return self("connect", address, port, **how)

    def start(self, address: str, port: object) -> Call:
        """connect() that does not wait: its errno is EINPROGRESS, unless the outcome is known at once."""
        self("blocking", 0)
        return self("connect", address, port, may_fail=True)

    def outcome(self) -> Call:
        """Of what was started, when it is known: `ret` is the errno's number."""
        self.until_ready(POLLOUT)
        return self("get", SOL_SOCKET, SO_ERROR, 4)

    def blocking(self, on: bool) -> Call:
        return self("blocking", int(on))

    def until_ready(self, events: int = POLLIN) -> Call:
        """Wait until poll() says so; its `end_us` is when it said it."""
        return self("poll", events, -1)

    def disconnect(self, **how: bool) -> Call:
        """connect() to AF_UNSPEC."""
        return self("connect_raw", "00" * 16, 16, **how)

    def accept(self, flags: int | None = 0, *, may_fail: bool = False, wait: bool = True) -> Socket:
        """By accept4(), without flags by accept()."""
        made = Socket(self.process, self.process.slot(), self.family)
        words = () if flags is None else (flags,)
        made.accepted = self("accept", made.slot, *words, may_fail=may_fail, wait=wait)
        return made

    def uring_accept(self, flags: int = 0, **how: bool) -> Socket:
        """Through io_uring, with flags of the request. `accepted` knows the error, but not who it is: `peer()` does."""
        made = Socket(self.process, self.process.slot(), self.family)
        made.accepted = self("uring_accept", made.slot, flags, **how)
        return made

    def send(self, text: str, flags: int = 0, **how: bool) -> Call:
        return self("send", text, flags, **how)

    def send_to(self, text: str, address: str, port: object, flags: int = MSG_FASTOPEN, **how: bool) -> Call:
        return self("send_to", text, flags, address, port, **how)

    def send_all(self, size: int, **how: bool) -> Call:
        """So many bytes."""
        return self("send_all", size, **how)

    def receive(self, room: int = 65536, flags: int = 0, **how: bool) -> Call:
        """`ret` is how many bytes there were, 0 at the end."""
        return self("receive", room, flags, **how)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside of the block a process holds the socket's lock. At its end it sends a byte."""
        holder = self.process.fork("holder")
        other = holder.thread()
        sending = holder.at(self)("send_stuck", wait=False)
        self.process.host.until_waiting(SENDTO, holder)
        yield
        other("unstuck")
        sending.join()
        holder.exit()

    @contextmanager
    def repaired(self) -> Iterator[None]:
        """Inside of the block it is in repair mode: the kernel tells its numbers, and lets them be changed."""
        self.option(IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_ON)
        yield
        self.option(IPPROTO_TCP, TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)

    def sequence(self, queue: str) -> Call:
        """`ret` is the sequence number of what comes next in the queue "receive" or "send": what a segment() takes."""
        with self.repaired():
            self.option(IPPROTO_TCP, TCP_REPAIR_QUEUE, ("", "receive", "send").index(queue))
            return self("get", IPPROTO_TCP, TCP_QUEUE_SEQ, 4)

    def read(self, size: int, **how: bool) -> Call:
        """Until so many bytes have come, or the end."""
        return self("read", size, **how)

    def splice(self, size: int) -> Call:
        """So much at most, into a pipe."""
        return self("splice", size)

    def until_end(self) -> Call:
        """Read until the other end has closed: `ret` is how many bytes that were."""
        return self.read(1 << 40)

    def shutdown(self, how: str = "write", may_fail: bool = False) -> Call:
        return self("shutdown", ("read", "write", "both").index(how), may_fail=may_fail)

    def close(self) -> Call:
        return self("close")

    def name(self, **how: bool) -> Call:
        """`ret` is the local port, `data` the local address."""
        return self("name", **how)

    def peer(self, **how: bool) -> Call:
        return self("peer", **how)

    def cookie(self) -> Call:
        return self("cookie")

    def fd(self) -> Call:
        return self("fd")

    def info(self) -> Call:
        """`info` is TCP_INFO, `ret` the number of the state. It takes the socket's lock."""
        return self("info")

    def field(self, name: str) -> Call:
        """`ret` is a field of TCP_INFO."""
        return self("info", *_place(name))

    def until_state(self, state: str) -> Call:
        """Wait until TCP_INFO says so."""
        return self.process.until("info", self.slot, op="==", value=STATES[state])

    def until_field(self, name: str, value: object, op: str = ">=") -> Call:
        return self.process.until("info", self.slot, *_place(name), op=op, value=value)

    def until_acknowledged(self) -> Call:
        """Wait until all that was sent has been acknowledged."""
        return self.process.until("ioctl", self.slot, TIOCOUTQ, op="==", value=0)

    def until_received(self, size: int) -> Call:
        """Wait until so much can be read."""
        return self.process.until("ioctl", self.slot, FIONREAD, op=">=", value=size)


def _place(field: str) -> tuple[int, int]:
    size = next(size for size, fields in ((1, _U8), (4, _U32), (8, _U64)) if field in fields)
    return (_U8 | _U32 | _U64)[field], size
