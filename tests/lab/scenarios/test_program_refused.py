"""Experiment K: a tracepoint program that follows skb->sk, and the same line where arguments have types."""

from __future__ import annotations

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.program_refused import ProgramRefused

pytestmark = pytest.mark.root


def told(way: str) -> list[str]:
    with Lab() as lab:
        scenario = ProgramRefused(way=way)
        scenario.run(lab)
    return [step.text for step in scenario.steps]


@pytest.mark.kernel
def test_the_verifier_refuses_a_number_that_is_followed() -> None:
    lines = told("tracepoint")
    assert lines[-1] == "it ends with status 3"
    (first,) = [number for number, line in enumerate(lines) if line.startswith("tcpscope: dropped: program 'freed': ")]
    assert "follow kernel pointers with BPF_CORE_READ" in lines[first]
    assert lines[first + 1].strip() == "dropped.bpf.c:24: event.owner = skb->sk;"
    assert "the verifier's last lines" in lines[first + 2]
    assert "invalid mem access" in lines[-2]


def test_it_takes_a_pointer_whose_type_it_knows() -> None:
    lines = told("tp_btf")
    assert lines[-1] == "it ends with status 0"
    assert any(line.split()[:2] == ["freed", "tp_btf/kfree_skb"] for line in lines)
