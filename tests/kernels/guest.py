"""Boots one kernel of the matrix, runs one command in it, brings back its output and exit status."""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from tests.kernels import qemu
from tests.kernels.debian import Image, cache_directory

TREE = Path(__file__).resolve().parents[2]
WORK = TREE / ".cache/guests"
MEMORY = "4G"  # thirty tools at a time, each with tables for a whole machine
BOOT_TIMEOUT_S = 300  # one takes 17 to 46 s on a machine that does other things, too
# Emulation is fastest without AVX, which the guest's C library would use (7 %), and with all of the guest's CPUs in
# one thread: a thread for each takes twice the processor time, for locks.
# With one processor the guest's clock counts executed instructions, a nanosecond each: a slow or busy host changes
# nothing that the guest sees, and a time that is measured there is a number of instructions. Two do not boot that way.
EMULATION = ("--disable-kvm", "--qemu-opt=-cpu", "--qemu-opt=qemu64,+rdrand")
EMULATION += ("--qemu-opt=-accel", "--qemu-opt=tcg,thread=single")
COUNTED = ("--qemu-opt=-icount", "--qemu-opt=shift=0")
# The kernel panics when its timer check, some milliseconds long, meets a busy host.
KERNEL_OPTIONS = ("no_timer_check", "mitigations=off", "random.trust_cpu=on")
# Filling all memory with zeros that is allocated is a twentieth of the work of some guests.
KERNEL_OPTIONS += ("init_on_alloc=0",)
# Each time a program is detached, somebody waits for a grace period: of RCU these are short then.
KERNEL_OPTIONS += ("rcupdate.rcu_expedited=1",)
# After a fault in the kernel tasks wait for ever for the one that it has ended. The machine ends instead.
KERNEL_OPTIONS += ("oops=panic",)

stop = threading.Event()
"""Set to end all guests of this process."""


@dataclass(frozen=True, slots=True)
class Outcome:
    status: int | None
    """The command's exit status; None when the guest ended without one."""
    problem: str
    """Why there is no exit status; empty when there is one."""
    boot_s: float | None
    """Seconds from start until the command began."""
    total_s: float


class Guest:
    """A folder that the guest may write, one that it only reads, and the machine that uses them."""

    def __init__(self, image: Image, *, processors: int = 1) -> None:
        self.image = image
        self.processors = processors
        WORK.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{image.name}-", dir=WORK))
        self._folder.chmod(0o755)
        self.shared = self._folder / "shared"
        self.shared.mkdir()
        self.site = self._folder / "site"
        self.site.mkdir()

    def __enter__(self) -> "Guest":
        self._place = _take_place()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._place)

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        timeout_s: float,
        show: Callable[[str], None],
        *,
        kvm: bool = False,
    ) -> Outcome:
        """Run ``command`` in the guest, in the project's folder; ``show`` gets its output line by line."""
        (self.shared / "command").write_text(_script(command, environment))
        _ensure_module_folder()
        started = time.monotonic()
        boot_s: float | None = None
        problem = ""
        with self._machine(timeout_s, kvm) as machine, _Tail(self.shared / "output", show) as tail:
            while not problem and not self._status_file.exists():
                if stop.is_set():
                    problem = "stopped"
                elif machine.poll() is not None:
                    problem = "the machine ended without an exit status"
                elif time.monotonic() - started > (limit_s := timeout_s if boot_s else min(timeout_s, BOOT_TIMEOUT_S)):
                    problem = f"not done after {limit_s:.0f} s"
                time.sleep(0.1)
                if boot_s is None and (self.shared / "booted").exists():
                    boot_s = time.monotonic() - started
                tail.read()
        total_s = time.monotonic() - started
        if self._status_file.exists():
            return Outcome(int(self._status_file.read_text()), "", boot_s, total_s)
        where = "" if (self.shared / "booted").exists() else " before the command began"
        said = next((f": {line}" for line in self.console(200) if "Kernel panic" in line), "")
        return Outcome(None, problem + where + said, boot_s, total_s)

    def console(self, last: int = 40) -> list[str]:
        """Return the last lines of what the kernel and virtme-ng said."""
        return (self.shared / "console").read_text(errors="replace").splitlines()[-last:]

    @property
    def _status_file(self) -> Path:
        return self.shared / "status"

    @contextmanager
    def _machine(self, timeout_s: float, kvm: bool) -> Iterator[subprocess.Popen[bytes]]:
        with (self.shared / "console").open("wb") as console:
            machine = subprocess.Popen(
                # timeout(1) ends the machine even when this process was killed.
                ["timeout", "--kill-after=5", f"{timeout_s + 15:.0f}", *self._virtme(kvm)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield machine
        finally:
            # Nothing is lost: the file systems are the host's, what was written is there.
            with suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                machine.wait(5)
            with suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()

    def _virtme(self, kvm: bool) -> list[str]:
        script = shlex.join(["sh", str(Path(__file__).with_name("guest.sh")), str(self.shared), str(TREE)])
        return [
            *(sys.executable, str(Path(__file__).with_name("boot.py"))),
            *("--kimg", self.image.vmlinuz, "--mods", "auto"),
            *("--cpus", str(self.processors), "--memory", MEMORY, "--force-9p", "--disable-microvm"),
            *(() if kvm else (*EMULATION, *qemu.options())),
            *(() if kvm or self.processors > 1 else COUNTED),
            *("--rwdir", str(self.shared), "--script-sh", script, "--show-boot-console", "--verbose"),
            *(word for option in KERNEL_OPTIONS for word in ("--kopt", option)),
        ]


class _Tail:
    """Follows a file that the guest writes."""

    def __init__(self, path: Path, show: Callable[[str], None]) -> None:
        path.touch()
        self._file: TextIO = path.open(errors="replace")
        self._show = show
        self._rest = ""

    def __enter__(self) -> "_Tail":
        return self

    def __exit__(self, *_: object) -> None:
        self.read()
        if self._rest:
            self._show(self._rest)
        self._file.close()

    def read(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            self._show(line)


def _take_place() -> int:
    """A guest at a time for each CPU of the machine, whoever starts them: more only slow each other down."""
    folder = cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    places = [os.open(folder / f"place-{n}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC) for n in range(os.cpu_count() or 1)]
    while True:
        for taken in places:
            with suppress(BlockingIOError):
                fcntl.flock(taken, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for other in places:
                    if other != taken:
                        os.close(other)
                return taken
        if stop.wait(0.2):
            raise InterruptedError("told to stop before its turn came")


def _script(command: Sequence[str], environment: Mapping[str, str]) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([f"cd {shlex.quote(str(TREE))}", *exports, f"exec {shlex.join(command)}\n"])


def _ensure_module_folder() -> None:
    """The guest mounts its modules over /lib/modules, which its read-only root must have."""
    folder = "/lib/modules"
    if not Path(folder).exists():
        make = ["mkdir", "-p", folder]
        subprocess.run(make if os.geteuid() == 0 else ["sudo", *make], check=True)
