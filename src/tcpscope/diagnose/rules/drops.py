"""Packets that the kernel discards for a reason that has a remedy, and that no other rule tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from tcpscope.diagnose import Finding, Remedy, Rule, peer, process, processes, wording
from tcpscope.diagnose.evidence import Evidence
from tcpscope.diagnose.tallies import Tally

AT_LEAST = 10
"""Packets of one reason in one network namespace. No alarm on a single one: a wire damages one now and then."""

SHARE = 1 / 10_000
"""Of the segments that came to the network namespace (TcpInSegs): a busy host has a few damaged ones each minute."""

_OF_FIRST = ("net.core.netdev_max_backlog", "net.ipv4.tcp_mem")
"""Settings that only the first network namespace has, and that hold for all."""

_PEERS_SHOWN = 3
_PLACES_SHOWN = 2


class _Meaning(NamedTuple):
    """What a reason means.

    what, why  for the title, and behind it
    helps      what to do; `command` belongs to it
    counter    tells it where the kernel gives no reason
    risk       of the command
    """

    what: str
    why: str
    helps: str
    command: str | None = None
    counter: str | None = None
    risk: str | None = None


_CSUM = (
    "The data or the header was changed after the sender had computed the checksum. Hardware does that (cable, memory, "
    "a network card's offload), or a program that rewrites packets. The sender sends each of them again."
)
_MD5 = "This connection must be signed (RFC 2385), and both ends must have the same key. BGP uses this."
_AO = "This connection must be signed (RFC 5925), and both ends must have the same keys."
_PRESSURE = (
    "The memory of all TCP sockets together is at its limit, or that of this control group. What comes is discarded "
    "until some is free."
)

# Left out, because other rules tell them: NETFILTER_DROP, IP_RPFILTER of handshakes, NO_SOCKET, IP_OUTNOROUTES,
# NEIGH_*, PKT_TOO_BIG, QDISC_*, TCP_LISTEN_OVERFLOW, TCP_ZEROWINDOW. Left out, because a healthy host has them:
# IP_INADDRERRORS (packets for others), TCP_INVALID_SEQUENCE and its like (segments after a RST).
MEANINGS = {
    "TCP_CSUM": _Meaning(
        "damaged TCP segments",
        _CSUM,
        "Compare with the errors that the network card counts. If it has none, switch its offloads off (ethtool -K) "
        "to see whether they do it.",
        "ip -s -s link",
        "TcpInCsumErrors",
    ),
    "IP_CSUM": _Meaning(
        "damaged IP headers", _CSUM, "Compare with the errors that the network card counts.", "ip -s -s link", None
    ),
    "PROTO_MEM": _Meaning(
        "segments for which there is no TCP memory",
        _PRESSURE,
        "See who holds the memory, and what tcp_mem allows.",
        "cat /proc/net/sockstat; sysctl net.ipv4.tcp_mem",
    ),
    "SOCKET_BACKLOG": _Meaning(
        "segments that came while a process held the socket",
        "While a process works on a socket (a long send or receive) segments wait in the socket's backlog. It is "
        "limited by the receive buffer and the send buffer.",
        "Larger socket buffers, or shorter calls on this socket.",
        counter="TcpExtTCPBacklogDrop",
    ),
    "TCP_RFC7323_PAWS": _Meaning(
        "segments with an old time stamp",
        "A segment's TCP time stamp is older than that of a segment before. Two hosts behind one address do that (NAT, "
        "a load balancer), or a middlebox that rewrites time stamps.",
        "See whether several hosts share the remote address. Without time stamps there they are taken.",
        counter="TcpExtPAWSEstab",
    ),
    "TCP_OVERWINDOW": _Meaning(
        "segments beyond the window",
        "The sender has sent more than this host has offered to take: its TCP or a middlebox is wrong.",
        "Look at these segments in a capture: a middlebox that changes window scaling does this.",
    ),
    "TCP_MD5NOTFOUND": _Meaning(
        "segments without the required signature", _MD5, "Set the key at the remote end.",
        counter="TcpExtTCPMD5NotFound",
    ),
    "TCP_MD5UNEXPECTED": _Meaning(
        "segments with a signature that nobody expects", _MD5, "Set the key here, or take it away at the remote end.",
        counter="TcpExtTCPMD5Unexpected",
    ),
    "TCP_MD5FAILURE": _Meaning(
        "segments with a wrong signature", _MD5, "Set the same key at both ends. A NAT between them breaks it, too.",
        counter="TcpExtTCPMD5Failure",
    ),
    "TCP_AONOTFOUND": _Meaning("segments without the required signature", _AO, "Set the key at the remote end."),
    "TCP_AOUNEXPECTED": _Meaning("segments with a signature that nobody expects", _AO, "Set the key here."),
    "TCP_AOKEYNOTFOUND": _Meaning("segments signed with an unknown key", _AO, "Compare the keys' ids."),
    "TCP_AOFAILURE": _Meaning("segments with a wrong signature", _AO, "Set the same keys at both ends."),
    "TCP_MINTTL": _Meaning(
        "segments from farther away than allowed",
        "The socket has IP_MINTTL set, and the segment has passed more routers than that allows.",
        "See who sends them. BGP uses this against forged segments.",
    ),
    "IP_INNOROUTES": _Meaning(
        "packets that this host shall forward, but has no route for",
        "No route leads to their destination.",
        "See whether a route is missing.",
        "ip route",
    ),
    "IP_RPFILTER": _Meaning(
        "packets from addresses that this host would answer through another device",
        "rp_filter=1 allows a packet only from the device through which its source is reached.",
        "If the paths to and fro may differ, check only that the source is reached at all.",
        "sysctl -w net.ipv4.conf.all.rp_filter=2",
        risk="It is for all devices of this network namespace, and takes packets with a forged source, if any route "
        "leads there. net.ipv4.conf.DEVICE.rp_filter is for one; the higher of the two counts.",
    ),
    "SOCKET_FILTER": _Meaning(
        "segments that a filter on the socket refuses",
        "A program that the application attached (SO_ATTACH_FILTER, SO_ATTACH_BPF), or its control group, said no.",
        "See which programs are attached.",
        "bpftool cgroup tree",
    ),
    "BPF_CGROUP_EGRESS": _Meaning(
        "packets that a program of the control group refuses",
        "A BPF program that is attached to the sender's control group said no.",
        "See which programs are attached.",
        "bpftool cgroup tree",
    ),
    "TC_INGRESS": _Meaning(
        "packets that a tc filter drops on arrival",
        "A filter of tc, or a BPF program of it, at the device dropped them.",
        "See which programs are attached, and which filters (tc filter show dev DEVICE).",
        "bpftool net",
    ),
    "TC_EGRESS": _Meaning(
        "packets that a tc filter drops before they leave",
        "A filter of tc, or a BPF program of it, at the device dropped them.",
        "See which programs are attached, and which filters (tc filter show dev DEVICE).",
        "bpftool net",
    ),
    "XDP": _Meaning(
        "packets that an XDP program drops",
        "An XDP program at the device dropped them.",
        "See which programs are attached.",
        "bpftool net",
    ),
    "XFRM_POLICY": _Meaning(
        "packets that an IPsec policy refuses",
        "A policy of IPsec forbids them, or wants them encrypted.",
        "See the policies.",
        "ip xfrm policy",
    ),
    "SECURITY_HOOK": _Meaning(
        "packets that a security module refuses",
        "SELinux, Smack or another security module said no.",
        "Look for denials in its log.",
        "ausearch -m avc -ts recent",
    ),
    "CPU_BACKLOG": _Meaning(
        "packets for which a processor's input queue was full",
        "More packets came to one processor than it could handle; its queue is limited by net.core.netdev_max_backlog.",
        "Spread the packets over more processors (RSS, RPS), or let the queue be longer.",
        "sysctl net.core.netdev_max_backlog; cat /proc/net/softnet_stat",
    ),
    "NOMEM": _Meaning(
        "packets for which there was no memory",
        "The kernel could not get memory for them.",
        "See what takes the memory.",
        "free -m; dmesg | tail",
    ),
}  # fmt: skip
_BY_COUNTER = {meaning.counter: reason for reason, meaning in MEANINGS.items() if meaning.counter}


class Drops(Rule):
    needs = ("drops", "counters")

    def check(self, seen: Evidence) -> Iterator[Finding]:
        found: dict[tuple[Any, ...], list[tuple[Any, Tally]]] = {}
        for group, tally in seen.drops.where(kind="LOST"):
            reason = group.reason or _BY_COUNTER.get(group.counter)
            if reason in MEANINGS and group.netns is not None:
                found.setdefault((group.netns, reason), []).append((group, tally))
        for (netns, reason), groups in found.items():
            came = seen.counters.grown(netns, "TcpInSegs") or 0
            if sum(tally.count for _, tally in groups) >= max(AT_LEAST, SHARE * came):
                yield self._finding(netns, reason, groups)

    def unseen(self, seen: Evidence) -> Iterator[str]:
        if {group.reason for group in seen.drops.tallies} == {None}:
            yield "drops: this kernel gives no reasons (Linux before 5.17); few of the discarded packets are judged"

    def _finding(self, netns: int, reason: str, groups: list[tuple[Any, Tally]]) -> Finding:
        meaning = MEANINGS[reason]
        whole = Tally()
        peers, owners, places = Counter[str](), Counter[tuple[int, str]](), Counter[str]()
        counters = set()
        for group, tally in groups:
            whole.merge(tally)
            peers[group.raddr] += tally.count
            places[str(group.location).partition("+")[0]] += tally.count
            counters.add(group.counter)
            if group.pid is not None:
                owners[group.pid, group.comm] += tally.count
        way = "sent to" if all(group.direction == "SENT" for group, _ in groups) else "from"
        observed = [
            f"{whole.count} packets in {whole.last_s - whole.first_s + 1:.0f} s, reason {reason}; function "
            + ", ".join(place for place, _ in places.most_common(_PLACES_SHOWN)),
            f"{way} {_most(peers)}",
        ]
        if owners:
            observed.append(
                "of " + ", ".join(f"{comm} (PID {pid}): {n}" for (pid, comm), n in owners.most_common(_PEERS_SHOWN))
            )
        for counter in counters - {None}:
            observed.append(f"the kernel counts them in {counter}")
        first = owners.most_common(1)[0][0] if owners else None
        owner = processes.read(*first) if first else None
        return Finding(
            rule=self.name,
            severity="warning",
            title=f"the kernel discards {meaning.what} ({reason})",
            observed=observed,
            why=meaning.why,
            remedies=[
                Remedy(
                    meaning.helps,
                    command=_command(netns, [pid for pid, _ in owners], meaning.command),
                    risk=meaning.risk,
                )
            ],
            who=owner.name if owner else None,
            look=(f"drop --reason {reason} --netns {netns}", f"drop --reason {reason} --netns {netns} --stack -n 5"),
            about=frozenset(
                {peer(netns, address) for address in peers if address}
                | {process(pid) for pid, _ in owners}
                | {(reason,)}
            ),
            subject=(netns, reason),
            first_s=whole.first_s,
            last_s=whole.last_s,
            facts={
                "netns": netns,
                "count": whole.count,
                "reason": reason,
                "peers": dict(peers.most_common(_PEERS_SHOWN)),
            },
        )


def _most(peers: Counter[str]) -> str:
    shown = ", ".join(f"{address} ({n})" for address, n in peers.most_common(_PEERS_SHOWN))
    return shown + (f" and {len(peers) - _PEERS_SHOWN} more addresses" if len(peers) > _PEERS_SHOWN else "")


def _command(netns: int, pids: list[int], command: str | None) -> str | None:
    """For that namespace; None: it is not known how to enter it."""
    if command is None:
        return None
    parts = [part if part.endswith(_OF_FIRST) else wording.in_netns(netns, part, pids) for part in command.split("; ")]
    return None if None in parts else "; ".join(map(str, parts))


rule = Drops()
