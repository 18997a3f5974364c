"""What the tools say that the kernel ran no program for: nothing, on kernels whose functions can be hooked."""

from __future__ import annotations

import pytest

from tests.record import PORTS, Script, Test, Watch, recorded

WATCHES = tuple(Watch(*words, "--port", PORTS) for words in (("states",), ("accept",), ("life", "--live"), ("tracer",)))


@recorded(*WATCHES)
def test_nothing_was_missed(script: Script) -> Test:
    """Over all scenarios of the recording. Since 7.0 tracepoints do not keep the processor: while a process is put
    aside within a program, the kernel skips that program for all others on its processor. Rows can be lost by it.
    It is a fault of ours, and known; the expected failure has no bound yet, so a further fault may hide behind it."""
    script.client.flush()
    seen = yield
    missed = seen.recording.missed()
    if missed and seen.machine.preempts_programs:
        pytest.xfail(f"programs were skipped, and this is counted: {missed}")
    if seen.machine.functions_can_be_hooked:
        assert missed == {}
