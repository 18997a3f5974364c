"""What helps where a remote end acknowledges nothing any more."""

from __future__ import annotations

from collections.abc import Iterator

from tcpscope.diagnose import Remedy, paths
from tcpscope.diagnose.paths import Peer
from tcpscope.diagnose.sockets import Track

USER_TIMEOUT_MS = 30_000  # proposed: RFC 5482 leaves it to the application; 30 s is two in three of its usual deadlines
KEEPALIVE_LEAST_S = 15  # proposed: less costs more packets than it helps


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
    living = [track for track in silent if track.last.has_file]
    program, limit_s = paths.program(paths.owners(living)), max(KEEPALIVE_LEAST_S, int(idle_us / 2e6))
    without = [track for track in living if not track.last.keepalive]
    if without:
        yield Remedy(
            f"Let {program} set SO_KEEPALIVE: {len(without)} of these do not have it. Or let its pool close "
            "connections "
            f"that were idle for {limit_s} s.",
            name="SO_KEEPALIVE",
            present="not set",
            proposed="set",
        )
    keepalive_s = max(track.last.keepalive_s for track in silent)
    if keepalive_s > limit_s:
        yield Remedy(
            "Let keepalive probe before the connection is forgotten: after half of the shortest idle time that was cut."
            " New connections and those that begin to be idle take it.",
            command=paths.command(where[0], paths.owners(silent), f"sysctl -w net.ipv4.tcp_keepalive_time={limit_s}"),
            name="net.ipv4.tcp_keepalive_time",
            present=keepalive_s,
            proposed=limit_s,
            risk="each idle connection with SO_KEEPALIVE sends one packet in that time",
        )
