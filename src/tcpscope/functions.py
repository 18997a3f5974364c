"""Functions of the kernel that take a packet, by their names or by patterns."""

from __future__ import annotations

import fnmatch
from typing import NamedTuple

from tcpscope.errors import UnsupportedError, UsageError, did_you_mean
from tcpscope.kernel.features import Kernel
from tcpscope.request import names_in

MOST = 32  # FUNCTIONS in trace_functions.bpf.h
_ARGUMENTS = 6  # that a program can read


class Function(NamedTuple):
    """A function.

    argument  which of its arguments is the packet, from 0
    named     its name was given, not only a pattern
    """

    name: str
    argument: int
    named: bool


def chosen(text: str, kernel: Kernel) -> tuple[Function, ...]:
    """The functions that the names and patterns in `text` mean, in the order of the alphabet.

    UnsupportedError where no function can be hooked. UsageError for a name or a pattern of none, and for too many.
    """
    if not kernel.fentry:
        hint = "without --functions there are the hops at tracepoints"
        raise UnsupportedError(f"--functions {text}: {kernel.fentry.why}", hint)
    patterns = names_in(text)
    if not patterns:
        raise UsageError("--functions is empty", "give names of functions, or patterns such as 'ip_rcv*'")
    taking = {name: at for name, at in kernel.functions_with("sk_buff").items() if at < _ARGUMENTS}
    found = {name for pattern in patterns for name in _matching(pattern, taking, kernel)}
    if len(found) > MOST:
        raise UsageError(f"--functions {text}: {len(found)} functions", f"give patterns of at most {MOST}")
    return tuple(Function(name, taking[name], name in patterns) for name in sorted(found))


def _matching(pattern: str, taking: dict[str, int], kernel: Kernel) -> list[str]:
    if found := fnmatch.filter(taking, pattern):
        return found
    if kernel.parameters(pattern) is not None:
        raise UsageError(f"--functions {pattern}", "this function takes no packet (struct sk_buff *)")
    near = did_you_mean(pattern.strip("*"), taking, 3)
    raise UsageError(f"--functions {pattern}: the kernel has no such function that takes a packet", near)
