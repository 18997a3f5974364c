"""Records tests on one kernel of the matrix, and asserts them: ``python -m tests.record --kernel 6.1 -- TESTS``.

The recording stays in .cache/recordings/KERNEL. ``--again`` asserts over it once more, without a boot.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from tests.kernels import KERNELS, debian, kvm
from tests.kernels.guest import TREE
from tests.record.guest import folder_of, record


def check(kernel: str, tests: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "recorded", "--recording", str(folder_of(kernel)), *tests]
    return subprocess.run(command, cwd=TREE).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.record", description=__doc__)
    parser.add_argument("--kernel", choices=[kernel.name for kernel in KERNELS], required=True)
    parser.add_argument("--again", action="store_true", help="only assert, over the recording that is there")
    parser.add_argument("tests", nargs="*", metavar="PYTEST_ARGUMENT", help="put -- before it")
    options = parser.parse_args()
    kernel = next(kernel for kernel in KERNELS if kernel.name == options.kernel)
    if not options.again:
        outcome = record(debian.get(kernel), kernel.name, options.tests, show=print, under_kvm=kvm.usable())
        print(f"recorded in {outcome.total_s:.0f} s, of which {outcome.boot_s or 0:.0f} s to boot", flush=True)
        if outcome.status:
            return 1
    return check(options.kernel, options.tests)


if __name__ == "__main__":
    sys.exit(main())
