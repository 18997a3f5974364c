"""What the kernel's reasons to discard a packet mean: is anything lost, and which SNMP counter counts it?

Each entry names the function of the kernel that counts. A reason without an entry is a loss, and no counter is known.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from tcpscope.errors import UnsupportedError, UsageError, did_you_mean
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.symbols import Symbols
from tcpscope.request import names_in
from tcpscope.schema import DERIVED

ENUM, PREFIX = "skb_drop_reason", "SKB_DROP_REASON_"
QDISC_ENUM = "qdisc_drop_reason"
"""What a queue discipline says in more detail, since 7.1. A discard has one of these in place of QDISC_DROP."""
_QDISC_REASON = "QDISC_DROP"
_SIZE = 256  # REASONS in drops.bpf.c
_PLACES = 16
_RULES = ("", "RECEIVER", "NO_SOCKET", "OVERFLOW", "STATE", "ORDER", "NOT_RST")  # enum rule
_ALL, _ONLY, _WITHOUT = range(3)  # enum wanted_reasons


class Fact(NamedTuple):
    """What a reason means.

    kind     LOST, REFUSED or HARMLESS
    counter  for both IP versions; `ipv4` is one for IPv4 only
    rule     what else the program looks at (enum rule)
    queued   the packet was in a queue of its socket
    mib      the counter in the kernel's words, if kernels that have the reason may lack it
    """

    kind: str = "LOST"
    counter: str = ""
    ipv4: str = ""
    rule: str = ""
    queued: bool = False
    mib: str = ""


_LOST = Fact()
_WITHOUT_REASON = Fact("", rule="RECEIVER")
_BEYOND = Fact(counter="TcpExtBeyondWindow", rule="NOT_RST", mib="LINUX_MIB_BEYOND_WINDOW")  # tcp_validate_incoming()
FACTS = {
    "NOT_SPECIFIED": _WITHOUT_REASON,
    "NO_SOCKET": Fact(rule="NO_SOCKET"),
    "TCP_LISTEN_OVERFLOW": Fact("REFUSED", "TcpExtListenDrops", rule="OVERFLOW"),  # tcp_v4_syn_recv_sock()
    "TCP_CSUM": Fact(counter="TcpInCsumErrors"),  # tcp_v4_rcv(), tcp_add_backlog(), tcp_rcv_established()
    "TCP_MINTTL": Fact(counter="TcpExtTCPMinTTLDrop"),  # tcp_v4_rcv()
    "TCP_MD5NOTFOUND": Fact(counter="TcpExtTCPMD5NotFound"),  # tcp_inbound_hash()
    "TCP_MD5UNEXPECTED": Fact(counter="TcpExtTCPMD5Unexpected"),  # tcp_inbound_md5_hash()
    "TCP_MD5FAILURE": Fact(counter="TcpExtTCPMD5Failure"),  # tcp_inbound_md5_hash()
    "TCP_AONOTFOUND": Fact(counter="TcpExtTCPAORequired"),  # tcp_inbound_hash()
    "TCP_AOUNEXPECTED": Fact(counter="TcpExtTCPAOKeyNotFound"),  # tcp_inbound_ao_hash()
    "TCP_AOKEYNOTFOUND": Fact(counter="TcpExtTCPAOKeyNotFound"),  # tcp_inbound_ao_hash()
    "TCP_AOFAILURE": Fact(counter="TcpExtTCPAOBad"),  # tcp_ao_verify_hash()
    "SOCKET_BACKLOG": Fact(counter="TcpExtTCPBacklogDrop"),  # tcp_add_backlog()
    "TCP_ABORT_ON_DATA": Fact(counter="TcpExtTCPAbortOnData"),  # tcp_rcv_state_process()
    "TCP_ZEROWINDOW": Fact(counter="TcpExtTCPZeroWindowDrop"),  # tcp_data_queue()
    "PROTO_MEM": Fact(rule="ORDER"),  # tcp_data_queue(), tcp_data_queue_ofo()
    "TCP_OFO_QUEUE_PRUNE": Fact(queued=True),  # tcp_prune_ofo_queue() counts calls, not packets
    "TCP_RFC7323_PAWS": Fact(counter="TcpExtPAWSEstab", rule="STATE"),  # tcp_validate_incoming(), tcp_check_req()
    "TCP_RFC7323_TW_PAWS": Fact(counter="TcpExtPAWSTimewait"),  # tcp_timewait_state_process()
    "TCP_RFC7323_TSECR": Fact(counter="TcpExtTSEcrRejected"),  # tcp_check_req()
    "TCP_INVALID_SEQUENCE": _BEYOND,
    "TCP_INVALID_END_SEQUENCE": _BEYOND,
    "TCP_INVALID_SYN": Fact(counter="TcpExtTCPSYNChallenge"),  # tcp_validate_incoming()
    "IP_OUTNOROUTES": Fact(ipv4="IpOutNoRoutes"),  # __ip_queue_xmit()
    "IP_CSUM": Fact(ipv4="IpExtInCsumErrors"),  # ip_rcv_core()
    "IP_INHDR": Fact(ipv4="IpInHdrErrors"),  # ip_rcv_core(), ip_forward()
    "IP_INADDRERRORS": Fact(ipv4="IpInAddrErrors"),  # ip_error()
    "IP_INNOROUTES": Fact(ipv4="IpExtInNoRoutes"),  # ip_error()
    "IP_RPFILTER": Fact(ipv4="TcpExtIPReversePathFilter"),  # ip_rcv_finish_core()
    # What the receiver has already, or what was for somebody else.
    "TCP_OLD_DATA": Fact("HARMLESS", "TcpExtDelayedACKLost"),  # tcp_data_queue()
    "TCP_OFOMERGE": Fact("HARMLESS", "TcpExtTCPOFOMerge", queued=True),  # tcp_data_queue_ofo()
    "TCP_OFO_DROP": Fact("HARMLESS", queued=True),
    "TCP_OLD_SEQUENCE": Fact("HARMLESS"),  # a keepalive probe, for one
    "TCP_OLD_ACK": Fact("HARMLESS"),
    "TCP_RFC7323_PAWS_ACK": Fact("HARMLESS", "TcpExtPAWSOldAck"),  # tcp_validate_incoming()
    "TCP_RESET": Fact("HARMLESS"),  # a RST that was obeyed
    "QUEUE_PURGE": Fact("HARMLESS", queued=True),
    "OTHERHOST": Fact("HARMLESS"),
    "SOCKET_RCVBUFF": Fact("HARMLESS"),  # the copy for a raw socket
    "PACKET_SOCK_ERROR": Fact("HARMLESS"),  # the copy for a packet socket
}

_OF_SOCKETS = {
    "LINUX_MIB_PAWSESTABREJECTED": FACTS["TCP_RFC7323_PAWS"],
    "LINUX_MIB_TCPSYNCHALLENGE": FACTS["TCP_INVALID_SYN"],
    "TCP_MIB_CSUMERRORS": FACTS["TCP_CSUM"],
    "LINUX_MIB_TCPOFODROP": Fact(counter="TcpExtTCPOFODrop"),
    "LINUX_MIB_TCPRCVQDROP": Fact(counter="TcpExtTCPRcvQDrop"),
    "LINUX_MIB_TCPZEROWINDOWDROP": FACTS["TCP_ZEROWINDOW"],
    "LINUX_MIB_TCPOFOMERGE": FACTS["TCP_OFOMERGE"],
    "LINUX_MIB_DELAYEDACKLOST": FACTS["TCP_OLD_DATA"],  # also beside TcpExtPAWSEstab
}
"""Counter, in the kernel's words -> what a discard without a reason means in which a socket counts it."""

