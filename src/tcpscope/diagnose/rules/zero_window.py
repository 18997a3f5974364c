"""A window that stays closed: data waits to be sent, because the process at the remote end does not read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, halted, listener, paths, peer, process, processes, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.processes import Process
from tcpscope.diagnose.sockets import Track
from tcpscope.kernel import pidns
from tcpscope.output import endpoint

STALLED_SECONDS = 5.0
"""A reader that pauses for a second or two is normal; one of five is what users call a hang."""

BACKOFF = 2
"""Two probes of the window without room for data: the one before may have met a reader that was late."""

LIMITED_SHARE = 0.9
"""Part of the time between two looks in which the remote end's window was the reason that nothing was sent. Of a stall
it was 0.99; the rest is what the timer of the last look does not tell."""

SEVERAL = 3
"""So many connections of a process that hangs are critical. One or two may be paused on purpose: a player, a pager. So
many of one client elsewhere are a fault; with fewer it may be a person who has paused."""

MOST = 0.5
"""More than this part of a port's connections that send: then it is no longer a matter of single clients."""

_RTO_MAX_US = 120e6
_SEQUENCES = 1 << 32
_PEERS_SHOWN = 3
_WHY_CLIENTS = (
    "What a client does, only the client knows: a player or a pager that is paused looks like one that hangs. Its "
    "kernel answers the probes, so the path works."
)
_WHY = (
    "The kernel keeps received data until the application reads it. When the receive buffer is full it offers a window "
    "of zero: the sender may send nothing, and only asks now and then whether there is room again. "
)


def _window_closed(row: Any, before: Any) -> bool:
    """The sender's side."""
    if row.timer != "ZERO_WINDOW" or not row.unsent:
        return False
    if before is None or before.timer != "ZERO_WINDOW":
        return True
    if before.acked_seq != row.acked_seq:  # the reader is slow, but it reads
        return False
    return bool(row.rwnd_us - before.rwnd_us >= LIMITED_SHARE * (row.busy_us - before.busy_us))


def _not_read(row: Any, before: Any) -> bool:
    """The reader's side: there is data, and no byte of it was read since the look before."""
    return before is not None and _data(before) > 0 < _data(row) and row.read_seq == before.read_seq


def _data(row: Any) -> int:
    return int(row.unread - row.has_fin) if row.has_file else 0


def _is_full(row: Any) -> bool:
    """Is there no room for another segment? The window is zero, or a rest that is not worth a segment."""
    return bool(row.own_window < min(row.mss, row.unread))


def stalled_s(track: Track) -> float:
    """For how long at least a sender has waited for room: as it was seen, or as the probes say, which come after the
    RTO, twice the RTO, and so on."""
    row = track.last
    waited_us = row.rto_us * ((1 << row.backoff) - 1)
    if waited_us > _RTO_MAX_US:
        waited_us = sum(min(row.rto_us << n, _RTO_MAX_US) for n in range(row.backoff))
    return max(track.held_s("window_closed"), float(min(waited_us, row.since_sent_us)) / 1e6)


@dataclass
class _Stall:
    """Connections that wait for one process, or one service, that does not read."""

    senders: list[Track] = field(default_factory=list)
    readers: list[Track] = field(default_factory=list)

    @property
    def comm(self) -> str | None:
        """Of the reader."""
        return self.readers[0].last.comm if self.readers else None

    @property
    def count(self) -> int:
        return max(len(self.senders), len(self.readers))

    @property
    def longest_s(self) -> float:
        stalls = [stalled_s(track) for track in self.senders] + [track.held_s("not_read") for track in self.readers]
        return max(stalls)


