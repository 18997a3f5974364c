"""The command line of the matrix: ``python -m tests.kernels``."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial

from tests import kernels
from tests.kernels import KERNELS, ROWS, Kernel, debian, image, install, kvm, matrix, qemu, ring_cli, rows, summary
from tests.kernels.guest import Guest

TIMEOUT_S = 4500


def run_kernel(kernel: Kernel, arguments: Sequence[str], *, timeout_s: float) -> int:
    """Record and run tests on one kernel."""
    under_kvm, show = kvm.usable(), partial(print, flush=True)
    row = rows.run_guest(
        kernel.name,
        debian.get(kernel),
        rows.compose(arguments),
        arguments,
        timeout_s=timeout_s,
        under_kvm=under_kvm,
        show=show,
    )
    matrix.show_failures(row)
    if not arguments:
        matrix.save(row)
    return matrix.close([row])


def run_command(kernel: Kernel, command: Sequence[str], *, timeout_s: float) -> int:
    with Guest(debian.get(kernel)) as machine:
        environment = install.staged(machine.site)
        show = partial(print, flush=True)
        outcome = machine.run(command, environment, timeout_s, show, kvm=kvm.usable())
        if outcome.problem:
            print(*machine.console(), outcome.problem, sep="\n", file=sys.stderr)
        return 1 if outcome.status is None else outcome.status


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
    jobs = min(2, os.cpu_count() or 1)
    everything.add_argument("--jobs", type=int, default=jobs, help="guests at the same time")
    add("host", "run all tests on the machine's own kernel", rest="PYTEST_ARGUMENT")
    add("run", "run the tests marked kernel on one kernel", kernel=True, rest="PYTEST_ARGUMENT")
    add("exec", "run a command on one kernel", kernel=True, rest="COMMAND")
    again = add("again", "assert once more over the last recording of a kernel, without a boot", rest="PYTEST_ARGUMENT")
    again.add_argument("--kernel", choices=ROWS, required=True)
    add("summary", "put the results of the last `host` and `run` commands together")
    ring_ = add("ring", "check all of Debian's kernels without a boot, or BTF files", rest="FILE")
    ring_.add_argument("--all", action="store_true", help="fetch every kernel, not only the newest of each kind")
    fetch = add("fetch", "fetch the kernels that are missing, and a newer QEMU if the suites have one")
    fetch.add_argument("--fresh", action="store_true", help="fetch all of them, and QEMU, in their newest version")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse(sys.argv[1:])
    kernel = next((k for k in KERNELS if k.name == getattr(options, "kernel", "")), KERNELS[0])
    if options.command in ("all", "run", "exec", "fetch"):
        qemu.get(partial(print, flush=True), fresh=getattr(options, "fresh", False))
    match options.command:
        case "all":
            return matrix.run_all(options.rest, jobs=options.jobs, timeout_s=options.timeout)
        case "host":
            row = rows.run_host(options.rest)
            if not options.rest:
                matrix.save(row)
            return matrix.close([row])
        case "run":
            return run_kernel(kernel, options.rest, timeout_s=options.timeout)
        case "exec":
            return run_command(kernel, options.rest, timeout_s=options.timeout)
        case "again":
            recording = rows.RECORDINGS / options.kernel.replace(" ", "-")
            kept = recording / rows.OPTIONS
            chosen = json.loads(kept.read_text()) if kept.exists() else []
            command = [*rows.PYTEST, "-q", "-m", "recorded", "--recording", str(recording), *chosen, *options.rest]
            return subprocess.run(command, cwd=rows.TREE).returncode
        case "ring":
            return ring_cli.run(options.rest, everything=options.all)
        case "summary":
            paths = [rows.RESULTS / f"{name.replace(' ', '-')}.json" for name in ROWS]
            return matrix.close([summary.load(path) for path in paths if path.exists()], ROWS)
        case _:
            fetch = partial(debian.get, fresh=options.fresh)
            for name, found in debian.rows(KERNELS, fetch, print).items():
                print(f"{name}: {found.release}")
            return 0


if __name__ == "__main__":
    # depmod and ip live in sbin, which Debian keeps out of an ordinary user's path.
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except (debian.FetchError, install.BuildError, image.ImageError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
