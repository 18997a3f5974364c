"""The hand-written types of bpf/kernel.bpf.h against the BTF of kernels: every field is there, of its kind.

The running kernel's, and those of all kernels of which the BTF is here: no boot is needed for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest

from tcpscope.kernel.btf import Btf, Enum, Int, Kind, Member, Struct, Type
from tcpscope.kernel.features import BTF
from tcpscope.kernel.spec import Spec
from tests.kernels import HOST, KERNELS, btfs, debian
from tests.kernels.image import btf_of

HEADER = Path(__file__).resolve().parents[2] / "src/tcpscope/bpf/kernel.bpf.h"
PROBES = sorted(
    path.name.removesuffix(".bpf.o") for path in (files("tcpscope") / "bpf").iterdir() if path.name.endswith(".bpf.o")
)

MAY_BE_MISSING = {
    "proto_accept_arg": "came with the second signature of inet_csk_accept (6.10); only asked whether it exists",
    "trace_event_raw_tcp_retransmit_skb": "since 6.17; its field is only asked whether it exists",
    "tp_transition_snapshot": "its field is only asked whether it exists",
    "io_kiocb": "with CONFIG_IO_URING",
    "io_uring_cqe": "with CONFIG_IO_URING",
    "mptcp_subflow_context": "with CONFIG_MPTCP only; its field is asked for before it is read",
    "mptcp_sock": "with CONFIG_MPTCP only; its field is asked for before it is read",
}
FIELDS_THAT_MAY_BE_MISSING = {
    ("tcp_sock", "is_mptcp"): "with CONFIG_MPTCP only, as mptcp_subflow_context, which is asked for first",
    ("tp_transition_snapshot", "srcu_gp"): "came in 7.0; only asked whether it exists",
    ("inet_connection_sock", "icsk_timeout"): "gone by 6.16; asked for before it is read",
    ("inet_connection_sock", "icsk_retransmit_timer"): "gone in 6.19; asked for before it is read",
    ("sock", "tcp_retransmit_timer"): "came in 6.19; read where the other two are missing",
    ("trace_event_raw_kfree_skb", "reason"): "came in 5.17; only asked whether it exists",
    ("trace_event_raw_kfree_skb", "rx_sk"): "came in 6.11; only asked whether it exists",
    ("mptcp_subflow_context", "resetting"): "missing in 6.16 to 7.1; asked for before it is read",
    ("mptcp_sock", "subflow"): "gone in 6.6; only asked whether it exists",
    ("netns_ipv4", "sysctl_ip_local_port_step_width"): "came in 7.1; asked for before it is read",
    ("inet_sock", "local_port_range"): "came in 6.3; asked for before it is read",
}
OTHER_KINDS = {
    ("netns_ipv4", "sysctl_tcp_syncookies"): "an int before 5.15: read at any width",
    ("netns_ipv4", "sysctl_tcp_abort_on_overflow"): "an int before 5.15: read at any width",
    ("net", "net_cookie"): "an atomic64_t before 5.12: not read there",
    ("local_ports", "range"): "an array before 6.8: asked for before it is read",
    ("inet_sock", "local_port_range"): "a pair before 6.8: asked for before it is read",
    ("tcp_skb_cb", "tcp_flags"): "16 bits since 6.15: read at any width",
    ("nf_hook_state", "hook"): "an int before 5.16: read at any width",
}
"""Fields whose kind or size may differ from ours, and why that does no harm."""


IMAGES = {image.release: image for kernel in KERNELS if (image := debian.cached(kernel))}
FOUND = {kernel.release: kernel for kernel in btfs.newest()}


@pytest.fixture(scope="module", params=[HOST, *(IMAGES | FOUND)])
def kernel(request: pytest.FixtureRequest) -> Btf:
    if request.param == HOST:
        return Btf.parse(BTF.read_bytes())
    return Btf.parse(btf_of(IMAGES[request.param])) if request.param in IMAGES else FOUND[request.param].btf


def declared() -> set[str]:
    """The structs and typedefs of the header that have fields."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    text = text.partition("preserve_access_index")[2].partition("#pragma clang attribute pop")[0]
    structs = re.findall(r"^struct (\w+) *\{", text, re.MULTILINE)
    return {*structs, *re.findall(r"^typedef struct \{[^}]*\} (\w+);", text, re.MULTILINE)}


