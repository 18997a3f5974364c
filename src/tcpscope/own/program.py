"""A user's own program as a tool: the events of its ring buffers and perf event arrays, by the BTF of their structs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from tcpscope.errors import RefusedError, UnsupportedError, UsageError, did_you_mean
from tcpscope.filters import Filter, address_bytes
from tcpscope.kernel import btf as B
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.machine import online_cpus
from tcpscope.kernel.ring import PerfArray, Ring
from tcpscope.kernel.spec import PERF_EVENT_ARRAY, RINGBUF, Spec
from tcpscope.kernel.symbols import kernel_symbols
from tcpscope.output import Column
from tcpscope.own import refusal
from tcpscope.own.hooks import UsersKernel
from tcpscope.request import Option, Request
from tcpscope.run import Batch, OverRate, Run
from tcpscope.schema import Clock, Layout
from tcpscope.session import RING_BYTES, Session, Stats, closed_on_error, filters
from tcpscope.tool import Stream

_TRACING = (
    *("fentry", "fexit", "fmod_ret", "tp_btf", "raw_tp", "raw_tracepoint", "tracepoint", "tp", "iter", "lsm"),
    *("kprobe", "kretprobe", "kprobe.multi", "kretprobe.multi", "ksyscall", "kretsyscall"),
    *("uprobe", "uretprobe", "usdt"),
)
_FAMILIES = {2: 4, 10: 6}  # AF_INET, AF_INET6: a struct may have these
_HEADER = "output.bpf.h"
_DETAILS = ("cookie", "netns", "family", "uid", "cgroup")
_PERF_BYTES = 256 << 10
"""For each processor, within what the kernel lets a process lock without CAP_IPC_LOCK (perf_event_mlock_kb)."""
_EACH_CPU = 0
"""As the size of a perf event array: libbpf gives it a place for each processor that there may be."""
_IMPORTANT = ("raddr", "time", "comm", "pid", "laddr")


class OwnProgram(Stream):
    """Show the events of a program of your own.

    FILE is a BPF program in C (NAME.bpf.c), which clang compiles, or an object file (NAME.bpf.o). Each event in its
    ring buffer or perf event array is a row; the columns are the fields of its C struct. `tcpscope new` writes a
    program to begin with.
    """

    name = "run"
    options = (
        Option(
            ("--event",),
            "Show only events that are this struct.  [default: those of the maps, or of a global pointer]",
            str,
            metavar="NAME",
        ),
        Option(
            ("--log",), "If the kernel refuses the program: write the verifier's whole log here.", str, metavar="FILE"
        ),
    )
    buffer = (
        "Size of the ring buffer between kernel and tool, or of a perf event array's buffer for each processor.  "
        "[default: what the ring buffer's map says, 4M with output.bpf.h; 256K for each processor]"
    )
    examples = {
        "run mine.bpf.c": "compile it and show its events",
        "run mine.bpf.o -R 443 -o json": "an object file, with a filter",
    }

    def __init__(self, spec: Spec | None = None, source: Path | None = None) -> None:
        super().__init__("own", (), event="own", options=self.options, examples=self.examples)
        self.help = _help_of(type(self))
        self.summary = self.help.partition("\n")[0]
        self._spec, self.source = spec, source

    @property
    def spec(self) -> Spec:
        assert self._spec is not None
        return self._spec

    @property
    def layout(self) -> Layout:
        """That of its only event."""
        return self._sources[0][1]

    def choose(self, request: Request) -> None:
        """Find the maps through which events come, and their structs. UsageError if the object does not name them."""
        structs = events_of(self.spec, request.options["event"])
        self.event = next(iter(structs.values()))
        self._sources = [(name, self._layout_of(struct)) for name, struct in structs.items()]
        self._union = Union([layout for _, layout in self._sources])

    def _layout_of(self, struct: str) -> Layout:
        layout = Layout.whole(self.spec.btf, struct)
        if not layout.fields:
            raise UsageError(f"{self.spec.name}: struct {struct} has no fields")
        return layout

    def columns(self, request: Request) -> tuple[Column, ...]:
        return self._union.columns

    def floods(self, request: Request) -> bool:
        return "rate_per_s" in self.spec.variables

    def chosen(self, request: Request) -> Sequence[str]:
        """A table has all fields; of `struct event` only those that other tools show, too."""
        added = self._added
        return [column.name for column in self._union.columns if column.name not in _DETAILS or column.name in added]

    @property
    def _added(self) -> tuple[str, ...]:
        """The columns that are not those of `struct event`."""
        if not _is_ours(self.spec, self.spec.btf.struct(self.event)):
            return tuple(column.name for column in self._union.columns)
        common = self.spec.btf.size_of(self.spec.btf.struct(self.event).members[0].type_id)
        return tuple(field.name for field in self.layout.fields if field.offset >= common)

    def frame(self, request: Request) -> Callable[[int], str]:
        """With names of functions, if the struct has some: KIND("function"), KIND("stack")."""
        kinds = {field.kind for _, layout in self._sources for field in layout.fields}
        return kernel_symbols().name if kinds & {"function", "stack"} else hex

    def open(self, request: Request) -> Run:
        check_sections(self.spec)
        self.choose(request)
        self._check(request)
        try:
            return super().open(request)
        except RefusedError as error:
            raise refusal.explained(error, self.spec, self.source, request.options["log"]) from None
        except UnsupportedError as error:
            raise refusal.without_hook(error, self.spec) from None

    def _check(self, request: Request) -> None:
        spec = self.spec
        if request.strict and not counts_events(spec) and not self._only_perf:
            raise UsageError("--strict", f"'{spec.name}' does not count what it loses: include event.bpf.h")
        if request.rate is not None and "rate_per_s" not in spec.variables:
            raise UsageError(f"--rate {request.rate}", "the program itself keeps to it: include event.bpf.h")
        for name, layout in self._sources if not spec.counts else ():
            self._check_size(name, layout, request)
        for _, layout in self._sources if not filters(spec) else ():
            check_filter(request.filter, layout)

    def _check_size(self, name: str, layout: Layout, request: Request) -> None:
        """UsageError if no event has room. The kernel writes up to 24 bytes more, and fills no buffer wholly."""
        is_perf = self.spec.maps[name] == PERF_EVENT_ARRAY
        has = f"struct {layout.name} has {layout.size} bytes"
        if is_perf and layout.size > PerfArray.largest:
            what = f"{self.spec.name}: perf event array '{name}': {has}, the kernel sends {PerfArray.largest} at most"
            raise UsageError(what, "a ring buffer takes larger ones")
        if request.buffer and layout.size + 24 > request.buffer:
            size = f"{request.buffer >> 10}K"
            raise UsageError(f"--buffer {size}", f"{has}, which find no room in '{name}'")

    @property
    def _only_perf(self) -> bool:
        """Whether all events come through perf event arrays, of which the kernel counts what is lost."""
        return {self.spec.maps[name] for name, _ in self._sources} == {PERF_EVENT_ARRAY}

    def session(
        self,
        request: Request,
        by: Sequence[str] = (),
        number: str | None = None,
        before: Callable[[Loaded], None] | None = None,
    ) -> Session:
        counts = self.spec.counts
        rings = [name for name, _ in self._sources if not counts and self.spec.maps[name] == RINGBUF]
        perf = [name for name, _ in self._sources if not counts and self.spec.maps[name] == PERF_EVENT_ARRAY]
        return Session(
            self.spec,
            self.layout if counts else None,
            request.filter,
            constants={"rate_per_s": request.rate or 0} if "rate_per_s" in self.spec.variables else {},
            entries=(dict.fromkeys(rings, request.buffer) if request.buffer else {}) | dict.fromkeys(perf, _EACH_CPU),
            skip=self.skip(request),
            ring_bytes=request.buffer or RING_BYTES,
            before=before,
            kernel=UsersKernel(),
            debug=request.debug,
        )

    def skip(self, request: Request) -> tuple[str, ...]:
        """Programs that are not to be loaded: SEC("?...")."""
        return tuple(program.hook for program in self.spec.programs if program.section.startswith("?"))

    def events(self, request: Request, names: Sequence[str], clock: Clock) -> Run:
        wanted = None if filters(self.spec) or request.filter.is_empty else request.filter
        readers: dict[str, Ring] = {}
        with ExitStack() as opened:

            def before(loaded: Loaded) -> None:
                """Open the readers: a perf event array has no room for events before."""
                opened.close()
                for name, layout in self._sources if not self.spec.counts else ():
                    readers[name] = self._reader(loaded, name, layout, request)
                    opened.callback(readers[name].close)
                self._check_counts(request, readers.values())

            with closed_on_error(self.session(request, before=before)) as session:
                sources = []
                for at, (name, layout) in enumerate(self._sources):
                    layout = session.layout or layout.named(session.kernel.enumerators)
                    rows = self._union.decoder(at, layout, names, clock, self.frame(request))
                    sources.append(Source(readers.get(name, session), rows, _matcher(wanted, layout)))
                columns = [column for column in self.columns(request) if column.name in names]
                columns.sort(key=lambda column: names.index(column.name))
                run = OwnRun(session, sources, columns, request)
                run.notes += self._left_out(request)
                run.important = tuple(dict.fromkeys((*self._added, *_IMPORTANT)))
                opened.pop_all()
                return run

    def _left_out(self, request: Request) -> list[str]:
        """A line for each map that is not read, unless one struct was asked for."""
        read = [name for name, _ in self._sources]
        left = [name for name in self.spec.channels if name not in read and request.options["event"] is None]
        return [f"map '{name}' is not read: it does not say its struct (__type(value, struct NAME))" for name in left]

    def _check_counts(self, request: Request, readers: Collection[Ring]) -> None:
        if request.strict and readers and not all(reader.counts for reader in readers):
            what = "--strict: this kernel does not count what finds no room in a perf event array"
            raise UnsupportedError(what, "kernels from 6.0 do; with event.bpf.h the program itself does")

    def _reader(self, loaded: Loaded, name: str, layout: Layout, request: Request) -> Ring:
        descriptor = loaded.map_fd(name)
        if self.spec.maps[name] == RINGBUF:
            return Ring(descriptor, layout.size)
        return PerfArray(descriptor, layout.size, request.buffer or _PERF_BYTES)


def _help_of(class_: type) -> str:
    import inspect

    return inspect.cleandoc(class_.__doc__ or "")


class Union:
    """The columns of several structs: a row has those of its own, the others are `None`.

    With several structs the column `struct` says which one it is. Fields of one name that are not alike have the name
    of their struct before their own.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        several = len(layouts) > 1
        self._several = several
        found: dict[str, Column] = {}
        self._fields: list[dict[str, str]] = []
        for layout in layouts:
            fields: dict[str, str] = {}
            for field in layout.fields:
                column = Column.of(field)
                if not _alike(found.setdefault(column.name, column), column):
                    column = msgspec.structs.replace(column, name=f"{layout.name}_{column.name}")
                    found[column.name] = column
                fields[column.name] = field.name
            self._fields.append(fields)
        if several:
            found = {
                name: msgspec.structs.replace(column, nullable=True)
                if any(name not in fields for fields in self._fields)
                else column
                for name, column in found.items()
            }
            found = {STRUCT.name: STRUCT} | found
        self.columns = tuple(found.values())

    def decoder(
        self, at: int, layout: Layout, names: Sequence[str], clock: Clock, frame: Callable[[int], str]
    ) -> Callable[[memoryview], list[Any]]:
        """Makes rows with the columns `names` of records of the struct with this index."""
        if not self._several:
            return layout.select(names).decoder(clock, frame=frame).rows
        fields = {name: field for name, field in self._fields[at].items() if name in names}
        if fields:
            decode = layout.select(fields.values()).decoder(clock, frame=frame).rows
        else:  # a record is a row all the same
            decode = layout.select([layout.fields[0].name]).decoder(raw=True).rows
        type_: Any = msgspec.defstruct("Row", [(name, Any, None) for name in names], gc=False)
        read = [(name, attrgetter(field)) for name, field in fields.items()]
        own = {STRUCT.name: layout.name} if STRUCT.name in names else {}
        return lambda records: [type_(**own, **{name: of(row) for name, of in read}) for row in decode(records)]


