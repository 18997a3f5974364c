"""rp_filter drops handshakes: they come in by another device than answers would leave by."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from tcpscope.diagnose import Finding, Remedy, Rule, endpoint, listener, paths, peer, service
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.rules.drops import AT_LEAST
from tcpscope.diagnose.tallies import Tally
from tcpscope.kernel import netns as namespaces

LEAST = 3
"""SYNs or SYN-ACKs of one address. A client sends its own again, and a flood forges another address for each."""

MANY = 5
REASON, COUNTER = "IP_RPFILTER", "TcpExtIPReversePathFilter"
_FUNCTION = "ip_rcv_finish"
"""It frees the packet, where the kernel gives no reason."""

_WITHOUT_REASON = (None, "NOT_SPECIFIED")
_SHOWN = 3
_CONF = Path("/proc/sys/net/ipv4/conf")
_OF_DEVICES = "net.ipv4.conf.all.rp_filter"
_KNOWN_SECONDS = 10
_STRICT, _LOOSE = 1, 2

_WHY = {
    _STRICT: "With rp_filter=1 the kernel takes a packet only from the device through which it would answer the "
    "sender. These came by another one, or there is no route to their sender at all: the two ways differ (several "
    "uplinks, a VPN, policy routing), or the sender's address is forged.",
    _LOOSE: "With rp_filter=2 the kernel takes a packet only if a route leads to its sender, by whatever device. None "
    "leads to these: it is missing, or the sender's address is forged.",
    None: "With rp_filter=1 the kernel takes a packet only from the device through which it would answer the sender, "
    "with 2 only if a route leads there at all. So the two ways differ (several uplinks, a VPN, policy routing), no "
    "route leads to the sender, or its address is forged.",
}
_WHY_UNSEEN = " TCP never sees them, and nobody gets an answer."
_WHY_FORGED = (
    "A client that gets no answer sends its SYN again, and a server its SYN-ACK. Of none of these addresses did {} "
    "come, so most probably they are forged, or answers to forged ones. rp_filter is there to drop such packets."
)


class RpFilter(Rule):
    needs = ("drops", "counters")
    explains = ("connects_fail", "synack_unanswered", "drops")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        found: dict[tuple[int, bool], list[tuple[Any, Tally]]] = {}
        others = Counter[int]()
        for group, tally in seen.drops.where(direction="RECEIVED", kind={"LOST", None}):
            if group.netns is None or not _is_filtered(seen, group):
                continue
            if "SYN" in (group.flags or ""):
                found.setdefault((group.netns, "ACK" in group.flags), []).append((group, tally))
            else:
                others[group.netns] += tally.count
        for (netns, answers), groups in found.items():
            peers = Counter[str]()
            for group, tally in groups:
                peers[group.raddr] += tally.count
            again = {raddr for raddr, number in peers.items() if number >= LEAST}
            # `drops` tells of other packets than handshakes, if they are enough for it.
            explains: tuple[str, ...] = ("drops",) if others[netns] < AT_LEAST else ()
            if again:
                # A SYN that is dropped here has no SYN-ACK, so what happens to SYN-ACKs has another cause.
                explains += ("connects_fail", "synack_unanswered") if answers else ("connects_fail",)
                of_them = [each for each in groups if each[0].raddr in again]
                scattered = Counter({raddr: number for raddr, number in peers.items() if raddr not in again})
                yield self._finding(seen, netns, answers, of_them, explains, scattered)
            elif peers.total() >= AT_LEAST:
                yield self._finding(seen, netns, answers, groups, explains)

    def _finding(
        self,
        seen: Evidence,
        netns: int,
        answers: bool,
        groups: list[tuple[Any, Tally]],
        explains: tuple[str, ...],
        scattered: Counter[str] | None = None,
    ) -> Finding:
        """`scattered`: who sent fewer than LEAST, beside those of `groups`; None: these are all such."""
        forged = scattered is None
        total, peers, ports = Tally(), Counter[str](), Counter[int]()
        owners: paths.Owners = Counter()
        about = set()
        for group, tally in groups:
            total.merge(tally)
            peers[group.raddr] += tally.count
            ports[group.rport if answers else group.lport] += tally.count
            if group.pid is not None:
                owners[group.pid, group.comm] += tally.count
            about.add(peer(netns, group.raddr))
            if answers:
                about |= {service(netns, group.raddr, group.rport), endpoint(netns, group.raddr, group.rport)}
            else:
                about |= {listener(netns, group.lport), endpoint(netns, group.laddr, group.lport)}
        what = "SYN-ACKs" if answers else "SYNs"
        grown = seen.counters.grown(netns, COUNTER)
        common = dict(peers.most_common(_SHOWN))
        whom = next(iter(peers)) if len(peers) == 1 else f"{len(peers)} addresses"
        values = _values(netns)
        mode = _mode(values)
        observed = [
            f"{total.count} {what} dropped, those that were sent again included; of {paths.listed(peers)}",
            f"{'ports of the services' if answers else 'for local ports'}: {paths.listed(ports)}",
            _said(values),
        ]
        if scattered:
            observed.append(
                f"beside them {scattered.total()} of {len(scattered)} more address{'es' * (len(scattered) > 1)}, fewer "
                f"than {LEAST} of each: these may be forged"
            )
        if grown:
            observed.append(f"the kernel counts in {COUNTER} +{grown}, packets of whatever protocol")
        return Finding(
            rule=self.name,
            severity="info" if forged else "critical" if total.count >= MANY else "warning",
            title=f"rp_filter of this host drops {what} of {whom}: {total.count}"
            + (f", fewer than {LEAST} of each" if forged else ""),
            observed=observed,
            why=_WHY_FORGED.format(LEAST) if forged else _WHY[mode] + _WHY_UNSEEN,
            remedies=[] if forged else list(_remedies(netns, owners, next(iter(common)), mode, values)),
            facts={
                "netns": netns,
                "count": total.count,
                "what": what,
                "peers": common,
                "ports": dict(ports.most_common(_SHOWN)),
                "counted": grown,
                "rp_filter": sorted(_by_devices(values)) or None,
                "pids": paths.pids(owners),
                "comm": paths.program(owners) if owners else None,
            },
            who=paths.who(owners),
            look=(f"drop --reason {REASON} --netns {netns}",),
            about=frozenset(about),
            first_s=total.first_s,
            last_s=total.last_s,
            subject=(netns, answers),
            explains=explains,
        )


def _is_filtered(seen: Evidence, group: Any) -> bool:
    """By its reason; where there is none (before 5.18), by its function, if the counter has grown."""
    if group.reason not in _WITHOUT_REASON:
        return bool(group.reason == REASON)
    return str(group.location).startswith(_FUNCTION) and (seen.counters.grown(group.netns, COUNTER) or 0) >= LEAST


def _values(netns: int) -> Mapping[str, int]:
    """`all` and each device -> rp_filter. Empty: of another network namespace it cannot be read without privileges."""
    return _read(int(time.monotonic() / _KNOWN_SECONDS)) if netns == namespaces.own() else {}


@lru_cache(maxsize=1)
def _read(when: int) -> Mapping[str, int]:
    """Of our own network namespace, once in a while: it may have thousands of devices."""
    found = {}
    with suppress(OSError):
        for path in _CONF.iterdir():
            if path.name not in ("default", "lo"):
                with suppress(OSError):  # a device that has gone meanwhile
                    found[path.name] = int((path / "rp_filter").read_text())
    return found if "all" in found else {}


def _by_devices(values: Mapping[str, int]) -> Mapping[int, list[str]]:
    """What counts at a device is the higher of its value and that of `all`: this -> devices."""
    found: dict[int, list[str]] = {}
    for device in sorted(values.keys() - {"all"}):
        found.setdefault(max(values[device], values["all"]), []).append(device)
    return found


def _mode(values: Mapping[str, int]) -> int | None:
    """What has dropped packets of handshakes, 1 or 2. None: not known, or both are in use."""
    possible = _by_devices(values).keys() & {_STRICT, _LOOSE}
    return next(iter(possible)) if len(possible) == 1 else None


def _said(values: Mapping[str, int]) -> str:
    """`net.ipv4.conf.all.rp_filter is 0; with it 1 counts at eth0, 2 at wg0`."""
    if not values:
        return "rp_filter's value is not known: it is read in tcpscope's own network namespace only"
    parts = [f"{value} at {_named(devices)}" for value, devices in sorted(_by_devices(values).items())]
    counts = ", ".join(parts).replace(" at ", " counts at ", 1)
    return f"{_OF_DEVICES} is {values['all']}" + (f"; with it {counts}" if counts else "")


def _named(devices: list[str]) -> str:
    more = len(devices) - _SHOWN
    return ", ".join(devices[:_SHOWN]) + (f" and {paths.number(more, 'more device')}" if more > 0 else "")


def _remedies(
    netns: int, owners: paths.Owners, raddr: str, mode: int | None, values: Mapping[str, int]
) -> Iterator[Remedy]:
    """Where it is 1, the looser check first. Where it may be 2 already the route: that check finds none."""
    route = Remedy(
        f"See by which device {raddr} would be answered. If no route leads there, add it. If it is not the device by "
        "which its packets come, and the ways shall not differ, correct it.",
        command=paths.command(netns, owners, f"ip route get {raddr}"),
    )
    if mode != _STRICT:
        yield route
    if not values or _STRICT in _by_devices(values):
        yield Remedy(
            "If the ways shall differ, check only that a route leads to the sender (2). It does not help where none "
            "does.",
            command=paths.command(netns, owners, f"sysctl -w {_OF_DEVICES}={_LOOSE}"),
            name=_OF_DEVICES,
            present=values.get("all", "1, or 2 and no route at all"),
            proposed=_LOOSE,
            risk="It is for all devices of this network namespace, and takes packets with a forged source, if any "
            "route leads there. net.ipv4.conf.DEVICE.rp_filter is for one; the higher of the two counts.",
        )
    if mode == _STRICT:
        yield route


rule = RpFilter()
