"""What to say when the kernel does not take a user's program: where, why, and what helps."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from tcpscope.errors import RefusedError, TcpscopeError, UnsupportedError, UsageError
from tcpscope.kernel import btf as B
from tcpscope.kernel.features import BTF
from tcpscope.kernel.spec import Program, Spec
from tcpscope.kernel.verifier import LINES, source_line, verifier_hint, verifier_lines
from tcpscope.own.hooks import UsersKernel, module_of

_EVENTS = (Path("/sys/kernel/tracing/events"), Path("/sys/kernel/debug/tracing/events"))
_NEAR = 3
_OFFSET = "an offset must be where an instruction begins"
_NO_INSTRUCTION = (errno.EILSEQ, errno.EINVAL)  # arch_prepare_kprobe() of x86, and of arm64


def explained(error: RefusedError, spec: Spec, source: Path | None, log_to: str | None) -> TcpscopeError:
    """The same error for who wrote the program: the line of the source, the verifier's last lines, one hint."""
    program = next((each for each in spec.programs if each.name == error.program), None)
    if program is None or not error.message.startswith(f"{spec.name}: "):
        return error  # of another object, which it uses
    lines = verifier_lines(error.log)
    if not lines:
        within = "+" in program.target and any(os.strerror(each) in error.message for each in _NO_INSTRUCTION)
        offset = _OFFSET if within else ""
        return UnsupportedError(error.message, near(program) or offset or error.said)
    hint = verifier_hint(error.log, program.section)
    if not hint and os.strerror(errno.ENOSPC) in error.message:
        hint = verifier_hint("infinite loop")  # a log of more than 16 MB, which has no end on kernels before 6.4
    found = UnsupportedError(error.message, hint)
    details = []
    if line := source_line(error.log):
        text, file, number = line
        number = number or _number_of(text, source)
        place = f"{file or (source.name if source else spec.name)}{f':{number}' if number else ''}"
        details.append(f"{place}: {text}")
    shown = lines[-LINES:]
    left_out = len(lines) - len(shown)
    more = "" if log_to else "; --log FILE writes all of it"
    details.append(f"the verifier's last lines ({left_out} earlier lines left out{more}):")
    details += (f"  {each}" for each in shown)
    if log_to:
        details.append(_written(error.log, log_to))
    found.details = details
    return found


def _written(log: str, path: str) -> str:
    try:
        Path(path).write_text(log, encoding="utf-8")
    except OSError as error:
        return f"its whole log could not be written to {path}: {error.strerror}"
    return f"its whole log is in {path}"


def _number_of(text: str, source: Path | None) -> int:
    """The line of the source with this text; 0 if several have it. Before 6.9 the verifier does not say the number."""
    lines = source.read_text(errors="replace").splitlines() if source else []
    found = [number for number, line in enumerate(lines, 1) if line.strip() == text.strip()]
    return found[0] if len(found) == 1 else 0


def without_hook(error: UnsupportedError, spec: Spec) -> TcpscopeError:
    """The same error, with the nearest names if a hook that a program names does not exist."""
    kernel = UsersKernel()
    for program in spec.programs:
        answer = kernel.can(program)
        if answer or program.without is not None:
            continue
        hint = near(program)
        if hint or program.alone:
            return UnsupportedError(f"{spec.name}: program '{program.name}' cannot be attached: {answer.why}", hint)
    return error


def near(program: Program) -> str:
    """What helps if there is no such hook: names that are like it. Empty if there is one."""
    type_ = program.type.partition(".")[0]
    target = program.target.partition("+")[0]
    if type_ not in _CLASSIC:
        known = _in_btf(*_KINDS.get(type_, (B.Kind.FUNC, "")))
    elif folder := next((path for path in _EVENTS if path.is_dir()), None):
        known = ["/".join(file.parts[-3:-1]) for file in folder.glob("*/*/format")]
    else:
        return f'{_EVENTS[0]} is not there: mount -t tracefs tracefs {_EVENTS[0].parent}; or take SEC("tp_btf/...")'
    if target in known or (type_ not in _KINDS and type_ not in _CLASSIC and module_of(target) is not None):
        return ""
    names = _similar(target, known)
    return f"did you mean {' or '.join(map(repr, names))}?" if names else ""


_CLASSIC = ("tracepoint", "tp")
_TRACEPOINTS = (B.Kind.TYPEDEF, "btf_trace_")
_KINDS = {
    **dict.fromkeys(("tp_btf", "raw_tp", "raw_tracepoint"), _TRACEPOINTS),
    "iter": (B.Kind.FUNC, "bpf_iter_"),
}
"""What the kernel's BTF has of a hook: a type of this kind, with this before its name. Else a function."""


def _in_btf(kind: B.Kind, begin: str) -> list[str]:
    try:
        kernel = B.Btf.parse(BTF.read_bytes())
    except OSError:
        return []
    return [name.removeprefix(begin) for name in kernel.names(kind) if name.startswith(begin)]


def _similar(name: str, known: Iterable[str]) -> list[str]:
    """The names that are like this one. Of sixty thousand functions only those with a long part of it are compared."""
    parts = {name[at : at + 3] for at in range(max(1, len(name) - 2))}
    alike = [each for each in known if abs(len(each) - len(name)) < 8 and any(part in each for part in parts)]
    alike.sort(key=lambda each: -sum(part in each for part in parts))
    return difflib.get_close_matches(name, alike[:500], _NEAR)


def check_log(path: str | None) -> None:
    """UsageError if a log cannot be written there."""
    if path is not None and not (path and os.access(Path(path).parent, os.W_OK) and not Path(path).is_dir()):
        raise UsageError(f"--log {path}", "no file can be written there")
