"""Labs for all tests of a file, one of them with a tool at each host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tests.tools.rtt.site import Pair, Tools, Watch, patient_lab


@pytest.fixture(scope="module")
def older() -> list[Pair]:
    """What existed before the tools of `watch`."""
    return []


@pytest.fixture(scope="module")
def watch(older: list[Pair]) -> Iterator[Watch]:
    with patient_lab() as lab, ExitStack() as stack:
        older.append(Pair(lab))
        older[0].exchange(20)
        older[0].settle()
        tools = {host: stack.enter_context(Tools(host, watch="--by connection -i 0.3")) for host in lab.hosts}
        watch = Watch(lab, tools)
        yield watch
        watch.check()


@pytest.fixture(scope="module")
def site() -> Iterator[Lab]:
    with patient_lab() as lab:
        yield lab
