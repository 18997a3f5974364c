"""From the BTF of a C struct to rows: the description is the object's own, the bytes are made here."""

from __future__ import annotations

import itertools
import struct
import time
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpscope import schema
from tcpscope.errors import UsageError
from tcpscope.filters import address_bytes
from tcpscope.kernel.spec import Spec, probes
from tcpscope.schema import Clock, Decoder, Layout, comm_text, tcp_flags_text
from tests import examples  # noqa: F401  for its settings

KINDS = ("stack", "errno", "text", "function", "tcp_flags")
WITHOUT_ROWS = ("owner", "rtt")
TRANSITION = Spec.of("transition").layout("transition")
VALUES: dict[str, Any] = {
    "time": 5_000_000_000,
    "cookie": 7,
    "netns": 4026531840,
    "lport": 40001,
    "rport": 443,
    "laddr": address_bytes("192.0.2.1"),
    "raddr": address_bytes("2001:db8::1"),
    "family": 4,
    "pid": 42,
    "uid": 0,
    "comm": b"nginx".ljust(16, b"\0"),
    "cgroup": 1,
    "role": 1,
    "old_state": 1,
    "new_state": 4,
    "followed_by": 2,
    "in_state_us": 1234,
}


def record(layout: Layout = TRANSITION, **changes: Any) -> bytes:
    """The bytes of one event, as the kernel would send it; what lies between the fields is not zero."""
    data = bytearray(b"\xee" * layout.size)
    for field in layout.fields:
        struct.pack_into(f"<{field.format}", data, field.offset, (VALUES | changes)[field.name])
    return bytes(data)


def decode(*records: bytes, layout: Layout = TRANSITION, **options: Any) -> list[Any]:
    return layout.decoder(Clock("none"), **options).rows(b"".join(records))


def test_the_layout_is_that_of_the_c_struct() -> None:
    assert TRANSITION.size == 120
    assert [(f.name, f.offset, f.size) for f in TRANSITION.fields][:7] == [
        ("time", 0, 8),
        ("cookie", 8, 8),
        ("netns", 16, 4),
        ("lport", 20, 2),
        ("rport", 22, 2),
        ("laddr", 24, 16),
        ("raddr", 40, 16),
    ]
    ends = sorted((f.offset, f.offset + f.size) for f in TRANSITION.fields)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize("probe", probes())
def test_every_column_is_described(probe: str) -> None:
    """Nothing is shown without a description, and a unit is in the name."""
    spec = Spec.of(probe)
    names = [type_.name for type_ in spec.btf.types if type_.name and spec.btf.find(type_.name, type_.kind) is not None]
    layouts = [spec.layout(name) for name in dict.fromkeys(names) if _is_event(spec, name)]
    assert any(layout.fields for layout in layouts) == (probe not in WITHOUT_ROWS)
    for layout in layouts:
        for field in layout.fields:
            assert field.doc, field
            assert field.kind in ("int", "bool", "enum", "address", "comm", "time", *KINDS), field
            if field.unit and field.kind != "time":
                assert field.name.endswith(f"_{field.unit}"), field


def _is_event(spec: Spec, name: str) -> bool:
    """An event is a struct with an anchor."""
    return any(f"{name}_anchor" == type_.name for type_ in spec.btf.types)


def test_a_row() -> None:
    (row,) = decode(record())
    assert msgspec.structs.asdict(row) == {
        "cookie": 7,
        "netns": 4026531840,
        "lport": 40001,
        "rport": 443,
        "laddr": "192.0.2.1",
        "raddr": "2001:db8::1",
        "family": 4,
        "pid": 42,
        "uid": 0,
        "comm": "nginx",
        "cgroup": 1,
        "role": "ACTIVE",
        "old_state": "ESTABLISHED",
        "new_state": "FIN_WAIT1",
        "followed_by": "TIME_WAIT",
        "in_state_us": 1234,
    }


def test_not_known_is_none_and_zero_is_zero() -> None:
    unknown = {
        "cookie": 0,
        "lport": 0,
        "rport": 0,
        "raddr": bytes(16),
        "pid": 0,
        "uid": 0xFFFFFFFF,
        "comm": bytes(16),
        "cgroup": 0,
        "role": 0,
        "followed_by": 0,
        "in_state_us": 2**64 - 1,
    }
    (row,) = decode(record(**unknown))
    assert {name for name, value in msgspec.structs.asdict(row).items() if value is None} == set(unknown)
    (row,) = decode(record(uid=0, in_state_us=0, laddr=bytes(16)))
    assert (row.uid, row.in_state_us, row.laddr) == (0, 0, "::")