STRUCT = Column("struct", "text", doc="the struct of the event")


def _alike(one: Column, other: Column) -> bool:
    return (one.kind, one.unit, one.enum) == (other.kind, other.unit, other.enum)


def _matcher(wanted: Filter | None, layout: Layout) -> Callable[[memoryview], list[bool]] | None:
    """Says of each record whether a filter wants it. None: there is none, or the kernel decides."""
    if wanted is None:
        return None
    names = needed(wanted)
    look = layout.select(names).decoder(Clock("none")).rows
    return lambda records: [wanted.matches(_comparable(row, names)) for row in look(records)]


@dataclass(frozen=True)
class Source:
    """Where events come from: a map, or of an object with our headers the session. `rows` decodes a batch."""

    reader: Session | Ring
    rows: Callable[[memoryview], list[Any]]
    matches: Callable[[memoryview], list[bool]] | None


class OwnRun(Run):
    """Its events. If its programs do not decide the filter, it is decided here, by the event's fields."""

    counted = True

    def __init__(
        self, session: Session, sources: Sequence[Source], columns: Sequence[Column], request: Request
    ) -> None:
        super().__init__(columns, session)
        self._session, self._sources = session, sources
        self._readers = [source.reader for source in sources if isinstance(source.reader, Ring)]
        self.buffer_bytes = sum(reader.kernel_bytes for reader in self._readers)
        self._over = OverRate(request.rate or 0, self.notes)
        spec = session.spec
        self._counts = counts_events(spec)
        self._told = bool(self._readers) and all(reader.counts for reader in self._readers)
        self._perf = any(isinstance(reader, PerfArray) for reader in self._readers)
        self._cpus = online_cpus() if self._perf else ""
        if not self._counts and not self._told:
            self.notes.append(f"what is lost is not known: '{spec.name}' does not count it (event.bpf.h would)")
        for name, (first, *_) in spec.hooks.items():
            if first.type.partition(".")[0] == "iter" and not first.role and name in session.loaded.hooks:
                self.notes.append(f"the iterator '{name}' is not run: ROLE(\"seeds\") runs it at the start")

    _unread = False
    """Whether a processor had no buffer: what programs sent there is neither read nor counted."""

    def _look_at_cpus(self) -> None:
        if self._perf and not self._unread and (now := online_cpus()) != self._cpus:
            self._unread = True
            what = f"processors {self._cpus} ran at the start, now {now}"
            self.notes.append(f"{what}: a perf event array has no buffer for one that came, its events are not known")

    def poll(self) -> Iterator[Batch]:
        self._session.release_held()
        self._look_at_cpus()
        yield from self._batches()
        self._over.say(self._session.counters)

    _final = False
    """Whether all that programs have sent was read."""

    def end(self) -> Iterator[Batch]:
        self._look_at_cpus()
        self._session.end()
        yield from self._batches()
        self._over.say(self._session.counters, at_once=True)
        self._final = True
        if self._counts and not self._adds_up(super().account()):
            name = self._session.spec.name
            self.notes.append(f"what is lost is not known: '{name}' does not send exactly what event_begin() counts")

    def _batches(self) -> Iterator[Batch]:
        for source in self._sources:
            for records in source.reader.batches():
                rows = source.rows(records)
                if source.matches:
                    kept = list(itertools.compress(rows, source.matches(records)))
                    self.stats.filtered += len(rows) - len(kept)
                    rows = kept
                self.stats.shown += len(rows)
                yield Batch("event", rows)

    @property
    def descriptors(self) -> tuple[int, ...]:
        return self._session.descriptors + tuple(reader.fd for reader in self._readers)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()
        super().close()

    def account(self) -> Stats:
        stats = super().account()
        if self._counts and self._adds_up(stats):
            return stats
        lost = stats.lost + sum(reader.lost or 0 for reader in self._readers)
        values = vars(stats) | {"lost": lost, "seen": stats.shown + stats.filtered + lost}
        if self._unread:
            return Unread(**values)
        return Told(**values) if self._told else Uncounted(**values)

    def _adds_up(self, stats: Stats) -> bool:
        """Whether the programs have counted what came. While they run, more may be counted than was read."""
        if not self._final:
            return stats.seen >= stats.shown
        return stats.seen == stats.shown + stats.filtered + stats.limited + stats.lost


