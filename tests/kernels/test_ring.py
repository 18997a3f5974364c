"""Kernels without a boot: that nothing is lacking on those that were fetched, and that it would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcpscope.kernel.btf import Btf
from tcpscope.kernel.spec import Spec
from tests.kernels import HOST, KERNELS, core, debian, ring, signature
from tests.kernels.image import btf_of

PAGE = Path(__file__).resolve().parents[2] / "docs/kernels.md"
IMAGES = {image.release: image for kernel in KERNELS if (image := debian.cached(kernel))}
FOUND = {kernel.release: kernel for kernel in ring.newest()}


@pytest.fixture(scope="module")
def btf() -> bytes:
    """That of a kernel of the matrix, as it lies in its image."""
    image = next((image for kernel in reversed(KERNELS) if (image := debian.cached(kernel))), None)
    if image is None:
        pytest.skip("no kernel has been fetched here")
    return btf_of(image)


@pytest.mark.parametrize("release", [HOST, *(IMAGES | FOUND)])
def test_nothing_is_lacking(release: str) -> None:
    if release == HOST:
        btf = Btf.parse(Path("/sys/kernel/btf/vmlinux").read_bytes())
    else:
        btf = FOUND[release].btf if release in FOUND else Btf.parse(btf_of(IMAGES[release]))
    assert {probe: lacks for probe, lacks in ring.check(btf).items() if lacks} == {}


def renamed(btf: bytes, old: str, new: str) -> Btf:
    """The same BTF with another name for something."""
    assert len(old) == len(new)
    assert btf.count(b"\0" + old.encode() + b"\0") == 1
    return Btf.parse(btf.replace(b"\0" + old.encode() + b"\0", b"\0" + new.encode() + b"\0"))


@pytest.mark.parametrize(
    ("name", "probe", "lack"),
    [
        ("bytes_acked", "connections", "no tcp_sock.bytes_acked"),
        ("skc_state", "connections", "no sock.__sk_common.skc_state"),
        ("btf_trace_inet_sock_set_state", "connections", "no hook for 'state'"),
        ("bpf_iter_task_file", "rtt", "no hook for 'seed'"),
        ("sk_max_ack_backlog", "listeners", "no sock.sk_max_ack_backlog"),
    ],
)
def test_what_is_gone_is_seen(btf: bytes, name: str, probe: str, lack: str) -> None:
    lacks = ring.check(renamed(btf, name, "X" + name[1:]))
    assert lack in lacks[probe], lacks


def test_what_is_asked_for_may_be_gone(btf: bytes) -> None:
    assert not any(ring.check(renamed(btf, "mptcp_sock", "Xptcp_sock")).values())


def test_a_tracepoint_with_fewer_arguments_is_seen(btf: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = ring.parameters
    monkeypatch.setattr(ring, "parameters", lambda *of: parameters(*of) - 1)
    lacks = ring.check(Btf.parse(btf))
    assert "inet_sock_set_state has 2 arguments, state reads 3" in lacks["connections"]
    assert "tcp_v4_syn_recv_sock has 6 arguments, ack4_enter__fentry reads 3" not in lacks["listeners"]


def test_what_programs_read_is_read_from_their_instructions() -> None:
    connections = Spec.of("connections")
    assert {name: ring.reads_of(connections, name) for name in ("state", "destroy", "connect__fentry")} == {
        "state": 3, "destroy": 1, "connect__fentry": 1,
    }  # fmt: skip
    assert ring.reads_of(connections, "accept__fexit") == 5  # where it is behind four arguments
    assert ring.ASKS_FIRST.keys() <= {program.name for program in connections.programs}


def test_relocations_are_those_of_the_source() -> None:
    found = {str(relocation): relocation.asks for relocation in core.relocations(Spec.of("connections"))}
    assert found["tcp_sock.bytes_acked"] is core.Asks.FIELD_OFFSET
    assert found["mptcp_sock.subflow"] is core.Asks.FIELD_EXISTS
    assert found["proto_accept_arg"] is core.Asks.TYPE_EXISTS
    assert found["bpf_func_id.BPF_FUNC_check_mtu"] is core.Asks.ENUMERATOR_EXISTS


def test_the_newest_of_each_kind() -> None:
    packages = [f"linux-image-{name}-amd64" for name in (
        "6.1.0-9", "6.1.0-10", "6.1.0-10-cloud", "6.1.0-10-rt", "6.12.9+deb13", "6.12.10+deb13", "6.1", "6.1-rt",
    )]  # fmt: skip
    packages += ["linux-image-amd64", "linux-image-6.1.0-10-amd64-dbg", "linux-image-6.1.0-10-amd64-unsigned"]
    assert [(kernel.series, kernel.flavour, kernel.release) for kernel in ring.wanted(packages, "s", False)] == [
        ((6, 1), "cloud", "6.1.0-10-cloud-amd64"),
        ((6, 1), "plain", "6.1.0-10-amd64"),
        ((6, 1), "rt", "6.1.0-10-rt-amd64"),
        ((6, 12), "plain", "6.12.10+deb13-amd64"),
    ]
    assert len(ring.wanted(packages, "s", True)) == 6


def test_the_page_says_what_is_found() -> None:
    """Of the newest kernels that are here: the page's verdict on their kind holds what was found of them."""
    stated = ring.stated(PAGE.read_text())
    assert len(stated) > 20
    kinds = {(".".join(map(str, k.series)), k.suite, k.flavour): ring.judged(k) for k in ring.newest()}
    for kind in kinds.keys() & stated.keys():
        assert all(lack in stated[kind] for lack in kinds[kind]), kind
        assert stated[kind] != "everything" or not kinds[kind]


def test_signatures_tell_kernels_apart() -> None:
    signatures = {}
    for kernel in (KERNELS[0], KERNELS[-1]):
        if (image := debian.cached(kernel)) is None:
            pytest.skip(f"kernel {kernel.name} has not been fetched here")
        signatures[kernel.name] = signature.of(Btf.parse(btf_of(image)))
    old, new = KERNELS[0].name, KERNELS[-1].name
    alone = signature.alone(new, signatures, (old,))
    assert "inet_csk_accept() has 2 arguments" in alone["connections"]
    assert "flush: flush__each" in alone["connections"]
    assert signature.alone(new, signatures, (old, new)) == {}
