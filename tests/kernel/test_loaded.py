"""The way into the kernel: which one is chosen, what happens when it is refused, what the user then reads."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.errors import TcpscopeError, UnsupportedError
from tcpscope.filters import Filter
from tcpscope.kernel import loaded as module
from tcpscope.kernel.btf import Kind
from tcpscope.kernel.features import Answer, Kernel
from tcpscope.kernel.loaded import Loaded, Setup, pieces
from tcpscope.kernel.machine import possible_cpus, sockets_at_most, tcp_sockets
from tcpscope.kernel.ring import BATCH_BYTES, Ring
from tcpscope.kernel.spec import Program, Spec, probes
from tcpscope.kernel.verifier import verifier_lines, verifier_summary
from tcpscope.kernel.ways import plan, plan_refusals
from tcpscope.show import explain
from tests.compiled import compiled
from tests.conftest import until
from tests.lacks import REFUSED_WITHOUT, is_refused

TRANSITION, ACCEPTED, OWNER = Spec.of("transition"), Spec.of("accepted"), Spec.of("owner")

# The first way compiles, and no verifier takes it: an integer is followed as a pointer.
OWN = """
#include "kernel.bpf.h"
#include "output.bpf.h"
const volatile bool hooked_state, hooked_extra;
SEC("tp_btf/inet_sock_set_state") int state__bad(__u64 *ctx) { return *(int *)ctx[1]; }
SEC("tp_btf/inet_sock_set_state") int state__good(__u64 *ctx) { counters[0].seen++; return 0; }
OPTIONAL("something") SEC("tp_btf/inet_sock_set_state") int extra(__u64 *ctx) { return *(int *)ctx[1]; }
"""
# Experiment K: a tracepoint program that follows skb->sk directly.
NAIVE = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct sock { int whatever; };
struct sk_buff { void *next, *prev, *dev; struct sock *sk; } __attribute__((preserve_access_index));
struct context { __u64 common; struct sk_buff *skb; void *location; };
SEC("tracepoint/skb/kfree_skb") int drop(struct context *ctx)
{
	struct sk_buff *skb = ctx->skb;
	char text[16] = {};
#pragma unroll
	for (int i = 0; i < 40; i++)
		text[i & 15] += bpf_get_prandom_u32();
	bpf_trace_printk(text, sizeof(text), skb->sk);
	return 0;
}
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return compiled(tmp_path_factory.mktemp("own"), "own", OWN)


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    return compiled(tmp_path_factory.mktemp("naive"), "naive", NAIVE)


def test_the_first_way_that_is_not_refused() -> None:
    hooks = plan(TRANSITION, {})
    assert {name: hook.program.name for name, hook in hooks.items() if hook.program and "__" in hook.program.name} == {
        "connect": "connect__fentry",
        "accept": "accept__fexit",
        "timewait": "timewait__fexit",
        "graft": "graft__fentry",
        "child4": "child4__fentry",
        "child6": "child6__fentry",
        "flush": "flush__each",
    }
    assert not any(hook.refused for hook in hooks.values())


def test_why_each_better_way_was_not_taken() -> None:
    refused = {"connect__fentry": "no trampolines", "connect__retransmit": "not asked"}
    hooks = plan(TRANSITION, refused | {"timewait__fexit": "no function", "timewait__kprobe": "no kprobes"})
    assert hooks["connect"].program is not None
    assert (hooks["connect"].program.name, hooks["connect"].refused) == (
        "connect__kprobe",
        {"connect__fentry": "no trampolines"},
    )
    assert hooks["timewait"].program is None
    assert hooks["timewait"].refused == {"timewait__fexit": "no function", "timewait__kprobe": "no kprobes"}
    assert hooks["timewait"].without == "what follows CLOSE"


def test_a_way_that_needs_what_the_kernel_lacks(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "enumerator", lambda name: None if name == "BPF_FUNC_for_each_map_elem" else 1)
    flush = plan(TRANSITION, plan_refusals(TRANSITION, kernel))["flush"]
    assert flush.program is not None
    assert flush.program.name == "flush__element"
    assert flush.refused == {"flush__each": "the kernel has no BPF_FUNC_for_each_map_elem"}


def test_an_iterator_that_pauses_goes_on() -> None:
    """None is EAGAIN: a million objects were met, and there is nothing to give yet."""
    answers = [None, b"first", None, None, b"second", b""]

    class File(io.RawIOBase):
        def read(self, size: int = -1) -> bytes | None:
            return answers.pop(0)

    assert list(pieces(File())) == [b"first", b"second"]
    assert not answers


def test_a_hook_that_is_not_wanted_is_not_planned() -> None:
    every = plan(TRANSITION, {}).keys()
    assert plan(TRANSITION, {}, frozenset({"seed", "state"})).keys() == every - {"seed", "state"}


def test_a_probe_has_the_hooks_that_it_needs() -> None:
    attempt, life = (plan(Spec.of(probe), {}).keys() for probe in ("attempt", "life"))
    assert "connected" in attempt and "connected" not in life
    assert not {"accept", "live"} & attempt
    assert {"accept", "live", "reset_sent"} <= life


def test_a_hook_that_another_program_makes_needless_is_not_planned() -> None:
    assert "accept_uring" not in plan(ACCEPTED, {})
    hooks = plan(ACCEPTED, {"accept__fexit": "no functions"})
    assert "graft" not in hooks
    assert hooks["accept_uring"].program is not None


LOG = """{lines}
processed 312 insns (limit 1000000) max_states_per_insn 0
"""


def test_the_end_of_the_verifiers_log() -> None:
    lines = [f"{n}: (bf) r1 = r{n % 9}" for n in range(80)] + ["R7 invalid mem access 'inv'"]
    text = verifier_summary(LOG.format(lines="\n".join(lines)))
    assert text.startswith("the verifier's last lines (75 earlier lines omitted): 75: (bf) r1")
    assert "R7 invalid mem access 'inv' | in programs of type kprobe and tracepoint follow kernel pointers with" in text
    assert "processed" not in text
    assert "\n" not in text
    assert len(text) < 500


def test_the_report_that_newer_kernels_add_to_the_verifiers_log() -> None:
    """Linux 7.3: it stands behind the reason, and ends with a suggestion that fits few cases."""
    lines = ["0: (79) r1 = *(u64 *)(r1 +8)", "1: (79) r3 = *(u64 *)(r1 +24)", "R1 invalid mem access 'scalar'"]
    report = "\nVerification failed: Register Type Safety: Invalid dereference\n\nReason:\n  R1 is no pointer.\n"
    log = LOG.format(lines="\n".join([*lines, report]))
    assert verifier_lines(log) == lines
    assert verifier_summary(log) == verifier_summary(LOG.format(lines="\n".join(lines)))


def test_a_log_without_the_verifiers_words() -> None:
    assert verifier_summary("") == verifier_summary("processed 0 insns (limit 1000000)") == ""
    other = verifier_summary(LOG.format(lines="frame pointer is read only"))
    assert other == "the verifier's last lines (0 earlier lines omitted): frame pointer is read only"


@pytest.mark.kernel
def test_a_refused_program_is_struck_out(own: Spec, kernel: Kernel) -> None:
    """The next way of its hook is taken; an optional hook without another stays away."""
    loaded = Loaded(own, kernel)
    try:
        state, extra = loaded.hooks["state"], loaded.hooks["extra"]
        assert state.program is not None
        assert state.program.name == "state__good"
        assert list(state.refused) == ["state__bad"]
        assert re.match(
            r"refused by the kernel \(Permission denied\): R\d invalid mem access '\w+'$", state.refused["state__bad"]
        )
        said = list(explain(Filter(), [SimpleNamespace(spec=own, loaded=loaded, owners=None)]))
        at = next(n for n, line in enumerate(said) if "not tp_btf/inet_sock_set_state: refused" in line)
        assert "the verifier's last lines" in said[at + 1]
        assert any("invalid mem access" in line for line in said[at + 2 :])
        assert (extra.program, extra.without) == (None, "something")
        assert set(loaded.program_info()) == {"state__good"}
    finally:
        loaded.close()
    loaded.close()  # once more is no error


AIMED = """
#include "kernel.bpf.h"
#include "output.bpf.h"
SEC("tp_btf/inet_sock_set_state") int state(__u64 *ctx) { return 0; }
SEC("fentry") int function0(__u64 *ctx) { return 0; }
"""


class CarriesTooLittle(Kernel):
    """A kernel whose trampolines do not carry all arguments of a function, as on x86 before 6.6."""

    def fentry_on(self, function: str) -> Answer:
        return Answer(False, f"the kernel refuses fentry on {function} (not supported)")


@pytest.mark.root
def test_a_function_that_was_asked_for_and_cannot_be_hooked(tmp_path: Path) -> None:
    """A line says so, although that is known before anything is loaded; if it is needed, the error names it."""
    spec, kernel = compiled(tmp_path, "aimed", AIMED), CarriesTooLittle()
    loaded = Loaded(spec.aimed({"function0": "tcp_v4_rcv"}), kernel)
    loaded.close()
    assert loaded.notes == [
        "'tcp_v4_rcv' of 'aimed' is left out, the kernel refuses fentry on tcp_v4_rcv (not supported); "
        "not known without it: when a packet is in tcp_v4_rcv()"
    ]
    with pytest.raises(UnsupportedError) as raised:
        Loaded(spec.aimed({"function0": "tcp_v4_rcv"}, {"function0"}), kernel)
    assert str(raised.value) == (
        "this kernel offers no hook for 'tcp_v4_rcv' of the probe 'aimed'; "
        "the kernel refuses fentry on tcp_v4_rcv (not supported)"
    )


@pytest.mark.kernel
def test_a_hook_without_a_way_left(own: Spec, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says which program, and why, in one line."""
    only_bad = tuple(program for program in own.programs if program.name == "state__bad")
    spec = Spec("own", own.data)
    monkeypatch.setattr(spec, "programs", only_bad)
    with pytest.raises(UnsupportedError, match="own: program 'state__bad': refused by the kernel") as caught:
        Loaded(spec, kernel)
    assert "invalid mem access" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_experiment_k(naive: Spec, kernel: Kernel) -> None:
    """A user's own object that follows skb->sk directly: the verifier's last lines and the hint, not 80 lines."""
    with pytest.raises(TcpscopeError) as caught:
        Loaded(naive, kernel)
    text = str(caught.value)
    assert text.startswith(
        "naive: program 'drop': refused by the kernel (Permission denied); the verifier's last lines"
    )
    assert "invalid mem access" in text
    assert "BPF_CORE_READ" in text
    left_out = int(text.partition("last lines (")[2].partition(" ")[0])
    assert left_out > 60
    assert len(text) < 1000
    assert "\n" not in text
    assert "libbpf" not in text


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_a_long_log_of_the_verifier(tmp_path: Path, kernel: Kernel) -> None:
    """Its end is there, and what was before it is counted."""
    long = compiled(tmp_path, "naive", NAIVE.replace("i < 40", "i < 2000"))
    with pytest.raises(TcpscopeError) as caught:
        Loaded(long, kernel)
    text = str(caught.value)
    assert text.startswith(
        "naive: program 'drop': refused by the kernel (Permission denied); the verifier's last lines"
    )
    assert "invalid mem access" in text
    assert int(text.partition("last lines (")[2].partition(" ")[0]) > 2000
    assert len(text) < 1000


