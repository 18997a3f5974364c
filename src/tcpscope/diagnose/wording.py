"""What the rules about listeners say in the same words."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from shlex import quote
from typing import Any

from tcpscope.diagnose import Remedy, listener, processes
from tcpscope.diagnose.listener_history import History
from tcpscope.diagnose.queue_history import QueueHistory
from tcpscope.errors import ResourceError
from tcpscope.kernel import netns, pidns
from tcpscope.listeners import Listener
from tcpscope.schema import comm_text

_LEAST, _MOST = 128, 65535
_PEERS_SHOWN = 3


def whose(history: History) -> str:
    """`python3 (PID 4711)`: who accepts from it, or should; and how many more hold it."""
    listener, closed = history.last, ", closed since" if history.gone else ""
    owner = listener.owner
    if owner is None:
        return f"owner not known{closed}"
    others = len({holder.pid for holder in listener.holders}) - 1
    return f"{owner.comm} (PID {owner.pid}{f' and {others} more' if others else ''}){closed}"


def program(listener: Listener) -> str:
    """The name of the process that accepts."""
    return listener.owner.comm if listener.owner else "the application"


def peers(history: History, *causes: str) -> Iterator[str]:
    """The remote addresses with most refusals for one of these causes."""
    found = Counter[str]()
    for (cause, address), n in history.peers.items():
        if cause in causes:
            found[address] += n
    if found:
        top = ", ".join(f"{address} ({n})" for address, n in found.most_common(_PEERS_SHOWN))
        more = len(found) - _PEERS_SHOWN
        yield f"clients: {top}" + (f" and {more} more addresses" if more > 0 else "")


def refusals(seen: QueueHistory, history: History, cause: str = "ACCEPT_QUEUE_FULL") -> Iterator[str]:
    """How many handshakes were refused for this cause, and at which step; nothing if there were none."""
    count, unsure = history.count(cause), unsure_refusals(history)
    if not count and not unsure:
        return
    if seen.exact:
        at_syn, at_ack = (history.count(cause, step=step) for step in ("SYN", "ACK"))
        yield f"{count} refusals: {at_syn} SYNs, {at_ack} final ACKs; each retransmission counts again"
    else:
        yield _sampled(history, count, unsure)


def unsure_refusals(history: History) -> int:
    """Refusals of which it is not certain that the full accept queue was their cause."""
    return history.count("UNKNOWN") if history.full_seen else 0


def refusal_facts(seen: QueueHistory, history: History) -> dict[str, int | None]:
    """The same numbers for programs; None: not known."""
    unsure = unsure_refusals(history)
    steps = {"at_syn": "SYN", "at_ack": "ACK"}
    return {
        "refused": None if unsure else history.count("ACCEPT_QUEUE_FULL"),
        "clients_in_burst": None if unsure else history.accept_burst.most,
        **{name: history.count("ACCEPT_QUEUE_FULL", step) if seen.exact else None for name, step in steps.items()},
    }


def _sampled(history: History, count: int, unsure: int) -> str:
    """The number of refusals, and of packets: if it has no other refusals, these tell the step."""
    refused = f"{count} refusals (sampled)" + (f", and {unsure} for this or another cause" if unsure else "")
    packets = f"{history.drops} packets dropped"
    if not unsure and history.count("ACCEPT_QUEUE_FULL", step="SYN") == count:
        return f"{refused}, all SYNs; {packets}"
    others = sum(n for (_, cause), n in history.refused.items() if cause not in ("ACCEPT_QUEUE_FULL", "COOKIE_SENT"))
    if not others and history.drops == count:
        return f"{refused}; {packets}, one for each, as for SYNs"
    if not others and history.drops == 2 * count:
        return f"{refused}; {packets}, two for each, as for final ACKs"
    return f"{refused}; {packets} (one for a refused SYN, two for a refused final ACK)"


def full_share(history: History) -> str:
    """How long the accept queue was, and how often it was full."""
    own = history.last
    return (
        f"longest accept queue {history.longest_accept_queue}, limit {own.accept_limit}; full in {history.full_seen} "
        f"of {history.looks} samples"
    )


def accepted(history: History) -> str:
    if history.accepts is None:
        return "accepted connections are not known on this kernel"
    return f"the application accepted {history.accepts}"


def other_symptoms(history: History) -> Iterator[str]:
    """What else a full accept queue does: it keeps handshakes in the SYN queue. Or it comes beside it."""
    if dropped := history.count("SYN_QUEUE_FULL") + history.count("SYN_QUEUE_RESERVED"):
        yield f"{dropped} SYNs more dropped because the SYN queue was full: refused handshakes stay in it"
    if cookies := history.count("COOKIE_SENT"):
        yield f"{cookies} SYNs answered with a SYN cookie"


WORKERS_SHOWN = 8


def states_of(pids: Iterable[int]) -> str | None:
    """A command that shows what the threads of these processes do; None in a PID namespace: PIDs are others there."""
    shown = ",".join(str(pid) for pid in list(dict.fromkeys(pids))[:WORKERS_SHOWN])
    return f"ps -L -p {shown} -o pid,tid,stat,pcpu,wchan:32,comm" if shown and not pidns.inner() else None


def counters_agree(seen: QueueHistory, listener: Listener, names: tuple[str, ...]) -> Iterator[str]:
    """The kernel's counters of the namespace in the same time: an independent witness."""
    counters = seen.counters(listener)
    known = [f"TcpExt{name} +{counters[name]}" for name in names if name in counters]
    if known:
        yield f"the kernel's counters of this network namespace, all its listeners: {', '.join(known)}"


