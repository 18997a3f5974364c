"""Local ports in use, by pool: bpf/ports.bpf.h says what a pool is. For the tool `ports`."""

from __future__ import annotations

import math
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tcpscope.errors import NotPermittedError
from tcpscope.filters import Filter, address_text
from tcpscope.kernel import compiled_filter
from tcpscope.kernel.walk import Walk
from tcpscope.namespaces import numbers, opened
from tcpscope.schema import Layout, comm_text
from tcpscope.session import Session, wait_for_programs

_NAMESPACE, _BIND = 1, 2  # enum pool_kind
_PLACES = 8192  # POOLS and HOLDERS
_PLACE = struct.Struct("<I")
_SOCKETS = struct.Struct("<16i")
_SPAN = struct.Struct("<QQQ16I")
_PAIR = struct.Struct("<QQ")
_NO_SOCKETS, _NO_SPANS, _NO_PAIR = bytes(_SOCKETS.size), bytes(2 * _SPAN.size), bytes(_PAIR.size)
_UNKNOWN = 2**32 - 1
_SYN_SENT, _ESTABLISHED, _TIME_WAIT, _CLOSE = 2, 1, 6, 7  # enum tcp_state


class Owner(NamedTuple):
    """A process, and a number of its ports or of its calls. None: the process is not known."""

    pid: int | None
    comm: str | None
    uid: int | None
    number: int


class Range(NamedTuple):
    """The ports from `first` to `last`, of which `reserved` are left out (ip_local_reserved_ports)."""

    first: int
    last: int
    reserved: int | None

    @property
    def available(self) -> int | None:
        return None if self.reserved is None else self.last - self.first + 1 - self.reserved


@dataclass(frozen=True)
class Pool:
    """Ports that limit one another, at one moment.

    raddr, rport    of the connections; None: of ports that bind() has taken for an address
    used            ports in use: those of its sockets and those that bind() has taken in the namespace
    used_first      the same in the first look
    bound           those that bind() has taken
    range           None: not known, or its sockets have several (IP_LOCAL_PORT_RANGE)
    comparable      `bound` has no ports outside of the range
    step_width      ip_local_port_step_width; None: the kernel has no such sysctl
    tw_reuse        tcp_tw_reuse; None: not known
    opened          connections that were opened since the look before
    search_us       how long connect() looked for a port then, on average; None: no attempt has ended
    failures        errno -> calls that found no port since the look before
    owner           the process that holds most of the pool's own ports
    failing         the process whose calls failed most
    """

    netns: int
    family: int
    laddr: str
    raddr: str | None
    rport: int | None
    states: tuple[int, ...]
    used: int
    used_first: int
    bound: int
    range: Range | None
    comparable: bool
    step_width: int | None
    tw_reuse: int | None
    opened: int
    search_us: float | None
    search_max_us: int | None
    failures: dict[str, int]
    owner: Owner | None
    failing: Owner | None

    @property
    def syn_sent(self) -> int:
        return self.states[_SYN_SENT]

    @property
    def established(self) -> int:
        return self.states[_ESTABLISHED]

    @property
    def time_wait(self) -> int:
        return self.states[_TIME_WAIT]

    @property
    def closing(self) -> int:
        """In the states between ESTABLISHED and TIME_WAIT or CLOSE."""
        return sum(self.states) - self.syn_sent - self.established - self.time_wait - self.states[_CLOSE]

    @property
    def share(self) -> float | None:
        """Of the available ports, how many are in use: 0 to 1. None: not known."""
        available = self.range and self.range.available
        if available is None or not self.comparable:
            return None
        return min(self.used / available, 1.0) if available > 0 else 1.0


def attach(filter: Filter, debug: bool = False) -> Session:
    """The probe, attached, with the sockets that exist. Raises the errors of `Session`."""
    places = [_PLACE.pack(place) for place in reversed(range(_PLACES))]
    return Session(
        "ports",
        None,
        filter,
        constants={"both_families": True},  # a port that bind() has taken for IPv6 is taken for IPv4 too
        stacks={"free_pools": places, "free_holders": places},
        debug=debug,
    )


