"""`tcpscope run` and `tcpscope new`: a user's own program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from tcpscope.cli import Once, command_of
from tcpscope.errors import TcpscopeError, UsageError, did_you_mean
from tcpscope.kernel.spec import Spec
from tcpscope.own import refusal, template
from tcpscope.own.compiler import compiled
from tcpscope.own.program import OwnProgram
from tcpscope.stop import tidied

_ELF, _EM_BPF = b"\x7fELF", 247


def read(path: Path) -> tuple[Spec, Path | None]:
    """The object of a file, compiled if it is C, and then its source. UsageError for what is neither."""
    if not path.exists():
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*.bpf.[co]")])
        raise UsageError(f"there is no file {path}", near or "'tcpscope new NAME' writes one")
    if not path.is_file():
        raise UsageError(f"{path} is no file", "give a program in C (NAME.bpf.c) or an object file (NAME.bpf.o)")
    name = path.name.removesuffix(path.suffix).removesuffix(".bpf")
    data = path.read_bytes()
    if not data.strip():
        raise UsageError(f"{path} is empty", "'tcpscope new NAME' writes a program to begin with")
    if path.suffix == ".c":
        return Spec(name, compiled(path)), path
    if not data.startswith(_ELF):
        raise UsageError(f"{path} is neither C nor an object file", "give NAME.bpf.c or NAME.bpf.o")
    if int.from_bytes(data[18:20], "little") != _EM_BPF:
        raise UsageError(f"{path} is no object file for BPF", "compile with clang -target bpf -g")
    return Spec(name, data), None


def of_file(path: Path) -> OwnProgram:
    """The tool that shows the events of a file. Raises the errors of `read`."""
    return OwnProgram(*read(path))


def _prepare(values: dict[str, Any]) -> OwnProgram:
    refusal.check_log(values["log"])
    with tidied():
        return of_file(values.pop("file"))


run = command_of(
    OwnProgram(),
    click.Argument(["file"], type=click.Path(path_type=Path), metavar="FILE"),
    _prepare,
)


def _new(name: str) -> None:
    path = Path(f"{template.checked(name)}.bpf.c")
    try:
        with path.open("x") as file:
            file.write(template.source(name))
    except FileExistsError:
        raise UsageError(f"{path} is there already", "take another name, or remove it") from None
    except OSError as error:
        raise TcpscopeError(f"{path} cannot be written: {error.strerror}") from None
    print(f"{path}: show its events with 'tcpscope run {path}'", file=sys.stderr)


new = Once(
    "new",
    params=[click.Argument(["name"], metavar="NAME")],
    callback=_new,
    help="Write NAME.bpf.c, a small program to begin with, into this directory. It shows the states of connections; "
    "'tcpscope run NAME.bpf.c' compiles it and shows its events.",
)
