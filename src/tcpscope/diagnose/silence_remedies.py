"""What helps where a remote end acknowledges nothing any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tcpscope.diagnose import Remedy, paths
from tcpscope.diagnose.paths import Peer
from tcpscope.diagnose.sockets import Track
from tcpscope.diagnose.wording import seconds
from tcpscope.kernel import netns

USER_TIMEOUT_MS = 30_000  # proposed: RFC 5482 leaves it to the application; 30 s is two in three of its usual deadlines
KEEPALIVE_LEAST_S = 15  # proposed: less costs more packets than it helps
KEEPALIVE_MOST_S = 200  # some load balancers forget after four minutes, others after 350 s
KEEPALIVE_DEFAULT_S = 7200  # TCP_KEEPALIVE_TIME, include/net/tcp.h: nobody sets a socket to that


def when_here(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether there is a route, and whether its device is up and has a link (state UP, LOWER_UP).",
        command=paths.command(where[0], paths.owners(silent), f"sh -c 'ip route get {where[1]}; ip link'"),
    )


def when_gone(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether a route leads to it, and then whether its host is alive.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )
    yield from _user_timeout(silent)


def when_lost(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    living = [track for track in silent if track.last.has_file]
    program = paths.program(paths.owners(living))
    close = f"Let {program} close these and open new ones: others of this address are answered. Then see"
    yield Remedy(
        f"{close if living else 'See'} why the packets of these are dropped, in the firewalls, NAT and load balancers "
        "on this route.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )
    yield from _user_timeout(silent)


def _user_timeout(silent: list[Track]) -> Iterator[Remedy]:
    without = [track for track in silent if not track.last.user_timeout_ms and track.last.has_file]
    if without and paths.owners(without):
        yield Remedy(
            f"Let {paths.program(paths.owners(without))} set TCP_USER_TIMEOUT: then a write that is not acknowledged "
            "fails after that "
            "time, and the application can turn to another server.",
            name="TCP_USER_TIMEOUT",
            present="not set",
            proposed=f"{USER_TIMEOUT_MS} ms",
            risk="a peer that is silent for as long, and comes back, loses its connections",
        )


def when_fins(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield Remedy(
        "See whether FINs arrive there, with tcpdump and 'tcp[tcpflags] & tcp-fin != 0', and look for rules about TCP "
        "flags, or about packets without a known connection (ct state invalid), in the firewalls on the way.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )


def when_full(where: Peer, silent: list[Track]) -> Iterator[Remedy]:
    yield _when_full(where, silent)
    yield from when_gone(where, silent)


def _when_full(where: Peer, silent: list[Track]) -> Remedy:
    return Remedy(
        "See whether it answers a small packet. If it does, large ones are lost: lower the MTU of the route, or set "
        "net.ipv4.tcp_mtu_probing to 1.",
        command=paths.command(where[0], paths.owners(silent), f"ping -c 3 -s 56 {where[1]}"),
    )


def when_nobody(where: Peer, silent: list[Track], full: bool) -> Iterator[Remedy]:
    """`where`: one of many clients."""
    if full:
        yield _when_full(where, silent)
    yield Remedy(
        f"See by which device and router packets leave for one of them, {where[1]}, and then what does not pass them "
        "on, or not back.",
        command=paths.command(where[0], paths.owners(silent), f"ip route get {where[1]}"),
    )


def when_idle(where: Peer, silent: list[Track], idle_us: float) -> Iterator[Remedy]:
    """`idle_us`: the shortest idle time that was cut. What forgets waits for that long at the most."""
    living = [track for track in silent if track.last.has_file] or silent
    program, limit_s = paths.program(paths.owners(living)), idle_limit_s(idle_us)
    unknown = f"How long it waits until it forgets is not known: at most {seconds(round(idle_us))}."
    without = [track for track in living if not track.last.keepalive]
    if without:
        yield Remedy(
            f"Let {program} set SO_KEEPALIVE, and TCP_KEEPIDLE to {limit_s} s: {len(without)} of these do not have it. "
            f"Or let its pool close connections that were idle for {limit_s} s. {unknown}",
            name="SO_KEEPALIVE",
            present="not set",
            proposed="set",
        )
    late = [track.last.keepalive_s for track in living if track.last.keepalive_s > limit_s]
    sysctl_s = keepalive_time_s(where[0])
    if sysctl_s is None and set(late) == {KEEPALIVE_DEFAULT_S}:
        sysctl_s = KEEPALIVE_DEFAULT_S
    own = [each for each in late if sysctl_s is not None and each != sysctl_s]
    if own:
        yield Remedy(
            f"Let {program} set TCP_KEEPIDLE to {limit_s} s. {len(own)} of these have a time of their own, for which "
            f"net.ipv4.tcp_keepalive_time ({sysctl_s}) does not count. {unknown}",
            name="TCP_KEEPIDLE",
            present=max(own),
            proposed=limit_s,
            risk=_RISK,
        )
    if sysctl_s is not None and sysctl_s in late:
        yield Remedy(
            f"Let keepalive probe before the connection is forgotten. {unknown} New connections and those that begin "
            "to be idle take it.",
            command=paths.command(where[0], paths.owners(silent), f"sysctl -w net.ipv4.tcp_keepalive_time={limit_s}"),
            name="net.ipv4.tcp_keepalive_time",
            present=sysctl_s,
            proposed=limit_s,
            risk=_RISK,
        )
    elif late and not own:
        yield Remedy(
            f"Let keepalive probe after {limit_s} s. It is not known whether {max(late)} s come from {program}, by "
            "TCP_KEEPIDLE, or from net.ipv4.tcp_keepalive_time. If the command shows another number, it is the program "
            f"that has to change it. {unknown}",
            command=paths.command(where[0], paths.owners(silent), "sysctl net.ipv4.tcp_keepalive_time"),
            name="idle time before keepalive probes",
            present=max(late),
            proposed=limit_s,
            risk=_RISK,
        )
    if not without and not late:
        yield Remedy(
            f"Let the pool of {program} close connections that were idle for {limit_s} s: keepalive would probe after "
            f"{max(track.last.keepalive_s for track in living)} s already. {unknown}"
        )


def idle_limit_s(idle_us: float) -> int:
    """How long a connection may be idle: half of what was cut, and less than common middleboxes wait."""
    return min(KEEPALIVE_MOST_S, max(KEEPALIVE_LEAST_S, int(idle_us / 2e6)))


def keepalive_time_s(inode: int) -> int | None:
    """net.ipv4.tcp_keepalive_time of a network namespace; None: it is not known.

    The kernel shows it to processes in that namespace only.
    """
    with suppress(OSError, ValueError):
        if inode == netns.own():
            return int(_KEEPALIVE_TIME.read_text())
    return None


_KEEPALIVE_TIME = Path("/proc/sys/net/ipv4/tcp_keepalive_time")
_RISK = "each idle connection with SO_KEEPALIVE sends one packet in that time"
