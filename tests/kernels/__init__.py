"""Runs the tests on the kernels of the matrix: Debian's own ones, in virtual machines over the host's file tree.

``python -m tests.kernels --help`` says how. This tuple is the matrix; nothing else in the project names a kernel version.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kernel:
    name: str
    """What the kernel is called in every command and table: the version up to the second number."""
    suite: str
    """The Debian suite whose ``linux-image-amd64`` is this kernel; the newest one there is taken."""


KERNELS = (
    Kernel("5.10", "bullseye"),
    Kernel("6.1", "bookworm"),
    Kernel("6.12", "trixie"),
    Kernel("7.2", "trixie-backports"),
)

HOST = "host"
"""The row of the machine's own kernel."""
