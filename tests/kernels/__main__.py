"""Command line of the matrix: ``python -m tests.kernels``."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.kernels import HOST, KERNELS, Kernel, debian, kvm, summary
from tests.kernels.guest import TREE, Guest
from tests.kernels.install import staged_site

RESULTS = TREE / ".cache/results"
ROWS = (HOST, *(kernel.name for kernel in KERNELS))
GUEST_TIMEOUT_S = 540
PYTEST = (sys.executable, "-m", "pytest", "-p", "tests.kernels.report")


def run_host(arguments: Sequence[str]) -> summary.Row:
    RESULTS.mkdir(parents=True, exist_ok=True)
    outcomes = RESULTS / f"host-{os.getpid()}.jsonl"
    started = time.monotonic()
    try:
        done = subprocess.run([*PYTEST, "--outcomes", str(outcomes), *arguments], cwd=TREE)
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    finally:
        outcomes.unlink(missing_ok=True)
    return summary.make_row(
        HOST, platform.release(), lines, exit_status=done.returncode, total_s=time.monotonic() - started
    )


def run_guest(kernel: Kernel, arguments: Sequence[str], *, timeout_s: float, prefix: str = "") -> summary.Row:
    def show(line: str) -> None:
        print(prefix + line, flush=True)

    image = debian.get(kernel)
    with Guest(image) as guest:
        outcomes = guest.shared / "outcomes.jsonl"
        environment = staged_site(guest.site)
        command = [*PYTEST, "-p", "no:cacheprovider", "-m", "kernel", "--outcomes", str(outcomes), *arguments]
        show(f"booting {image.release}")
        outcome = guest.run(command, environment, timeout_s, show, kvm=kvm.usable())
        lines = outcomes.read_text().splitlines() if outcomes.exists() else []
        row = summary.make_row(
            kernel.name,
            image.release,
            lines,
            exit_status=outcome.status,
            problem=outcome.problem,
            boot_s=outcome.boot_s,
            total_s=outcome.total_s,
        )
        if outcome.problem:
            show("--- console ---")
            for line in guest.console():
                show(line)
    return row


def run_command(kernel: Kernel, command: Sequence[str], *, timeout_s: float) -> int:
    with Guest(debian.get(kernel)) as guest:
        outcome = guest.run(command, staged_site(guest.site), timeout_s, print, kvm=kvm.usable())
        if outcome.problem:
            print(outcome.problem, *guest.console(), sep="\n", file=sys.stderr)
        return 1 if outcome.status is None else outcome.status


def save(row: summary.Row) -> None:
    summary.save(row, RESULTS / f"{row.name}.json")


def close(rows: Sequence[summary.Row], expected: Sequence[str]) -> int:
    lines, good = summary.render(rows, expected)
    print("", *lines, sep="\n", flush=True)
    return 0 if good else 1


def run_all(arguments: Sequence[str], *, jobs: int, timeout_s: float) -> int:
    shutil.rmtree(RESULTS, ignore_errors=True)
    images = [debian.get(kernel) for kernel in KERNELS]
    print(f"=== {HOST} ({platform.release()}), all tests ===", flush=True)
    rows = [run_host(arguments)]
    save(rows[0])
    print(f"=== kernels {', '.join(image.release for image in images)}, tests marked kernel ===", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for row in pool.map(
            lambda kernel: run_guest(kernel, arguments, timeout_s=timeout_s, prefix=f"[{kernel.name}] "), KERNELS
        ):
            save(row)
            rows.append(row)
    return close(rows, ROWS)


def summarise() -> int:
    rows = [summary.load(path) for name in ROWS if (path := RESULTS / f"{name}.json").exists()]
    return close(rows, ROWS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__import__("tests.kernels").kernels.__doc__)
    parser.add_argument("--timeout", type=float, default=GUEST_TIMEOUT_S, help="seconds that a guest may take")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *, kernel: bool = False, rest: str = "") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if kernel:
            command.add_argument("--kernel", choices=[k.name for k in KERNELS], required=True)
        if rest:
            command.add_argument("rest", nargs="*", metavar=rest, help="put -- before it")
        return command

    add("all", "run everything, on the host and on all kernels", rest="PYTEST_ARGUMENT").add_argument(
        "--jobs", type=int, default=2, help="guests at the same time"
    )
    add("host", "run all tests on the machine's own kernel", rest="PYTEST_ARGUMENT")
    add("run", "run the tests marked kernel on one kernel", kernel=True, rest="PYTEST_ARGUMENT")
    add("exec", "run a command on one kernel", kernel=True, rest="COMMAND")
    add("summary", "put the results of the last host and run commands together")
    add("fetch", "fetch the kernels that are missing").add_argument(
        "--fresh", action="store_true", help="fetch all of them, in their newest version"
    )
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    kernel = next((k for k in KERNELS if k.name == getattr(options, "kernel", None)), None)
    rest: list[str] = getattr(options, "rest", [])
    match options.command:
        case "all":
            return run_all(rest, jobs=options.jobs, timeout_s=options.timeout)
        case "host":
            row = run_host(rest)
            if not rest:
                save(row)
            return close([row], [])
        case "run":
            assert kernel
            row = run_guest(kernel, rest, timeout_s=options.timeout)
            if not rest:
                save(row)
            return close([row], [])
        case "exec":
            assert kernel
            return run_command(kernel, rest, timeout_s=options.timeout)
        case "summary":
            return summarise()
        case "fetch":
            for each in KERNELS:
                print(debian.get(each, fresh=options.fresh).release)
            return 0
    raise AssertionError(options.command)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except debian.FetchError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
