"""What a BPF object file says of itself. Pure: needs no root and no kernel.

A program called `hook` or `hook__way` is one way to attach the logical hook `hook`; the ways are tried in the order of
the file. What holds for the hook stands on its first way: with the tag `optional:TEXT` it may be missing, and TEXT says
what is then not known; with `unless:PROGRAMS` it is not needed where one of these is attached; with `role:NAME` the
loader attaches, runs or detaches it at its time.
"""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msgspec

from tcpscope.errors import TcpscopeError
from tcpscope.kernel import btf as B
from tcpscope.kernel import elf
from tcpscope.schema import Layout, labels_of


class Program(msgspec.Struct, frozen=True):
    """One program: `section` is its ELF section, `type/target` (`fexit/inet_csk_accept`).

    without    what is not known when the hook has no way; None: it cannot be done without
    over       the map whose entries an iterator visits
    role       seeds, forgets, delays or flushes (output.bpf.h); empty: none
    unless     programs that make the hook needless
    again      the second copy of a program, which takes what the first was left out of; not needed where it has no way
    arguments  how many the hooked function must have at the least
    needs      an enumerator that the kernel must have, such as BPF_FUNC_for_each_map_elem; empty: none
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

    @property
    def hook(self) -> str:
        return self.name.partition("__")[0]

    @property
    def first(self) -> str:
        """Of a second copy the first one: `state` of `state_again`, `seen__fentry` of `seen_again__fentry`."""
        return self.name.replace("_again", "", 1)

    @property
    def type(self) -> str:
        return self.section.partition("/")[0]

    @property
    def target(self) -> str:
        return self.section.partition("/")[2]


class Variable(msgspec.Struct, frozen=True):
    """A global: where it lies in its section."""

    section: str
    offset: int
    size: int
    type: int


class Spec:
    """An object file: programs, hooks, global variables, layouts."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        self.data = data
        self._sections = elf.sections(data)
        self._symbols = elf.symbols(data)
        if ".BTF" not in self._sections:
            raise TcpscopeError(f"{name}: no .BTF section", "compile with clang -g")
        self.btf = B.Btf.parse(self._sections[".BTF"])

    @classmethod
    @cache
    def of(cls, probe: str) -> Spec:
        """The object that this package ships for `probe`."""
        return cls(probe, _shipped(f"{probe}.bpf.o"))

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """All programs in the order of the source, which is that of their BTF; functions in .text are their callees."""
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
        """The programs of the hooks that have this role."""
        return frozenset(way.name for ways in self.hooks.values() if ways[0].role == role for way in ways)

    @cached_property
    def shared(self) -> dict[str, str]:
        """Maps of this object that are those of another object -> its name."""
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
        """Bytes of .rodata or .bss up to the end of its last variable."""
        return max(v.offset + v.size for v in self.variables.values() if v.section == section)

    def pack(self, type_id: int, value: Any) -> bytes:
        """The bytes of `value` as type `type_id`: dicts for structs, sequences for arrays; what is missing is zero."""
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
        """The layout of the struct `name`; with `internal` also of the fields that are not for showing."""
        return Layout.of(self.btf, name, internal)

    def labels(self, enum: str) -> dict[int, str]:
        """Value -> name of the enumerators of `enum`, without the prefix that they share."""
        found = self.btf.find(enum, B.Kind.ENUM)
        assert isinstance(found, B.Enum)
        return labels_of(self.btf.enumerators(found))


def probes() -> list[str]:
    """All objects that the package ships: the directory `bpf/` is the list."""
    from importlib.resources import files

    names = (file.name for file in (files("tcpscope") / "bpf").iterdir())
    return sorted(name.removesuffix(".bpf.o") for name in names if name.endswith(".bpf.o"))


def _shipped(name: str) -> bytes:
    """A file of `bpf/`. Mostly it lies beside the code: to import importlib.resources would take 5 ms of each start."""
    try:
        return (Path(__file__).parents[1] / "bpf" / name).read_bytes()
    except FileNotFoundError:  # an editable install has it elsewhere
        from importlib.resources import files

        return (files("tcpscope") / "bpf" / name).read_bytes()
