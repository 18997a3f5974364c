"""Names of kernel addresses, from /proc/kallsyms. The kernel shows addresses there only with CAP_SYSLOG."""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import cache
from pathlib import Path

_KALLSYMS = Path("/proc/kallsyms")
_FUNCTION = re.compile(r"^([0-9a-f]+) [tTwW] (\S+)", re.MULTILINE)


class Symbols:
    """The kernel's functions, by address. Without CAP_SYSLOG there are none: `len()` is 0.

    text  that of /proc/kallsyms, instead of reading it
    """

    def __init__(self, text: str | None = None) -> None:
        lines = _FUNCTION.finditer(_KALLSYMS.read_text() if text is None else text)
        found = sorted([(value, line[2]) for line in lines if (value := int(line[1], 16))])
        self._addresses = [value for value, _ in found]
        self._names = [name for _, name in found]

    def range(self, name: str) -> tuple[int, int] | None:
        """Where a function begins, and where the next one does. None if there is none with this name, or several."""
        if self._names.count(name) != 1:
            return None
        begin = self._addresses[self._names.index(name)]
        end = bisect_right(self._addresses, begin)
        return (begin, self._addresses[end]) if end < len(self) else None

    def __len__(self) -> int:
        return len(self._names)

    def name(self, address: int) -> str:
        """`function+0x1a`; the address in hexadecimal if it is below all functions."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0:
            return hex(address)
        return f"{self._names[at]}+{address - self._addresses[at]:#x}"


@cache
def kernel_symbols() -> Symbols:
    """The running kernel's. Ask for them before the tool gives up its capabilities: they are read once."""
    return Symbols()