@dataclass
class Told(Stats):
    """The account of perf event arrays: what programs sent is known, and what the kernel had no room for."""

    def record(self) -> dict[str, int | None]:
        return super().record() | {"table_full": None}


@dataclass
class Uncounted(Stats):
    """The account of a program that does not count its events: what came is known, and what it lost is not."""

    unknown = "with our headers each event must come from event_begin(), and go by event_submit()"

    def line(self) -> str:
        limited = f" + over --rate {self.limited}" if self.limited else ""
        text = f"shown {self.shown} + filtered {self.filtered}{limited}; what was lost before is not known"
        if self.lost:
            text += f", but that it is at least {self.lost}"
        if self.missed:
            text += f"; at least {self.missed} times the kernel skipped a program"
        return text

    def record(self) -> dict[str, int | None]:
        return super().record() | {"seen": None, "lost": None, "table_full": None}

    @property
    def lossless(self) -> bool:
        return not self.missed and not self.lost


@dataclass
class Unread(Uncounted):
    """The account of perf event arrays, if a processor had no buffer for some time."""

    unknown = "no processor may come while it runs"

    @property
    def lossless(self) -> bool:
        return False


def counts_events(spec: Spec) -> bool:
    """Whether event_begin() of event.bpf.h counts each event. Those of output.bpf.h count what the program says."""
    return spec.counts and "rate_per_s" in spec.variables


