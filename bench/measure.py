"""A program under measurement, and the measurements. Each takes one figure per call; the caller interleaves them."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import workload
from bench.subjects import Subject

Traffic = Callable[[], workload.Made]

BPF_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_PROBE_ADDRESS = re.compile(rb"127\.1\.(\d+)\.(\d+)")
_LOST = re.compile(rb"lost (\d+)|at least (\d+) times the kernel skipped", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """How long a program may take for anything, and the share of a processor below which it counts as idle."""

    patience_s: float
    idle: float


class CannotRun(Exception):
    """The program ended by itself; the message is the last thing that it said."""


class Running:
    """A program that was started, with its output in files, until the end of the `with` block."""

    def __init__(self, subject: Subject, limits: Limits, stdout: int | None = None) -> None:
        self.subject = subject
        self._limits = limits
        self._folder = tempfile.TemporaryDirectory(prefix="tcpscope-bench-")
        self.out = Path(self._folder.name, "out")
        self.err = Path(self._folder.name, "err")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MESONPY"))}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.started_ns = time.monotonic_ns()
            self._process = subprocess.Popen(
                subject.argv,
                stdin=subprocess.DEVNULL,
                stdout=out if stdout is None else stdout,
                stderr=err,
                env=environment,
            )
        self._proc = Path(f"/proc/{self._process.pid}")

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def check(self) -> None:
        """CannotRun if it has ended."""
        if self._process.poll() is not None:
            raise CannotRun(reason(self._said()))

    def _said(self) -> str:
        return (self.err.read_bytes() + self.out.read_bytes()[: 1 << 20]).decode(errors="replace")

    def cpu_ns(self) -> int:
        """Time on a processor so far, user and system, of all its threads: the scheduler's account, not ticks."""
        total = 0
        for task in self._proc.glob("task/*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(task.read_text().split()[0])
        return total

    def peak_kb(self) -> int:
        """The most memory that it had resident."""
        found = re.search(r"VmHWM:\s+(\d+) kB", (self._proc / "status").read_text())
        return int(found[1]) if found else 0

    def maps_kb(self) -> int:
        """Memory of the kernel that its BPF maps take, as the kernel says itself (memlock in fdinfo)."""
        found: dict[str, int] = {}
        for info in self._proc.glob("fdinfo/*"):
            with contextlib.suppress(OSError):
                fields = dict(line.split(":\t", 1) for line in info.read_text().splitlines() if ":\t" in line)
                if "map_type" in fields:
                    found[fields["map_id"]] = int(fields["memlock"])
        return sum(found.values()) // 1024

    def programs(self) -> dict[int, tuple[int, int]]:
        """BPF programs that it holds: number -> run time in ns, runs (both 0 unless kernel.bpf_stats_enabled)."""
        found = {}
        for info in self._proc.glob("fdinfo/*"):
            with contextlib.suppress(OSError):
                fields = dict(line.split(":\t", 1) for line in info.read_text().splitlines() if ":\t" in line)
                if "prog_id" in fields and "run_time_ns" in fields:
                    found[int(fields["prog_id"])] = (int(fields["run_time_ns"]), int(fields["run_cnt"]))
        return found

    def attached(self) -> None:
        """Wait until it has loaded its programs and has nothing more to do. CannotRun if it ends or never does."""
        deadline = time.monotonic() + self._limits.patience_s
        while not self.programs():
            self.check()
            if time.monotonic() > deadline:
                raise CannotRun(f"not ready after {self._limits.patience_s:.0f} s")
            time.sleep(0.02)
        self.settled()
        self.check()
        if "could not attach probe" in (said := self._said()):  # bpftrace goes on without
            raise CannotRun(reason(said))

    def settled(self) -> None:
        """Wait until it has worked off what there is: waiting for events, and next to idle, three times 100 ms."""
        deadline = time.monotonic() + self._limits.patience_s
        calm, before = 0, self.cpu_ns()
        while calm < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
            now = self.cpu_ns()
            calm = calm + 1 if now - before < self._limits.idle * 1e8 and not self._is_at_work() else 0
            before = now

    def _is_at_work(self) -> bool:
        """Is a thread of it running (R), or would it if others let it? Or does it wait for the kernel (D, I)?

        To attach to a function, the kernel waits until all tasks have left the code that it changes. Traffic that
        began meanwhile would not be seen.
        """
        states = set()
        for task in self._proc.glob("task/*/stat"):
            with contextlib.suppress(OSError):
                states.add(task.read_text().rpartition(")")[2].split()[0])
        return bool(states - {"S"})

    def stop(self) -> tuple[int, int]:
        """End it as Ctrl-C does; rows about our traffic that it printed, and events that it says were lost."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(self._limits.patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        rows = 0
        said = self.err.read_bytes()
        with self.out.open("rb") as lines:
            for line in lines:
                rows += workload.MARK in line
                if b"Lost " in line:  # bpftrace says it among the rows
                    said += line
        return rows, sum(int(lost or missed) for lost, missed in _LOST.findall(said))


def reason(text: str) -> str:
    """Of what a program said before it gave up: the line that says most, without the place in its own source."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "RLIMIT_MEMLOCK" not in line]
    for telling in ("could not attach probe", "ERROR", "Unable to|fatal error", "fail|not found|cannot|Error"):
        for line in lines:
            if re.search(telling, line):
                line = re.sub(r"^(libbpf: |\S+:\d+-\d+: |\S+:\d+:\d+: )", "", line)
                return line.partition(". ")[0].strip()[:140]
    return (lines or ["ended without a word"])[-1][:140]


@contextlib.contextmanager
def bpf_stats() -> Iterator[None]:
    """The kernel measures the run time of BPF programs inside of the block."""
    before = BPF_STATS.read_text()
    BPF_STATS.write_text("1")
    try:
        yield
    finally:
        BPF_STATS.write_text(before)


def ready_ms(subject: Subject, interval_ms: int, limits: Limits) -> float:
    """From exec to the beginning of the first connection that shows up in the program's output."""
    master, slave = pty.openpty()
    try:
        with workload.Probe(interval_ms) as probe, Running(subject, limits, stdout=slave) as running:
            started_ns = running.started_ns
            first = _first_probe(running, master, limits.patience_s)
    finally:
        os.close(master)
        os.close(slave)
    return (probe.began[first] - started_ns) / 1e6


def _first_probe(running: Running, master: int, patience_s: float) -> int:
    text = b""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        running.check()
        if select.select([master], [], [], 0.05)[0]:
            text += os.read(master, 1 << 16)
            complete = text[: text.rfind(b"\n") + 1]
            if found := _PROBE_ADDRESS.search(complete):
                return int(found[1]) * 256 + int(found[2])
    raise CannotRun(f"showed nothing for {patience_s:.0f} s")


@dataclass(frozen=True)
class Cost:
    """What one run cost: medians over its batches, per connection; the rest of the whole run."""

    wall_ns: float
    cpu_ns: float
    connections: int
    events: int
    rows: int = 0
    lost_said: int = 0
    tool_cpu_ns: int = 0
    peak_kb: int = 0
    maps_kb: int = 0
    program_ns: int = 0
    program_runs: int = 0
    seconds: float = 0


def cost(subject: Subject | None, made: Traffic, limits: Limits) -> Cost:
    """Make this traffic while the program runs, or while nothing does."""
    if subject is None:
        return _cost(made())
    with Running(subject, limits) as running:
        running.attached()
        cpu, programs = running.cpu_ns(), running.programs()
        done = made()
        running.settled()
        cpu = running.cpu_ns() - cpu
        after = running.programs()
        peak, maps = running.peak_kb(), running.maps_kb()
        running.check()
        rows, lost = running.stop()
    spent = [(ns - programs.get(n, (0, 0))[0], runs - programs.get(n, (0, 0))[1]) for n, (ns, runs) in after.items()]
    return _cost(
        done,
        rows=rows,
        lost_said=lost,
        tool_cpu_ns=cpu,
        peak_kb=peak,
        maps_kb=maps,
        program_ns=sum(ns for ns, _ in spent),
        program_runs=sum(runs for _, runs in spent),
    )


def _cost(done: workload.Made, **others: int) -> Cost:
    return Cost(
        wall_ns=median(done.wall_ns) if done.wall_ns else 0,
        cpu_ns=median(done.cpu_ns) if done.cpu_ns else 0,
        connections=done.connections,
        events=done.events,
        seconds=done.seconds,
        **others,
    )
