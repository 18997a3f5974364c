"""docs/kernels.md against the kernels that are here."""

from __future__ import annotations

from tests.kernels import btfs, page, ring
from tests.kernels.btfs import Found
from tests.kernels.ring import Verdict
from tests.kernels.ring_cli import PAGE

WELL = Verdict({}, {}, {})
OLD = Verdict({}, {}, {"life": ["flush by `iter/bpf_map_elem`", "no `x`"], "rtt": ["no `x`"]})
LACKING = Verdict({"rtt": ["no tcp_sock.rack"]}, {"queue": ["overflow events"]}, {})


def kernels() -> dict[Found, Verdict]:
    def found(minor: int, patch: int, flavour: str = "plain") -> Found:
        return Found((6, minor), "sid", flavour, f"6.{minor}.{patch}-{flavour}-amd64")

    return {found(1, 9): OLD, found(1, 10): WELL, found(1, 9, "rt"): LACKING, found(12, 3): WELL}


def test_the_page_is_that_of_this_machines_kernels() -> None:
    """As far as they are here: a kind that the page has and this machine has not cannot be looked at.

    Of each kind the newest is looked at, which may not lack anything that the page does not say.
    """
    text = PAGE.read_text()
    stated, differing = page.stated(text)
    assert len(stated) > 20
    by_age = sorted(btfs.cached(), key=btfs.age)
    here = {(page.series(kernel), kernel.suite, kernel.flavour): kernel for kernel in by_age}
    for kind in here.keys() & stated.keys():
        said = set(stated[kind].split(page.SEPARATOR))
        assert set(page.words(ring.verdict_of(here[kind]))) <= said, here[kind].release
    found = page.by_series(btfs.newest(), ring.verdict_of)
    if found and list(found)[-1] == list(differing)[-1]:  # they are told from the same newest one
        assert {name: what for name, what in found.items() if name in differing and what != differing[name]} == {}


def test_the_tables() -> None:
    verdicts = kernels()
    made = page.tables(
        list(verdicts), [kernel for kernel in verdicts if "6.1.9-p" not in kernel.release], verdicts.__getitem__
    )
    assert page.stated(made) == (
        {
            ("6.1", "sid", "plain"): "all",
            ("6.1", "sid", "rt"): "`rtt` cannot run: no tcp_sock.rack<br>`queue` without overflow events",
            ("6.12", "sid", "plain"): "all",
        },
        {"6.1": "-", "6.12": "-"},
    )
    assert "| 6.1 | sid | plain | 2 | 6.1.10-plain-amd64 | all |" in made


def test_what_an_older_kernel_does_otherwise() -> None:
    assert page.differences(OLD, WELL) == "flush by `iter/bpf_map_elem`, no `x`"
    assert page.differences(OLD, Verdict({}, {}, {"sockets": ["no `x`"]})) == "flush by `iter/bpf_map_elem`"
    assert page.differences(WELL, OLD) == "-"


def test_the_page_keeps_what_is_around_the_tables() -> None:
    text = "before\n<!-- kernels -->\nold\n<!-- end -->\nbehind\n"
    once = page.rewritten(text, "| new |\n")
    assert once == "before\n<!-- kernels -->\n| new |\n<!-- end -->\nbehind\n"
    assert page.rewritten(once, "| new |\n") == once
