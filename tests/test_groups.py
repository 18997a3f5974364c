"""Counting in the kernel: which bits of an event make its group, and how they are put back."""

from __future__ import annotations

import pytest

from tcpscope import groups
from tcpscope.errors import UsageError
from tcpscope.kernel.spec import Spec

RETRANS = Spec.of("retrans")
LAYOUT = RETRANS.layout("retrans")


def bits(names: tuple[str, ...]) -> dict[int, int]:
    """Word -> mask."""
    parts = groups.counting(LAYOUT, names, None).constants["group_by"]
    return {part["word"]: part["mask"] for part in parts if part["mask"]}


def test_a_group_has_the_bits_of_its_columns() -> None:
    field = {name: LAYOUT.field(name) for name in ("raddr", "rport", "lport")}
    assert bits(("rport",)) == {field["rport"].offset // 8: 0xFFFF << 8 * (field["rport"].offset % 8)}
    both = bits(("rport", "lport"))
    assert both == {field["rport"].offset // 8: bits(("rport",)).popitem()[1] | bits(("lport",)).popitem()[1]}
    at = field["raddr"].offset // 8
    assert bits(("raddr",)) == {at: 2**64 - 1, at + 1: 2**64 - 1}


def test_the_order_is_that_of_the_event() -> None:
    assert list(bits(("kind", "raddr", "netns"))) == sorted(bits(("netns", "kind", "raddr")))


def test_a_sum_is_the_number_of_its_bits() -> None:
    part, field = groups.counting(LAYOUT, ("kind",), "segs").constants["group_sum"], LAYOUT.field("segs")
    record = bytearray(LAYOUT.size)
    record[field.offset : field.offset + field.size] = (4711).to_bytes(field.size, "little")
    word = int.from_bytes(record[part["word"] * 8 : part["word"] * 8 + 8], "little")
    assert (word & part["mask"]) >> part["shift"] == 4711


def test_too_many_columns_are_refused() -> None:
    names = tuple(field.name for field in LAYOUT.fields if field.kind != "time")
    with pytest.raises(UsageError, match="too many columns"):
        groups.counting(LAYOUT, names, None)


@pytest.mark.parametrize(
    ("probe", "event", "name"),
    [("trace", "trace", "chain"), ("drops", "drop", "stack"), ("resets", "resets", "stack")],
)
def test_a_column_that_the_kernel_does_not_count_is_refused(probe: str, event: str, name: str) -> None:
    layout = Spec.of(probe).layout(event)
    alone = [field.name for field in layout.fields if not field.counted]
    assert alone == [name]
    with pytest.raises(UsageError, match=f"--by {name}"):
        groups.counting(layout, ("netns", name), None)


def test_only_some_objects_count() -> None:
    assert groups.counts(RETRANS)
    assert not groups.counts(Spec.of("transition"))