_PLACES_WITHOUT_LOSS = {
    "inet_sock_destruct": "ANY",  # data that was never read
    "kfree_skb_list": "RECEIVED",  # a part of another packet; a queue drops what is sent
    "kfree_skb_list_reason": "RECEIVED",
    "packet_rcv": "ANY",  # the copy for a packet socket
    "packet_rcv_spkt": "ANY",
    "raw_rcv": "ANY",  # the copy for a raw socket
    "sk_stream_kill_queues": "ANY",
    "skb_queue_purge": "ANY",
    "tcp_rcv_state_process": "AFTER_FIN",  # an ACK from a peer that sends no more
    "tpacket_rcv": "ANY",
}
"""Without a reason, a discard in one of these functions is harmless, if it is one of these packets (enum only)."""
_ONLY_OF = ("ANY", "RECEIVED", "AFTER_FIN")


def constants(
    spec: Spec, enumerators: Mapping[int, str], symbols: Symbols, counter_number: Callable[[str], int | None]
) -> dict[str, Any]:
    """The facts as the program has them. `enumerators` are the running kernel's reasons, empty before 5.17."""
    names = {number: name.removeprefix(PREFIX) for number, name in enumerators.items()}
    kinds, counters = (_numbers(spec, field) for field in ("kind", "counter"))

    def packed(number: int, ipv6: bool) -> dict[str, int]:
        fact = FACTS.get(names.get(number, ""), _LOST) if names else _WITHOUT_REASON
        counter = fact.counter or ("" if ipv6 else fact.ipv4)
        return {
            "kind": kinds.get(fact.kind, 0),
            "counter": counters.get(counter, 0) if not fact.mib or counter_number(fact.mib) is not None else 0,
            "rule": _RULES.index(fact.rule),
            "no_device": fact.queued,
            "of_tcp": names.get(number, "").startswith("TCP_"),
        }

    watched = [
        {
            "number": counter_number(mib) or 0,
            "kind": kinds[fact.kind],
            "counter": counters[fact.counter],
            "of_tcp": mib.startswith("TCP_"),
            "padding": 0,
        }
        for mib, fact in _OF_SOCKETS.items()
    ]
    ranges = [(symbols.range(name), only) for name, only in _PLACES_WITHOUT_LOSS.items()]
    places = [{"begin": found[0], "end": found[1], "only": _ONLY_OF.index(only)} for found, only in ranges if found]
    return {
        "facts": [[packed(number, ipv6) for number in range(_SIZE)] for ipv6 in (False, True)],
        "places": places + [{"begin": 0, "end": 0, "only": 0}] * (_PLACES - len(places)),
        "watched": watched,
        "overflow_has_reason": "TCP_LISTEN_OVERFLOW" in names.values(),
    }