class ZeroWindow(Rule):
    needs = ("sockets",)
    marks = {"window_closed": _window_closed, "not_read": _not_read}
    explains = ("window_limited", "worker_hangs", "close_wait_leak", "orphans", "drops")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        read = cache(processes.read)
        senders = [
            track
            for track in seen.sockets.now
            if track.holds("window_closed") and track.last.backoff >= BACKOFF and stalled_s(track) >= STALLED_SECONDS
        ]
        readers = {_received(track.last): track for track in seen.sockets.now if track.last.unread}
        stalls: dict[tuple[Any, ...], _Stall] = {}
        clients: dict[tuple[int, int], list[Track]] = {}
        for sender in senders:
            row = sender.last
            reader = readers.get((row.rport, row.lport, row.acked_seq))
            if reader is None and row.role == "PASSIVE":
                clients.setdefault((row.netns, row.lport), []).append(sender)
            elif reader is None:
                far = (row.raddr, row.rport) if row.role == "ACTIVE" else (row.raddr, None)
                stalls.setdefault((row.netns, row.pid, *far), _Stall()).senders.append(sender)
            elif reader.last.has_file:  # otherwise it is not accepted: that is another fault
                stall = stalls.setdefault((reader.last.netns, reader.last.pid), _Stall())
                stall.senders.append(sender)
                stall.readers.append(reader)
        for (netns, lport), stuck in clients.items():
            yield from self._clients(seen, netns, lport, stuck)
        busy = {
            (track.last.netns, track.last.pid)
            for track in seen.sockets.now
            if track.last.unsent and track.last.backoff >= BACKOFF
        }
        met = {id(reader) for stall in stalls.values() for reader in stall.readers}
        for reader in seen.sockets.now:
            row = reader.last
            if id(reader) in met or reader.held_s("not_read") < STALLED_SECONDS:
                continue
            if _is_full(row) or (row.pid is not None and read(row.pid, row.comm).is_stopped):
                stalls.setdefault((row.netns, row.pid), _Stall()).readers.append(reader)
        for whose, stall in stalls.items():
            if stall.readers and not any(reader.holds("not_read") for reader in stall.readers):
                continue
            if not stall.readers:
                yield self._read_elsewhere(stall)
            # One that waits to send, a proxy, reads nothing meanwhile: what it waits for is the cause.
            elif whose not in busy or (whose[1] is not None and read(whose[1], stall.comm).is_stopped):
                yield self._read_here(stall, read)

    def _read_here(self, stall: _Stall, read: Any) -> Finding:
        row = stall.readers[0].last
        owner: Process | None = read(row.pid, row.comm) if row.pid is not None else None
        stopped = owner is not None and owner.is_stopped
        unread = sum(_data(track.last) for track in stall.readers)
        full = sum(_is_full(track.last) for track in stall.readers)
        name = f"{row.comm} (PID {row.pid})" if owner else "the process"
        observed = [
            f"{_connections(len(stall.readers))} with {unread} unread bytes; none was read for "
            f"{_for(track.held_s('not_read') for track in stall.readers)}; {_full(full, len(stall.readers))}",
            f"remote ends: {_ends(stall.readers)}",
            *_senders(stall.senders),
        ]
        if owner and owner.does:
            observed.append(f"{name} {owner.does}")
        elif owner and owner.state:
            waits = f", and waits in {owner.wchan}" if owner.wchan else ""
            observed.append(f"{name} is in state {owner.state}{waits}")
        return Finding(
            rule=self.name,
            severity="critical" if (owner and owner.does) or stall.count >= SEVERAL else "warning",
            title=f"{name} does not read what it receives{': it is stopped' if stopped else ''}",
            observed=observed,
            why=_WHY
            + (
                "A stopped process reads nothing."
                if stopped
                else "Its process reads nothing: it hangs, works elsewhere, or has forgotten the connection."
            ),
            remedies=list(_remedies(owner)),
            who=owner.name if owner else None,
            look=(f"list -p {row.pid}",) if owner and not pidns.inner() else ("list",),
            about=frozenset(_about(stall)) | ({halted(owner.pid)} if owner and stopped else set()),
            subject=(row.netns, row.pid),
            first_s=_first(stall),
            facts=_facts(stall, row.netns, row.pid, row.comm)
            | {"unread_bytes": unread, "full": full, "state": owner.state if owner else None},
        )

    def _clients(self, seen: Evidence, netns: int, lport: int, stuck: list[Track]) -> Iterator[Finding]:
        """One finding for each address with several connections, and one for all others of a local port."""
        addresses: dict[str, list[Track]] = defaultdict(list)
        for track in stuck:
            addresses[track.last.raddr].append(track)
        single = [track for tracks in addresses.values() if len(tracks) < SEVERAL for track in tracks]
        for tracks in addresses.values():
            if len(tracks) >= SEVERAL:
                yield self._read_elsewhere(_Stall(tracks))
        if single:
            sending = sum(_sends(track.last, netns, lport) for track in seen.sockets.now)
            yield self._single_clients(netns, lport, single, len(stuck), sending)

    def _single_clients(self, netns: int, lport: int, single: list[Track], stuck: int, sending: int) -> Finding:
        most = stuck >= SEVERAL and stuck > MOST * sending
        owners, addresses = paths.owners(single), Counter(track.last.raddr for track in single)
        many = len(addresses) > 1
        waits = f"{_connections(len(single))} of {paths.program(owners)} {'waits' if len(single) == 1 else 'wait'}"
        stall = _Stall(single)
        return Finding(
            rule=self.name,
            severity="warning" if most else "info",
            title=f"{paths.number(len(addresses), 'client')} of port {lport} {'do' if many else 'does'} not read: "
            f"{waits} to send",
            observed=[
                *_senders(single),
                f"clients: {paths.listed(addresses)}",
                f"{stuck} of {_connections(sending)} of this port that send",
            ],
            why=_WHY + _WHY_CLIENTS,
            remedies=[
                Remedy(
                    "See at one of the clients what its process waits for: it is not one of them alone. A timeout for "
                    "sending (TCP_USER_TIMEOUT, or the application's own) ends such connections here.",
                )
            ]
            if most
            else [],
            who=paths.who(owners),
            look=(f"list -L {lport}",),
            about=frozenset(_about(stall)),
            subject=("clients", netns, lport),
            explains=None if most else (),  # a pause is no cause
            first_s=_first(stall),
            facts=_facts(stall, netns, *(owners.most_common(1)[0][0] if owners else (None, None)))
            | {
                "raddr": None if many else single[0].last.raddr,
                "lport": lport,
                "clients": len(addresses),
                "stuck": stuck,
                "sending": sending,
            },
        )

    def _read_elsewhere(self, stall: _Stall) -> Finding:
        row = stall.senders[0].last
        far = endpoint(row.raddr, row.rport) if row.role == "ACTIVE" else row.raddr
        return Finding(
            rule=self.name,
            # Not critical: a player or a pager that pauses looks the same, and only the remote end knows.
            severity="warning",
            title=f"{far} does not read: {_connections(stall.count)} of {row.comm or 'a process'} "
            f"{'waits' if stall.count == 1 else 'wait'} to send",
            observed=[*_senders(stall.senders), f"remote ends: {_ends(stall.senders)}"],
            why=_WHY
            + "So the fault is neither on this host nor on the path: its probes are answered. The application at "
            "the remote end does not read.",
            remedies=[
                Remedy(
                    f"See on {row.raddr} which process has the connection, and what it waits for. "
                    "A timeout for sending (TCP_USER_TIMEOUT, or the application's own) ends such connections here.",
                )
            ],
            who=paths.who(paths.owners(stall.senders)),
            look=(
                f"list --raddr {row.raddr} --rport {row.rport}"
                if row.role == "ACTIVE"
                else f"list --raddr {row.raddr}",
            ),
            about=frozenset(_about(stall)),
            subject=(row.netns, row.lport if row.role == "PASSIVE" else row.pid, far),
            first_s=_first(stall),
            facts=_facts(stall, row.netns, row.pid, row.comm) | {"raddr": row.raddr},
        )