class _PoolBrief(NamedTuple):
    """What a look asks of each pool: these fields of `struct pool`, and the number of its sockets and bound ports."""

    netns: int
    kind: int
    sockets: bytes
    bound: int
    pins: int
    own: int
    spans: bytes
    used: int

    @classmethod
    def of(cls, fields: tuple[Any, ...]) -> _PoolBrief:
        return cls._make((*fields, fields[3] + sum(_SOCKETS.unpack(fields[2]))))


class _HolderBrief(NamedTuple):
    """... and of each process that holds ports of one: fields of `struct pool_holder`."""

    pool: int
    ports: int
    pins: int
    failed_connects: bytes
    failed_binds: bytes

    @classmethod
    def of(cls, fields: tuple[Any, ...]) -> _HolderBrief:
        return cls._make(fields)

    @property
    def fails(self) -> bool:
        return self.failed_connects != _NO_PAIR or self.failed_binds != _NO_PAIR


class Pools:
    """Takes snapshots of all pools. The caller must hold the session open."""

    def __init__(self, session: Session, filter: Filter, notes: list[str]) -> None:
        self._loaded, self._filter = session.loaded, filter
        self._epoch = session.loaded.memory("epoch").cast("I")
        self._pools = _Places(session, "pools", "pool_places", "pool", "pool_key", _PoolBrief, _PoolBrief._fields[:-1])
        self._holders = _Places(
            session, "holders", "holder_places", "pool_holder", "holder_key", _HolderBrief, _HolderBrief._fields
        )
        self._reserved: dict[int, tuple[int, int]] = {}
        self._asks_owner = compiled_filter.asks_owner(filter)
        self._addresses = Filter(
            netns=filter.netns, family=filter.family, rport=filter.rport, laddr=filter.laddr, raddr=filter.raddr
        )
        self._still: tuple[float, list[Pool]] | None = None
        self._first: dict[bytes, int] | None = None  # key -> ports in use in the first look
        Walk.look(self._loaded, "held", lambda walked: self._find(notes))

    def _find(self, notes: list[str]) -> None:
        """The rest of the first picture. Sockets with a process come first, so that they have an owner."""
        wanted = self._filter.netns
        for descriptor in opened(wanted, notes):
            try:
                for _ in self._loaded.iterate("existing", descriptor):
                    pass
            except PermissionError:
                if wanted:
                    raise NotPermittedError(
                        f"cannot enter network namespace {numbers(wanted)}", "needs CAP_SYS_ADMIN", ("CAP_SYS_ADMIN",)
                    ) from None
                notes.append("other network namespaces cannot be entered without CAP_SYS_ADMIN")
                return

    def look(self, least: float = 0.0) -> list[Pool]:
        """All pools that pass the filter and have a port in use, or failed calls; those nearest to their end first.

        least  leave out those that use a smaller share of their range, unless calls have failed
        """
        ended = self._epoch[0] & 1
        self._epoch[0] += 1
        wait_for_programs()  # one may still add to what has ended
        changed = [each.read() for each in (self._pools, self._holders)]
        if self._still and self._still[0] == least and not any(changed):
            return self._still[1]
        places, holders = self._pools.briefs, self._holders.briefs
        held: dict[int, list[int]] = defaultdict(list)
        for at, holder in holders.items():
            held[holder.pool].append(at)
        whole: dict[int, list[tuple[int, Any]]] = {}  # a pool may be there before that of its namespace is
        pools: dict[bytes, list[int]] = defaultdict(list)
        for place, pool in places.items():
            if pool.kind == _NAMESPACE:
                whole.setdefault(pool.netns, []).append((place, self._pools.record(place)))
            else:
                pools[self._pools.key(place)].append(place)
        if self._first is None:
            self._first = {key: _used([places[place] for place in same], whole) for key, same in pools.items()}
        if least:
            failing = {holder.pool for holder in holders.values() if holder.fails}
            ports = {netns: least * self._available(spaces) for netns, spaces in whole.items()}
            pools = {
                key: same
                for key, same in pools.items()
                if any(place in failing for place in same)
                or _most_used([places[place] for place in same], whole) >= ports.get(places[same[0]].netns, 0)
            }
        found = [
            self._pool(
                [self._pools.record(place) for place in same],
                whole.get(places[same[0]].netns, []),
                [self._holders.record(at) for place in same for at in held[place]],
                ended,
                self._first.get(key, 0),
            )
            for key, same in pools.items()
        ]
        nothing_done = self._forget(ended)
        shown = [pool for pool in found if pool is not None and (pool.failures or (pool.share or 0.0) >= least)]
        shown.sort(key=lambda pool: (-(pool.share or 0.0), -pool.used, pool.netns, pool.laddr))
        self._still = (least, shown) if nothing_done else None
        return shown

    def _available(self, spaces: list[tuple[int, Any]]) -> int:
        """How many ports the range of a namespace has; 0: not known."""
        return self._range(0, *max(spaces, key=lambda space: space[1].checked_ns)).available or 0

    def _pool(
        self,
        records: list[Any],
        spaces: list[tuple[int, Any]],
        holders: list[Any],
        ended: int,
        used_first: int,
    ) -> Pool | None:
        """`records` have the same key; `spaces` are those of the namespace. A program may have made another one."""
        opened, searches, search_ns, most_us = 0, 0, 0, 0
        for each in records:
            span = _SPAN.unpack_from(each.spans, ended * _SPAN.size)
            opened, searches, search_ns = opened + span[0], searches + span[1], search_ns + span[2]
            most_us = max(most_us, *span[3:])
        record = records[0]
        owners: Counter[_Who] = Counter()
        failing: Counter[_Who] = Counter()
        failures: dict[str, int] = {}
        for holder in holders:
            who = _who(holder)
            owners[who] += holder.ports
            for errno, field in (("EADDRNOTAVAIL", "failed_connects"), ("EADDRINUSE", "failed_binds")):
                if failed := _PAIR.unpack(getattr(holder, field))[ended]:
                    failures[errno] = failures.get(errno, 0) + failed
                    failing[who] += failed
        if not self._wants(record, holders):
            return None
        states = tuple(map(sum, zip(*(_SOCKETS.unpack(each.sockets) for each in records), strict=True)))
        own = sum(each.bound for each in records)
        taken = sum(each.bound for _, each in spaces) if spaces else own
        used = own if record.kind == _BIND else sum(states) + taken
        if not (failures or opened or sum(states) or (record.kind == _BIND and own)):
            return None
        known = {who: number for who, number in owners.items() if who[0] and number > 0}
        whole = max(spaces, key=lambda space: space[1].checked_ns, default=None)
        ranges = {each.own for each in records if each.own} | {0 for each in records if each.whole}
        own_range = max(ranges, default=0)
        apart = len(ranges) > 1 or any(each.mixed for each in records)
        return Pool(
            netns=record.netns,
            family=record.family,
            laddr=address_text(record.laddr),
            raddr=None if record.kind == _BIND else address_text(record.raddr),
            rport=None if record.kind == _BIND else record.rport,
            states=states,
            used=used,
            used_first=used_first,
            bound=own if record.kind == _BIND else taken,
            range=self._range(own_range, *whole) if whole and not apart else None,
            comparable=not (own_range and record.kind != _BIND and taken),
            step_width=None if not whole or whole[1].step_width == _UNKNOWN else whole[1].step_width,
            tw_reuse=whole[1].tw_reuse if whole else None,
            opened=opened,
            search_us=search_ns / searches / 1000 if searches else None,
            search_max_us=most_us if searches else None,
            failures=failures,
            owner=_most(known),
            failing=_most(failing),
        )

    def _wants(self, record: Any, holders: list[Any]) -> bool:
        """Whether it passes the filter, and with a filter for owners: whether a wanted one holds a port in it."""
        if self._asks_owner and not any(holder.wanted for holder in holders):
            return False
        bind = record.kind == _BIND
        ends = {"netns": record.netns, "family": record.family, "laddr": record.laddr}
        return self._addresses.matches(ends if bind else ends | {"raddr": record.raddr, "rport": record.rport})

    def _range(self, own: int, place: int, whole: Any) -> Range:
        """The range of the namespace, narrowed by IP_LOCAL_PORT_RANGE as inet_sk_get_local_port_range() does it."""
        first, last = whole.range & 0xFFFF, whole.range >> 16
        if own:
            if first <= own & 0xFFFF <= last:
                first = own & 0xFFFF
            if first <= own >> 16 <= last:
                last = own >> 16
        return Range(first, last, self._reserved_in(place, whole.checked_ns, first, last))

    def _reserved_in(self, place: int, checked_ns: int, first: int, last: int) -> int | None:
        known = self._reserved.get(place)
        if known is None or known[0] != checked_ns:
            data = self._loaded.value("reserved", _PLACE.pack(place), 65536 // 8)
            if data is None:
                return None
            self._reserved[place] = known = checked_ns, int.from_bytes(data, "little")
        return (known[1] >> first & (1 << last - first + 1) - 1).bit_count()

    def _forget(self, ended: int) -> bool:
        """Begin the next span, and free the places of what counts nothing and did nothing since the look before.

        Whether there was nothing to do.
        """
        holders, pools = self._holders.briefs, self._pools.briefs
        idle_holders = {place for place, holder in holders.items() if _is_idle_holder(holder)}
        failing = [place for place, holder in holders.items() if holder.fails]
        busy = [place for place, pool in pools.items() if pool.spans != _NO_SPANS]
        for place in failing:
            for name in ("failed_connects", "failed_binds"):
                self._holders.clear(place, name, ended * _PAIR.size // 2, _PAIR.size // 2)
        for place in busy:
            self._pools.clear(place, "spans", ended * _SPAN.size, _SPAN.size)
        self._holders.free(idle_holders, _is_idle_holder)
        in_use = {holder.pool for place, holder in holders.items() if place not in idle_holders}
        idle = {place for place, pool in pools.items() if place not in in_use and _is_idle_pool(pool)}
        if idle:
            spaces = {pool.netns for place, pool in pools.items() if place not in idle}
            idle -= {place for place in idle if pools[place].kind == _NAMESPACE and pools[place].netns in spaces}
        for place in idle:
            self._reserved.pop(place, None)
            self._loaded.remove("reserved", _PLACE.pack(place))
        self._pools.free(idle, _is_idle_pool)
        return not (idle or idle_holders or failing or busy)


_Who = tuple[int | None, str | None, int | None]


def _who(holder: Any) -> _Who:
    """Its process, name and user."""
    if not holder.pid:
        return None, None, None
    return holder.pid, comm_text(holder.comm), None if holder.uid == _UNKNOWN else holder.uid


def _most(numbers: Mapping[_Who, int]) -> Owner | None:
    who = max(numbers, key=lambda who: numbers[who], default=None)
    return None if who is None else Owner(*who, numbers[who])


def _used(same: list[_PoolBrief], whole: Mapping[int, list[tuple[int, Any]]]) -> int:
    """How many ports of a pool are in use."""
    if same[0].kind == _BIND:
        return sum(pool.bound for pool in same)
    return sum(pool.used for pool in same) + sum(int(space.bound) for _, space in whole.get(same[0].netns, ()))


def _most_used(same: list[_PoolBrief], whole: Mapping[int, list[tuple[int, Any]]]) -> float:
    """The same, but one with a range of its own may be at its end with any number."""
    return math.inf if any(pool.own for pool in same) else _used(same, whole)


def _is_idle_holder(holder: _HolderBrief) -> bool:
    return not (holder.ports or holder.pins or holder.fails)


def _is_idle_pool(pool: _PoolBrief) -> bool:
    return not (pool.bound or pool.pins) and pool.sockets == _NO_SOCKETS and pool.spans == _NO_SPANS


class _Places:
    """Structs in an array that programs fill, and the hash map that says where each of them is.

    A program that has found a place adds to it afterwards. So a place is free only if it still counts nothing when no
    program runs any more that may have found it. Numbers of places are one more than the index.
    """

    def __init__(
        self, session: Session, name: str, places: str, layout: str, key: str, brief: Any, fields: Sequence[str]
    ) -> None:
        self._loaded = session.loaded
        self._name, self._places = name, places
        self._layout = session.spec.layout(layout, internal=True)
        self._decode = self._layout.decoder(raw=True).rows
        self._memory = self._loaded.values(name, _PLACES * self._layout.size)
        self._key_bytes = session.spec.layout(key, internal=True).size
        self._number = session.spec.layout("place", internal=True)
        self._keys: dict[int, bytes] = {}
        self._apart: dict[int, bytes] = {}  # in use, but a program has made another place for the same key since
        self._brief, self._unpack = brief, _unpacker(self._layout, fields)
        self._before = self._read = b""
        self.briefs: dict[int, Any] = {}
        """Place -> the fields that are asked of all of them."""

    def read(self) -> bool:
        """Whether anything has changed since. A program that takes a place writes to the array before and after."""
        before, size = bytes(self._memory), self._layout.size
        if before == self._before:
            return False
        found = self._loaded.entries(self._places, self._key_bytes, self._number)
        self._keys = {value.number: key for key, value in found} | self._apart
        now, read = bytes(self._memory), self._read
        known, self.briefs = self.briefs, {}
        for place in self._keys:
            begin = (place - 1) * size
            same = known.get(place) if now[begin : begin + size] == read[begin : begin + size] else None
            self.briefs[place] = same or self._at(place, now)
        self._before, self._read = before, now
        return True

    def _at(self, place: int, memory: bytes | memoryview) -> Any:
        return self._brief.of(self._unpack(memory, (place - 1) * self._layout.size))

    def record(self, place: int) -> Any:
        """The whole struct. To decode it takes ten times as long."""
        begin = (place - 1) * self._layout.size
        return self._decode(self._memory[begin : begin + self._layout.size])[0]

    def key(self, place: int) -> bytes:
        return self._keys[place]

    def clear(self, place: int, name: str, at: int, size: int) -> None:
        """Set `size` bytes of a field to zero."""
        begin = (place - 1) * self._layout.size + self._layout.field(name).offset + at
        self._memory[begin : begin + size] = bytes(size)

    def free(self, places: set[int], is_idle: Callable[[Any], bool]) -> None:
        """Free these places, if they are still idle."""
        places = {place for place in places if is_idle(self._at(place, self._memory))}
        if not places:
            return
        self._before = b""
        for place in places - self._apart.keys():
            self._loaded.remove(self._places, self._keys[place])
        wait_for_programs()
        for place in places:
            if is_idle(self._at(place, self._memory)):
                self._apart.pop(place, None)
                begin = (place - 1) * self._layout.size
                self._memory[begin : begin + self._layout.size] = bytes(self._layout.size)
                self._loaded.push(f"free_{self._name}", _PLACE.pack(place - 1))
            elif self._loaded.insert(self._places, self._keys[place], _PLACE.pack(place)):
                self._apart.pop(place, None)
            else:
                self._apart[place] = self._keys[place]


def _unpacker(layout: Layout, names: Sequence[str]) -> Callable[[bytes | memoryview, int], tuple[Any, ...]]:
    """Reads these fields of a struct, which follow each other in it, from memory at an offset."""
    form, end = "<", 0
    for field in map(layout.field, names):
        form += f"{field.offset - end}x{field.format}"
        end = field.offset + field.size
    return struct.Struct(form).unpack_from