@pytest.mark.kernel
def test_what_runs_and_what_it_counted(own: Spec, kernel: Kernel) -> None:
    loaded = Loaded(own, kernel)
    try:
        counters = loaded.memory("counters").cast("Q")
        before = counters[0]
        _refused_connection()
        assert counters[0] >= before + 2
        loaded.detach()
        after = counters[0]
        _refused_connection()
        assert counters[0] == after
    finally:
        loaded.close()


def _refused_connection() -> None:
    with socket.socket() as client:
        client.connect_ex(("127.0.0.1", 9))


@pytest.mark.kernel
def test_nothing_is_left_behind(kernel: Kernel) -> None:
    """File descriptors: programs, maps, links, the ring, the iterators."""
    fds = Path("/proc/self/fd")

    def run() -> int:
        setup = Setup(entries={"events": 4096, "connections": 64})
        loaded = Loaded(TRANSITION, kernel, setup)
        ring = Ring(loaded.map_fd("events"), TRANSITION.layout("transition").size)
        assert all(isinstance(piece, bytes) for piece in loaded.iterate("seed"))
        assert list(ring.batches()) is not None
        del ring
        loaded.close()
        return len(list(fds.iterdir()))

    assert run() == run()


@pytest.mark.kernel
def test_what_comes_while_it_is_read_has_to_wait(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is slower than the programs gets as much at once as there is room for."""
    loaded = Loaded(TRANSITION, kernel, Setup(entries={"events": 1 << 20, "connections": 64}))
    try:
        ring = Ring(loaded.map_fd("events"), TRANSITION.layout("transition").size)
        monkeypatch.setattr(ring, "_drain", lambda reader, buffer, room, size: room // size * size)
        read = sum(map(len, itertools.islice(ring.batches(), 100)))
        assert 1 << 20 <= read < (1 << 20) + BATCH_BYTES
        ring.close()
    finally:
        loaded.close()


@pytest.mark.kernel
def test_the_kernels_btf_is_given_back_and_read_anew(own: Spec) -> None:
    kernel = Kernel()
    Loaded(own, kernel).close()
    assert "_btf" not in vars(kernel)
    assert kernel.parameters("tcp_connect") == 1


@pytest.fixture(scope="module")
def sockets(kernel: Kernel) -> Iterator[Loaded]:
    loaded = Loaded(Spec.of("sockets"), kernel)
    yield loaded
    loaded.close()


@pytest.mark.kernel
def test_an_iterator_in_a_namespace_that_is_none(sockets: Loaded) -> None:
    said = "iterator 'existing' cannot run: Invalid argument"
    with Path("/dev/null").open() as wrong, pytest.raises(OSError, match=said):
        list(sockets.iterate("existing", wrong.fileno()))


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_all_ways_but_the_refused_are_really_there(kernel: Kernel) -> None:
    """What the kernel is said to have, it has: every hook of every probe attaches by its planned way."""
    for probe in probes():
        if is_refused(probe, kernel):
            continue
        spec = Spec.of(probe)
        planned = plan(spec, plan_refusals(spec, kernel))
        loaded = Loaded(spec, kernel)
        differing = {name: hook.refused for name, hook in loaded.hooks.items() if hook.program != planned[name].program}
        loaded.close()
        assert differing == {}


class Poorer(Kernel):
    """The running kernel without some kinds of programs."""

    def __init__(self, *without: str) -> None:
        super().__init__()
        self.without = without

    def can(self, program: Program) -> Answer:
        return Answer(False, "not today") if program.type in self.without else super().can(program)


@pytest.mark.kernel
@pytest.mark.every_kernel
@pytest.mark.parametrize("probe", probes())
def test_every_worse_way_is_taken_by_the_verifier_too(probe: str) -> None:
    """Kernel probes instead of trampolines, then neither, with everything switched on that costs stack."""
    if is_refused(probe, Kernel()):
        pytest.skip(f"this kernel has no tracepoint {REFUSED_WITHOUT[probe]}")
    spec = Spec.of(probe)
    constants = {name: True for name in ("send_events", "send_stacks", "want_owner") if name in spec.variables}
    entries = {name: size for name, size in (("connections", 64), ("events", 4096)) if spec.btf.find(name, Kind.VAR)}
    for without in (("fentry", "fexit"), ("fentry", "fexit", "kprobe", "kretprobe")):
        loaded = Loaded(spec, Poorer(*without), Setup(constants=dict(constants), entries=dict(entries)))
        taken = {hook.name: hook.program.type for hook in loaded.hooks.values() if hook.program}
        why = {reason for hook in loaded.hooks.values() for reason in hook.refused.values()}
        loaded.close()
        assert not set(without) & set(taken.values())
        assert {"tp_btf", "iter"} & set(taken.values())
        tried = [program for name in loaded.hooks for program in spec.hooks[name]]  # not all, where some have UNLESS
        assert ("not today" in why) == any(program.type in without for program in tried)


def test_tables_have_room_for_the_sockets_of_the_machine(tmp_path: Path) -> None:
    assert sockets_at_most(0, allocates=True) == 1 << 17
    assert sockets_at_most(0, allocates=False) == 1 << 16
    assert sockets_at_most(500_000, allocates=True) == 2_000_000
    for allocates in (True, False):
        assert 500_000 <= sockets_at_most(500_000, allocates) <= sockets_at_most(10**9, allocates) <= 1 << 21
    stat = tmp_path / "sockstat"
    stat.write_text("sockets: used 98\nTCP: inuse 1 orphan 4 tw 7 alloc 70413 mem 156\nUDP: inuse 0 mem 0\n")
    assert tcp_sockets(stat) == 70413
    assert tcp_sockets(tmp_path / "none") == 0
    assert tcp_sockets() >= 0


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_room_is_made_beforehand_where_programs_cannot_allocate() -> None:
    loaded = Loaded(TRANSITION, Kernel())
    lines = Path(f"/proc/self/fdinfo/{loaded.map_fd('connections')}").read_text().splitlines()
    found = {name: int(value, 0) for name, value in (line.split(":") for line in lines if line.startswith("m"))}
    loaded.close()
    allocates = Kernel().allocates_in_programs
    assert found["map_flags"] == allocates
    assert sockets_at_most(0, allocates) <= found["max_entries"] <= sockets_at_most(1 << 30, allocates)


def test_the_processors_that_are_possible(tmp_path: Path) -> None:
    mask = tmp_path / "possible"
    for text, count in (("0", 1), ("0-3", 4), ("0-4095", 4096), ("0-4096", 0), ("0-3,8-11", 0), ("0,2", 0), ("1-3", 0)):
        mask.write_text(f"{text}\n")
        assert possible_cpus(mask) == count
    assert possible_cpus() >= (os.cpu_count() or 1)


class NoMemory:
    """libbpf, where the first loads find no memory."""

    def __init__(self, times: int) -> None:
        self._times, self._lib = times, module.lib
        self.loads = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def bpf_object__load(self, object: Any) -> int:
        self.loads += 1
        return -errno.ENOMEM if self.loads <= self._times else self._lib.bpf_object__load(object)


@pytest.mark.kernel
def test_without_memory_the_tables_are_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sockets_at_most", lambda now, allocates: 1 << 16)
    monkeypatch.setattr(module, "lib", NoMemory(2))
    loaded = Loaded(OWNER, Kernel())
    lines = Path(f"/proc/self/fdinfo/{loaded.map_fd('connections')}").read_text().splitlines()
    loaded.close()
    assert f"max_entries:\t{1 << 14}" in lines
    assert loaded.notes == [
        "no memory for 65536 sockets in the tables of 'owner', there is room for 16384; "
        "further ones are counted as table_full"
    ]


@pytest.mark.kernel
def test_without_any_memory_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sockets_at_most", lambda now, allocates: 1 << 16)
    monkeypatch.setattr(module, "lib", lib := NoMemory(100))
    with pytest.raises(TcpscopeError, match="owner: cannot be loaded: Cannot allocate memory; free memory") as caught:
        Loaded(OWNER, Kernel())
    assert caught.value.exit_status == 1
    assert lib.loads == 7  # 65536 to 1024


# So many calls wait in the function that its kretprobe has no place for the last ones.
WAITS = """
#include "kernel.bpf.h"
SEC("kretprobe/inet_csk_accept") int returned(void *ctx) { return 0; }
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.mark.kernel
@pytest.mark.every_kernel
def test_calls_that_a_kernel_probe_missed(tmp_path: Path, kernel: Kernel) -> None:
    if not kernel.kprobe:
        pytest.skip(kernel.kprobe.why)
    if kernel.enumerator("BPF_LINK_TYPE_NETKIT") is None:  # came with the same release
        pytest.skip("the kernel's links do not tell what a kernel probe has missed (6.7)")
    loaded = Loaded(compiled(tmp_path, "waits", WAITS), kernel)
    try:
        assert loaded.program_info()["returned"][2] == 0
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threads = [threading.Thread(target=_accept, args=(listener,)) for _ in range(64)]
            for thread in threads:
                thread.start()
            until(lambda: loaded.program_info()["returned"][2], "a call without a place")
            listener.shutdown(socket.SHUT_RD)
            for thread in threads:
                thread.join()
        missed = loaded.program_info()["returned"][2]
        loaded.detach()
        assert loaded.program_info()["returned"][2] == missed
    finally:
        loaded.close()


def _accept(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):
        listener.accept()