def _sends(row: Any, netns: int, lport: int) -> bool:
    """Whether it is a client's connection with this port, on which something waits to be sent, or was sent lately."""
    if row.role != "PASSIVE" or (row.netns, row.lport) != (netns, lport):
        return False
    return bool(row.unsent or row.unacked or (row.sent_bytes and row.since_sent_us < STALLED_SECONDS * 1e6))


def _received(row: Any) -> tuple[int, int, int]:
    """Ports, and up to where it has received: where the sender at its other end has been acknowledged. Network
    address translation does not hide that."""
    return row.lport, row.rport, (row.read_seq + row.unread) % _SEQUENCES


def _about(stall: _Stall) -> Iterator[tuple[Any, ...]]:
    for row in (track.last for track in (*stall.senders, *stall.readers)):
        yield peer(row.netns, row.raddr)
        if row.role == "ACTIVE":
            yield service(row.netns, row.raddr, row.rport)
    for row in (track.last for track in stall.readers):
        if row.pid is not None:
            yield process(row.pid)
        elif row.role == "PASSIVE":
            yield listener(row.netns, row.lport)


def _senders(senders: list[Track]) -> Iterator[str]:
    if not senders:
        return
    unsent = sum(track.last.unsent for track in senders)
    rows = [track.last for track in senders]
    yield (
        f"{_connections(len(senders))} with {unsent} bytes that wait for room at the remote end, for "
        f"{_for(stalled_s(track) for track in senders)}; window offered: {_range(row.peer_window for row in rows)} "
        f"bytes; {_range(row.backoff for row in rows)} probes were answered without room"
    )


