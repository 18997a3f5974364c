"""What a BPF object file says of itself. Pure: needs no root and no kernel.

A program called `hook` or `hook__way` is one way to attach the logical hook `hook`. The loader tries the ways in the
order of the source. Of an object without our header (output.bpf.h) each program is a hook. The tags on the first way
hold for the hook:

    optional:TEXT    the hook may be missing; TEXT says what is not known without it
    unless:PROGRAMS  the loader omits the hook if one of these programs is attached
    role:NAME        says when the loader attaches, runs or detaches it

A program whose section names no function (`fentry`) is aimed at one by `Spec.aimed`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from copy import copy
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msgspec

from tcpscope.errors import TcpscopeError
from tcpscope.kernel import btf as B
from tcpscope.kernel import elf
from tcpscope.schema import Layout, labels_of

HASH, PERF_EVENT_ARRAY, RINGBUF = 1, 4, 27  # BPF_MAP_TYPE_...
_OUTPUT = (PERF_EVENT_ARRAY, RINGBUF)
_AIMLESS = ("fentry", "fexit")  # sections that name no function


class Program(msgspec.Struct, frozen=True):
    """One program: `section` is its ELF section, `type/target` (`fexit/inet_csk_accept`).

    without    what is not known without the hook; None: the object does not work without it
    over       the map whose entries an iterator visits
    role       seeds, forgets, delays or flushes (output.bpf.h); empty: none
    unless     the hook is omitted if one of these programs is attached
    again      it is the second copy of a program, and handles what the first was skipped for (recursion.bpf.h)
    arguments  how many arguments the hooked function must have at least
    needs      an enumerator that the kernel must have, such as BPF_FUNC_for_each_map_elem, or a function; empty: none
    module     the module of the hooked function, if that is not built in; empty: it always is
    alone      it is no way of a hook, but a hook
    """

    name: str
    section: str
    without: str | None = None
    over: str | None = None
    role: str = ""
    unless: frozenset[str] = frozenset()
    again: bool = False
    arguments: int = 0
    needs: str = ""
    module: str = ""
    alone: bool = False

    @property
    def hook(self) -> str:
        """The logical hook that it is a way of."""
        return self.name if self.alone else self.name.partition("__")[0]

    @property
    def first(self) -> str:
        """The first copy of a second one: `state` of `state_again`, `seen__fentry` of `seen_again__fentry`."""
        return self.name.replace("_again", "", 1)

    @property
    def type(self) -> str:
        """`fexit` of `fexit/inet_csk_accept`."""
        return self.section.partition("/")[0]

    @property
    def target(self) -> str:
        """`inet_csk_accept` of `fexit/inet_csk_accept`; empty if the section names none."""
        return self.section.partition("/")[2]


class Variable(msgspec.Struct, frozen=True):
    """A global variable: its section, offset and size in bytes, and the BTF id of its type."""

    section: str
    offset: int
    size: int
    type: int


class Spec:
    """An object file: programs, hooks, global variables, layouts. Raises TcpscopeError if it has no BTF."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.aims: Mapping[str, str] = {}
        self.data = data
        self._sections = elf.sections(data)
        self._symbols = elf.symbols(data)
        if ".BTF" not in self._sections:
            raise TcpscopeError(f"{name}: no .BTF section", "compile with clang -g")
        self.btf = B.Btf.parse(self._sections[".BTF"])

    @classmethod
    @cache
    def of(cls, probe: str | Path) -> Spec:
        """The object that this package ships for `probe`, or that of a path."""
        if isinstance(probe, Path):
            return cls(probe.name.removesuffix(".o").removesuffix(".bpf"), probe.read_bytes())
        return cls(probe, _shipped(f"{probe}.bpf.o"))

    @property
    def counts(self) -> bool:
        """Whether it has our header (output.bpf.h), with the counters of the loss contract."""
        return self.variables.keys() >= {"counters", "ending", "table_error"}

    @cached_property
    def _maps(self) -> dict[str, dict[str, B.Type]]:
        """Map -> the members of its description: name -> type to which the member points."""
        found = {}
        for symbol in self._symbols:
            variable = self.btf.find(symbol.name, B.Kind.VAR) if symbol.section == ".maps" else None
            described = self.btf.resolve(variable.type_id) if isinstance(variable, B.Var) else None
            if isinstance(described, B.Struct):
                pointers = {member.name: self.btf.resolve(member.type_id) for member in described.members}
                found[symbol.name] = {
                    name: self.btf.resolve(pointer.type_id)
                    for name, pointer in pointers.items()
                    if isinstance(pointer, B.Ref)
                }
        return found

    @cached_property
    def maps(self) -> dict[str, int]:
        """Map -> its type, a number of enum bpf_map_type."""
        numbers = {name: members.get("type") for name, members in self._maps.items()}
        # __uint(type, ...) is a pointer to an array of so many
        return {name: number.count for name, number in numbers.items() if isinstance(number, B.Array)}

    @cached_property
    def channels(self) -> dict[str, str]:
        """The maps through which events come -> the struct that `__type(value, struct ...)` gives them; empty: none.

        Of an object with our header that is the ring buffer `events` alone.
        """
        if self.counts:
            return {"events": ""}
        values = {name: self._maps[name].get("value") for name, type_ in self.maps.items() if type_ in _OUTPUT}
        return {name: value.name if isinstance(value, B.Struct) else "" for name, value in values.items()}

    def aimed(self, functions: Mapping[str, str], needed: Set[str] = frozenset()) -> Spec:
        """The same object, with programs that hook these functions: program -> function.

        Those that are `needed` may not be missing.
        """
        spec = copy(self)
        vars(spec).pop("hooks", None)
        spec.aims = dict(functions)
        vars(spec)["programs"] = self.programs + tuple(
            _aimed(program, functions[program.name], program.name in needed)
            for program in self._all
            if program.name in functions
        )
        return spec

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """All programs, in the order of the source, but those of ours that hook nothing until they are `aimed`."""
        return tuple(program for program in self._all if program.section not in _AIMLESS or not self.counts)

    @cached_property
    def _all(self) -> tuple[Program, ...]:
        """All programs, in the order of the source, which the BTF keeps. Functions in .text are no programs."""
        found = []
        for symbol in self._symbols:
            function = self.btf.find(symbol.name, B.Kind.FUNC)
            if function is None or symbol.section in ("", ".text"):
                continue
            tags = dict(tag.split(":", 1) for tag in self.btf.decl_tags(function.id) if ":" in tag)
            program = Program(
                symbol.name,
                symbol.section,
                tags.get("optional"),
                tags.get("map"),
                tags.get("role", ""),
                frozenset(tags.get("unless", "").split()),
                "again" in tags,
                int(tags.get("arguments", 0)),
                tags.get("needs", ""),
                tags.get("module", ""),
                not self.counts,
            )
            found.append((function.id, program))
        return tuple(program for _, program in sorted(found, key=lambda entry: entry[0]))

    @cached_property
    def hooks(self) -> dict[str, tuple[Program, ...]]:
        """Logical hook -> the ways to attach it, best first."""
        hooks: dict[str, tuple[Program, ...]] = {}
        for program in self.programs:
            hooks[program.hook] = (*hooks.get(program.hook, ()), program)
        return hooks

    def role(self, role: str) -> frozenset[str]:
        """The names of the programs whose hooks have this role."""
        return frozenset(way.name for ways in self.hooks.values() if ways[0].role == role for way in ways)

    @cached_property
    def shared(self) -> dict[str, str]:
        """Map that this object uses of another object -> the name of that object."""
        tags = {
            symbol.name: self.btf.find(symbol.name, B.Kind.VAR) for symbol in self._symbols if symbol.section == ".maps"
        }
        found = {name: tag for name, variable in tags.items() if variable for tag in self.btf.decl_tags(variable.id)}
        return {name: tag.partition(":")[2] for name, tag in found.items() if tag.startswith("shared:")}

    @cached_property
    def variables(self) -> dict[str, Variable]:
        """Global variables by name, with their place in .rodata or .bss."""
        return {
            symbol.name: Variable(symbol.section, symbol.value, symbol.size, variable.type_id)
            for symbol in self._symbols
            if symbol.section in (".rodata", ".bss")
            and isinstance(variable := self.btf.find(symbol.name, B.Kind.VAR), B.Var)
        }

    def section(self, program: str) -> str:
        """The ELF section of a program: `fexit/inet_csk_accept`."""
        return next(p.section for p in self.programs if p.name == program)

    def section_size(self, section: str) -> int:
        """Size in bytes of .rodata or .bss, up to the end of its last variable."""
        return max(v.offset + v.size for v in self.variables.values() if v.section == section)

    def pack(self, type_id: int, value: Any) -> bytes:
        """The bytes of `value` as type `type_id`: dicts for structs, sequences for arrays. Missing parts are zero."""
        type_ = self.btf.resolve(type_id)
        size = self.btf.size_of(type_.id)
        if isinstance(value, bytes):
            return value.ljust(size, b"\0")
        packed = bytearray(size)
        if isinstance(type_, B.Struct):
            members = {member.name: member for member in type_.members}
            for name, part in value.items():
                at = members[name].bit_offset // 8
                data = self.pack(members[name].type_id, part)
                packed[at : at + len(data)] = data
        elif isinstance(type_, B.Array):
            step = size // type_.count
            for index, part in enumerate(value):
                packed[index * step : (index + 1) * step] = self.pack(type_.type_id, part)
        else:
            packed[:] = int(value).to_bytes(size, "little", signed=value < 0)
        return bytes(packed)

    def layout(self, name: str, internal: bool = False) -> Layout:
        """The layout of the struct `name`. With `internal` it has also the fields without DOC."""
        return Layout.of(self.btf, name, internal)

    def labels(self, enum: str) -> dict[int, str]:
        """Value -> name of each enumerator of `enum`, without their common prefix."""
        found = self.btf.find(enum, B.Kind.ENUM)
        assert isinstance(found, B.Enum)
        return labels_of(self.btf.enumerators(found))


def _aimed(program: Program, function: str, needed: bool) -> Program:
    without = None if needed else f"when a packet is in {function}()"
    return msgspec.structs.replace(program, section=f"{program.type}/{function}", without=without)


def probes() -> list[str]:
    """All objects that the package ships: the directory `bpf/` is the list."""
    from importlib.resources import files

    names = (file.name for file in (files("tcpscope") / "bpf").iterdir())
    return sorted(name.removesuffix(".bpf.o") for name in names if name.endswith(".bpf.o"))


def _shipped(name: str) -> bytes:
    """A file of `bpf/`. It is read beside the code if it is there: importlib.resources takes 5 ms to import."""
    try:
        return (Path(__file__).parents[1] / "bpf" / name).read_bytes()
    except FileNotFoundError:  # an editable install has it elsewhere
        from importlib.resources import files

        return (files("tcpscope") / "bpf" / name).read_bytes()
