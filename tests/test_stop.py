"""Every reason to stop ends a wait."""

from __future__ import annotations

import os
import signal
import time

from tcpscope.stop import Stop


def test_stop() -> None:
    with Stop() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        stop.wait(60)  # does not wait
    stop.stop()  # after its end it is no error
    with Stop(0.05) as stop:
        stop.wait(0.1)
        assert not stop  # the time has not begun
        stop.begin()
        begin = time.monotonic()
        stop.wait(60)
        assert time.monotonic() - begin < 30
        assert stop
    read, write = os.pipe()
    with Stop() as stop:
        os.write(write, b"x")
        stop.wait(60, read)  # nor does it while there is something to read
        assert not stop
    os.close(read), os.close(write)
