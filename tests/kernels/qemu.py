"""The newest QEMU that the machine's suites offer: from backports, unpacked beside the kernels, if it is newer.

QEMU 10 emulates a twentieth to a tenth faster than the 7.2 of Debian 12. Nothing of the machine's own packages is
touched; where there is no newer one, or it does not run here, the installed one is used.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tests.kernels import debian

NAME = "qemu-system-x86_64"
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios")
FIRMWARE = ("usr/share/qemu", "usr/share/seabios")
RECORD = "qemu.json"
"""In the cache, beside what was unpacked: the version, empty where none newer was found."""


@cache
def options() -> tuple[str, ...]:
    """Of virtme-ng's runner, for the QEMU in the cache; none for the installed one."""
    folder = _folder()
    if not _version(folder):
        return ()
    firmware = [f"--qemu-opt={word}" for part in FIRMWARE for word in ("-L", str(folder / part))]
    return ("--qemu-bin", str(folder / "usr/bin" / NAME), *firmware)


def get(say: Callable[[str], None], *, fresh: bool = False) -> None:
    """Have a newer QEMU in the cache, if there is one. What was found once is kept, also that nothing was."""
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with debian.locked(folder.with_suffix(".lock")):
        if (folder / RECORD).exists() and not fresh:
            return
        with tempfile.TemporaryDirectory(prefix=".qemu-", dir=folder.parent) as temporary:
            root = Path(temporary, "root")
            root.mkdir()
            try:
                version = _unpacked(Path(temporary), root, say)
            except debian.FetchError as error:
                why = str(error).splitlines()[-1]
                say(f"QEMU: the installed {_text(installed())} is used, `fetch --fresh` looks again: {why}")
                version = ""
                shutil.rmtree(root)
                root.mkdir()
            (root / RECORD).write_text(json.dumps({"version": version}) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            root.rename(folder)
    options.cache_clear()


def numbers(version: str) -> tuple[int, ...]:
    """Of upstream: (10, 0, 2) of 1:10.0.2+ds-2+deb13u1~bpo12+1, () of anything else."""
    found = re.search(r"(?:^|[ :])(\d+(?:\.\d+)+)", version)
    return tuple(int(number) for number in found[1].split(".")) if found else ()


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def installed() -> tuple[int, ...]:
    """Its version."""
    return _runs(shutil.which(NAME) or NAME)


def _folder() -> Path:
    return debian.cache_directory().with_name("qemu")


def _version(folder: Path) -> str:
    """Of the one that was unpacked there."""
    try:
        return str(json.loads((folder / RECORD).read_text())["version"])
    except (OSError, ValueError, KeyError):
        return ""


def _runs(program: str) -> tuple[int, ...]:
    """The version that it tells; () if it does not run here."""
    try:
        return numbers(subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return ()


def _unpacked(work: Path, root: Path, say: Callable[[str], None]) -> str:
    """The version that lies below `root` now; "" if the suite has none that is newer than the installed one."""
    here, suite = installed(), debian.backports(debian.os_release())
    if suite is None:
        return ""
    apt = debian.apt_of(work / "apt", suite)
    apt.run("apt-get", "update")
    if PACKAGES[0] not in apt.run("apt-cache", "pkgnames", PACKAGES[0]).split():
        return ""
    version = apt.version(PACKAGES[0])
    if numbers(version) <= here:
        return ""
    say(f"QEMU: fetching {_text(numbers(version))} of {suite}, {_text(here)} is installed")
    apt.run("apt-get", "download", *PACKAGES, cwd=work)
    for archive in work.glob("*.deb"):
        debian.run("dpkg", "-x", str(archive), str(root))
    if _runs(str(root / "usr/bin" / NAME)) != numbers(version):
        raise debian.FetchError(f"{_text(numbers(version))} of {suite} does not run here")
    return version
