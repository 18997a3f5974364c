"""`python -m tests.kernels ring`: what kernels that nobody boots lack, and the page that says it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tcpscope.errors import TcpscopeError
from tcpscope.kernel.btf import Btf
from tests.kernels import btfs, image, page, ring
from tests.kernels.guest import TREE

PAGE = TREE / "docs/kernels.md"


def run(files: Sequence[str], *, everything: bool) -> int:
    """0 if nothing is lacking. Without files those of Debian's kernels, which are fetched, and the page is written."""
    if files:
        verdicts = {name: ring.judge(_types_of(name)) for name in files}
    else:
        btfs.fetch(everything, print)
        kernels = btfs.cached()
        with ProcessPoolExecutor() as pool:
            found = dict(zip(kernels, pool.map(ring.verdict_of, kernels), strict=True))
        verdicts = {kernel.release: verdict for kernel, verdict in found.items()}
        tables = page.tables(kernels, btfs.newest(), found.__getitem__)
        PAGE.write_text(page.rewritten(PAGE.read_text(), tables))
        print(tables, f"written: {PAGE.relative_to(TREE)}", sep="\n")
    for name, verdict in verdicts.items():
        said = [*page.words(verdict), *(what for whats in verdict.otherwise.values() for what in whats if files)]
        print(*(f"{name}: {what}" for what in dict.fromkeys(said)), sep="\n", end="\n" if said else "")
    lacking = sum(bool(verdict.lacks) for verdict in verdicts.values())
    print(f"{len(verdicts)} kernels, {lacking} of them lack what tcpscope needs")
    return 1 if lacking else 0


def _types_of(name: str) -> Btf:
    try:
        return Btf.parse(image.types_in(Path(name).read_bytes()))
    except (OSError, image.ImageError, TcpscopeError) as error:
        raise image.ImageError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
