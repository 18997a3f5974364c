"""Plays scripts while tools run, and leaves a recording: ``python -m tests.record.recorder FOLDER``, as root.

The folder holds `actor`, where it is needed `unseen.bpf.o` (unseen.py), for each part a folder with `script` and
`watches.json`, and afterwards the recording (recording.py). While a part is played everything stays in memory, so that
a guest waits for none of the host's files meanwhile. The tools are forks of this process, which has imported them:
under emulation Python and its imports are two seconds of each start.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from tcpscope.lab import processes
from tests.record import parts
from tests.record.watch import Watch

AT_ONCE = 16
"""Scenarios that are played at a time: their timers run side by side."""
READY_S, END_S = 600, 120
LOCK = Path("/tmp/tcpscope-recording.lock")
READY_FD = "TCPSCOPE_READY_FD"


class RecordingError(Exception):
    """There is no recording; the message is one line and says why."""


class Tool:
    """A tool at work, in a fork of this process."""

    def __init__(self, watch: Watch, folder: Path) -> None:
        self.watch = watch
        self._files = [folder / f"{watch.name}.{ending}" for ending in ("out", "err")]
        self._ready, write = os.pipe()
        self._ended = False
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            processes.follow(parent)
            os.close(self._ready)
            self._become(write)
        os.close(write)

    def _become(self, ready: int) -> NoReturn:
        from tcpscope import cli
        from tests import lacks

        status = 1
        try:
            null = os.open(os.devnull, os.O_RDONLY)
            opened = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) for file in self._files]
            for number, descriptor in enumerate((null, *opened, ready)):
                os.dup2(descriptor, number)
            os.closerange(4, 1 << 16)
            os.environ[READY_FD] = "3"
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["tcpscope", *self.watch.command]
            lacks.pretend(self.watch.lacks)
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait_until_ready(self, deadline: float) -> None:
        """Or until it has ended, which its tests are told then: a kernel may not have what it needs."""
        poll = select.poll()
        poll.register(self._ready)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            said = self._files[1].read_text(errors="replace").strip()
            raise RecordingError(f"tcpscope {' '.join(self.watch.argv)} is not ready: {said}")
        os.close(self._ready)

    def end(self, deadline: float) -> int:
        """Its exit status."""
        poll = select.poll()
        poll.register(process := os.pidfd_open(self.pid))
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            os.kill(self.pid, signal.SIGKILL)
        os.close(process)
        self._ended = True
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """Unless it has ended."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class Actor:
    """The process that plays."""

    def __init__(self, folder: Path) -> None:
        command = [folder / "actor", folder / "script", folder / "log", str(AT_ONCE)]
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
        )

    def wait_for(self, what: str) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.readline() != f"{what}\n":
            raise RecordingError(f"the actor ended before '{what}', with status {self._process.wait()}")

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")

    def end(self) -> None:
        """Also of those processes whose parents have ended: they are of its session's group."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def record(folder: Path, watches: list[Watch], say: Callable[[str], None]) -> None:
    """One part."""
    actor = Actor(folder)
    tools: list[Tool] = []
    try:
        actor.wait_for("tools")
        tools += [Tool(watch, folder) for watch in watches if not watch.moment]
        deadline = time.monotonic() + READY_S
        for each in tools:
            each.wait_until_ready(deadline)
        say(f"{len(tools)} tools ready")
        actor.go_on()
        actor.wait_for("moment")
        looking = [Tool(watch, folder) for watch in watches if watch.moment]
        tools += looking
        ended = ends(looking)
        actor.go_on()
        actor.wait_for("played")
        say("all was played")
        others = [each for each in tools if each not in looking]
        for each in others:
            os.kill(each.pid, signal.SIGINT)
        ended |= ends(others)
        (folder / "tools.json").write_text(json.dumps(ended))
        say("all have ended")
    finally:
        for each in tools:
            each.kill()
        actor.end()


def ends(tools: list[Tool]) -> dict[str, tuple[list[str], int]]:
    """Their command lines and exit statuses, when they have ended."""
    deadline = time.monotonic() + END_S
    return {each.watch.name: (list(each.watch.argv), each.end(deadline)) for each in tools}


def about_the_kernel() -> dict[str, Any]:
    """Its release, whether functions can be hooked, and the hooks of each probe, by its own account."""
    from tcpscope.kernel.features import Kernel
    from tcpscope.kernel.spec import Spec, probes
    from tcpscope.kernel.ways import plan, plan_refusals
    from tests.lacks import no_netem

    kernel, hooks = Kernel(), {}
    for probe in probes():
        spec = Spec.of(probe)
        chosen = plan(spec, plan_refusals(spec, kernel))
        hooks[probe] = {name: hook.program and hook.program.name for name, hook in chosen.items()}
    functions = "yes" if kernel.fentry or kernel.kprobe else "no"
    switch = Path("/proc/sys/kernel/io_uring_disabled")
    config = {
        "functions": functions,
        "netem": "no" if no_netem() else "yes",
        "io_uring_disabled": switch.read_text().strip() if switch.exists() else "0",
    }
    return {"release": platform.release(), "config": config, "hooks": hooks}


@contextmanager
def alone() -> Iterator[None]:
    """One recording at a time on a machine: the tools see all of its network namespaces, those of another one too."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def witnessed(program: Path, folder: Path) -> Iterator[None]:
    """Inside of the block it is watched what no program is run for, if there is the witness's program (unseen.py)."""
    if not program.exists():
        yield
        return
    from tests.record.unseen import Witness, WitnessError

    witness = Witness(program)
    try:
        with witness.watching():
            yield
    except WitnessError as error:
        raise RecordingError(str(error)) from None
    (folder / "unseen.json").write_text(json.dumps(witness.records()))


@contextmanager
def in_memory(target: Path, part: Path) -> Iterator[Path]:
    """A folder for a part, which is copied back at the end, also of a failure."""
    with tempfile.TemporaryDirectory(prefix="tcpscope-record-", dir="/tmp") as name:
        folder = Path(name)
        for file in (part / parts.SCRIPT, target / "actor"):
            shutil.copy(file, folder)
        try:
            yield folder
        finally:
            (folder / "actor").unlink()
            shutil.copytree(folder, part, dirs_exist_ok=True)


def main() -> int:
    target = Path(sys.argv[1])
    began, clock = time.time(), time.monotonic()

    def say(what: str) -> None:
        print(f"recorder: {what} after {time.monotonic() - clock:.1f} s", flush=True)

    from tcpscope import cli, tool

    assert cli
    for name in tool.names():
        tool.find(name)
    about = about_the_kernel()
    shutil.copyfile("/sys/kernel/btf/vmlinux", target / "btf")
    gc.freeze()
    if nft := shutil.which("nft"):
        # While the kernel loads nf_tables for one scenario, it refuses the connection of another one.
        subprocess.run([nft, "list", "tables"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    say("the kernel was asked")
    for part in parts.of(target):
        asked = json.loads((part / "watches.json").read_text())
        watches = [Watch(*argv, moment=moment, lacks=tuple(lacks)) for moment, lacks, *argv in asked]
        try:
            with in_memory(target, part) as folder, alone(), witnessed(target / "unseen.bpf.o", folder):
                record(folder, watches, lambda what, number=part.name: say(f"part {number}: {what}"))
        except RecordingError as error:
            print(f"no recording: {error}", file=sys.stderr)
            return 1
    about["wall_clock_us"] = began * 1e6, time.time() * 1e6
    (target / "kernel.json").write_text(json.dumps(about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
