"""Which TCP packets does the kernel discard, where, and why?

One row per discarded packet: both ends, the reason in the kernel's words, the kernel function, the SNMP counter that
counts it, and whether anything is lost. The owner is that of the socket which was to receive the packet, or which sent
it. --stack adds the kernel stack.

A SYN that a listener refuses is a row, too. The kernel has no reason for it: the tool derives one, such as
DERIVED:SYN_QUEUE_FULL. `tcpscope queue` shows how full the queues are.

Without --all there are no rows of what belongs to normal life: packets for a connection in TIME_WAIT, data that was not
read before close(), data that came twice, a bare ACK under TCP_DEFER_ACCEPT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from tcpscope import drop_reasons, groups, listeners
from tcpscope.drop_reasons import Wanted
from tcpscope.filters import Filter
from tcpscope.kernel.compiled_filter import asks_owner
from tcpscope.kernel.features import Kernel
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.symbols import kernel_symbols
from tcpscope.request import Option, Request
from tcpscope.session import Session
from tcpscope.summary import Summary
from tcpscope.tool import Stacked

_SHOWN = (
    "time",
    "pid",
    "comm",
    "direction",
    "laddr",
    "lport",
    "raddr",
    "rport",
    "flags",
    "packet_bytes",
    "state",
    "kind",
    "reason",
    "location",
    "counter",
)
_REASON = {"direction", "kind", "reason", "location", "counter"}
_WHY = {
    *_REASON,
    "flags",
    "packet_bytes",
    "lport",
    "rport",
    "raddr",
    "laddr",
}
_OF_REFUSED_SYNS = ("syn_enter", "syn_exit", "syn_exit_again", "begins", "ends", "ends_again", "older")


class Drop(Stacked):
    """The events of the probe `drops`."""

    for_more: ClassVar = {"CAP_SYSLOG": "names of functions; without it, addresses"}

    def __init__(self) -> None:
        super().__init__(
            "drops",
            _SHOWN,
            important=("reason", "laddr", "raddr", "time", "flags", "location", "comm", "kind", "counter", "pid"),
            event="drop",
            aliases=("tcpdrop",),
            options=(
                Option(("-a", "--all"), "Show harmless discards too."),
                Option(
                    ("--reason",),
                    "Only these reasons, comma-separated: names, patterns such as 'TCP_*', with ! all others.",
                    str,
                    names=True,
                    repeats=True,
                    metavar="NAMES",
                ),
                Option(("--stack",), "Print the kernel stack of each discard."),
            ),
            examples={
                "drop -L 443": "discarded packets of one port",
                "drop --count -i 10": "by reason and function, every ten seconds",
                "drop --reason 'TCP_*,!TCP_CSUM' --stack": "some reasons only, and how the kernel came there",
            },
            summaries=(
                Summary(
                    "count",
                    "Count the packets of each group in the kernel, do not print them.",
                    ("reason", "location"),
                ),
            ),
        )

    def shows_functions(self, request: Request) -> bool:
        return True

    def session(self, request: Request, by: Sequence[str] = (), number: str | None = None) -> Session:
        kernel = Kernel()
        enumerators = kernel.enumerators(drop_reasons.ENUM)
        derived = self.layout.field("reason").derived or {}
        of_qdiscs = kernel.enumerators(drop_reasons.QDISC_ENUM)
        wanted = Wanted.of(request.options["reason"], enumerators, of_qdiscs, derived)
        counters = {name: kernel.enumerator(enumerator) for name, enumerator in listeners.MIB.items()}
        sees_syns = any(map(wanted.takes, derived)) and None not in counters.values()
        if not sees_syns:
            wanted = wanted.without(derived)
        facts = drop_reasons.constants(Spec.of(self.probes[0]), enumerators, kernel_symbols(), kernel.enumerator)
        constants = facts | {
            "want_packet": not by or not _REASON.issuperset(by) or not request.filter.is_empty,
            "want_owner": not by or not _WHY.issuperset(by) or _asks_whose(request.filter),
            "want_harmless": bool(request.options["all"] or wanted.named),
            "wanted_reasons": wanted.mode,
            "send_stacks": bool(request.options["stack"]),
            "rate_per_s": request.rate or 0,
            **{name: number or 0 for name, number in counters.items()},
        }
        counting = groups.counting(self.layout, by, number)
        return Session(
            self.probes[0],
            None if by else self.event,
            request.filter,
            constants=constants | counting.constants,
            entries=counting.entries,
            key_bytes=counting.key_bytes,
            keys={"reasons": wanted.keys},
            skip=() if sees_syns else _OF_REFUSED_SYNS,
            ring_bytes=request.buffer or self.ring_bytes(request),
            kernel=kernel,
            debug=request.debug,
        )


def _asks_whose(filter: Filter) -> bool:
    return bool(filter.netns) or asks_owner(filter)


tool = Drop()