def _remedies(owner: Process | None) -> Iterator[Remedy]:
    inner = pidns.inner() or owner is None
    if owner and owner.is_stopped:
        yield Remedy(
            "Let it go on, or find out who stopped it: a debugger, a shell's Ctrl-Z, SIGSTOP.",
            command=None if inner or owner.state == "t" else f"kill -CONT {owner.pid}",
            risk="It goes on with old data: whoever stopped it may have had a reason.",
        )
        return
    yield Remedy(
        "Find out what it waits for. A larger receive buffer only delays the stall.",
        command=None if inner or not owner else f"ps -L -p {owner.pid} -o pid,tid,stat,wchan:32,comm",
    )


def _facts(stall: _Stall, netns: int, pid: int | None, comm: str | None) -> dict[str, Any]:
    return {
        "netns": netns,
        "count": stall.count,
        "pid": pid,
        "comm": comm,
        "unsent_bytes": sum(track.last.unsent for track in stall.senders),
        "stalled_s": round(stall.longest_s, 1),
    }


def _first(stall: _Stall) -> float:
    return max(track.last_s for track in (*stall.senders, *stall.readers)) - stall.longest_s


def _connections(number: int) -> str:
    return f"{number} connection{'' if number == 1 else 's'}"


def _full(full: int, of: int) -> str:
    if full == of:
        return "no room for more"
    return f"{full} of them have no room for more" if full else "there is still room for more"


def _ends(tracks: list[Track]) -> str:
    ends = Counter(track.last.raddr for track in tracks)
    shown = ", ".join(f"{address} ({n})" for address, n in ends.most_common(_PEERS_SHOWN))
    return shown + (f" and {len(ends) - _PEERS_SHOWN} more addresses" if len(ends) > _PEERS_SHOWN else "")


def _for(seconds: Iterable[float]) -> str:
    found = list(seconds)
    return f"{max(found):.0f} s" + (" and less" if len(found) > 1 else "")


def _range(numbers: Iterable[int]) -> str:
    found = list(numbers)
    return str(found[0]) if min(found) == max(found) else f"{min(found)} to {max(found)}"


rule = ZeroWindow()
