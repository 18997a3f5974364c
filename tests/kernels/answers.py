"""What a kernel has of what the programs of an object ask for, and whether they use what it has not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from functools import cached_property

from tcpscope.kernel.btf import Array, Struct
from tcpscope.kernel.spec import Spec
from tests.kernels import code
from tests.kernels.core import OF_ENUMERATORS, QUESTIONS, Asks, Place, Relocation, ends, relocations
from tests.kernels.offline import Offline


class Answer(Enum):
    """What a kernel has of it."""

    FOUND = "found"
    UNUSED = "not there, and not used then"
    MISSING = "not there"
    AMBIGUOUS = "there in several types of that name, at different places"


class Answers:
    """What a kernel has of what an object asks for."""

    def __init__(self, spec: Spec, kernel: Offline) -> None:
        self.spec = spec
        self._ends = {one: {end.bit_offset for end in ends(one, kernel)} for one in relocations(spec)}

    @cached_property
    def _constants(self) -> dict[str, code.Constants]:
        """Program or function -> the places of its questions, and the answers that the loader puts there."""
        found: dict[str, list[tuple[int, int]]] = {}
        for one, where in relocations(self.spec).items():
            for piece, at in where if one.asks in QUESTIONS else ():
                found.setdefault(piece, []).append((at, int(bool(self._ends[one]))))
        return {piece: tuple(sorted(answers)) for piece, answers in found.items()}

    def used(self, programs: Iterable[str]) -> set[str]:
        """These programs, and the functions that are called by them on this kernel."""
        found: set[str] = set()
        todo = [*programs, *code.callbacks(self.spec)]
        while todo:
            if (piece := todo.pop()) not in found:
                found.add(piece)
                todo += code.calls(self.spec, piece, self._constants.get(piece, ()))
        return found

    def helpers(self, piece: str) -> frozenset[int]:
        """The numbers of the helpers that a program or function calls on this kernel."""
        return code.helpers(self.spec, piece, self._constants.get(piece, ()))

    def stack(self, program: str, step: int) -> tuple[int, str]:
        """The bytes of stack that a program takes with what it calls, and the deepest way, by frames of `step` bytes.

        As check_max_stack_depth() in the kernel's verifier.c: a call counts also where it is not reached.
        """
        used = self.used([program])

        def deepest(piece: str) -> tuple[int, str]:
            own = code.frame(self.spec, piece, self._constants.get(piece, ())) if piece in used else 0
            size = -(-max(own, 1) // step) * step
            below = max(map(deepest, code.calls(self.spec, piece, ())), default=(0, ""))
            return size + below[0], f"{piece} {size}{', ' if below[1] else ''}{below[1]}"

        return deepest(program)

    def of(self, programs: Collection[str]) -> dict[Relocation, Answer]:
        """The answers to what these programs, and the functions of the object, ask for."""
        used, own = self.used(programs), {*programs} | (code.pieces(self.spec).keys() - self._programs)
        found = {}
        for one, where in relocations(self.spec).items():
            if any(place.piece in own for place in where):
                found[one] = self._answer(one, any(self._reached(place) for place in where if place.piece in used))
        return found

    @cached_property
    def _programs(self) -> set[str]:
        return {program.name for program in self.spec.programs}

    def _reached(self, place: Place) -> bool:
        return place.at in code.reached(self.spec, place.piece, self._constants.get(place.piece, ()))

    def _answer(self, one: Relocation, used: bool) -> Answer:
        number = len(self._ends[one])
        if one.asks is Asks.TYPE_ID_LOCAL or number == 1 or (number and one.asks in QUESTIONS):
            return Answer.FOUND
        if one.asks in QUESTIONS or not used:
            return Answer.UNUSED
        return Answer.AMBIGUOUS if number else Answer.MISSING


def width(relocation: Relocation, kernel: Offline) -> str:
    """How wide the number or pointer is that the path leads to; of anything else that it is there."""
    for end in ends(relocation, kernel) if relocation.path and relocation.asks not in OF_ENUMERATORS else ():
        if not isinstance(kernel.btf.resolve(end.type_id), Struct | Array):
            return f"{end.bitfield_size} bits" if end.bitfield_size else f"{kernel.btf.size_of(end.type_id)} bytes"
    return "there"


def lacks(found: Mapping[Relocation, Answer]) -> list[str]:
    """What programs would use and this kernel has not, as text."""
    missing = {str(one) for one, answer in found.items() if answer is Answer.MISSING}
    ambiguous = {str(one) for one, answer in found.items() if answer is Answer.AMBIGUOUS}
    return [f"no {path}" for path in sorted(missing)] + [f"more than one {path}" for path in sorted(ambiguous)]


def absent(found: Mapping[Relocation, Answer]) -> list[str]:
    """What programs ask for and this kernel has not."""
    return sorted({str(one) for one, answer in found.items() if answer is Answer.UNUSED and one.asks in QUESTIONS})