def needed(filter: Filter) -> list[str]:
    """The fields by which it decides."""
    return list(dict.fromkeys(name for option, _ in filter.describe() for name in _fields_of(option)))


def _fields_of(option: str) -> tuple[str, ...]:
    return {"-4": ("family",), "-6": ("family",), "--port": ("lport", "rport")}.get(option, (option.lstrip("-"),))


def _comparable(row: Any, names: Sequence[str]) -> SimpleNamespace:
    """The row as a filter compares it: addresses as 16 bytes, the family as 4 or 6."""
    values = {name: getattr(row, name) for name in names}
    for name in ("laddr", "raddr"):
        if values.get(name) is not None:
            values[name] = address_bytes(values[name])
    if "family" in values:
        values["family"] = _FAMILIES.get(values["family"], values["family"])
    return SimpleNamespace(**values)


def check_filter(filter: Filter, layout: Layout) -> None:
    """UsageError for a filter that the fields of this struct cannot decide."""
    fields = {field.name: field for field in layout.fields}
    for option, value in filter.describe():
        what = f"{option} {value}".strip()
        if option == "--cgroup":
            what = "--cgroup and a command behind -- need event.bpf.h"
            raise UsageError(what, "only the kernel knows which cgroups lie below another")
        for name in _fields_of(option):
            if name not in fields:
                raise UsageError(what, f"struct {layout.name} has no field '{name}'")
            field = fields[name]
            kind = {"comm": "comm", "laddr": "address", "raddr": "address"}.get(name, "int")
            if field.kind != kind or field.counts:
                wants = {"comm": "is no text", "address": 'is no address: tag it KIND("address")'}.get(
                    kind, "is no number"
                )
                raise UsageError(what, f"field '{name}' of struct {layout.name} {wants}")