def _numbers(spec: Spec, name: str) -> dict[str, int]:
    labels = spec.layout("drop").field(name).labels
    assert labels
    return {label: number for number, label in labels.items()}


class Wanted(NamedTuple):
    """The reasons that --reason asks for. `named`: it names some, and does not only exclude others."""

    mode: int
    numbers: tuple[int, ...] = ()
    named: bool = False

    @classmethod
    def of(
        cls,
        text: str | None,
        enumerators: Mapping[int, str],
        of_qdiscs: Mapping[int, str] | None = None,
        derived: Mapping[int, str] | None = None,
    ) -> Wanted:
        """UsageError for a name that there is not. UnsupportedError for one of the kernel's, if it has no reasons.

        `of_qdiscs` are the names of `QDISC_ENUM`. QDISC_DROP stands for all of them. `derived` are names of ours.
        """
        if text is None:
            return cls(_ALL)
        patterns = names_in(text)
        if not enumerators and not all(pattern.lstrip("!").upper().startswith(DERIVED) for pattern in patterns):
            raise UnsupportedError(f"--reason {text}", "this kernel gives no reasons; Linux does since 5.17")
        known = {
            name.removeprefix(PREFIX): number
            for number, name in enumerators.items()
            if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in ("MAX", "SUBSYS_MASK")
        }
        detailed = {
            name: number
            for number, name in (of_qdiscs or {}).items()
            if name.startswith(f"{_QDISC_REASON}_") and name not in (f"{_QDISC_REASON}_UNSPEC", f"{_QDISC_REASON}_MAX")
        }
        known |= detailed | {name: number for number, name in (derived or {}).items()}
        if not patterns:
            raise UsageError("--reason is empty", "give names of reasons, separated by commas")
        excluded = _matching(known, (pattern[1:] for pattern in patterns if pattern.startswith("!")))
        named = _matching(known, (pattern for pattern in patterns if not pattern.startswith("!")))
        for chosen in (excluded, named):
            if known.get(_QDISC_REASON) in chosen:
                chosen |= set(detailed.values())
        if not named:
            return cls(_WITHOUT, tuple(sorted(excluded)))
        if not named - excluded:
            raise UsageError(f"--reason {text}", "nothing is left of these reasons")
        return cls(_ONLY, tuple(sorted(named - excluded)), True)

    def takes(self, number: int) -> bool:
        """Whether it asks for this reason."""
        return self.mode == _ALL or (number in self.numbers) == (self.mode == _ONLY)

    def without(self, numbers: Iterable[int]) -> Wanted:
        """The same, if no packet has one of these reasons: then nobody has to look whether it is an excluded one."""
        if self.mode != _WITHOUT:
            return self
        left = tuple(sorted(set(self.numbers) - set(numbers)))
        return self._replace(mode=_WITHOUT if left else _ALL, numbers=left)

    @property
    def keys(self) -> list[bytes]:
        """The keys of the map `reasons`."""
        return [number.to_bytes(4, "little") for number in self.numbers]


def _matching(known: Mapping[str, int], patterns: Iterable[str]) -> set[int]:
    found = set()
    for pattern in patterns:
        wanted = pattern.upper().removeprefix(PREFIX)
        matching = {number for name, number in known.items() if fnmatch.fnmatchcase(name, wanted)}
        if not matching:
            raise UsageError(f"this kernel has no reason {pattern!r}", _hint(wanted, known))
        found |= matching
    return found


def _hint(wanted: str, known: Iterable[str]) -> str:
    """Names that are similar, or have a word of `wanted`."""
    words = [word for word in re.findall("[A-Z]+", wanted) if len(word) > 3]
    alike = [name for name in known if any(word in name for word in words)]
    return (
        did_you_mean(wanted, known, 3)
        or (f"there are {', '.join(alike)}" if alike else "")
        or "tcpscope drop --all --count shows the reasons that occur"
    )