def test_a_yes_or_no_that_is_not_known() -> None:
    layout = Spec.of("attempt").layout("attempt").select(("syn_dropped",))
    (field,) = layout.fields
    decode = layout.decoder().rows
    records = [bytearray(layout.size) for _ in range(3)]
    for record, value in zip(records, (0, 1, 255), strict=True):
        record[field.offset] = value
    assert [row.syn_dropped for row in decode(memoryview(b"".join(records)))] == [False, True, None]


def test_a_value_without_a_name_is_shown_as_it_is() -> None:
    (row,) = decode(record(new_state=99))
    assert row.new_state == "99"


def test_the_running_kernel_names_a_value() -> None:
    """Not the object: another kernel may give the value another name, or none."""
    layout = Spec.of("retrans").layout("retrans").select(["ca_state"])
    assert layout.field("ca_state").type == str | None

    def named(names: dict[str, dict[int, str]], value: int) -> Any:
        field = layout.field("ca_state")
        data = bytearray(layout.size)
        struct.pack_into(f"<{field.format}", data, field.offset, value)
        (row,) = layout.named(lambda enum: names.get(enum, {})).decoder().rows(data)
        return row.ca_state

    here = {"tcp_ca_state": {0: "TCP_CA_Open", 3: "TCP_CA_Slow", 7: "OTHER"}}
    assert [named(here, value) for value in (0, 3, 7, 4, 255)] == ["Open", "Slow", "OTHER", "4", None]
    assert named({}, 3) == "3"


def test_a_batch_is_rows_in_order() -> None:
    rows = decode(*(record(lport=port) for port in (3, 1, 2)))
    assert [row.lport for row in rows] == [3, 1, 2]
    assert decode() == []


def test_a_cut_record_is_an_error() -> None:
    with pytest.raises(struct.error):
        decode(record()[:-1])


def test_columns_in_the_order_asked_for() -> None:
    layout = TRANSITION.select(("rport", "pid", "lport"))
    (row,) = decode(record(), layout=layout)
    assert row.__struct_fields__ == ("rport", "pid", "lport")
    assert (row.rport, row.pid, row.lport) == (443, 42, 40001)
    with pytest.raises(UsageError, match="unknown column 'lprot'; did you mean 'lport'"):
        TRANSITION.select(("lprot",))


def test_raw_values_are_those_of_the_struct() -> None:
    (row,) = decode(record(pid=0), raw=True)
    assert (row.pid, row.old_state, row.laddr) == (0, 1, address_bytes("192.0.2.1"))


def test_internal_fields_only_when_asked_for() -> None:
    assert "in_cgroup" not in [field.name for field in TRANSITION.fields]
    internal = Spec.of("transition").layout("transition", internal=True)
    assert "in_cgroup" in [field.name for field in internal.fields]
    assert not any(field.name.startswith("padding") for field in internal.fields)


def test_a_stack() -> None:
    layout = Spec.of("listeners").layout("overflow").select(("stack",))
    field = layout.fields[0]
    data = bytearray(layout.size)
    struct.pack_into("<2Q", data, field.offset, 0xFFFFFFFF81000010, 0xFFFFFFFF81000020)
    (row,) = decode(bytes(data), layout=layout)
    assert row.stack == ["0xffffffff81000010", "0xffffffff81000020"]
    (row,) = decode(bytes(data), layout=layout, frame=lambda address: f"f+{address & 0xFF}")
    assert row.stack == ["f+16", "f+32"]


def test_clocks() -> None:
    now = time.monotonic_ns()
    decoder = TRANSITION.select(("time",)).decoder(Clock("iso"))
    text = decoder.rows(record(time=now))[0].time
    assert abs(datetime.fromisoformat(text).timestamp() - datetime.now(UTC).timestamp()) < 5
    assert text.endswith("Z") and len(text) == len("2026-01-01T00:00:00.000000Z")
    clock = Clock("elapsed")
    (row,) = TRANSITION.select(("time",)).decoder(clock).rows(record(time=clock.start_ns + 1_500_000_000))
    assert row.time == 1.5
    assert "time" not in [field.name for field in TRANSITION.decoder(Clock("none")).fields]


def test_iso_times_keep_their_order_over_a_second() -> None:
    clock = Clock("iso")
    stamps = [clock.read(clock.start_ns + n * 333_333_333) for n in range(9)]
    assert stamps == sorted(stamps)
    assert len(set(stamps)) == 9