def check_sections(spec: Spec) -> None:
    """UsageError if there is nothing to attach, or nothing that sends events."""
    if all(program.section.startswith("?") for program in spec.programs):
        raise UsageError(
            f"{spec.name}: there is no program in it", 'a program is a function with SEC("tp_btf/...") or the like'
        )
    for program in spec.programs:
        type_ = program.type.removeprefix("?").partition(".s")[0].removesuffix(".w")
        if type_ not in _TRACING:
            known = 'programs that trace have SEC("tp_btf/..."), fentry, fexit, kprobe, tracepoint, raw_tp'
            raise UsageError(f"{spec.name}: SEC(\"{program.section}\") of '{program.name}' is not for tracing", known)
    if not spec.channels:
        raise UsageError(
            f"{spec.name}: it has no ring buffer and no perf event array, so there are no events", f"{_HEADER} has one"
        )


def events_of(spec: Spec, asked: str | None) -> dict[str, str]:
    """The maps through which events come -> their structs. With `asked` those that have this struct. UsageError.

    One map needs not say its struct: the only one, or of several the ring buffer or the one with the name `events`.
    Perf event arrays beside it may be for something else, as for hardware counters.
    """
    channels = spec.channels
    if not channels:
        return {"events": event_of(spec, asked)}
    typed = {name: struct for name, struct in channels.items() if struct and asked in (None, struct)}
    untyped = [name for name, struct in channels.items() if not struct]
    main = _main_of(spec)
    if asked and not typed:
        alone = main if main in untyped or len(channels) == 1 else untyped[0] if len(untyped) == 1 else ""
        if alone:
            return {alone: event_of(spec, asked)}
        if not untyped:
            structs = sorted(set(channels.values()))
            hint = did_you_mean(asked, structs) or f"there are {', '.join(structs)}"
            raise UsageError(f"--event {asked}: no map of '{spec.name}' has such events", hint)
    elif asked or main in typed:
        return typed
    elif main:
        return typed | {main: event_of(spec, None)}
    if unclear := [name for name in untyped if not typed or spec.maps[name] == RINGBUF]:
        what = f"{spec.name}: of several maps with events ({', '.join(channels)}), which struct has {unclear[0]}?"
        raise UsageError(what, "say it in the map: __type(value, struct NAME), or call it 'events'")
    return typed


