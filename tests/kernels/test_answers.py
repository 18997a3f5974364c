"""What programs use of what a kernel has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcpscope.kernel.btf import Btf, Kind
from tcpscope.kernel.features import BTF
from tcpscope.kernel.spec import Spec
from tests.blob import Blob
from tests.kernels.answers import Answer, Answers, absent, lacks, width
from tests.kernels.core import relocations
from tests.kernels.objects import KERNEL, OBJECT, spec_of, types_of
from tests.kernels.offline import Offline
from tests.kernels.signature import probes

ALL = ("first", "second", "asks", "guards", "careless", "alias")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return spec_of(OBJECT, tmp_path_factory.mktemp("answers"))


def answers(spec: Spec, folder: Path, *changes: tuple[str, str]) -> Answers:
    """Those of a kernel of which something was changed."""
    source = KERNEL
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    return Answers(spec, Offline(types_of(source, folder)))


def test_a_kernel_that_has_everything(spec: Spec, tmp_path: Path) -> None:
    found = answers(spec, tmp_path).of(ALL)
    assert found.keys() == relocations(spec).keys()
    assert set(found.values()) == {Answer.FOUND}


@pytest.mark.parametrize(
    ("change", "lacking", "asked"),
    [
        (("long mark", "long march"), ["no sock.mark"], []),
        (("since", "until"), [], ["later.since"]),
        (("maybe", "never"), [], ["maybe"]),  # the field is used only if the type is there
        (("struct maybe { int field; };", "struct maybe { int other; };"), ["no maybe.field"], []),
        (("HELPER", "ANOTHER"), [], ["helper.HELPER"]),
        (("int one, other", "int other"), [], ["new.one"]),  # a function that is then not called uses it
        (("int one, other", "int one"), ["no new.other"], ["new.other"]),  # asked for, and used all the same
    ],
)
def test_what_a_kernel_lacks(
    spec: Spec, tmp_path: Path, change: tuple[str, str], lacking: list[str], asked: list[str]
) -> None:
    found = answers(spec, tmp_path, change).of(ALL)
    assert (lacks(found), absent(found)) == (lacking, asked)


def test_only_what_the_programs_use_counts(spec: Spec, tmp_path: Path) -> None:
    """A program that is not attached may want what it likes."""
    lacking = answers(spec, tmp_path, ("long mark", "long march"), ("int value", "int worth"))
    assert lacks(lacking.of(["first"])) == ["no sock.mark"]
    assert lacks(lacking.of(["alias"])) == ["no uses_alias.alias.value"]
    assert lacks(lacking.of(["second"])) == []


def test_functions_that_are_called(spec: Spec, tmp_path: Path) -> None:
    assert answers(spec, tmp_path).used(["second"]) == {"second", "called"}
    assert answers(spec, tmp_path).used(["guards"]) == {"guards", "only_if_asked"}
    assert answers(spec, tmp_path, ("int one, other", "int other")).used(["guards"]) == {"guards"}


def test_helpers_that_are_called(spec: Spec, tmp_path: Path) -> None:
    assert answers(spec, tmp_path).helpers("only_if_asked") == {5}


def test_a_type_of_which_there_are_several(spec: Spec) -> None:
    blob = Blob()
    blob.add(Kind.INT, "int", 4, 32)
    for bits in (0, 32):
        blob.add(Kind.STRUCT, "inner", 8, "deep", 1, bits, count=1)
    assert "more than one inner.deep" in lacks(Answers(spec, Offline(blob.parse())).of(["second"]))


def test_widths(spec: Spec, tmp_path: Path) -> None:
    kernel = Offline(types_of(KERNEL, tmp_path))
    widths = {str(one): width(one, kernel) for one in relocations(spec)}
    assert (widths["sock.mark"], widths["sock.low"], widths["row.each"]) == ("8 bytes", "3 bits", "there")
    assert (widths["row.cells[2]"], widths["maybe"], widths["helper.HELPER"]) == ("2 bytes", "there", "there")


@pytest.mark.parametrize("probe", probes())
def test_the_running_kernel_has_what_its_loader_finds(probe: str) -> None:
    """It loads these objects: what is said to be missing would be wrong."""
    kernel = Offline(Btf.parse(BTF.read_bytes()))
    usable = [program.name for program in Spec.of(probe).programs if kernel.can(program)]
    assert lacks(Answers(Spec.of(probe), kernel).of(usable)) == []
