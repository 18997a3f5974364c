"""One walk over all open files for several objects.

A walk finds the processes that hold sockets which are older than the tool. With many files it takes longer than what a
program does with each of them. So objects that begin together share one: the iterator of the first one is run, and each
program calls that of the next object (walk_on() in bpf/connection.bpf.h).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar

from tcpscope.kernel.loaded import Loaded


@dataclass(frozen=True)
class Walked:
    """What the programs have written in a walk, and the processor seconds that it took."""

    output: bytes
    took_s: float


@dataclass(frozen=True)
class _Look:
    """An iterator over open files, and what is to be done when all that share its walk have seen them."""

    loaded: Loaded
    hook: str
    then: Callable[[Walked], None]


class Walk:
    """A walk at the end of its block. Until then an object that begins in it knows no older socket."""

    _current: ClassVar[ContextVar[Walk | None]] = ContextVar("walk", default=None)

    def __init__(self) -> None:
        self._looks: list[_Look] = []
        self._after: list[Callable[[], None]] = []
        self._token: Token[Walk | None] | None = None

    def __enter__(self) -> Walk:
        self._token = self._current.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._token is not None
        self._current.reset(self._token)
        if kind is None:
            self._go()

    @classmethod
    def is_shared(cls) -> bool:
        """Whether what begins now shares a walk."""
        return cls._current.get() is not None

    @classmethod
    def look(cls, loaded: Loaded, hook: str, then: Callable[[Walked], None]) -> None:
        """Let an iterator see all open files, now or at the end of the block, and then call `then`."""
        look, walk = _Look(loaded, hook, then), cls._current.get()
        if walk:
            walk._looks.append(look)
        else:
            then(_together([look]))

    @classmethod
    def after(cls, call: Callable[[], None]) -> None:
        """Call this after the walk, or now if none is shared."""
        walk = cls._current.get()
        if walk:
            walk._after.append(call)
        else:
            call()

    def _go(self) -> None:
        rest = [look for look in self._looks if look.loaded.is_open]  # one may have failed since
        done: list[tuple[_Look, Walked]] = []
        while rest:
            chain = [rest.pop(0)]
            while rest and chain[-1].loaded.walk_on(rest[0].loaded, rest[0].hook):
                chain.append(rest.pop(0))
            walked = _together(chain)
            done += [(look, walked) for look in chain]
        for look, walked in done:
            look.then(walked)
        for call in self._after:
            call()


def _together(chain: list[_Look]) -> Walked:
    began = time.thread_time()
    for look in chain:
        look.loaded.seed_counts(True)
    try:
        output = b"".join(chain[0].loaded.iterate(chain[0].hook))
    finally:
        for look in chain:
            look.loaded.seed_counts(False)
            look.loaded.walk_alone()
    return Walked(output, time.thread_time() - began)