def in_namespace(history: History, command: str) -> str | None:
    """The command, to be run in the listener's network namespace; None if it is not known how to enter that.

    A process may have left the namespace after it made the socket: entering its present one would change another. Of
    a listener that is gone, the PIDs and the namespace's inode number may be those of others now.
    """
    listener = history.last
    if history.gone and listener.netns != netns.own():
        return None
    return in_netns(listener.netns, command, listener.inside)


def in_netns(inode: int, command: str, pids: Iterable[int] = ()) -> str | None:
    """The command, to be run in this network namespace, which these processes are in; None: it is not known how."""
    if inode == netns.own():
        return command
    if (first := min(pids, default=None)) and not pidns.inner():
        return f"nsenter -t {first} -n {command}"
    try:
        seen = _namespaces(int(time.monotonic())).get(inode)
    except (OSError, ResourceError):
        return None
    return f"nsenter --net={quote(seen.path)} {command}" if seen and seen.path.isprintable() else None


def namespace(inode: int | None) -> str | None:
    """What a reader calls this network namespace; None: it is our own, or not known."""
    if inode is None or inode == netns.own():
        return None
    name = None
    with suppress(OSError, ResourceError):
        seen = _namespaces(int(time.monotonic())).get(inode)
        name = seen.name if seen else None
    return f"network namespace {name} ({inode})" if name else f"network namespace {inode}"


@lru_cache(maxsize=1)
def _namespaces(second: int) -> dict[int, netns.Namespace]:
    """Those that can be seen, looked for once in a second: that walks over all processes."""
    return netns.visible().namespaces


def is_in(pid: int, inode: int, comm: str | None = "") -> bool:
    """Whether this process is in this network namespace.

    Without privileges that cannot be seen. Few programs change their namespace, but the number may be that of another
    process by now: its name must be `comm`; "": any. In a PID namespace PIDs are those of others.
    """
    process = Path("/proc", str(pid))
    try:
        return not pidns.inner() and netns.inode_of(process / "ns/net") == inode
    except PermissionError:
        with suppress(OSError):
            return comm is not None and comm in ("", comm_text((process / "comm").read_bytes()[:-1]))
    except OSError:
        pass
    return False


def raise_limit(history: History, proposed: int) -> Iterator[Remedy]:
    """How to get a longer queue: raise somaxconn if it is below `proposed`, and the application's backlog.

    Nothing if `proposed` is not more than the present limit.
    """
    listener = history.last
    if proposed <= listener.accept_limit:
        return
    again = "the .socket unit" if listener.by_systemd else program(listener)
    if listener.somaxconn < proposed:
        yield Remedy(
            f"Raise net.core.somaxconn, then restart {again}: listen() cuts its backlog to it when it is called.",
            command=in_namespace(history, f"sysctl -w net.core.somaxconn={proposed}"),
            name="net.core.somaxconn",
            present=listener.somaxconn,
            proposed=proposed,
        )
    if listener.by_systemd:
        yield Remedy(
            "Raise Backlog= in the .socket unit of this address, and restart that unit. systemd calls listen() for it, "
            "so a restart of the service does not change the limit.",
            command=f"systemctl list-sockets | grep -w {listener.lport}",
            name="Backlog=",
            present=listener.accept_limit if listener.limit_from == "listen()" else f"{listener.accept_limit} or more",
            proposed=proposed,
        )
        return
    yield Remedy(
        f"Let {program(listener)} call listen() with a larger backlog, and restart it: the kernel takes the limit at "
        "that call.",
        name="listen() backlog",
        present=listener.accept_limit if listener.limit_from == "listen()" else f"{listener.accept_limit} or more",
        proposed=proposed,
    )


def next_power(value: int) -> int:
    """The power of two that is not below `value`, within reason: the present limit may be more."""
    return min(max(1 << (value - 1).bit_length(), _LEAST), _MOST)


def seconds(us: int) -> str:
    """`850 ms`, `12.3 s`."""
    return f"{us // 1000} ms" if us < 1_000_000 else f"{us / 1e6:.1f} s"


def of(history: History) -> dict[str, Any]:
    """What a finding about a listener has beside its text: `who`, `look`, `about`, and its times."""
    own = history.last
    return {
        "who": processes.read(own.owner.pid, own.owner.comm).name if own.owner and not pidns.inner() else None,
        "look": (f"queue -L {own.lport}", f"queue --events -L {own.lport}"),
        "about": frozenset({listener(own.netns, own.lport), ("socket", own.key)}),
        "first_s": history.first_s,
        "last_s": history.last_s,
    }


def facts(history: History, **numbers: Any) -> dict[str, Any]:
    """What programs want to know of every finding about a listener."""
    own = history.last
    return numbers | {
        "netns": own.netns,
        "laddr": own.laddr,
        "lport": own.lport,
        "cookie": own.cookie,
        "pids": [holder.pid for holder in own.holders],
        "comm": own.owner.comm if own.owner else None,
        "accept_queue": history.longest_accept_queue,
        "syn_queue": history.longest_syn_queue,
        "accept_limit": own.accept_limit,
        "limit_from": own.limit_from,
        "somaxconn": own.somaxconn,
        "max_syn_backlog": own.max_syn_backlog,
        "syncookies": own.syncookies,
        "abort_on_overflow": own.abort_on_overflow,
        "accepts": history.accepts,
        "drops": history.drops,
        "full_seen": history.full_seen,
        "looks": history.looks,
    }
