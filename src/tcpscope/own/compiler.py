"""Compiles a user's program with clang, as the build compiles those of tcpscope."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from tcpscope.errors import TcpscopeError, UnsupportedError
from tcpscope.kernel.features import BTF
from tcpscope.stop import tidied

HEADERS = Path(__file__).parents[1] / "bpf"
"""Our headers, for #include "event.bpf.h" and the like."""
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
_CLANGS = ("clang", *(f"clang-{version}" for version in range(30, 11, -1)))
_LINES = 20
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_MISSING = {
    "bpf/": "libbpf's headers are missing (on Debian and Ubuntu: apt install libbpf-dev)",
    "asm/": "the kernel's headers for programs are missing (on Debian and Ubuntu: apt install linux-libc-dev)",
    "linux/": "the kernel's headers for programs are missing (on Debian and Ubuntu: apt install linux-libc-dev)",
}


def compiled(source: Path) -> bytes:
    """The object file of a source. TcpscopeError with clang's messages, or if there is no clang.

    `vmlinux.h` is made of the running kernel's BTF, if the source asks for it and has none beside it.
    """
    clang = next(filter(None, map(shutil.which, _CLANGS)), None)
    if not clang:
        raise TcpscopeError(
            f"{source}: there is no clang to compile it",
            "on Debian and Ubuntu: apt install clang libbpf-dev; or give an object file (.bpf.o) from another machine",
        )
    with tempfile.TemporaryDirectory(prefix="tcpscope.") as folder:
        own = (source.parent / "vmlinux.h").exists()
        if not own and re.search(rb'^\s*#\s*include\s*["<]vmlinux\.h[">]', source.read_bytes(), re.M):
            _write_vmlinux(Path(folder) / "vmlinux.h")
        made = Path(folder) / "made.o"
        done = subprocess.run(
            [clang, *flags(), "-I", source.parent, "-I", HEADERS, "-I", folder, "-c", "-o", made, "--", source],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"LC_ALL": "C"},
        )
        if done.returncode == 0:
            sys.stderr.write(done.stderr)  # warnings
            return made.read_bytes()
    missing = re.search(r"'([^']+)' file not found", done.stderr)
    hints = [hint for begin, hint in _MISSING.items() if missing and missing[1].startswith(begin)]
    error = TcpscopeError(f"{source}: clang cannot compile it", "".join(hints[:1]))
    lines = done.stderr.splitlines()
    error.details = lines[:_LINES] + ([f"({len(lines) - _LINES} more lines)"] if len(lines) > _LINES else [])
    raise error


def flags() -> list[str]:
    """clang's options, those of bpf/meson.build but the ones that concern a release."""
    machine = platform.machine()
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{machine}-linux-gnu"
    return [
        *("-target", "bpf", "-mcpu=v3", "-O2", "-fno-strict-aliasing", "-g", "-Wall", "-Wno-unused-function"),
        f"-D__TARGET_ARCH_{_ARCHITECTURES.get(machine, machine)}",
        *("-idirafter", f"/usr/include/{multiarch}"),
    ]


def main(source: str, made: str) -> None:
    """Compile a source for a package that brings a tool: python -m tcpscope.own.compiler NAME.bpf.c NAME.bpf.o"""
    try:
        with tidied():
            object_ = compiled(Path(source))
        Path(made).write_bytes(object_)
    except TcpscopeError as error:
        sys.exit("\n".join([str(error), *error.details]))


def _write_vmlinux(path: Path) -> None:
    from tcpscope.kernel._libbpf import lib

    if not BTF.exists():
        raise UnsupportedError(f"this kernel has no BTF ({BTF}) to make vmlinux.h of", "put one beside the source")
    with path.open("w") as file:
        error = -lib.tcpscope_write_types(file.fileno())
        if error in _CANNOT_WRITE:
            what = f"{path.parent.parent}: there is no room for vmlinux.h ({os.strerror(error)})"
            raise TcpscopeError(what, "make room, or name another folder in TMPDIR")
        if error:
            raise TcpscopeError(f"vmlinux.h cannot be made of {BTF}: {os.strerror(error)}", "put one beside the source")


if __name__ == "__main__":
    main(*sys.argv[1:])
