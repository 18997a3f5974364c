"""What tells kernels apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcpscope.kernel.btf import Btf
from tcpscope.kernel.features import BTF
from tests.kernels import KERNELS, debian, signature
from tests.kernels.image import btf_of
from tests.kernels.objects import types_of


@pytest.fixture(scope="module")
def here() -> bytes:
    return BTF.read_bytes()


KERNEL = """
struct tcp_sock { unsigned long long bytes_acked, other; unsigned char save : 1, repair : 1; } tcp_sock;
struct mptcp_sock { void *subflow; } mptcp_sock;
struct proto_accept_arg { int flags; } proto_accept_arg;
int tcp_connect(void *sk) { return 0; }
"""


@pytest.mark.parametrize(
    ("old", "new", "had", "has"),
    [
        ("tcp_connect", "tcp_disconnect", "connect: connect__fentry", "connect: nothing"),
        ("subflow", "first", "mptcp_sock.subflow: 8 bytes", "mptcp_sock.subflow: not there, and not used then"),
        ("proto_accept_arg", "accept_arg", "proto_accept_arg: there", "proto_accept_arg: not there, and not used then"),
        ("bytes_acked", "bytes_acknowledged", "tcp_sock.bytes_acked: 8 bytes", "tcp_sock.bytes_acked: not there"),
        ("long long bytes_acked", "bytes_acked", "tcp_sock.bytes_acked: 8 bytes", "tcp_sock.bytes_acked: 4 bytes"),
        ("repair : 1", "repair : 2", "tcp_sock.repair: 1 bits", "tcp_sock.repair: 2 bits"),
        ("void *sk", "void *sk, int flags", "tcp_connect has 1 arguments", "tcp_connect has 2 arguments"),
    ],
)
def test_a_difference_has_words(tmp_path: Path, old: str, new: str, had: str, has: str) -> None:
    assert old in KERNEL
    both = (signature.of(types_of(source, tmp_path)).values() for source in (KERNEL, KERNEL.replace(old, new)))
    before, after = (frozenset().union(*probes) for probes in both)
    assert had in before - after
    assert has in after - before


def test_what_nobody_uses_makes_no_difference(tmp_path: Path) -> None:
    before, after = (signature.of(types_of(source, tmp_path)) for source in (KERNEL, KERNEL.replace("other", "more")))
    assert before == after


def test_arguments_are_counted(tmp_path: Path) -> None:
    def has(parameters: str) -> frozenset[str]:
        source = (
            f"typedef void (*btf_trace_tcp_send_reset)(void *, {parameters}); btf_trace_tcp_send_reset hook;"
            f"int tcp_connect({parameters}) {{ return 0; }}"
        )
        return frozenset().union(*signature.of(types_of(source, tmp_path)).values())

    assert {"tcp_send_reset has 1 arguments", "tcp_connect has 1 arguments"} <= has("int a")
    assert {"tcp_send_reset has 2 arguments", "tcp_connect has 2 arguments"} <= has("int a, int b")


def test_a_kernel_without_functions_to_hook(here: bytes) -> None:
    assert "accept: accept__syscall" in signature.of(Btf.parse(here), functions=False)["life"]
    assert "accept: accept__fexit" in signature.of(Btf.parse(here))["life"]


def test_what_a_kernel_has_alone() -> None:
    signatures = {
        "old": {"rtt": frozenset("ab"), "sockets": frozenset("x")},
        "mid": {"rtt": frozenset("bcd"), "sockets": frozenset("x")},
        "new": {"rtt": frozenset("d"), "sockets": frozenset("y")},
    }
    assert signature.alone("mid", signatures, ("old", "new")) == {"rtt": frozenset("c")}
    assert signature.alone("new", signatures, ("old",)) == {"rtt": frozenset("d"), "sockets": frozenset("y")}


def test_the_kernels_of_the_matrix_differ() -> None:
    images = [image for kernel in KERNELS if (image := debian.cached(kernel))]
    if len(images) < 2:
        pytest.skip("the kernels of the matrix have not been fetched here")
    old, new = (signature.of(Btf.parse(btf_of(image))) for image in (images[0], images[-1]))
    alone = signature.alone("new", {"old": old, "new": new}, ("old",))
    assert {"inet_csk_accept has 2 arguments", "flush: flush__each"} <= alone["life"]
