"""What connects got from the services that programs need: by service, and by program. For rules over attempts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from ipaddress import ip_address
from math import inf
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.tallies import INTERVAL_SECONDS, Groups, Tally, spanning
from tcpscope.listeners import Listener
from tcpscope.output import endpoint as text_of

PORTS_SHOWN = 5

# With faults that were made 41 of 41 and 23 of 23 failed; on a busy server 14 of 2,099, all of one health check.
LEAST, SHARE = 3, 0.2
CRITICAL = 5
CHECKS_PER_S = 1.2
"""A health check of a service that is down is refused once a second, or less often."""

SCAN_PORTS = 10
"""A program that is refused at so many ports of one host, and gets through at none of them, looks for open ports."""

RESTART_SECONDS = 3.0
"""A service that answered before and refuses for less than this is restarted."""

_LINEAR = Path("/proc/sys/net/ipv4/tcp_syn_linear_timeouts")

Host = tuple[int, str]
"""Network namespace from which it is seen, and its address."""

SILENCE, _REFUSED = "not answered", "refused by a RST"
_KINDS = {
    "REFUSED": _REFUSED,
    "RESET": "reset",
    "REJECTED": "rejected by an ICMP message",
    "UNREACHABLE": "unreachable",
    "TIMED_OUT": SILENCE,
    "FAILED": "failed",
}

_SAYS_NO = {
    "ENETUNREACH": ("no route to it", "No route of this host leads to this address."),
    "EHOSTUNREACH": (
        "a route of this host says unreachable",
        "The route to this address is one of the kind unreachable.",
    ),
    "EACCES": (
        "this host forbids it",
        "The route to this address is one of the kind prohibit, or a security module (SELinux, AppArmor) forbids it.",
    ),
    "EPERM": ("this host forbids it", "A BPF program of the control group, or a security module, forbids it."),
    "EINVAL": (
        "connect() fails with EINVAL",
        "The route to this address is one of the kind blackhole; or it is a link-local address without its device.",
    ),
}
"""Errno of a connect() that fails before a SYN is sent -> what it means, for the title and behind it."""

_ANSWERS = {_REFUSED, "reset"}
BY_ICMP = ("rejected by an ICMP message", "unreachable")
NO_ANSWER = (SILENCE, *BY_ICMP)
_ICMP_PER_S = 0.25  # a host sends one a second (icmp_ratelimit); several ports share it, and some are lost
_LONGEST_S = 120.0  # TCP_RTO_MAX


def kind_of(attempt: Any) -> str | None:
    """How an attempt failed; None: it did not, or others tell it better."""
    if attempt.outcome == "GAVE_UP":  # without a second SYN: another address was faster, or there was no patience
        return SILENCE if attempt.syn_retrans else None
    if attempt.outcome == "FAILED" and attempt.errno in (None, "EADDRNOTAVAIL"):
        return None
    return _KINDS.get(attempt.outcome)


def is_steady(count: int, first_s: float, last_s: float, between_ns: tuple[int, int]) -> bool:
    """Whether so many events came one after the other, as those of a health check.

    The times are ends of intervals, which may be read late, and `between_ns` the kernel's.
    """
    first_ns, last_ns = between_ns
    return (count - 1) / max(last_s - first_s + INTERVAL_SECONDS, (last_ns - first_ns) / 1e9) <= CHECKS_PER_S


@dataclass
class Program:
    """What the processes of one name got from a service.

    began_s    when the first failing attempt began at the earliest; latest_s: at the latest
    waiting    sockets in SYN_SENT whose SYN was sent again
    unsent     failed before a SYN was sent
    connected  since the first failure; connected_before: until then; connected_later: for certain after it
    succeeded_s    when the last connect succeeded; 0: none
    refused_since  refusals since then, of the intervals that followed
    """

    kinds: Counter[str] = field(default_factory=Counter)
    errnos: Counter[tuple[str, str]] = field(default_factory=Counter)
    pids: Counter[int | None] = field(default_factory=Counter)
    laddrs: set[str] = field(default_factory=set)
    began_s: float = 0.0
    latest_s: float = inf
    unsent: int = 0
    connected: int = 0
    connected_before: int = 0
    connected_later: int = 0
    waiting: int = 0
    looked_s: float = 0.0
    waited_s: float = 0.0
    retransmits: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    between_ns: tuple[int, int] = (0, 0)
    succeeded_s: float = 0.0
    refused_since: int = 0

    @property
    def failed(self) -> int:
        return self.kinds.total()

    @property
    def bad(self) -> int:
        return self.failed + self.waiting

    @property
    def still_connected(self) -> int:
        return 0 if self.all_fail else self.connected

    @property
    def total(self) -> int:
        return self.bad + self.still_connected

    def happened(self, first_s: float, last_s: float, took_s: tuple[float, float] = (0.0, 0.0)) -> None:
        """`took_s`: how long the first attempt has lasted at the least, and at most."""
        self.began_s = min(self.began_s or first_s, first_s - took_s[1])
        self.latest_s = min(self.latest_s, first_s - took_s[0])
        self.first_s = min(self.first_s or first_s, first_s)
        self.last_s = max(self.last_s, last_s)

    def answered(self, tally: Tally) -> None:
        """Of the interval in which the failure begins it is not known what came first."""
        since = tally.since(self.began_s - INTERVAL_SECONDS / 2)
        self.connected += since
        self.connected_before += tally.count - since
        self.connected_later += tally.since(self.first_s + INTERVAL_SECONDS)
        self.succeeded_s = max(self.succeeded_s, tally.last_s)

    @property
    def succeeded(self) -> int:
        """Connects that succeeded at whatever time."""
        return self.connected + self.connected_before

    @property
    def broke_down(self) -> bool:
        """Whether it answered, and since then has refused each connect for longer than a restart takes."""
        lasts = self.last_s - self.succeeded_s >= RESTART_SECONDS
        return bool(self.succeeded) and self.refused_since >= LEAST and lasts

    @property
    def restarted(self) -> bool:
        """Whether it answered, refused for a moment and answers again."""
        return self._briefly and self.succeeded_s > self.last_s

    @property
    def _briefly(self) -> bool:
        return bool(self.succeeded) and self.last_s - self.first_s < RESTART_SECONDS

    @property
    def all_fail(self) -> bool:
        """Whether nothing succeeds any more."""
        return not self.connected or (not self.connected_later and self.lasts)

    @property
    def lasts(self) -> bool:
        """Whether attempts fail for so long that what succeeds meanwhile is seen."""
        return self.last_s - self.first_s >= 2 * INTERVAL_SECONDS

    @property
    def fails(self) -> bool:
        return self.bad >= LEAST and self.bad >= SHARE * (self.bad + self.connected)

    @property
    def severity(self) -> str | None:
        """None: it is not certain yet."""
        if not self.waiting and not self.kinds.keys() - {_REFUSED}:
            if self._briefly:
                return "info" if self.restarted else None
            if is_steady(self.bad, self.first_s, self.last_s, self.between_ns):
                return "warning" if self.broke_down else "info"
        return "critical" if self.bad >= CRITICAL and self.all_fail else "warning"


@dataclass
class Subject:
    """A service, or a host that does not answer at several ports, and the programs that fail.

    unresolved  SYNs to it that were discarded here, since no next hop has given its link address
    elsewhere   who listens at this port in other network namespaces, if it is a loopback address
    narrowed    a filter leaves out connects to other ports of the host, or those of other programs
    got         what is known to be `main`: of ports that are one finding, for each of them got that
    first       of the findings of one host
    """

    host: Host
    ports: list[int]
    programs: dict[str | None, Program]
    scan: bool = False
    unresolved: int = 0
    elsewhere: list[Listener] = field(default_factory=list)
    narrowed: bool = False
    got: str | None = None
    first: bool = True

    def _sum(self, name: str) -> int:
        return sum(getattr(program, name) for program in self.programs.values())

    @property
    def failed(self) -> int:
        return self._sum("failed")

    @property
    def unsent(self) -> int:
        return self._sum("unsent")

    @property
    def bad(self) -> int:
        return self._sum("bad")

    @property
    def total(self) -> int:
        return self._sum("total")

    @property
    def waiting(self) -> int:
        return self._sum("waiting")

    @property
    def connected(self) -> int:
        return self._sum("still_connected")

    @property
    def kinds(self) -> Counter[str]:
        return sum((program.kinds for program in self.programs.values()), Counter[str]())

    @property
    def main(self) -> str:
        """What most attempts got. ICMP messages also say what became of those without any answer, if they come as often
        as hosts send them."""
        if self.got is not None:
            return self.got
        kinds = self.kinds + Counter({SILENCE: self.waiting})
        most = max(kinds, key=lambda kind: kinds[kind])
        if most == SILENCE and not self.connected:
            said = max(BY_ICMP, key=lambda kind: kinds[kind])
            first_s = min(program.first_s for program in self.programs.values())
            last_s = max(program.last_s for program in self.programs.values())
            return said if kinds[said] > _ICMP_PER_S * (last_s - first_s) else most
        return most

    @property
    def names(self) -> list[str | None]:
        """Of the programs; of attempts that began before the watch it is not known whose they are."""
        return [comm for comm in self.programs if comm is not None] or [None]

    @property
    def errno(self) -> str | None:
        """The most frequent one of those who got `main`."""
        errnos = sum((program.errnos for program in self.programs.values()), Counter[tuple[str, str]]())
        found = max((each for each in errnos if each[0] == self.main), key=lambda each: errnos[each], default=None)
        return found[1] if found else None

    @property
    def pids(self) -> Counter[int | None]:
        return sum((program.pids for program in self.programs.values()), Counter[int | None]())

    @property
    def says_no(self) -> tuple[str, str] | None:
        """If this host itself refuses to send a SYN: what that means, for the title and behind it."""
        return _SAYS_NO.get(self.errno or "") if self.unsent >= self.bad else None

    @property
    def worst(self) -> str | None:
        return max(self.names, key=lambda comm: self.programs[comm].bad)

    @property
    def name(self) -> str:
        ports = [str(port) for port in self.ports[:PORTS_SHOWN]]
        more = ",..." if len(self.ports) > PORTS_SHOWN else ""
        return text_of(self.host[1], ",".join(ports) + more)


def services_of(
    seen: Evidence,
    unresolved: Mapping[Host, int],
) -> tuple[dict[tuple[int, str, int], dict[str | None, Program]], dict[Host, set[int]]]:
    """Services to which something failed, by program; and which ports of these hosts have answered since it began."""
    services: dict[tuple[int, str, int], dict[str | None, Program]] = {}
    answered: list[tuple[Any, Tally]] = []
    silent: list[tuple[Program, Tally]] = []
    refused: list[tuple[Program, Tally]] = []
    connected = {(g.netns, g.comm, g.rport) for g in seen.attempts.tallies if g.outcome == "ESTABLISHED"}
    for group, tally in seen.attempts.tallies.items():
        kind = kind_of(group)
        if group.outcome == "GAVE_UP" and (
            (group.netns, group.comm, group.rport) not in connected or (group.netns, group.raddr) in unresolved
        ):
            kind = SILENCE  # no other address was faster: there is no answer anywhere. Or no SYN has left
        if kind is None:
            if group.outcome == "ESTABLISHED":
                answered.append((group, tally))
            continue
        if group.raddr is None:
            continue
        program = _program(services, group)
        program.kinds[kind] += tally.count
        program.errnos[kind, group.errno] += tally.count
        program.pids[group.pid] += tally.count
        program.laddrs.add(group.laddr)
        program.unsent += 0 if group.syn_sent else tally.count
        program.between_ns = spanning(program.between_ns, tally.between_ns)
        program.happened(tally.first_s, tally.last_s, _took_s(group) if kind == SILENCE else (0.0, 0.0))
        if kind == SILENCE:
            silent.append((program, tally))
        elif kind == _REFUSED:
            refused.append((program, tally))
    alive: dict[Host, set[int]] = defaultdict(set)
    acks: list[tuple[Any, float]] = []
    for track in seen.sockets.now:
        row = track.last
        if row.state == "SYN_SENT":
            program = _program(services, row)
            program.waiting += 1
            program.pids[row.pid] += 1
            program.laddrs.add(row.laddr)
            program.retransmits = max(program.retransmits, row.retransmits)
            began_s = row.opened_ns / 1e9 if row.opened_ns else track.first_s
            program.looked_s = track.last_s
            program.waited_s = max(program.waited_s, track.last_s - began_s)
            program.happened(began_s, track.last_s)
        elif row.role == "ACTIVE":
            acks.append((row, track.last_s - row.since_ack_us / 1e6))
    if services:
        failing_at: dict[Host, Program] = {}
        for (netns, raddr, _), programs in services.items():
            for program in programs.values():
                host = netns, raddr
                failing_at[host] = merged(failing_at[host], program) if host in failing_at else program
        # Where nothing more succeeds, what did in the time in which the first failure may have begun came before it.
        began = {host: whole.latest_s if whole.lasts else whole.began_s for host, whole in failing_at.items()}
        for row, ack_s in acks:
            if ack_s > began.get((row.netns, row.raddr), ack_s):
                alive[row.netns, row.raddr].add(_port(row))
        for group, tally in answered:
            host = group.netns, group.raddr
            if host in began:
                if tally.last_s > began[host] - INTERVAL_SECONDS / 2:
                    alive[host].add(_port(group))
                if failing := services.get((*host, _port(group)), {}).get(group.comm):
                    failing.answered(tally)
        for program, tally in silent:  # what has ended since the look waited in it
            if program.waiting:
                program.waiting = max(0, program.waiting - tally.since(program.looked_s))
        for (netns, raddr, rport), programs in services.items():
            if any(each.kinds.keys() & _ANSWERS for each in programs.values()):
                alive[netns, raddr].add(rport)
    _remember(seen, services)
    for program, tally in refused:
        program.refused_since += tally.since(program.succeeded_s)
    return services, alive


def _remember(seen: Evidence, services: Mapping[tuple[int, str, int], Mapping[str | None, Program]]) -> None:
    """That a service has answered, for as long as it refuses: a watch forgets what is older than a minute."""
    before = _answered_before.get(seen.attempts, {})
    now: dict[tuple[Any, ...], tuple[int, float]] = {}
    for service, programs in services.items():
        for comm, program in programs.items():
            if not program.succeeded and (*service, comm) in before:
                program.connected_before, program.succeeded_s = before[*service, comm]
            if program.succeeded:
                now[*service, comm] = program.succeeded, program.succeeded_s
    _answered_before[seen.attempts] = now


_answered_before: WeakKeyDictionary[Groups, dict[tuple[Any, ...], tuple[int, float]]] = WeakKeyDictionary()
"""Of each watch: service and program -> how many connects succeeded, and when the last one did."""


def has_answered(seen: Evidence, netns: int, address: str, port: int) -> bool:
    """Whether a program of this machine got through in this watch, and fails there now. It may be in another network
    namespace, unless it is a loopback address. `services_of` was asked before."""
    if not hasattr(seen, "attempts"):
        return False
    known = _answered_before.get(seen.attempts, {})
    anywhere = not ip_address(address).is_loopback
    return any((raddr, rport) == (address, port) and (anywhere or own == netns) for own, raddr, rport, _ in known)


def _took_s(attempt: Any) -> tuple[float, float]:
    """How long an attempt has lasted at the least, and at most until the interval ended in which it did.

    The kernel gives up when the next SYN would be sent, unless TCP_USER_TIMEOUT says so earlier.
    """
    most_s = _until_syn(attempt.syn_retrans + 1)
    least_s = _until_syn(attempt.syn_retrans) if attempt.syn_retrans else 0.0
    return most_s if attempt.outcome == "TIMED_OUT" else least_s, INTERVAL_SECONDS + most_s


def _until_syn(number: int) -> float:
    """When the SYN is sent again for so many times: the time to the next one doubles each time, from one second on.

    Since 6.5 (ccce324dabfe, "tcp: make the first N SYN RTO backoffs linear") not from the first time on.
    """
    linear = min(number - 1, _linear_timeouts())
    return linear + sum(min(2.0**doubled, _LONGEST_S) for doubled in range(number - linear))


@cache
def _linear_timeouts() -> int:
    """How many SYNs are sent again after a second each, before the time doubles; 0: this kernel has none of these."""
    with suppress(OSError, ValueError):
        return int(_LINEAR.read_text())
    return 0


def falls_back(seen: Evidence, host: Host, ports: set[int], failed: Mapping[str | None, int]) -> bool:
    """Whether each program connects to the same port of an address of the other IP version, about as often as it fails
    here.

    A name has addresses of both versions, and the second one works: for localhost both are loopback addresses.
    """
    netns, address = host[0], ip_address(host[1])
    for comm, number in failed.items():
        worked = 0
        for group, tally in seen.attempts.where(netns=netns, comm=comm, rport=ports, outcome="ESTABLISHED"):
            other = ip_address(group.raddr)
            if other.version != address.version and other.is_loopback == address.is_loopback:
                worked += tally.count
        if worked < number - max(1, number // 10):  # one may be under way, or fail for another reason
            return False
    return True


def scans_of(
    services: Mapping[tuple[int, str, int], Mapping[str | None, Program]],
) -> dict[tuple[Host, str | None], list[int]]:
    """Programs that scan a host, and the ports that refused them."""
    refused: dict[tuple[Host, str | None], list[int]] = defaultdict(list)
    for (netns, raddr, rport), programs in services.items():
        for comm, program in programs.items():
            if not program.connected and not program.waiting and program.kinds.keys() == {_REFUSED}:
                refused[(netns, raddr), comm].append(rport)
    return {key: ports for key, ports in refused.items() if len(ports) >= SCAN_PORTS}


def _program(services: dict[tuple[int, str, int], dict[str | None, Program]], row: Any) -> Program:
    return services.setdefault((row.netns, row.raddr, _port(row)), {}).setdefault(row.comm, Program())


def _port(row: Any) -> int:
    """A connect to port 0 is possible, and the columns of ports have None for it."""
    return int(row.rport or 0)


def merged(one: Program, other: Program) -> Program:
    return Program(
        kinds=one.kinds + other.kinds,
        errnos=one.errnos + other.errnos,
        pids=one.pids + other.pids,
        laddrs=one.laddrs | other.laddrs,
        unsent=one.unsent + other.unsent,
        connected=one.connected + other.connected,
        connected_before=one.connected_before + other.connected_before,
        connected_later=one.connected_later + other.connected_later,
        waiting=one.waiting + other.waiting,
        waited_s=max(one.waited_s, other.waited_s),
        retransmits=max(one.retransmits, other.retransmits),
        first_s=min(one.first_s, other.first_s),
        began_s=min(one.began_s, other.began_s),
        latest_s=min(one.latest_s, other.latest_s),
        last_s=max(one.last_s, other.last_s),
        between_ns=spanning(one.between_ns, other.between_ns),
        succeeded_s=min(one.succeeded_s, other.succeeded_s),
        refused_since=one.refused_since + other.refused_since,
    )
