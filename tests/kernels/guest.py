"""Boots one kernel of the matrix, runs one command in it, brings back its output and exit status."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.kernels.debian import Image

TREE = Path(__file__).resolve().parents[2]
WORK = TREE / ".cache/guests"
CPUS = "2"
MEMORY = "2G"

Print = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int | None
    """The command's exit status; None when the guest ended without one."""
    problem: str
    """Why there is no exit status; empty otherwise."""
    boot_s: float | None
    """Seconds from start until the command began."""
    total_s: float


class Guest:
    """Two folders, one that the guest may write and one that it only reads, and the virtual machine that uses them."""

    def __init__(self, image: Image) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        self.image = image
        self._folder = Path(tempfile.mkdtemp(prefix=f"{image.name}-", dir=WORK))
        self._folder.chmod(0o755)
        self.shared = self._folder / "shared"
        self.shared.mkdir()
        self.site = self._folder / "site"

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        timeout_s: float,
        show: Print,
        *,
        kvm: bool = False,
    ) -> Outcome:
        """Run ``command`` in the project's folder in the guest; every complete line it prints goes to ``show``."""
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        (self.shared / "command").write_text(f"cd {shlex.quote(str(TREE))}\n{exports}exec {shlex.join(command)}\n")
        _ensure_modules_mount_point()
        output = self.shared / "output"
        output.touch()
        started = time.monotonic()
        booted_s: float | None = None
        # timeout(1) stays behind when this process is killed and still ends the machine.
        machine = subprocess.Popen(
            ["timeout", "--kill-after=5", str(timeout_s + 10), *self._virtme(kvm)],
            stdin=subprocess.DEVNULL,
            stdout=(self.shared / "console").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"},
        )
        timed_out = False
        try:
            with output.open(errors="replace") as lines:
                rest = ""
                while True:
                    ended = machine.poll() is not None
                    if booted_s is None and (self.shared / "booted").exists():
                        booted_s = time.monotonic() - started
                    while chunk := lines.read(65536):
                        *complete, rest = (rest + chunk).split("\n")
                        for line in complete:
                            show(line)
                    if ended or (self.shared / "status").exists():
                        break
                    if time.monotonic() - started > timeout_s:
                        timed_out = True
                        break
                    time.sleep(0.1)
                if rest:
                    show(rest)
        finally:
            _end(machine)
        total_s = time.monotonic() - started
        try:
            status = int((self.shared / "status").read_text())
        except (OSError, ValueError):
            status = None
        problem = ""
        if status is None:
            if timed_out:
                problem = f"not done after {timeout_s:.0f} s"
            elif booted_s is None:
                problem = "did not boot"
            else:
                problem = "ended without an exit status (a kernel crash?)"
        return Outcome(status, problem, booted_s, total_s)

    def console(self, last: int = 40) -> list[str]:
        """The last lines of what the kernel and virtme-ng said."""
        return (self.shared / "console").read_text(errors="replace").splitlines()[-last:]

    def _virtme(self, kvm: bool) -> list[str]:
        options = {
            "--kimg": self.image.vmlinuz,
            "--mods": "auto",
            "--cpus": CPUS,
            "--memory": MEMORY,
            "--rwdir": str(self.shared),
            "--script-sh": f"sh {shlex.quote(str(TREE / 'tests/kernels/guest.sh'))} {shlex.quote(str(self.shared))}",
        }
        words = [word for pair in options.items() for word in pair]
        words += ["--force-9p", "--disable-microvm", "--show-boot-console", "--verbose"]
        for option in ("mitigations=off", "random.trust_cpu=on"):
            words += ["--kopt", option]
        if not kvm:
            words.append("--disable-kvm")
        return [sys.executable, str(Path(__file__).with_name("boot.py")), *words]


def _end(machine: subprocess.Popen[bytes]) -> None:
    """Let the guest power off, then end what is left of the process group."""
    try:
        machine.wait(5)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(machine.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    machine.wait()


def _ensure_modules_mount_point() -> None:
    """The guest mounts its modules over /lib/modules, which its read-only root must have."""
    directory = Path("/lib/modules")
    if directory.exists():
        return
    make = ["mkdir", "-p", str(directory)]
    subprocess.run(make if os.geteuid() == 0 else ["sudo", *make], check=True)
