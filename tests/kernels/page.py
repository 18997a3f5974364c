"""The tables of docs/kernels.md: what was looked at, and what was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from tests.kernels.btfs import Found, age
from tests.kernels.ring import Verdict

Judge = Callable[[Found], Verdict]

_MARKED = re.compile(r"(<!-- kernels -->\n).*?(\n<!-- end -->)", re.DOTALL)
_KERNELS = "| series | suite | flavour | kernels | newest | what is there |\n|---|---|---|---:|---|---|\n"
_SERIES = "| series | not as on the newest |\n|---|---|\n"
ALL = "all"
SEPARATOR = "<br>"
"""Between what stands in one cell: the texts themselves have semicolons."""


def words(verdict: Verdict) -> Iterator[str]:
    """What is not there, probe by probe and tool by tool; nothing if all is."""
    for probe, lacks in verdict.lacks.items():
        yield from (f"`{probe}` cannot run: {lack}" for lack in lacks)
    for tool, unknown in verdict.unknown.items():
        yield from (f"`{tool}` without {what}" for what in unknown)


def differences(verdict: Verdict, newest: Verdict) -> str:
    """What is done in a worse way than on the newest kernel, or is not there and is there; "-" for nothing."""
    own = [what for whats in verdict.otherwise.values() for what in whats]
    its = [what for whats in newest.otherwise.values() for what in whats]
    return ", ".join(dict.fromkeys(what for what in own if what not in its)) or "-"


def series(kernel: Found) -> str:
    return ".".join(map(str, kernel.series))


def rows(kernels: Iterable[Found], judge: Judge) -> dict[tuple[str, str, str], str]:
    """(series, suite, flavour) -> the other cells of its row. Of all kernels in it what any of them lacks."""
    groups: dict[tuple[str, str, str], list[Found]] = {}
    for kernel in kernels:
        groups.setdefault((series(kernel), kernel.suite, kernel.flavour), []).append(kernel)
    return {
        kind: f"{len(own)} | {max(own, key=age).release} | "
        f"{SEPARATOR.join(dict.fromkeys(word for kernel in own for word in words(judge(kernel)))) or ALL}"
        for kind, own in groups.items()
    }


def by_series(newest: Sequence[Found], judge: Judge) -> dict[str, str]:
    """Series -> how the usual kernel of that series differs from that of the newest series."""
    plain = [kernel for kernel in newest if kernel.flavour == "plain"]
    return {series(kernel): differences(judge(kernel), judge(plain[-1])) for kernel in plain}


def tables(kernels: Sequence[Found], newest: Sequence[Found], judge: Judge) -> str:
    first = "".join(f"| {' | '.join(kind)} | {rest} |\n" for kind, rest in rows(kernels, judge).items())
    second = "".join(f"| {name} | {what} |\n" for name, what in by_series(newest, judge).items())
    return f"{_KERNELS}{first}\n{_SERIES}{second}"


def rewritten(text: str, tables: str) -> str:
    """The page with these tables."""
    return _MARKED.sub(lambda match: match[1] + tables + match[2].lstrip("\n"), text)


def stated(text: str) -> tuple[dict[tuple[str, str, str], str], dict[str, str]]:
    """What the page says is there: of a row of the first table, and of one of the second."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| \d", line)]
    cells = [[cell.strip() for cell in line] for line in lines]
    return (
        {(row[0], row[1], row[2]): row[5] for row in cells if len(row) == 6},
        {row[0]: row[1] for row in cells if len(row) == 2},
    )
