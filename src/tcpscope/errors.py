"""Errors a user can meet, and the exit status of each.

    TcpscopeError            1  failed at run time
    ├── UsageError           2  wrong usage: a value, and what is allowed
    ├── UnsupportedError     3  this kernel cannot do it: what is missing
    │   └── RefusedError     3  the kernel refuses a program: the verifier's log
    ├── NotPermittedError    4  a capability is missing: its name
    ├── LossError            5  events were lost, under --strict
    ├── ReachedError         6  a limit of the command line was reached (--warn)
    ├── ResourceError        1  this machine lacks memory, open files or the like now: what failed, and what helps
    └── MalformedError       1  bytes that are not what they claim to be (BTF, ELF, a batch)
        └── BtfError

An error prints one line: what is wrong, with the value that caused it, then what helps (`hint`). Below it stand
`details`, if the error is about a text: what a compiler or the verifier says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class TcpscopeError(Exception):
    """Base of all known errors. `str(error)` is the line to print, and `hint` its second half."""

    exit_status = 1

    details: Sequence[str] = ()

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(TcpscopeError):
    """The command line or the call is wrong."""

    exit_status = 2


class UnsupportedError(TcpscopeError):
    """The running kernel lacks something that the request needs."""

    exit_status = 3


class RefusedError(UnsupportedError):
    """The kernel refuses a program that has no other way.

    `log` is the verifier's log, empty if the kernel did not ask the verifier; `said` is libbpf's last message.
    """

    def __init__(self, message: str, hint: str, program: str, log: str, said: str) -> None:
        super().__init__(message, hint)
        self.program = program
        self.log = log
        self.said = said


class NotPermittedError(TcpscopeError):
    """A privilege is missing. `capabilities` names the missing ones (`CAP_BPF`, ...)."""

    exit_status = 4

    def __init__(self, message: str, hint: str = "", capabilities: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.capabilities = capabilities


class LossError(TcpscopeError):
    """Events were lost in a run that must not lose any (--strict)."""

    exit_status = 5


class ReachedError(TcpscopeError):
    """The run has seen what --warn asks for."""

    exit_status = 6


class ResourceError(TcpscopeError):
    """The machine has too little of something now. It does not mean that the kernel lacks anything."""


class MalformedError(TcpscopeError):
    """Bytes are not what they claim to be."""


class BtfError(MalformedError):
    """BTF that is cut short or contradicts itself."""


def did_you_mean(value: str, allowed: Iterable[str], most: int = 1) -> str:
    """`did you mean 'states'?`: the `most` names of `allowed` that are similar to `value`. Empty if there are none."""
    import difflib  # only after a mistake

    near = difflib.get_close_matches(value, list(allowed), most)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
