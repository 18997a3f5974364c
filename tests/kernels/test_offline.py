"""What a kernel's BTF says of it, compared with what the running kernel says of itself."""

from __future__ import annotations

import pytest

from tcpscope.kernel.btf import Btf
from tcpscope.kernel.features import BTF, Kernel
from tcpscope.kernel.spec import Program, Spec
from tcpscope.kernel.ways import plan, plan_refusals
from tests.blob import Blob
from tests.kernels.offline import Offline
from tests.kernels.signature import probes
from tests.lacks import functions_cannot_be_hooked


@pytest.fixture(scope="module")
def here() -> Offline:
    return Offline(Btf.parse(BTF.read_bytes()), functions=not functions_cannot_be_hooked())


def test_the_plan_is_that_of_the_running_kernel(here: Offline) -> None:
    for probe in probes():
        spec = Spec.of(probe)
        plans = [plan(spec, plan_refusals(spec, kernel)) for kernel in (here, Kernel())]
        chosen = [{hook: use.program for hook, use in each.items()} for each in plans]
        assert chosen[0] == chosen[1]


@pytest.mark.parametrize("name", ["tcp_connect", "tcp_v4_syn_recv_sock", "no_such_function"])
def test_functions(here: Offline, name: str) -> None:
    assert here.parameters(name) == Kernel().parameters(name)


@pytest.mark.parametrize("name", ["LINUX_MIB_LISTENOVERFLOWS", "BPF_FUNC_check_mtu", "NO_SUCH_ENUMERATOR"])
def test_enumerators(here: Offline, name: str) -> None:
    assert here.enumerator(name) == Kernel().enumerator(name)


@pytest.mark.parametrize("enum", ["tcp_ca_state", "skb_drop_reason", "no_such_enum", "tcp_sock"])
def test_the_names_of_an_enum(here: Offline, enum: str) -> None:
    assert here.enumerators(enum) == Kernel().enumerators(enum)


def test_the_names_of_an_enum_are_the_kernels(here: Offline) -> None:
    assert here.enumerators("tcp_ca_state")[4] == "TCP_CA_Loss"


@pytest.mark.parametrize("name", ["tcp_sock", "bpf_func_id", "in6_addr", "no_such_type"])
def test_types(here: Offline, name: str) -> None:
    assert here.has_type(name) == Kernel().has_type(name)


def test_another_kernel_needs_none_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tcpscope.kernel.features.BTF", BTF / "not here")
    kernel = Offline(Blob().parse(), functions=False)
    assert kernel.parameters("tcp_connect") is None
    assert not kernel.fentry and not kernel.kprobe
    kernel.release()


def test_arguments_are_counted_where_the_program_is_hooked(here: Offline) -> None:
    state = Program("state", "tp_btf/inet_sock_set_state")
    assert here.arguments(state) == 3  # sk, oldstate, newstate
    assert here.arguments(Program("connect", "fentry/tcp_connect")) == 1
