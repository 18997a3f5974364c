"""A tool that is recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

PORTS = "6000-9999"
"""Where the scenarios' listeners are, and the targets of their clients: no ports that the kernel would choose."""


@dataclass(frozen=True, init=False)
class Watch:
    """A command line of tcpscope that runs while scenarios are played, once for all tests that name it.

    Its output is JSON with the account, unless it says otherwise. It sees all scenarios: no network namespace exists
    yet that it could be asked for. `--port` keeps other programs of the machine away from it. One with `moment` ends
    by itself: it runs once, when all scenarios that ask for it have come to their `script.moment()`, and only looks.
    One that is not for `every_kernel` differs from another in what no kernel has a say in, such as a grouping or how
    counts are added up. A test with such a watch among its own runs on the oldest and the newest kernel only.
    The tool takes the kernel for one that `lacks` something: `pretend()` in tests/lacks.py.
    """

    argv: tuple[str, ...]
    moment: bool
    every_kernel: bool = field(compare=False)
    lacks: tuple[str, ...]

    def __init__(
        self, *argv: str, moment: bool = False, every_kernel: bool = True, lacks: tuple[str, ...] = ()
    ) -> None:
        object.__setattr__(self, "argv", argv)
        object.__setattr__(self, "moment", moment)
        object.__setattr__(self, "every_kernel", every_kernel)
        object.__setattr__(self, "lacks", lacks)

    @property
    def name(self) -> str:
        """Also of its files."""
        return re.sub(r"[^\w.]+", "_", " ".join((*self.argv, *self.lacks)))

    @property
    def command(self) -> list[str]:
        json = () if {"-o", "--output"} & set(self.argv) else ("-o", "json", "--stats")
        return [*self.argv, *json]
