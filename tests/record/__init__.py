"""Recorded tests: a compiled actor plays what a test does on a kernel, while the tools run; the test asserts
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

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.record.plugin import Test, recorded
    from tests.record.recording import Seen
    from tests.record.script import Call, Host, Process, Script, Socket
    from tests.record.watch import PORTS, Watch

_WHERE = {
    "plugin": ("Test", "recorded"),
    "recording": ("Seen",),
    "script": ("Call", "Host", "Process", "Script", "Socket"),
    "watch": ("PORTS", "Watch"),
}

__all__ = ["PORTS", "Call", "Host", "Process", "Script", "Seen", "Socket", "Test", "Watch", "recorded"]


def __getattr__(name: str) -> Any:
    """A guest imports the recorder, and pytest only with what needs it: that is seconds there."""
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"tests.record.{module}"), name)
    raise AttributeError(name)
