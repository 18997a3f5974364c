"""An aggregate of the test's own, of few lines: what is taken while it is filled sums to what was added.

Each process that adds runs on its own CPU. Since 7.0 a process may be preempted inside a program, and the kernel then
skips that program for the other processes of that CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tcpscope.aggregate import Aggregate, extremes
from tcpscope.kernel.features import Kernel
from tcpscope.kernel.loaded import Loaded, Setup
from tcpscope.kernel.spec import Spec
from tests.kernel.test_loaded import compiled

pytestmark = pytest.mark.kernel

SOURCE = Path(__file__).with_name("aggregate.bpf.c")
NO_FILE = -4242
NETWORKS = 200
ROUNDS = 100
PROCESSORS = sorted(os.sched_getaffinity(0))[:2]
FILL = f"""
import os, sys
os.sched_setaffinity(0, {{int(sys.argv[2])}})
for number in range({ROUNDS}):
    for network in range({NETWORKS}):
        try: os.lseek({NO_FILE}, 1000 * int(sys.argv[1]) + (number * 7 + network) % 1000, network)
        except OSError: pass
"""


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    text = SOURCE.read_text()
    assert text.count("\n") <= 60
    return compiled(tmp_path_factory.mktemp("aggregate"), "aggregate", text)


@contextmanager
def adding_up(spec: Spec, **entries: int) -> Iterator[tuple[Loaded, Aggregate]]:
    loaded = Loaded(spec, Kernel(), Setup(entries={"events": 4096, **entries}))
    try:
        yield loaded, Aggregate(loaded, "traffics", "network_key", "traffic")
    finally:
        loaded.close()


def filling(process: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", FILL, str(process), str(PROCESSORS[process])])


def added(network: int) -> list[int]:
    """What all processes add to a network."""
    return [1000 * process + (n * 7 + network) % 1000 for process in range(len(PROCESSORS)) for n in range(ROUNDS)]


@pytest.mark.every_kernel
def test_what_is_taken_while_it_is_filled(spec: Spec) -> None:
    packets: Counter[int] = Counter()
    sizes: Counter[int] = Counter()
    least, most = dict.fromkeys(range(NETWORKS), 1 << 32), dict.fromkeys(range(NETWORKS), -1)
    takes = 0

    def take() -> int:
        taken = 0
        for key, value in aggregate.take():
            low, high = extremes(value)
            packets[key.network] += value.packets
            sizes[key.network] += value.bytes
            least[key.network] = min(least[key.network], low)
            most[key.network] = max(most[key.network], high)
            taken += value.packets
        return taken

    with adding_up(spec) as (_, aggregate):
        processes = [filling(number) for number in range(len(PROCESSORS))]
        while any(process.poll() is None for process in processes):
            takes += take() > 0
        assert [process.returncode for process in processes] == [0] * len(PROCESSORS)
        take()
        assert take() == take() == 0
    expected = {network: added(network) for network in range(NETWORKS)}
    assert takes > 1
    assert packets == {network: len(values) for network, values in expected.items()}
    assert sizes == {network: sum(values) for network, values in expected.items()}
    assert least == {network: min(values) for network, values in expected.items()}
    assert most == {network: max(values) for network, values in expected.items()}


@pytest.mark.every_kernel
@pytest.mark.parametrize("sizes", [(2**32 - 1,), (7, 2**32 - 1), (2**32 - 1, 0)])
def test_the_largest_number_has_a_place(spec: Spec, sizes: tuple[int, ...]) -> None:
    with adding_up(spec) as (_, aggregate):
        for size in sizes:
            with suppress(OSError):
                os.lseek(NO_FILE, size, 1)
        ((_, value),) = aggregate.take()
    assert (value.packets, extremes(value)) == (len(sizes), (min(sizes), max(sizes)))


def test_what_finds_no_room_is_lost_and_counted(spec: Spec) -> None:
    with adding_up(spec, traffics_even=NETWORKS // 4, traffics_odd=NETWORKS // 4) as (loaded, aggregate):
        for number in (1, 2):
            assert filling(0).wait() == 0
            rows = list(aggregate.take())
            words = loaded.memory("counters").cast("Q")
            seen, lost = sum(words[0::8]), sum(words[2::8])
            assert seen == number * NETWORKS * ROUNDS
            assert len(rows) == NETWORKS // 4
            assert {value.packets for _, value in rows} == {ROUNDS}
            assert lost == number * (NETWORKS - len(rows)) * ROUNDS


def test_batches_are_smaller_than_the_map(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also smaller than a bucket: then the kernel wants more room."""
    monkeypatch.setattr("tcpscope.kernel.loaded.BATCH_BYTES", 0)
    monkeypatch.setattr("tcpscope.kernel.loaded.LEAST_BATCH", 1)
    with adding_up(spec) as (_, aggregate):
        assert filling(0).wait() == 0
        assert sorted(key.network for key, _ in aggregate.take()) == list(range(NETWORKS))
        assert list(aggregate.take()) == []
