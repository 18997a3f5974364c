"""The instructions of an object: which arguments a program reads, what it reaches, which helpers it calls, its stack.

The format of an instruction: Documentation/bpf/standardization/instruction-set.rst in the kernel's tree.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from tcpscope.kernel import elf
from tcpscope.kernel.btf import Kind
from tcpscope.kernel.spec import Spec

Constants = tuple[tuple[int, int], ...]
"""Instructions of a piece of code, by their place in its section, and what each puts into its register."""

_SIZE = 8
_CALL, _EXIT, _LOAD_8, _LOAD_IMMEDIATE = 0x85, 0x95, 0x79, 0x18
_COPIES, _CONSTANTS, _ATOMIC, _JUMPS = (0xBF, 0xBC), (0xB7, 0xB4), (0xC3, 0xDB), {0x05: "offset", 0x06: "immediate"}
_ALU, _LOADS, _BRANCHES = (4, 7), (0, 1), (5, 6)  # classes of instructions
_WITH_REGISTER = 0x08
_OPERATIONS = {0x00: operator.add, 0x40: operator.or_, 0x50: operator.and_, 0xA0: operator.xor}
_COMPARISONS = {0x10: operator.eq, 0x50: operator.ne}
_A_HELPER, _OF_THE_OBJECT = 0, 1  # what is called, in the place of the source register
_TEXT = ".text"
_FRAME = 10  # the register that points to the end of the stack
_LOAD, _STORES, _ADD = 1, (2, 3), 0x07
_SYMBOL, _RELOCATION = struct.Struct("<I20x"), struct.Struct("<QQ")
_SCRATCH = frozenset(range(6))  # registers that a call does not keep


class _Instruction(NamedTuple):
    at: int
    opcode: int
    target: int
    source: int
    offset: int
    immediate: int

    @property
    def size(self) -> int:
        return 2 * _SIZE if self.opcode == _LOAD_IMMEDIATE else _SIZE


class Piece(NamedTuple):
    """The place of a program or function: a section, and the bytes in it."""

    section: str
    begin: int
    end: int


@cache
def pieces(spec: Spec) -> dict[str, Piece]:
    """Every program, and every function that programs call, by name."""
    return {
        symbol.name: Piece(symbol.section, symbol.value, symbol.value + symbol.size)
        for symbol in elf.symbols(spec.data)
        if symbol.size and spec.btf.find(symbol.name, Kind.FUNC)
    }


@cache
def _functions(spec: Spec) -> dict[int, str]:
    """What programs call, by its place in .text."""
    return {piece.begin: name for name, piece in pieces(spec).items() if piece.section == _TEXT}


def callbacks(spec: Spec) -> frozenset[str]:
    """The functions that no call leads to: the kernel is given their addresses."""
    everywhere = {name for piece in pieces(spec) for name in _called(spec, piece, _instructions(spec, piece))}
    return frozenset(_functions(spec).values()) - everywhere


@cache
def arguments(spec: Spec, program: str) -> int:
    """How many arguments a program reads: loads of eight bytes from its context.

    The context is in r1 at first. What is copied from there is followed in a straight line, which is how clang unpacks
    arguments: at the beginning.
    """
    holds, most = {1}, 0
    for each in _instructions(spec, program):
        if each.opcode == _CALL:
            holds -= _SCRATCH
        elif each.opcode in _COPIES:
            holds = holds | {each.target} if each.source in holds else holds - {each.target}
        elif each.opcode & 7 in (*_ALU, *_LOADS):
            if each.opcode == _LOAD_8 and each.source in holds:
                most = max(most, each.offset // 8 + 1)
            holds.discard(each.target)
    return most


@cache
def helpers(spec: Spec, piece: str, constants: Constants) -> frozenset[int]:
    """The numbers of the helpers (`enum bpf_func_id`) that a program or function calls, where it is reached."""
    reach = reached(spec, piece, constants)
    return frozenset(
        each.immediate
        for each in _instructions(spec, piece)
        if each.opcode == _CALL and each.source == _A_HELPER and each.at in reach
    )


@cache
def reached(spec: Spec, piece: str, constants: Constants) -> frozenset[int]:
    """The instructions, by their places, that can be come to, as the verifier sees it.

    `constants` are answers of the kernel that the loader writes into the code: a branch on one of them goes one way.
    """
    code = {each.at: each for each in _instructions(spec, piece)}
    known = dict(constants)
    states: dict[int, dict[int, int]] = {}  # place -> registers whose value is known
    todo: list[tuple[int, dict[int, int]]] = [(min(code, default=0), {})] if code else []
    while todo:
        at, registers = todo.pop()
        if at in states:
            registers = {name: value for name, value in states[at].items() if registers.get(name) == value}
            if registers == states[at]:
                continue
        states[at] = registers
        each = code[at]
        after = _after(each, registers, known)
        todo += [(place, after) for place in _next(each, registers)]
    return frozenset(states)


def _after(each: _Instruction, before: dict[int, int], known: dict[int, int]) -> dict[int, int]:
    """The registers behind an instruction."""
    registers = dict(before)
    kind = each.opcode & 7
    if each.opcode == _CALL:
        return {name: value for name, value in registers.items() if name not in _SCRATCH}
    if each.opcode in _ATOMIC:  # may fetch the old value
        registers.pop(each.source, None)
        registers.pop(0, None)
    if kind not in (*_ALU, *_LOADS):
        return registers
    value = registers.pop(each.target, None)
    if each.at in known:
        registers[each.target] = known[each.at]
    elif each.opcode in _CONSTANTS:
        registers[each.target] = each.immediate
    elif each.opcode in _COPIES and each.source in before:
        registers[each.target] = before[each.source]
    elif kind in _ALU and value is not None and not each.opcode & _WITH_REGISTER and each.opcode & 0xF0 in _OPERATIONS:
        registers[each.target] = _OPERATIONS[each.opcode & 0xF0](value, each.immediate)
    return registers


def _next(each: _Instruction, registers: dict[int, int]) -> tuple[int, ...]:
    """Where it goes on from an instruction."""
    behind = each.at + each.size
    if each.opcode == _EXIT:
        return ()
    if each.opcode in _JUMPS:
        return (behind + _SIZE * getattr(each, _JUMPS[each.opcode]),)
    if each.opcode & 7 not in _BRANCHES or each.opcode == _CALL:
        return (behind,)
    there = behind + _SIZE * each.offset
    compare = _COMPARISONS.get(each.opcode & 0xF0)
    if compare and not each.opcode & _WITH_REGISTER and each.target in registers:
        return (there if compare(registers[each.target], each.immediate) else behind,)
    return behind, there


@cache
def calls(spec: Spec, piece: str, constants: Constants) -> frozenset[str]:
    """The functions that a program or function calls, where it is reached."""
    reach = reached(spec, piece, constants)
    return frozenset(_called(spec, piece, (each for each in _instructions(spec, piece) if each.at in reach)))


@cache
def frame(spec: Spec, piece: str, constants: Constants) -> int:
    """How many bytes of stack a piece uses, where it is reached: as deep as it reads, writes or points."""
    deepest, pointers = 0, set[int]()
    reach = reached(spec, piece, constants)
    for each in _instructions(spec, piece):
        if each.at not in reach:
            continue
        kind = each.opcode & 7
        if (each.source if kind == _LOAD else each.target if kind in _STORES else None) == _FRAME:
            deepest = max(deepest, -each.offset)
        elif each.opcode == _ADD and each.target in pointers:
            deepest = max(deepest, -each.immediate)
        pointers.discard(each.target)
        if each.opcode in _COPIES and each.source == _FRAME:
            pointers.add(each.target)
    return deepest


def _called(spec: Spec, piece: str, instructions: Iterable[_Instruction]) -> Iterator[str]:
    """A static function is called by its place in .text, within .text by the distance; a global one by its name."""
    section = pieces(spec)[piece].section
    base = section == _TEXT
    for each in instructions:
        if each.opcode != _CALL or each.source != _OF_THE_OBJECT:
            continue
        name = _named(spec, section).get(each.at)
        if name is None:
            yield _functions(spec)[(each.at if base else 0) + _SIZE * (each.immediate + 1)]
        elif name in pieces(spec):
            yield name


@cache
def _named(spec: Spec, section: str) -> dict[int, str]:
    """The names that the instructions of a section refer to: variables, global functions, functions of the kernel."""
    found = _sections(spec)
    symbols = list(_SYMBOL.iter_unpack(found.get(".symtab", b"")))
    names: dict[int, str] = {}
    for at, what in _RELOCATION.iter_unpack(found.get(f".rel{section}", b"")):
        begin = symbols[what >> 32][0]
        if begin:  # a section has none
            names[at] = found[".strtab"][begin:].partition(b"\0")[0].decode()
    return names


@cache
def _sections(spec: Spec) -> dict[str, bytes]:
    return elf.sections(spec.data)


@cache
def _instructions(spec: Spec, piece: str) -> tuple[_Instruction, ...]:
    return tuple(_read(_sections(spec)[pieces(spec)[piece].section], *pieces(spec)[piece][1:]))


def _read(code: bytes, begin: int, end: int) -> Iterator[_Instruction]:
    at = begin
    while at < end:
        opcode, registers, offset, immediate = struct.unpack_from("<BBhi", code, at)
        yield (one := _Instruction(at, opcode, registers & 15, registers >> 4, offset, immediate))
        at += one.size
