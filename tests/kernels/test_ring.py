"""Kernels without a boot: that nothing is lacking on those that were fetched, and that it would be seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcpscope import listeners
from tcpscope.kernel.btf import Btf
from tcpscope.kernel.features import BTF
from tcpscope.kernel.spec import Spec
from tests.kernels import HOST, KERNELS, btfs, debian, ring
from tests.kernels.image import btf_of
from tests.kernels.objects import types_of
from tests.kernels.signature import probes
from tests.lacks import functions_cannot_be_hooked

IMAGES = {image.release: image for kernel in KERNELS if (image := debian.cached(kernel))}
FOUND = {kernel.release: kernel for kernel in btfs.newest()}


@pytest.mark.parametrize("release", [HOST, *(IMAGES | FOUND)])
def test_nothing_is_lacking(release: str) -> None:
    if release == HOST:
        verdict = ring.judge(Btf.parse(BTF.read_bytes()), functions=not functions_cannot_be_hooked())
    elif release in FOUND:
        verdict = ring.verdict_of(FOUND[release])
    else:
        verdict = ring.judge(Btf.parse(btf_of(IMAGES[release])))
    assert verdict.lacks == {}


@pytest.fixture(scope="module")
def here() -> bytes:
    """The running kernel's BTF, to be changed: it has everything."""
    return BTF.read_bytes()


def renamed(btf: bytes, old: str) -> Btf:
    """The same BTF with another name for something."""
    name = b"\0" + old.encode() + b"\0"
    assert btf.count(name) == 1
    return Btf.parse(btf.replace(name, b"\0X" + name[2:]))


@pytest.mark.parametrize(
    ("name", "probe", "lack"),
    [
        ("bytes_acked", "life", "no tcp_sock.bytes_acked"),
        ("skc_state", "life", "no sock.__sk_common.skc_state"),
        ("sk_max_ack_backlog", "listeners", "no sock.sk_max_ack_backlog"),
        ("btf_trace_inet_sock_set_state", "life", "no hook for 'state'"),
        ("bpf_iter_task_file", "owner", "no hook for 'seed'"),
        ("bpf_iter_tcp", "sockets", "no hook for 'existing'"),
    ],
)
def test_what_is_gone_is_seen(here: bytes, name: str, probe: str, lack: str) -> None:
    lacks = ring.judge(renamed(here, name)).lacks
    assert lack in lacks[probe], lacks


def test_what_is_asked_for_may_be_gone(here: bytes) -> None:
    """And so may what only programs use that are not attached then."""
    before, after = ring.judge(Btf.parse(here)), ring.judge(renamed(here, "mptcp_sock"))
    assert after.lacks == {}
    lack = "no `mptcp_sock.first`"
    assert any(lack in words for words in after.otherwise.values())
    assert not any(lack in words for words in before.otherwise.values())
    assert ring.judge(renamed(here, "btf_trace_io_uring_complete")).lacks == {}


def test_a_field_that_only_an_unattached_program_uses(here: bytes) -> None:
    without = renamed(here, "io_kiocb")
    assert "no io_kiocb.opcode" in ring.judge(without).lacks["life"]
    changed = here.replace(b"\0io_kiocb\0", b"\0Xo_kiocb\0")
    assert ring.judge(renamed(changed, "btf_trace_io_uring_complete")).lacks == {}


def test_too_much_stack_is_seen(here: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "STACK_BYTES", 300)
    lacks = ring.judge(Btf.parse(here)).lacks
    (lack,) = (words for words in lacks["retrans"] if "stack for retransmit " in words)
    size, frames = int(lack.split()[0]), [int(part.split()[-1]) for part in lack.split(", ")[:-1]]
    assert size == sum(frames) > 300
    assert "life" not in lacks or not any("stack" in words for words in lacks["life"])


def test_what_a_tool_does_not_know_is_told(here: bytes) -> None:
    assert ring.judge(Btf.parse(here)).unknown == {}
    unhooked = ring.judge(Btf.parse(here), functions=False)
    assert unhooked.lacks == {}
    assert "what follows CLOSE" in unhooked.unknown["states"]
    sampled = "refusals one by one, with peer and step; they are sampled instead"
    seen = "sk_skb_reason_drop" in here.decode(errors="replace")  # since then tracepoints alone show them
    assert (sampled in unhooked.unknown.get("queue", ())) != seen


@pytest.mark.parametrize("enumerator", listeners.MIB.values())
def test_a_counter_without_a_number_is_told(here: bytes, enumerator: str) -> None:
    unknown = ring.judge(renamed(here, enumerator)).unknown
    told = [f"single refusals: the kernel's BTF does not number {enumerator}"]
    assert unknown == {"drop": told, "queue": told, "synbl": told}


