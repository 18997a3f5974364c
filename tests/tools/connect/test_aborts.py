"""Attempts that end on this side: by the application, its end, or an administrator."""

from __future__ import annotations

import pytest

from tests.record import Script, Test, recorded
from tests.tools.connect.attempts import (
    CONNECT,
    PORT,
    SILENT,
    SYNCNT_1,
    Attempt,
    made,
    rows,
    silence,
    syn_retransmissions,
)


@pytest.mark.parametrize("way", ["close", "shutdown", "shutdown-write", "disconnect"])
@pytest.mark.parametrize("family", ["4", "6"])
@recorded(CONNECT)
def test_aborted(script: Script, way: str, family: str) -> Test:
    silence(script)
    saw = Attempt(script.client.process("client"), SILENT[family], PORT, "started")
    local = saw.socket.name()
    if way == "close":
        end = saw.socket.close()
    elif way == "disconnect":
        end = saw.socket.disconnect()
    else:
        end = saw.socket.shutdown("write" if way == "shutdown-write" else "both")
    if way != "close":
        # The row does not wait until the socket is destroyed.
        script.client.until_rows(CONNECT, 1, since=0, rport=PORT)
        saw.socket.close()
    fails, repeated = script.client.counter("TcpAttemptFails"), syn_retransmissions(script.client)
    seen = yield
    assert saw.errno == "EINPROGRESS"
    (row,) = rows(
        seen,
        script,
        {
            "by": saw.process,
            "rport": PORT,
            "outcome": "GAVE_UP",
            "errno": "none",
            "syn_sent": True,
            "syn_dropped": False,
            "laddr": local.data,
            "lport": local.ret,
            "raddr": SILENT[family],
            "syn_retrans": repeated.ret,
        },
    )
    assert end.begin_us - saw.first.end_us - 1 <= row["latency_us"] <= end.end_us - saw.first.begin_us + 1
    assert fails.ret == 0  # it is nobody's failure


@pytest.mark.parametrize("way", ["shutdown", "disconnect"])
@recorded(CONNECT)
def test_aborted_while_another_thread_waits(script: Script, way: str) -> Test:
    """The waiting call returns an error that nobody on the network has sent. There are kernels that refuse to
    disconnect what a thread waits for: the attempt goes on."""
    silence(script)
    client = script.client.process("client")
    mine = made(client, SILENT["4"], options=SYNCNT_1)
    waiting = client.thread().at(mine).connect(SILENT["4"], PORT, wait=False)
    script.client.until_sockets(state="SYN_SENT", rport=PORT)
    end = mine.disconnect(may_fail=True) if way == "disconnect" else mine.shutdown("both", may_fail=True)
    waiting.join()
    mine.close()
    seen = yield
    row = {"by": client, "saw": waiting, "rport": PORT, "syn_sent": True}
    if waiting.errno == "ETIMEDOUT":
        assert end.errno == "EBUSY" or waiting.took_us >= 2_900_000  # or all of this came too late
        rows(seen, script, row | {"outcome": "TIMED_OUT"})
    else:
        assert end.errno == "none"
        assert waiting.errno in ("ECONNRESET", "ECONNABORTED", "EPIPE")
        rows(seen, script, row | {"outcome": "GAVE_UP"})


@recorded(CONNECT)
def test_its_process_is_killed(script: Script) -> Test:
    silence(script)
    mortal = script.client.process("mortal")
    made(mortal, SILENT["4"]).connect(SILENT["4"], PORT, wait=False)
    script.client.until_sockets(state="SYN_SENT", rport=PORT)
    mortal.kill()
    script.client.until_sockets(0, "==", rport=PORT)
    seen = yield
    rows(seen, script, {"by": mortal, "rport": PORT, "outcome": "GAVE_UP", "errno": "none", "syn_sent": True})


@recorded(CONNECT)
def test_killed(script: Script) -> Test:
    """By `ss -K`, where the kernel has it (CONFIG_INET_DIAG_DESTROY)."""
    silence(script)
    saw = Attempt(script.client.process("client"), SILENT["4"], PORT, "started")
    local = saw.socket.name()
    call = script.client.destroy(local, PORT, to=SILENT["4"])
    saw.fetch()
    saw.socket.close()
    seen = yield
    if call.errno == "EOPNOTSUPP":
        rows(seen, script, {"by": saw.process, "rport": PORT, "outcome": "GAVE_UP"})
        pytest.skip("CONFIG_INET_DIAG_DESTROY is not set: the kernel does not support SOCK_DESTROY")
    assert (call.errno, saw.first.errno, saw.errno) == ("none", "EINPROGRESS", "ECONNABORTED")
    (row,) = rows(seen, script, {"saw": saw, "rport": PORT, "outcome": "KILLED", "syn_sent": True})
    assert row["latency_us"] is not None
