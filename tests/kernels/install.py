"""An installed copy of the package for a guest.

The editable install rebuilds on import and writes no bytecode: the guest's file system is read-only and its processor slow.
So the same build is installed into a folder of its own, compiled, and put before the editable one.
"""

import compileall
import fcntl
import os
import subprocess
import sys
from pathlib import Path

TREE = Path(__file__).resolve().parents[2]
BUILD = TREE / "build" / f"cp{sys.version_info.major}{sys.version_info.minor}"


class BuildError(Exception):
    """The package could not be built; the message is the end of the build's output."""


def staged_site(folder: Path) -> dict[str, str]:
    """Install the present state of the package below ``folder``; return the environment that uses it."""
    if not (BUILD / "build.ninja").exists():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "DESTDIR": str(folder), "MESONPY_EDITABLE_SKIP": str(BUILD)}
    lock_path = TREE / ".cache/build.lock"
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-m", "mesonbuild.mesonmain", "install", "-C", str(BUILD), "--quiet"],
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise BuildError("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
    package = next(folder.rglob("tcpscope/__init__.py")).parent
    compileall.compile_dir(package, quiet=1)
    return {"PYTHONPATH": str(package.parent), "MESONPY_EDITABLE_SKIP": str(BUILD)}