def _main_of(spec: Spec) -> str:
    """The map that has the events if none says so; empty: that cannot be told."""
    rings = [name for name in spec.channels if spec.maps.get(name) == RINGBUF]
    for names in (["events"] if "events" in spec.channels else [], list(spec.channels), rings):
        if len(names) == 1:
            return names[0]
    return ""


def event_of(spec: Spec, asked: str | None) -> str:
    """The name of the event's struct: the one that was asked for, or to which a global pointer leads. UsageError."""
    structs = sorted(
        {
            type_.name
            for type_ in spec.btf.types
            if isinstance(type_, B.Struct) and type_.name and type_.kind is B.Kind.STRUCT
        }
    )
    if asked:
        if asked not in structs:
            hint = did_you_mean(asked, structs) or _anchor(asked)
            raise UsageError(f"--event {asked}: '{spec.name}' has no such struct in its BTF", hint)
        return asked
    pointed = {struct.name: struct for struct in _pointed_to(spec)}
    anchored = [name for name, struct in pointed.items() if _is_ours(spec, struct)] or list(pointed)
    if spec.name in anchored:
        return spec.name
    if len(anchored) == 1:
        return anchored[0]
    if anchored:
        raise UsageError(
            f"{spec.name}: which struct is the event: {', '.join(anchored)}?", f"say it: --event {anchored[0]}"
        )
    for name in (spec.name, "event"):
        if name in structs:
            return name
    raise UsageError(f"{spec.name}: its BTF does not tell which struct an event is", _anchor("event"))


def _anchor(name: str) -> str:
    return f"the compiler keeps it if the source has: const struct {name} *anchor __attribute__((unused));"


def _is_ours(spec: Spec, struct: B.Struct) -> bool:
    """Whether it begins as the events of event.bpf.h do."""
    first = spec.btf.resolve(struct.members[0].type_id) if struct.members else None
    return spec.counts and isinstance(first, B.Struct) and first.name == "event"


def _pointed_to(spec: Spec) -> Iterator[B.Struct]:
    """The structs to which global pointers of the object lead."""
    for type_ in spec.btf.types:
        if isinstance(type_, B.Var) and type_.linkage == 1:
            pointer = spec.btf.resolve(type_.type_id)
            to = (
                spec.btf.resolve(pointer.type_id) if pointer.kind is B.Kind.PTR and isinstance(pointer, B.Ref) else None
            )
            if isinstance(to, B.Struct) and to.name:
                yield to