class Clocks:
    """Stands for the kernel's clock and the wall clock; neither goes by itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monotonic_ns, self.offset_ns = 5_000_000_000, 1_700_000_000 * 10**9
        monkeypatch.setattr(schema, "monotonic_ns", self._monotonic_ns)
        monkeypatch.setattr(schema, "time", SimpleNamespace(time_ns=lambda: self.monotonic_ns + self.offset_ns))

    def _monotonic_ns(self) -> int:
        return self.monotonic_ns


def seconds_of(clock: Clock, stamp_ns: int) -> float:
    return datetime.fromisoformat(str(clock.read(stamp_ns))).timestamp()


@pytest.mark.parametrize("step_s", [-3600, 3600, 0.5], ids=["back", "forth", "a little"])
def test_a_wall_clock_that_is_set(monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
    """Stamps of before keep their time, those of after have the new one."""
    clocks = Clocks(monkeypatch)
    clock = Clock()
    assert seconds_of(clock, 5_000_000_000) == 1_700_000_005
    clocks.monotonic_ns += 2_000_000_000
    assert seconds_of(clock, 7_000_000_000) == 1_700_000_007
    clocks.offset_ns += int(step_s * 10**9)
    clocks.monotonic_ns += 1_000_000_000
    assert seconds_of(clock, 8_000_000_000) == 1_700_000_008 + step_s
    assert [seconds_of(clock, stamp * 10**9) for stamp in (5, 6, 8)] == [
        1_700_000_005,
        1_700_000_006,
        1_700_000_008 + step_s,
    ]
    clocks.offset_ns -= int(step_s * 10**9)
    clocks.monotonic_ns += 1_000_000_000
    assert [seconds_of(clock, stamp * 10**9) for stamp in (9, 8, 6)] == [
        1_700_000_009,
        1_700_000_008 + step_s,
        1_700_000_006,
    ]


def test_a_wall_clock_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long it takes to read both clocks is no change."""
    clocks = Clocks(monkeypatch)
    clock, slow = Clock(), iter(range(0, 10**9, 777))

    def monotonic_ns() -> int:
        clocks.monotonic_ns += next(slow)
        return clocks.monotonic_ns

    monkeypatch.setattr(schema, "monotonic_ns", monotonic_ns)
    for stamp in range(10**9, 10**12, 10**10):
        clocks.monotonic_ns = max(stamp, clocks.monotonic_ns)
        assert seconds_of(clock, stamp) == 1_700_000_000 + stamp / 10**9


@given(st.binary(max_size=16))
def test_any_name_of_a_process_is_text(data: bytes) -> None:
    text = comm_text(data.ljust(16, b"\0"))
    assert "\0" not in text
    text.encode()


def test_names_that_are_not_utf8_are_not_lost() -> None:
    assert comm_text(b"caf\xe9\0\0\0") == "caf\\xe9"
    assert comm_text("café".encode() + b"\0rest") == "café"


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)), max_size=5))
def test_whatever_the_kernel_sends_becomes_rows(values: list[tuple[int, int, int]]) -> None:
    rows = decode(*(record(in_state_us=a, lport=b, uid=c) for a, b, c in values))
    assert [(row.in_state_us, row.lport, row.uid) for row in rows] == [
        (None if a == 2**64 - 1 else a, b or None, None if c == 2**32 - 1 else c) for a, b, c in values
    ]


def test_the_row_types_encode_as_json() -> None:
    (row,) = decode(record())
    assert msgspec.json.decode(msgspec.json.encode(row))["raddr"] == "2001:db8::1"
    assert isinstance(TRANSITION.decoder(), Decoder)


@pytest.mark.parametrize(
    ("flags", "text"), [(0, "none"), (2, "SYN"), (18, "SYN|ACK"), (255, "FIN|SYN|RST|PSH|ACK|URG|ECE|CWR")]
)
def test_tcp_flags(flags: int, text: str) -> None:
    assert tcp_flags_text(flags) == text


def test_a_reason_of_a_subsystem() -> None:
    """Its number has no name; its upper half does, unless the kernel has no enum of subsystems."""
    enums = {
        "skb_drop_reason": {2: "SKB_DROP_REASON_NOT_SPECIFIED"},
        "skb_drop_reason_subsys": {2: "SKB_DROP_REASON_SUBSYS_OPENVSWITCH"},
    }
    layout = Spec.of("drops").layout("drop").select(["reason", "location"]).named(lambda enum: enums.get(enum, {}))
    by_name = {"reason": 0, "location": 0xFFFF}
    found = []
    for reason in (2, 3, 2 << 16 | 7, 5 << 16 | 7, 0x7FFF0002, 0xFFFFFFFF):
        record = bytearray(layout.size)
        for field in layout.fields:
            value = reason if field.name == "reason" else by_name[field.name]
            record[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
        found += layout.decoder(frame=lambda address: f"at {address:#x}").rows(bytes(record))
    assert [row.reason for row in found] == [
        "NOT_SPECIFIED",
        "3",
        "OPENVSWITCH:7",
        "5:7",
        "DERIVED:SYN_QUEUE_FULL",
        None,
    ]
    assert {row.location for row in found} == {"at 0xffff"}


def test_a_namespace_that_may_be_unknown() -> None:
    """Only of the events that say so."""
    assert Spec.of("drops").layout("drop").field("netns").unknown == 0
    assert Spec.of("retrans").layout("retrans").field("netns").unknown is None
