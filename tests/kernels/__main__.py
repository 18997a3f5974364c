"""The command line of the matrix: ``python -m tests.kernels``."""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tests import kernels
from tests.kernels import HOST, KERNELS, ROWS, Kernel, debian, guest, install, kvm, summary
from tests.kernels.guest import TREE, Guest

RESULTS = TREE / ".cache/results"
TIMEOUT_S = 2400
BOOTS = 2
PYTEST = (sys.executable, "-m", "pytest", "-p", "tests.kernels.report")


def run_host(arguments: Sequence[str]) -> summary.Row:
    """Run all tests here, as root where that can be had."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    outcomes = RESULTS / f"host-{os.getpid()}.jsonl"
    command = [*PYTEST, "--outcomes", str(outcomes), *arguments]
    if os.geteuid() != 0 and shutil.which("sudo"):
        # Root leaves nothing behind in the tree.
        keep_clean = ("PYTHONDONTWRITEBYTECODE=1", "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis")
        command = ["sudo", "env", *keep_clean, *command, "-p", "no:cacheprovider"]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=TREE)
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    finally:
        outcomes.unlink(missing_ok=True)
    total_s = time.monotonic() - started
    return summary.make_row(HOST, platform.release(), lines, exit_status=done.returncode, total_s=total_s)


def run_guest(
    kernel: Kernel, arguments: Sequence[str], *, timeout_s: float, under_kvm: bool, prefix: str = ""
) -> summary.Row:
    """Run the tests marked ``kernel`` on one kernel."""

    def show(line: str) -> None:
        print(prefix + line, flush=True)

    image = debian.get(kernel)
    with Guest(image) as machine:
        environment = install.staged(machine.site)
        outcomes = machine.shared / "outcomes.jsonl"
        command = [*PYTEST, "-p", "no:cacheprovider", "-m", "kernel", "--outcomes", str(outcomes), *arguments]
        for _ in range(BOOTS):
            show(f"booting {image.release}")
            outcome = machine.run(command, environment, timeout_s, show, kvm=under_kvm)
            if outcome.problem:
                for line in ("--- the end of the console ---", *machine.console(), f"--- {outcome.problem}"):
                    show(line)
            if outcome.boot_s is not None or guest.stop.is_set():
                break  # What goes wrong from here on is a result; that a machine does not start is none.
        return summary.make_row(
            kernel.name,
            image.release,
            outcomes.read_text().splitlines() if outcomes.exists() else [],
            exit_status=outcome.status,
            problem=outcome.problem,
            boot_s=outcome.boot_s,
            total_s=outcome.total_s,
        )


def run_command(kernel: Kernel, command: Sequence[str], *, timeout_s: float) -> int:
    with Guest(debian.get(kernel)) as machine:
        environment = install.staged(machine.site)
        show = partial(print, flush=True)
        outcome = machine.run(command, environment, timeout_s, show, kvm=kvm.usable())
        if outcome.problem:
            print(*machine.console(), outcome.problem, sep="\n", file=sys.stderr)
        return 1 if outcome.status is None else outcome.status


def run_all(arguments: Sequence[str], *, jobs: int, timeout_s: float) -> int:
    shutil.rmtree(RESULTS, ignore_errors=True)
    releases = [debian.get(kernel).release for kernel in KERNELS]
    under_kvm = kvm.usable()
    print(f"=== {HOST} ({platform.release()}): all tests ===", flush=True)
    rows = [run_host(arguments)]
    save(rows[0])
    print(f"=== {', '.join(releases)}: tests marked kernel, {jobs} at a time ===", flush=True)
    chosen = arguments or summary.modules_marked_kernel(rows[0])

    def row_of(kernel: Kernel) -> summary.Row:
        prefix = f"[{kernel.name}] "
        return run_guest(kernel, chosen, timeout_s=timeout_s, under_kvm=under_kvm, prefix=prefix)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for row in pool.map(row_of, KERNELS):
                save(row)
                rows.append(row)
        except BaseException:
            guest.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return close(rows, ROWS)


def save(row: summary.Row) -> None:
    summary.save(row, RESULTS / f"{row.name}.json")


def close(rows: Sequence[summary.Row], expected: Sequence[str] = ()) -> int:
    lines, good = summary.render(rows, expected)
    print("", *lines, sep="\n", flush=True)
    return 0 if good else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=kernels.__doc__)
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds that one guest may take")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *, kernel: bool = False, rest: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if kernel:
            command.add_argument("--kernel", choices=[k.name for k in KERNELS], required=True)
        if rest:
            command.add_argument("rest", nargs="*", metavar=rest, help="put -- before it")
        return command

    everything = add("all", "all tests here, those marked kernel on every kernel", rest="PYTEST_ARGUMENT")
    everything.add_argument("--jobs", type=int, default=2, help="guests at the same time")
    add("host", "run all tests on the machine's own kernel", rest="PYTEST_ARGUMENT")
    add("run", "run the tests marked kernel on one kernel", kernel=True, rest="PYTEST_ARGUMENT")
    add("exec", "run a command on one kernel", kernel=True, rest="COMMAND")
    add("summary", "put the results of the last `host` and `run` commands together")
    fetch = add("fetch", "fetch the kernels that are missing")
    fetch.add_argument("--fresh", action="store_true", help="fetch all of them, in their newest version")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    kernel = next((k for k in KERNELS if k.name == getattr(options, "kernel", "")), KERNELS[0])
    match options.command:
        case "all":
            return run_all(options.rest, jobs=options.jobs, timeout_s=options.timeout)
        case "host":
            row = run_host(options.rest)
        case "run":
            row = run_guest(kernel, options.rest, timeout_s=options.timeout, under_kvm=kvm.usable())
        case "exec":
            return run_command(kernel, options.rest, timeout_s=options.timeout)
        case "summary":
            paths = [RESULTS / f"{name}.json" for name in ROWS]
            return close([summary.load(path) for path in paths if path.exists()], ROWS)
        case _:
            for each in KERNELS:
                print(f"{each.name}: {debian.get(each, fresh=options.fresh).release}")
            return 0
    if not options.rest:
        save(row)
    return close([row])


if __name__ == "__main__":
    # depmod and ip live in sbin, which Debian keeps out of an ordinary user's path.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except (debian.FetchError, install.BuildError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
