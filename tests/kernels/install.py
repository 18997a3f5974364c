"""An installed copy of the package for a guest.

The editable install rebuilds on import and keeps no bytecode; the guest's file system is read-only and its
processor slow. So the same build is installed into a folder of its own, compiled, and found before the
editable one. Besides, a source file that is edited while a guest runs does not change what the guest tests.
"""

import compileall
import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.guest import TREE

BUILD = TREE / "build" / f"cp{sys.version_info.major}{sys.version_info.minor}"


class BuildError(Exception):
    """The package could not be built; the message is the end of the build's output."""


def staged(folder: Path) -> dict[str, str]:
    """Install the present state of the package below ``folder``; return the environment that uses it."""
    if not (BUILD / "build.ninja").exists():
        raise BuildError(f"no build in {BUILD.relative_to(TREE)}: run `make install` first")
    editable_off = {"MESONPY_EDITABLE_SKIP": str(BUILD)}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}"  # meson looks for ninja
    with (TREE / ".cache/build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-m", "mesonbuild.mesonmain", "install", "-C", str(BUILD), "--quiet"],
            env={**os.environ, **editable_off, "PATH": path, "DESTDIR": str(folder)},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise BuildError("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
    site = next(folder.rglob("tcpscope/__init__.py")).parents[1]
    compileall.compile_dir(site, quiet=1)
    return {"PYTHONPATH": str(site)}
