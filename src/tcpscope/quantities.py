"""Numbers and times as people type them. Digits are ASCII: no 1_000, no 1e3, no digits of other scripts."""

from __future__ import annotations

import re
from math import ceil

from tcpscope.errors import UsageError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_TIME = re.compile(rf"([0-9]{{1,12}}(?:\.[0-9]{{0,9}})?|\.[0-9]{{1,9}})({'|'.join(_UNITS)})")


def seconds(text: str) -> float | None:
    """`2`, `0.5`, `200ms`, `5m`, `1h` in seconds; None for anything else."""
    found = _TIME.fullmatch(text.strip())
    return float(found[1]) * _UNITS[found[2]] if found else None


def whole(text: str, highest: int) -> int | None:
    """The number from 0 to `highest` that the digits of `text` are; None for anything else."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > len(str(highest)):
        return None
    return int(digits) if int(digits) <= highest else None


def microseconds(option: str, text: str) -> int:
    """10ms, 1.5s, 300us in microseconds, rounded up. UsageError for anything else, and for less than one."""
    found = seconds(text) if text.strip()[-1:].isalpha() else None
    if found is None:
        raise UsageError(f"{option} {text}", "give a time with its unit, such as 300us, 10ms or 1.5s")
    if not 1e-6 <= found < 1e9:
        raise UsageError(f"{option} {text}", "give a time from 1us on")
    return ceil(round(found * 1e6, 3))
