"""Recorded tests: a compiled actor plays what a test does, on each kernel, while the tools run; the test asserts
afterwards and elsewhere, over what was written down.

A recorded test is a generator. What stands before its `yield` becomes a script (script.py). The actor plays it with
many others at a time (actor/). What stands behind it reads the recording: the rows of the tools, what every call came
to, the counters. So a kernel is booted once for all of them, a failure can be looked at again and again, and nothing
that is asserted depends on how fast Python is there.

    from tests.record import Script, Seen, Watch, recorded

    STATES = Watch("states", "--port", "7000-9999")

    @recorded(STATES)
    def test_refused(script: Script) -> Iterator[None]: ...
"""

from tests.record.plugin import Test, recorded
from tests.record.recording import Seen
from tests.record.script import Call, Host, Process, Script, Socket
from tests.record.watch import PORTS, Watch

__all__ = ["PORTS", "Call", "Host", "Process", "Script", "Seen", "Socket", "Test", "Watch", "recorded"]