def find(btf: Btf, name: str) -> Struct | None:
    """A struct, or what is behind a typedef."""
    found = btf.find(name, Kind.STRUCT)
    if found is None and (alias := btf.find(name, Kind.TYPEDEF)):
        found = btf.resolve(alias.id)
    return found if isinstance(found, Struct) else None


def kind(btf: Btf, type_: Type) -> str:
    if isinstance(type_, Enum | Int):
        return "number"
    return {Kind.UNION: "struct", Kind.FWD: "struct"}.get(type_.kind, type_.kind.name.lower())


def members(btf: Btf, struct: Struct) -> dict[str, Member]:
    """Its fields by name. As in C, a field may be inside an anonymous member."""
    found = {}
    for member in struct.members:
        inner = btf.resolve(member.type_id)
        if member.name:
            found[member.name] = member
        elif isinstance(inner, Struct):
            found |= members(btf, inner)
    return found


def differences(ours: Btf, mine: Struct, theirs: Btf, real: str, path: str) -> Iterator[str]:
    for member in mine.members:
        there = theirs.field(real, member.name)
        if there is None:
            if (real, member.name) not in FIELDS_THAT_MAY_BE_MISSING:
                yield f"{path}.{member.name} does not exist"
            continue
        yield from _compare(ours, member, theirs, there, real, f"{path}.{member.name}")


def _compare(ours: Btf, member: Member, theirs: Btf, there: Member, real: str, path: str) -> Iterator[str]:
    mine, other = ours.resolve(member.type_id), theirs.resolve(there.type_id)
    if (real, member.name) in OTHER_KINDS:
        return
    if kind(ours, mine) != kind(theirs, other):
        yield f"{path} is a {kind(ours, mine)} here and a {kind(theirs, other)} there"
    elif isinstance(mine, Struct) and not mine.name and isinstance(other, Struct):
        for inner in mine.members:
            if inner.name not in members(theirs, other):
                yield f"{path}.{inner.name} does not exist"
    elif kind(ours, mine) == "number" and not there.bitfield_size:
        sizes = ours.size_of(member.type_id), theirs.size_of(there.type_id)
        if sizes[0] != sizes[1]:
            yield f"{path} has {sizes[0]} bytes here and {sizes[1]} there"


def test_every_field_exists(kernel: Btf) -> None:
    wrong, seen = [], set()
    for probe in PROBES:
        ours = Spec.of(probe).btf
        for name in sorted(declared()):
            mine = find(ours, name)
            if mine is None:
                continue
            seen.add(name)
            real = name.partition("___")[0]
            theirs = find(kernel, real)
            if theirs is None:
                if real not in MAY_BE_MISSING:
                    wrong.append(f"{real} does not exist")
                continue
            if theirs.name:
                wrong += differences(ours, mine, kernel, real, real)
            else:  # behind a typedef
                there = members(kernel, theirs)
                for member in mine.members:
                    if member.name not in there:
                        wrong.append(f"{real}.{member.name} does not exist")
                    else:
                        wrong += _compare(ours, member, kernel, there[member.name], real, f"{real}.{member.name}")
    assert wrong == []
    # Otherwise the list above says less than it seems to.
    assert {"sock_common", "sock", "tcp_sock", "task_struct", "pt_regs___kernel", "kuid_t", "possible_net_t"} <= seen


def test_what_is_read_of_a_socket_in_one_piece(kernel: Btf) -> None:
    """identity.bpf.h copies so much, and then reads these fields in the copy."""
    (size,) = map(int, re.findall(r"#define COMMON_BYTES (\d+)", (HEADER.parent / "identity.bpf.h").read_text()))
    for name in (
        "skc_daddr",
        "skc_rcv_saddr",
        "skc_dport",
        "skc_num",
        "skc_family",
        "skc_net",
        "skc_v6_daddr",
        "skc_v6_rcv_saddr",
    ):
        field = kernel.field("sock_common", name)
        assert field is not None
        assert field.bit_offset // 8 + kernel.size_of(field.type_id) <= size


def test_the_header_holds_nothing_that_no_probe_uses() -> None:
    used = {name for probe in PROBES for name in declared() if find(Spec.of(probe).btf, name)}
    # Types that the programs only name in a question (does it exist?) or reach by other fields.
    assert declared() - used == set()


def test_the_exceptions_are_exceptions() -> None:
    """A line that is no longer needed is a line too many."""
    names = {name.partition("___")[0] for name in declared()}
    assert MAY_BE_MISSING.keys() <= names
    assert {struct for struct, _ in (*OTHER_KINDS, *FIELDS_THAT_MAY_BE_MISSING)} <= names