def test_a_lesser_way_is_told(here: bytes) -> None:
    assert "connected by `tp_btf/sys_exit`" not in ring.judge(Btf.parse(here)).otherwise["attempt"]
    otherwise = ring.judge(renamed(here, "__inet_stream_connect")).otherwise["attempt"]
    assert "connected by `tp_btf/sys_exit`" in otherwise


@pytest.mark.parametrize(("parameters", "enough"), [("void *, void *, int, int", True), ("void *, void *, int", False)])
def test_a_tracepoint_with_fewer_arguments_is_seen(tmp_path: Path, parameters: str, enough: bool) -> None:
    typedef = f"typedef void (*btf_trace_inet_sock_set_state)({parameters}); btf_trace_inet_sock_set_state anchor;"
    lacks = ring.judge(types_of(typedef, tmp_path)).lacks["life"]
    assert ("inet_sock_set_state has 2 arguments, state reads 3" in lacks) == (not enough)
    assert ("inet_sock_set_state has 2 arguments, state_again reads 3" in lacks) == (not enough)


@pytest.mark.parametrize(
    ("parameters", "enough"),
    [
        ("void *a, void *b, int c, int d, int e", True),
        ("void *a, void *b, int c, int d", False),
    ],
)
def test_a_function_with_fewer_arguments_is_seen(tmp_path: Path, parameters: str, enough: bool) -> None:
    """Behind the arguments is what it returns, which the program reads, too."""
    source = f"int __inet_stream_connect({parameters}) {{ return 0; }}"
    lacks = ring.judge(types_of(source, tmp_path)).lacks["attempt"]
    lack = "__inet_stream_connect has 4 arguments, connected__fexit reads 6"
    assert (lack in lacks) == (not enough)


def helpers_missed(folder: Path, enumerators: str, probe: str = "life") -> list[str]:
    """What is said of the helpers of a kernel that numbers these, and has two of the hooks."""
    source = f"""
        enum bpf_func_id {{ {enumerators} }} anchor;
        typedef void (*btf_trace_tcp_send_reset)(void *, void *); btf_trace_tcp_send_reset hook;
        int bpf_iter_task_file(void) {{ return 0; }}
    """
    verdict = ring.judge(types_of(source, folder))
    return [lack for lack in verdict.lacks[probe] if lack.startswith("no helper")]


def test_a_helper_that_the_kernel_does_not_number_is_seen(tmp_path: Path) -> None:
    missed = helpers_missed(tmp_path, "BPF_FUNC_get_socket_cookie = 46, BPF_FUNC_check_mtu = 163")
    assert "no helper 131, which life_emit calls" in missed  # bpf_ringbuf_reserve, in a function that is called
    assert "no helper 1, which reset_sent calls" in missed
    assert not any(lack.startswith("no helper 46,") for lack in missed)


def test_a_helper_that_is_not_called_then_is_not_missed(tmp_path: Path) -> None:
    """bpf_sock_from_file (162), of the release of BPF_FUNC_check_mtu, which is asked for."""
    older = ", ".join(f"X{number} = {number}" for number in range(162))
    newer = f"{older}, BPF_FUNC_check_mtu = 163"
    assert helpers_missed(tmp_path, older, "accepted") == []
    assert helpers_missed(tmp_path, newer, "accepted") == ["no helper 162, which seed calls"]


def test_programs_that_ask_first_are_programs() -> None:
    known = {program.name for probe in probes() for program in Spec.of(probe).programs}
    assert ring.ASKS_FIRST.keys() <= known


def test_a_verdict_is_kept_until_something_changes(
    here: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(debian.CACHE_VARIABLE, str(tmp_path / "kernels"))
    kernel = btfs.Found((1, 2), "sid", "plain", "1.2.3-amd64")
    btfs.folder().mkdir()
    btfs._keep(kernel, here)
    first = ring.verdict_of(kernel)
    assert first == ring.judge(Btf.parse(here))
    with monkeypatch.context() as patch:
        patch.setattr(ring, "judge", lambda _: pytest.fail("judged again"))
        assert ring.verdict_of(kernel) == first
    monkeypatch.setattr(ring, "judge", lambda _: ring.Verdict({"rtt": ["changed"]}, {}, {}))
    monkeypatch.setattr(ring, "_basis", lambda: "another")
    assert ring.verdict_of(kernel).lacks == {"rtt": ["changed"]}
