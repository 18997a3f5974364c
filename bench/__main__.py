"""The bench: `python -m bench [--quick]`. As root, or it starts itself anew through sudo."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import installed, part, report, subjects

GUEST_KERNEL = "6.1"
GUEST_TIMEOUT_S = 2400
RESULTS = installed.TREE / ".cache/bench-results.json"
PAGE = installed.TREE / "docs/performance.md"
_TAKE = "bench result: "


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that all works; writes no page")
    parser.add_argument("--only", choices=["host", "micro", "guest"], help="this part; the rest from the last run")
    parser.add_argument("--groups", default="", help="with --only: these groups of tools, with commas")
    parser.add_argument("--report", action="store_true", help="write the page anew from the last run")
    parser.add_argument("--measure", choices=part.PLANS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if os.geteuid():
        os.execvp("sudo", ["sudo", sys.executable, "-m", "bench", *sys.argv[1:]])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started ends too
    if options.measure:
        groups = [group for group in options.groups.split(",") if group]
        result = part.run(part.PLANS[options.measure], lambda line: print(line, flush=True), groups)
        print(_TAKE + json.dumps(result), flush=True)
        return 0
    results: dict[str, Any] = {}
    if (options.only or options.report) and RESULTS.exists():
        results = json.loads(RESULTS.read_text())
    if not options.report:
        for package in subjects.missing_packages():
            print(f"package {package} is not installed: what it holds is left out", flush=True)
        began = time.monotonic()
        measure(results, options.only, "quick-" if options.quick else "", options.groups)
        print(f"measured for {time.monotonic() - began:.0f} s", flush=True)
    text = report.page(results)
    if options.quick:
        print(text)
        return 0
    RESULTS.write_text(json.dumps(results))
    PAGE.write_text(text)
    print(f"written: {PAGE.relative_to(installed.TREE)}")
    return 0


def measure(results: dict[str, Any], only: str | None, prefix: str, groups: str) -> None:
    """Take the parts that were asked for."""
    print("building", flush=True)
    installed.build()
    me = [sys.executable, "-m", "bench", "--groups", groups, "--measure"]
    if only in (None, "host"):
        results["host"] = take([*me, f"{prefix}host"])
    if only in (None, "micro"):
        print("user side alone", flush=True)
        command = [str(installed.PYTHON), "-m", "bench.micro", str(installed.WORKLOAD)]
        done = subprocess.run(command, cwd=installed.TREE, check=True, stdout=subprocess.PIPE)
        results["micro"] = json.loads(done.stdout)
    if only in (None, "guest"):
        print(f"kernel {GUEST_KERNEL}, in a virtual machine", flush=True)
        matrix = [sys.executable, "-m", "tests.kernels", "--timeout", str(GUEST_TIMEOUT_S)]
        results["guest"] = take([*matrix, "exec", "--kernel", GUEST_KERNEL, "--", *me, f"{prefix}guest"])


def take(command: list[str]) -> dict[str, Any]:
    """Run a part as a process of its own, show what it says, return its result."""
    with subprocess.Popen(command, cwd=installed.TREE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        result: dict[str, Any] | None = None
        try:
            for line in process.stdout:
                if line.startswith(_TAKE):
                    result = json.loads(line.removeprefix(_TAKE))
                else:
                    print(line, end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    if result is None:
        sys.exit(f"no result from: {' '.join(map(str, map(Path, command[:4])))} ...")
    return result


if __name__ == "__main__":
    sys.exit(main())
