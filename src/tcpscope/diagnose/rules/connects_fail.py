"""Connects to a service fail: refused, rejected, unreachable, or not answered."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from functools import reduce
from ipaddress import ip_address
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, endpoint, listener, paths, peer, process, processes, service
from tcpscope.diagnose.attempts import (
    BY_ICMP,
    LEAST,
    NO_ANSWER,
    PORTS_SHOWN,
    SILENCE,
    Host,
    Program,
    Subject,
    falls_back,
    merged,
    scans_of,
    services_of,
)
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.firewall import is_syn
from tcpscope.diagnose.wording import in_netns, is_in
from tcpscope.kernel import pidns
from tcpscope.listeners import Listener

_PROGRAMS_SHOWN = 3
_PORTS_IN_FACTS = 100
_WILDCARDS = ("0.0.0.0", "::")

WHY_LOOPBACK = (
    " Each network namespace, as that of each container, has a loopback address of its own: what listens in another "
    "one is not reached."
)


class ConnectsFail(Rule):
    needs = ("attempts", "sockets")
    explains = ("close_wait_leak",)

    def check(self, seen: Evidence) -> Iterator[Finding]:
        unresolved = _unresolved(seen)
        services, alive = services_of(seen, unresolved)
        silent: dict[tuple[Host, str], list[Subject]] = defaultdict(list)
        narrowed = seen.request.filter.names_owners or seen.request.filter.names_ports
        scans = scans_of(services)
        for (host, comm), ports in scans.items():
            whole = reduce(merged, (services[(*host, port)][comm] for port in ports))
            if whole.fails:
                yield from self._finding(seen, Subject(host, sorted(ports), {comm: whole}, scan=True), alive)
        for (netns, raddr, rport), programs in services.items():
            failing = {
                comm: program
                for comm, program in programs.items()
                if program.fails and ((netns, raddr), comm) not in scans
            }
            if not failing:
                continue
            subject = Subject((netns, raddr), [rport], failing)
            subject.unresolved = _kept_here(subject, unresolved, alive)
            subject.elsewhere = list(_elsewhere(seen, subject))
            if subject.main in NO_ANSWER:
                # Without a link address connect() fails with EHOSTUNREACH after three seconds, or is given up before.
                silent[subject.host, "unreachable" if subject.unresolved else subject.main].append(subject)
            else:
                yield from self._finding(seen, subject, alive)
        met: set[Host] = set()
        for (host, main), subjects in sorted(silent.items(), key=lambda each: NO_ANSWER.index(each[0][1])):
            together: dict[str | None, Program] = {}
            for subject in subjects:
                for comm, program in subject.programs.items():
                    together[comm] = merged(together[comm], program) if comm in together else program
            ports = sorted(port for subject in subjects for port in subject.ports)
            whole_host = Subject(host, ports, together, narrowed=narrowed, got=main, first=host not in met)
            met.add(host)
            whole_host.unresolved = _kept_here(whole_host, unresolved, alive)
            yield from self._finding(seen, whole_host, alive)

    def _finding(
        self,
        seen: Evidence,
        subject: Subject,
        alive: Mapping[Host, set[int]],
    ) -> Iterator[Finding]:
        severities = {program.severity for program in subject.programs.values()}
        severity = next((name for name in ("critical", "warning", "info") if name in severities), None)
        if severity is None:
            return
        failed = {comm: program.bad for comm, program in subject.programs.items()}
        both_versions = not subject.scan and falls_back(seen, subject.host, set(subject.ports), failed)
        steady = severity == "info" and not both_versions and not subject.scan and not subject.connected
        company = _company(seen, subject) if steady else ""
        alone = company == "none"
        if both_versions or subject.scan:
            severity = "info"
        netns, raddr = subject.host
        others = sorted(alive.get(subject.host, set()) - set(subject.ports))
        pids = subject.pids
        worst = subject.programs[subject.worst]
        main_pid = max(worst.pids, key=lambda pid: worst.pids[pid])
        named = [(pid, comm) for comm, program in subject.programs.items() for pid in program.pids]
        inside = [pid for pid, comm in named if pid and is_in(pid, netns, comm)]
        about = {service(netns, raddr, port) for port in subject.ports}
        about |= {endpoint(netns, raddr, port) for port in subject.ports}
        about |= {listener(own, port) for port in subject.ports for own in _listening(seen, subject, port)}
        if subject.main in NO_ANSWER and _answer(subject, others) in ("nothing", "unknown"):
            about.add(peer(netns, raddr))
        held_up = _held_up(seen, subject)
        about |= {process(pid) for pid in held_up}
        yield Finding(
            rule=self.name,
            severity=severity,
            title=_title(subject, others, refused=severity == "info" and not both_versions, alone=alone),
            observed=list(_observed(subject, others))
            + [f"{number} clients of PID {pid} have closed meanwhile" for pid, number in held_up.items()]
            + ([_NOTHING_ELSE[len(pids) > 1]] if alone else []),
            why=_WHY_ALONE[len(pids) > 1] if alone else _why(subject, severity, others, both_versions, company),
            remedies=[] if severity == "info" and not steady else list(_remedies(subject, others, inside)),
            facts={
                "netns": netns,
                "raddr": raddr,
                "rports": subject.ports[:_PORTS_IN_FACTS],
                "comm": subject.worst,
                "pids": sorted(pid for pid in pids if pid),
                "attempts": subject.total,
                "failed": subject.failed,
                "waiting": subject.waiting,
                "kinds": dict(subject.kinds),
                "errno": subject.errno,
                "answers": others[:PORTS_SHOWN],
                "alone": None if company == "unknown" else alone,
                "unresolved": subject.unresolved,
                "unsent": subject.unsent,
                "listens_elsewhere": [own.owner.pid for own in subject.elsewhere if own.owner],
                "count": subject.bad,
            },
            who=None if main_pid is None or pidns.inner() else processes.read(main_pid, subject.worst).name,
            look=(f"connect --failed --raddr {raddr}{_option(subject.ports[:PORTS_SHOWN])}",),
            about=frozenset(about),
            first_s=min(program.first_s for program in subject.programs.values()),
            last_s=max(program.last_s for program in subject.programs.values()),
            subject=_key(subject),
        )


def _unresolved(seen: Evidence) -> Counter[Host]:
    """How many SYNs the kernel has discarded since nobody gave the link address of their next hop, by destination.

    One now and then is none: a neighbour may answer late.
    """
    drops, found = getattr(seen, "drops", None), Counter[Host]()
    for group, tally in drops.tallies.items() if drops else ():
        if group.netns is not None and is_syn(group.flags) and paths.is_unresolved(group):
            found[group.netns, group.raddr] += tally.count
    return Counter({host: number for host, number in found.items() if number >= LEAST})


def _kept_here(subject: Subject, unresolved: Mapping[Host, int], alive: Mapping[Host, set[int]]) -> int:
    """How many of its SYNs did not leave for want of a link address; 0 also if the host has answered meanwhile."""
    if subject.connected or alive.get(subject.host) or subject.main not in (SILENCE, "unreachable"):
        return 0
    return unresolved.get(subject.host, 0)


def _elsewhere(seen: Evidence, subject: Subject) -> Iterator[Listener]:
    """Who listens at this port in other network namespaces: each has a loopback address of its own."""
    netns, raddr = subject.host
    queues = getattr(seen, "queues", None)
    if queues is None or subject.main != "refused by a RST" or not ip_address(raddr).is_loopback:
        return
    for history in queues.histories.values():
        own = history.last
        if own.netns != netns and own.lport in subject.ports and own.owner and not history.gone:
            yield own


def _key(subject: Subject) -> tuple[Any, ...]:
    """For `Finding.subject`."""
    if subject.scan:
        return ("scan", *subject.host, subject.worst)
    if subject.main in NO_ANSWER:  # what is silent at first may say so a moment later
        return ("silent" if subject.first else subject.main, *subject.host)
    return (*subject.host, subject.ports[0])


def _option(ports: list[int]) -> str:
    """No filter has port 0."""
    return f" -R {','.join(map(str, ports))}" if all(ports) else ""


def _company(seen: Evidence, subject: Subject) -> str:
    """What else the processes do with TCP that a service refuses steadily: a key of _COMPANY, or "none".

    "none": none of them has another connection, has opened one or serves anybody, and each has tried twice or more
    """
    pids = subject.pids
    if seen.request.filter.names_ends or None in pids:
        return "unknown"
    queues = getattr(seen, "queues", None)
    busy = {group.pid for group, _ in seen.attempts.where(pid=set(pids), outcome="ESTABLISHED")}
    busy |= {track.last.pid for track in seen.sockets.now if track.last.state != "SYN_SENT"}
    busy |= {own.pid for each in (queues.histories.values() if queues else ()) for own in each.last.holders}
    if found := busy & pids.keys():
        return "all" if len(found) == len(pids) else "some"
    tried = [number for number in pids.values() if number > 1]
    return "none" if len(tried) == len(pids) else "tried" if tried else "once"


def _held_up(seen: Evidence, subject: Subject) -> dict[int, int]:
    """Processes that wait for this host in as many connects as they have clients that have closed: PID -> clients.

    Their threads wait here, and so do not close.
    """
    waiting, left = Counter[int](), Counter[int]()
    for track in seen.sockets.now:
        row = track.last
        if row.pid is None or row.pid not in subject.pids:
            continue
        if row.state == "SYN_SENT" and (row.netns, row.raddr) == subject.host:
            waiting[row.pid] += 1
        elif row.state == "CLOSE_WAIT" and row.role == "PASSIVE" and row.has_file:
            left[row.pid] += 1
    return {pid: number for pid, number in left.items() if waiting[pid] >= max(number, LEAST)}


def _listening(seen: Evidence, subject: Subject, port: int) -> Iterator[int]:
    """Network namespaces of this machine in which the service's listener is, if it is here: what its queue refuses are
    these attempts."""
    queues = getattr(seen, "queues", None)
    if queues is None:
        return
    netns, raddr = subject.host
    here = {laddr for program in subject.programs.values() for laddr in program.laddrs}
    for history in queues.histories.values():
        own = history.last
        if own.lport != port or own.laddr not in (raddr, *_WILDCARDS):
            continue
        local = raddr in here or ip_address(raddr).is_loopback
        if local if own.netns == netns else any(address in here for _, address in history.peers):
            yield own.netns


_SILENT = {
    "itself": "no answer",
    "others": "no answer, though the host answers at other ports",
    "nothing": "the host does not answer",
    "unknown": "no answer",
}


_UNREACHABLE = {
    False: "host unreachable",
    True: "an ICMP message says unreachable, though the host answers at other ports",
}


def _by_firewall(subject: Subject, others: list[int]) -> bool:
    """Whether it is a firewall that says that the host is unreachable: it answers at other ports."""
    return bool(subject.main == "unreachable" and subject.errno != "ENETUNREACH" and others)


def _answer(subject: Subject, others: list[int]) -> str:
    """What answers, where a connect got no answer."""
    if subject.connected:
        return "itself"
    return "others" if others else "unknown" if subject.narrowed else "nothing"


def _title(subject: Subject, others: list[int], refused: bool, alone: bool = False) -> str:
    who = subject.worst or "a process"
    if more := len(subject.names) - 1:
        who += f" and {paths.number(more, 'more program')}"
    known = {
        "refused by a RST": "connection refused",
        "rejected by an ICMP message": "rejected by an ICMP message, as of a firewall",
        "unreachable": "no route to it"
        if subject.errno == "ENETUNREACH"
        else _UNREACHABLE[_by_firewall(subject, others)],
        SILENCE: _SILENT[_answer(subject, others)],
        "failed": f"connect() fails with {subject.errno}",
    }
    if subject.says_no:
        how = subject.says_no[0]
    elif subject.unresolved:
        how = f"nobody answers {paths.resolution(subject.host[1])} for it"
    else:
        how = known.get(subject.main, subject.main)
    if subject.scan:
        return f"{who} was refused at {len(subject.ports)} ports of {subject.host[1]}: a port scan, it seems"
    if alone:
        return f"{who} tries again and again to connect to {subject.name}, and was refused {subject.bad} times"
    if refused:
        return f"{who} was refused by {subject.name}, {subject.bad} times"
    if subject.connected:
        return f"{who}: {subject.bad} of {subject.total} connects to {subject.name} fail: {how}"
    return f"{who} cannot connect to {subject.name}: {how}"


def _observed(subject: Subject, others: list[int]) -> Iterator[str]:
    failed = subject.failed
    if failed:
        kinds = ", ".join(f"{number} {kind}" for kind, number in subject.kinds.most_common())
        yield f"{failed} of {subject.total} connects failed: {kinds}"
    if subject.waiting:
        waited_s = max(program.waited_s for program in subject.programs.values())
        again = max(program.retransmits for program in subject.programs.values())
        yield (
            f"{subject.waiting} {'more wait' if failed else f'of {subject.total} connects wait'} for an answer, for up "
            f"to {waited_s:.1f} s now; SYNs were sent up to {again + 1} times"
        )
    for comm, program in subject.programs.items():
        if program.broke_down:
            since_s = program.last_s - program.succeeded_s
            yield f"connects of {comm or 'a process'} succeeded before, and none in the last {since_s:.0f} s"
    if subject.says_no:
        yield f"connect() returns {subject.errno} before a SYN is sent"
    if subject.unresolved:
        yield f"{subject.unresolved} SYNs to it were discarded here: no next hop gave its link address"
    for own in subject.elsewhere[:_PROGRAMS_SHOWN]:
        owner = f"{own.owner.comm} (PID {own.owner.pid})" if own.owner else "a process"
        yield f"{owner} listens at {own.name} in another network namespace"
    address = subject.host[1]
    if others and subject.main in NO_ANSWER:
        ports = ", ".join(map(str, others[:PORTS_SHOWN]))
        yield f"other ports of {address} answer: {ports}{', ...' if len(others) > PORTS_SHOWN else ''}"
    elif subject.main == SILENCE and not subject.unresolved:
        if _answer(subject, others) == "nothing":
            yield f"no connect to {address} was answered since the first of them, at whatever port"
        elif _answer(subject, others) == "unknown":
            yield f"the filter of this watch leaves out other connects to {address}: some of them may be answered"
    pids = [pid for pid, _ in subject.pids.most_common() if pid]
    if len(pids) > 1:
        shown = [f"PID {pid}" for pid in pids[:_PROGRAMS_SHOWN]]
        more = len(pids) - len(shown)
        yield f"processes: {', '.join(shown)}{f' and {more} more' if more else ''}"


_NOTHING_ELSE = (
    "its process has no other connection, and no other connect of it succeeded",
    "none of its processes has another connection, and no other connect of theirs succeeded",
)
"""Of one process, and of several. _WHY_ALONE too."""

_SAME_PACE = " A health check that looks at this service only has the same pace; then the service is down."
_WHY_ALONE = (
    "This process does nothing else with TCP. Most probably it needs the service, cannot work without it, and tries "
    "again after a pause." + _SAME_PACE,
    "These processes do nothing else with TCP. Most probably they need the service, cannot work without it, and try "
    "again after a pause." + _SAME_PACE,
)

_COMPANY = {
    "all": "These processes have other connections, too.",
    "some": "Some of these processes have other connections, too.",
    "once": "Each of these processes has tried once, as those do that are started for each check.",
    "tried": "Some of these processes have tried once only, as those do that are started for each check.",
    "unknown": "Whether these processes have other connections was not watched.",
}


def _why(subject: Subject, severity: str, others: list[int], falls_back: bool, company: str) -> str:
    address = subject.host[1]
    if severity == "info" and falls_back:
        return (
            "The programs connect to the same port at an address of the other IP version as often. A name has both "
            "addresses, and only one of them works: each connect comes a little later."
        )
    if subject.scan:
        return "A RST comes back from a port at which nobody listens. Programs that look for services try many ports."
    if severity == "info" and all(program.restarted for program in subject.programs.values()):
        return "The service refused for less than three seconds and answers again: it was restarted, probably."
    if severity == "info" and subject.connected:
        return (
            "Some of these connects are refused and others succeed: the service was down for a time, or is started "
            "again and again, or one of several hosts behind this address is down."
        )
    if severity == "info":
        return (
            "A steady pace of one connect in a second or less is that of a health check of a service that is down, or "
            f"of a program that waits for the service. {_COMPANY[company]}"
        )
    if subject.says_no:
        return subject.says_no[1] + " So connect() fails at once, and no packet leaves this host."
    if subject.unresolved:
        return (
            "Before a packet leaves, the kernel asks for the link address of the next hop: of the host itself, if it "
            "is on the same network, else of the router. Nobody answers, so no SYN has left: that host is down, has "
            "another address, or is on another network (VLAN). connect() fails after about three seconds."
        )
    if subject.main == "refused by a RST":
        return (
            f"A RST answers the SYN: {address} is up, but no process listens at this address and port there. A "
            "firewall that rejects with a RST looks the same."
        ) + (WHY_LOOPBACK if subject.elsewhere else "")
    limit = "net.ipv6.icmp.ratelimit" if ":" in address else "net.ipv4.icmp_ratelimit"
    limited = (
        f" It sends few of these messages ({limit}: one in a second to an address), so other SYNs get no answer and "
        "are sent again."
    ) * bool(subject.main in BY_ICMP and (subject.kinds[SILENCE] or subject.waiting))
    if subject.main == "rejected by an ICMP message" or _by_firewall(subject, others):
        return "A firewall or router answers the SYN with an ICMP message. The service has not seen the SYN." + limited
    if subject.main == "unreachable":
        if subject.errno == "ENETUNREACH":
            return (
                "There is no route to this address, here or at a router on the way, so no SYN reaches the host."
                + limited
            )
        return (
            "A router or a firewall says so with an ICMP message (host unreachable, administratively prohibited), or "
            "the host on the same network does not answer ARP or neighbour discovery: it is down, or the address is "
            "wrong." + limited
        )
    answer = _answer(subject, others)
    if subject.main == SILENCE and answer == "itself":
        return (
            "Some SYNs to this port are answered and others are not: the queue of the listener is full at times, "
            "packets are lost, or one of several hosts behind this address is down."
        )
    if subject.main == SILENCE and answer == "others":
        return (
            "SYNs to this port are not answered, while others of the host are: a firewall drops them, or the queue of "
            "the listener is full. The kernel sends the SYN again and again; connect() fails after a minute or two."
        )
    if subject.main == SILENCE:
        return (
            "Neither a SYN-ACK nor a RST nor an ICMP message comes back: the host is down, packets are lost on the way "
            "there or back, or a firewall drops them. connect() fails only after a minute or two."
        )
    return "connect() returns this error before a SYN is sent, or the kernel ends the attempt with it."


def _remedies(subject: Subject, others: list[int], inside: list[int]) -> Iterator[Remedy]:
    netns, address = subject.host
    program = subject.worst or "the program"
    if subject.says_no and subject.errno == "EPERM":
        yield Remedy(
            f"See which programs are attached to the control group of {program}.", command="bpftool cgroup tree"
        )
    elif subject.says_no and subject.errno != "ENETUNREACH":
        yield Remedy(
            f"See which route and which rule say so, and correct them or the address that {program} has.",
            command=in_netns(netns, f"sh -c 'ip route get {address}; ip rule; ip route show table all'", inside),
        )
    elif subject.unresolved:
        yield Remedy(
            f"See which next hop is asked for and does not answer (FAILED). If {address} is gone, take it out of the "
            f"configuration of {program}.",
            command=in_netns(netns, f"sh -c 'ip route get {address}; ip neigh'", inside),
        )
    elif subject.main == "refused by a RST":
        yield Remedy(
            f"Start the service on {address}, or correct address and port in the configuration of {program}. On that "
            f"host, `ss -ltnp sport = :{subject.ports[0]}` shows whether something listens, and at which address."
        )
        for own in subject.elsewhere[:1]:
            owner = own.owner.comm if own.owner else "that process"
            yield Remedy(
                f"If {owner} in the other network namespace is what {program} needs, let {program} connect to an "
                f"address of that namespace"
                + (f", and let {owner} listen there." if ip_address(own.laddr).is_loopback else ".")
            )
    elif subject.main == SILENCE and _answer(subject, others) == "itself":
        yield Remedy(
            f"See on {address} whether the listener's queue overflows, with `tcpscope diagnose -L {subject.ports[0]}`."
        )
    elif (subject.main == SILENCE and others) or _by_firewall(subject, others):
        yield Remedy(
            f"Let the firewall of {address}, or one on the way, take TCP port "
            f"{', '.join(map(str, subject.ports[:PORTS_SHOWN]))} from this host. On that host, `tcpscope drop` and "
            "`tcpscope queue --events` show what is discarded."
        )
    elif subject.main == "unreachable" and subject.errno == "ENETUNREACH":
        yield Remedy(
            f"Add a route to {address}, or give {program} an address that this host can reach.",
            command=in_netns(netns, f"ip {'-6 ' if ':' in address else ''}route show", inside),
        )
    elif subject.main in (SILENCE, "unreachable"):
        yield Remedy(
            f"See whether {address} is up and which way leads there"
            + (", and whether a firewall on the way rejects it" if subject.main == "unreachable" else "")
            + f". A timeout for connect() of a few seconds in {program} limits the harm.",
            command=in_netns(netns, f"ip route get {address}", inside),
        )
    elif subject.main == "rejected by an ICMP message":
        yield Remedy(f"Let the firewall that rejects it take this port from {program}'s host.")


rule = ConnectsFail()
