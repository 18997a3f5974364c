"""What programs read and call, by their instructions."""

from __future__ import annotations

import pytest

from tcpscope.kernel.btf import Enum, Kind
from tcpscope.kernel.spec import Spec, probes
from tests.kernels import code
from tests.kernels.core import relocations
from tests.kernels.objects import spec_of

SOURCE = """
#define SEC(name) __attribute__((section(name), used))
#define INDEX __attribute__((preserve_access_index))
typedef unsigned long long u64;
struct maybe { int one; } INDEX;
static long (*ktime)(void) = (void *)5;
static int (*comm)(void *, unsigned) = (void *)16;
static long (*each)(void *, void *, void *, u64) = (void *)164;
static __attribute__((noinline)) long early(u64 *ctx) { return ktime() + ctx[7]; }
static __attribute__((noinline)) long late(u64 *ctx) { return early(ctx) + comm(ctx, 3); }
static __attribute__((noinline)) long back(void *map, void *key, void *value, void *data) { return 0; }
__attribute__((noinline)) long shared(u64 number) { return number * ktime(); }
static __attribute__((noinline)) long through(u64 *ctx) { return shared(3) + ktime(); }
SEC("tp_btf/directly") long directly(u64 *ctx) { return shared(7); }
SEC("tp_btf/indirectly") long indirectly(u64 *ctx) { return through(ctx); }
SEC("tp_btf/opens") long opens(u64 *ctx) { return early(ctx); }
SEC("tp_btf/none") long none(u64 *ctx) { return 0; }
SEC("tp_btf/third") long third(u64 *ctx) { return ctx[2] ? 0x123456789abcdef : 1; }
SEC("tp_btf/later") long later(u64 *ctx) { char name[16]; comm(name, 16); return name[0] + ctx[1]; }
SEC("tp_btf/saves") long saves(u64 *ctx)
{
    volatile u64 kept = ctx[0];
    return ktime() + kept;
}
SEC("tp_btf/other") long other(u64 *ctx) { u64 *into = (void *)ctx[0]; return into[9] + late(ctx); }
SEC("tp_btf/visits") long visits(u64 *ctx) { return each(ctx, back, 0, 0); }
SEC("tp_btf/asks") long asks(u64 *ctx)
{
    if (__builtin_preserve_field_info(((struct maybe *)ctx)->one, 2))
        return ktime();
    return comm(ctx, 1);
}
SEC("tp_btf/loops") long loops(u64 *ctx)
{
    long sum = 0;
    for (int i = 0; i < ctx[0]; i++)
        sum += ctx[1] & i ? ktime() : comm(ctx, i);
    return sum;
}
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return spec_of(SOURCE, tmp_path_factory.mktemp("code"))


@pytest.mark.parametrize(("program", "count"), [("none", 0), ("third", 3), ("later", 2), ("other", 1)])
def test_arguments(spec: Spec, program: str, count: int) -> None:
    """Also after a call, and not what is behind a pointer among them."""
    assert code.arguments(spec, program) == count


def test_helpers(spec: Spec) -> None:
    assert {name: set(code.helpers(spec, name, ())) for name in ("none", "later", "other", "late", "loops")} == {
        "none": set(),
        "later": {16},
        "other": set(),
        "late": {16},
        "loops": {5, 16},
    }


def test_frames(spec: Spec) -> None:
    """What is written, and what a helper is given the address of."""
    assert {name: code.frame(spec, name, ()) for name in ("none", "later", "other", "saves")} == {
        "none": 0,
        "later": 16,
        "other": 0,
        "saves": 8,
    }


@pytest.mark.parametrize(("answer", "helper"), [(1, 5), (0, 16)])
def test_what_is_reached_depends_on_the_answer(spec: Spec, answer: int, helper: int) -> None:
    (question,) = [place.at for where in relocations(spec).values() for place in where if place.piece == "asks"]
    assert code.helpers(spec, "asks", ((question, answer),)) == {helper}


def test_everything_is_reached_where_nothing_is_asked(spec: Spec) -> None:
    for piece in code.pieces(spec).keys() - {"asks"}:
        own = code._instructions(spec, piece)
        assert code.reached(spec, piece, ()) == {each.at for each in own}, piece


def test_calls(spec: Spec) -> None:
    """Between sections, and within one; of functions that are static, and that are not."""
    assert (code.calls(spec, "other", ()), code.calls(spec, "late", ())) == ({"late"}, {"early"})
    assert (code.calls(spec, "indirectly", ()), code.calls(spec, "through", ())) == ({"through"}, {"shared"})
    assert (code.calls(spec, "directly", ()), code.calls(spec, "opens", ())) == ({"shared"}, {"early"})
    assert code.calls(spec, "visits", ()) == set()


def test_callbacks(spec: Spec) -> None:
    assert code.callbacks(spec) == {"back"}


def test_arguments_of_our_own() -> None:
    transition = Spec.of("transition")
    names = ("state", "destroy", "connect__fentry", "accept__fexit")
    assert [code.arguments(transition, name) for name in names] == [3, 1, 1, 5]  # the last asks where to look


def test_helpers_of_our_own() -> None:
    """The ones that their source names."""
    life = Spec.of("life")
    names = {
        value: name
        for enum in life.btf.find_all("bpf_func_id", Kind.ENUM)
        if isinstance(enum, Enum)
        for name, value in enum.values
    }
    assert "BPF_FUNC_for_each_map_elem" in {names[number] for number in code.helpers(life, "flush__each", ())}
    assert "BPF_FUNC_get_socket_cookie" in {names[number] for number in code.helpers(life, "state", ())}


@pytest.mark.parametrize("probe", probes())
def test_only_iterators_run_another_program(probe: str) -> None:
    """The kernel does not check a tail call for recursion, which would share the private stack of the program.

    An iterator has none: bpf_prog_check_recur() in include/linux/bpf_verifier.h.
    """
    tail_call, own = 12, Spec.of(probe)
    assert not [
        name
        for name, piece in code.pieces(own).items()
        if tail_call in code.helpers(own, name, ()) and not piece.section.startswith("iter/")
    ]
