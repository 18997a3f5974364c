"""Runs the tests on the kernels of the matrix: Debian's own, in virtual machines over the host's files.

``python -m tests.kernels --help`` says how. The tuple below is the matrix.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    """What the kernel is called in commands and tables: its version up to the second number."""
    suite: str
    """The Debian suite that has it; of several packages of that version the newest is taken."""


KERNELS = (
    Kernel("5.10", "bullseye"),
    Kernel("6.1", "bookworm"),
    Kernel("6.12", "trixie"),
    Kernel("7.2", "trixie-backports"),
    Kernel("7.3", "trixie-backports"),
)
"""From the oldest to the newest. These two run every test of the kernel, those between them what choice.py says."""

TWO = "two processors"
"""The row of the newest kernel with two of them: what needs true concurrency."""

HOST = "host"
"""The row of the machine's own kernel."""

ROWS = (HOST, *(kernel.name for kernel in KERNELS), TWO)
