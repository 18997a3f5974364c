"""A user's own program as a tool: the events of its ring buffer, by the BTF of their struct."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tcpscope.errors import RefusedError, UnsupportedError, UsageError, did_you_mean
from tcpscope.filters import Filter, address_bytes
from tcpscope.kernel import btf as B
from tcpscope.kernel.spec import PERF_EVENT_ARRAY, RINGBUF, Spec
from tcpscope.kernel.symbols import kernel_symbols
from tcpscope.own import refusal
from tcpscope.request import Option, Request
from tcpscope.run import Batch, Run, Streaming
from tcpscope.schema import Clock, Decoder, Layout
from tcpscope.session import Session, Stats, closed_on_error, filters
from tcpscope.tool import Stream

_TRACING = (
    *("fentry", "fexit", "fmod_ret", "tp_btf", "raw_tp", "raw_tracepoint", "tracepoint", "tp", "iter", "lsm"),
    *("kprobe", "kretprobe", "kprobe.multi", "kretprobe.multi", "ksyscall", "kretsyscall"),
    *("uprobe", "uretprobe", "usdt"),
)
_FAMILIES = {2: 4, 10: 6}  # AF_INET, AF_INET6: a struct may have these
_HEADER = "output.bpf.h"
_DETAILS = ("cookie", "netns", "family", "uid", "cgroup")
_IMPORTANT = ("raddr", "time", "comm", "pid", "laddr")


class OwnProgram(Stream):
    """Show the events of a program of your own.

    FILE is a BPF program in C (NAME.bpf.c), which clang compiles, or an object file (NAME.bpf.o). Each event in its
    ring buffer is a row; the columns are the fields of its C struct. `tcpscope new` writes a program to begin with.
    """

    name = "run"
    options = (
        Option(
            ("--event",), "The struct of an event.  [default: the one that a global pointer has]", str, metavar="NAME"
        ),
        Option(
            ("--log",), "If the kernel refuses the program: write the verifier's whole log here.", str, metavar="FILE"
        ),
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
        return self._layout

    @cached_property
    def _layout(self) -> Layout:
        layout = Layout.whole(self.spec.btf, self.event)
        if not layout.fields:
            raise UsageError(f"{self.spec.name}: struct {self.event} has no fields")
        return layout

    def choose(self, request: Request) -> None:
        """Find the event's struct. UsageError if the object does not name it."""
        self.event = event_of(self.spec, request.options["event"])

    def floods(self, request: Request) -> bool:
        return "rate_per_s" in self.spec.variables

    def chosen(self, request: Request) -> Sequence[str]:
        """A table has all fields; of `struct event` only those that other tools show, too."""
        return [field.name for field in self.layout.fields if field.name not in _DETAILS or field.name in self._added]

    @cached_property
    def _added(self) -> tuple[str, ...]:
        """The fields that the struct has beside `struct event`."""
        first = self.spec.btf.struct(self.event).members[0]
        common = self.spec.btf.size_of(first.type_id) if _is_ours(self.spec, self.spec.btf.struct(self.event)) else 0
        return tuple(field.name for field in self.layout.fields if field.offset >= common)

    def frame(self, request: Request) -> Callable[[int], str]:
        """With names of functions, if the struct has some: KIND("function"), KIND("stack")."""
        named = any(field.kind in ("function", "stack") for field in self.layout.fields)
        return kernel_symbols().name if named else hex

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
        if request.strict and not counts_events(spec):
            raise UsageError("--strict", f"'{spec.name}' does not count what it loses: include event.bpf.h")
        if request.rate is not None and "rate_per_s" not in spec.variables:
            raise UsageError(f"--rate {request.rate}", "the program itself keeps to it: include event.bpf.h")
        if not filters(spec):
            check_filter(request.filter, self.layout)

    def session(self, request: Request, by: Sequence[str] = (), number: str | None = None) -> Session:
        if self.spec.counts:
            return super().session(request, by, number)
        return Session(
            self.spec,
            self.layout,
            request.filter,
            entries={self.spec.ring: request.buffer} if request.buffer else {},
            skip=self.skip(request),
            debug=request.debug,
        )

    def skip(self, request: Request) -> tuple[str, ...]:
        """Programs that are not to be loaded: SEC("?...")."""
        return tuple(program.hook for program in self.spec.programs if program.section.startswith("?"))

    def events(self, request: Request, names: Sequence[str], clock: Clock) -> Run:
        with closed_on_error(self.session(request)) as session:
            assert session.layout is not None
            decoder = session.layout.select(names).decoder(clock, frame=self.frame(request))
            run = OwnRun(session, decoder, request, None if filters(self.spec) else request.filter)
            run.important = tuple(dict.fromkeys((*self._added, *_IMPORTANT)))
            return run


def _help_of(class_: type) -> str:
    import inspect

    return inspect.cleandoc(class_.__doc__ or "")


class OwnRun(Streaming):
    """Its events. If its programs do not decide the filter (`wanted`), it is decided here, by the event's fields."""

    def __init__(self, session: Session, decoder: Decoder, request: Request, wanted: Filter | None) -> None:
        super().__init__(session, decoder, rate=request.rate or 0)
        self._counts = counts_events(session.spec)
        self._matches: Callable[[Any], bool] | None = None
        if wanted and not wanted.is_empty:
            assert session.layout is not None
            names = needed(wanted)
            self._look = session.layout.select(names).decoder(Clock("none")).rows
            self._matches = lambda row: wanted.matches(_comparable(row, names))
        if not self._counts:
            self.notes.append(f"what is lost is not known: '{session.spec.name}' does not count it (event.bpf.h would)")
        for name, (first, *_) in session.spec.hooks.items():
            if first.type.partition(".")[0] == "iter" and not first.role and name in session.loaded.hooks:
                self.notes.append(f"the iterator '{name}' is not run: ROLE(\"seeds\") runs it at the start")

    def _batch(self, records: memoryview) -> Batch:
        rows = self._decode(records)
        if self._matches:
            kept = [row for row, seen in zip(rows, self._look(records), strict=True) if self._matches(seen)]
            self.stats.filtered += len(rows) - len(kept)
            rows = kept
        self.stats.shown += len(rows)
        return Batch("event", rows)

    def account(self) -> Stats:
        stats = super().account()
        if self._counts and stats.seen >= stats.shown:
            return stats
        return Uncounted(**vars(stats))


@dataclass
class Uncounted(Stats):
    """The account of a program that does not count its events: what came is known, and what it lost is not."""

    def line(self) -> str:
        text = f"shown {self.shown} + filtered {self.filtered}; what was lost before is not known"
        if self.missed:
            text += f"; at least {self.missed} times the kernel skipped a program"
        return text

    def record(self) -> dict[str, int | None]:
        return super().record() | {"seen": None, "lost": None, "table_full": None}

    @property
    def lossless(self) -> bool:
        return not self.missed and not self.lost


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
    if not spec.ring:
        rings = [name for name, type_ in spec.maps.items() if type_ == RINGBUF]
        if rings:
            raise UsageError(
                f"{spec.name}: there are several ring buffers ({', '.join(rings)})", "call one of them 'events'"
            )
        if PERF_EVENT_ARRAY in spec.maps.values():
            raise UsageError(
                f"{spec.name}: its events come through a perf event array", "use a ring buffer, as output.bpf.h does"
            )
        raise UsageError(f"{spec.name}: it has no ring buffer, so there are no events", f"{_HEADER} has one")


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
