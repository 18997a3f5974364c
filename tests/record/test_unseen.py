"""What no program was run for: read from a trace, told apart on this kernel, and held against a recording."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.record.recording import Played
from tests.record.script import Came
from tests.record.unseen import NAME, Unseen, unseen

LINES = """
# tracer: nop
          worker-75      [001] ..s2.  12.000250: inet_sock_set_state: family=AF_INET sport=40000 dport=7001
          worker-75      [001] .....  12.000300: inet_sock_set_state: family=AF_INET sport=40000 dport=7002
 comm with - in-76      [001] ..S2.  13.500000: tcp_probe: family=AF_INET6 src=[2001:db8::1]:7003 dest=[::1]:40001
          <idle>-0       [000] ..s2.  14.000000: tcp_destroy_sock: family=AF_INET sport=40000 dport=7004
"""


def test_events_of_softirqs_in_tasks_without_a_note() -> None:
    ran = bytearray(100)
    ran[0] = 1
    assert list(unseen(LINES.splitlines(), ran)) == [
        Unseen(12_000_250, "worker (75)", "inet_sock_set_state", (40000, 7001)),
        Unseen(13_500_000, "comm with - in (76)", "tcp_probe", (7003, 40001)),
    ]
    assert [each.is_change for each in unseen(LINES.splitlines(), ran)] == [True, False]


def test_whom_an_event_may_be_of() -> None:
    """Played at that time, and one of the ports stands in the script."""
    played = Played("0 0 ! connect 0 192.0.2.2 7001\n", calls={0: Came(2_000_000, 5_000_000, 0, 0, "")})
    assert played.may_be_of(Unseen(3000, "task", "tcp_probe", (40000, 7001)))
    assert not played.may_be_of(Unseen(3000, "task", "tcp_probe", (7001 + 1, 40000)))
    assert not played.may_be_of(Unseen(1999, "task", "tcp_probe", (40000, 7001)))
    assert not played.may_be_of(Unseen(5001, "task", "tcp_probe", (40000, 7001)))
    assert not Played("").may_be_of(Unseen(3000, "task", "tcp_probe", (40000, 7001)))


# In a process of its own, which the witness gives a mount namespace.
WATCH = """
import json, socket, sys
from pathlib import Path
from tests.record import unseen

program, kib, blind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "blind"
told, unseen.BUFFER_KIB = unseen.unseen, kib
if blind:  # as if no program had been run in any task
    unseen.unseen = lambda lines, ran: told(lines, bytes(len(ran)))
unseen.compiled(program)
witness = unseen.Witness(program)
with witness.watching():
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 9998)) as listener:
            with socket.create_connection(("127.0.0.1", 9998)):
                listener.accept()[0].close()
print(json.dumps([each["event"] for each in witness.records() if 9998 in each["ports"]]))
"""


def watch(folder: Path, tree: Path, kib: int = 16384, how: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WATCH, folder / "unseen.bpf.o", str(kib), how]
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, err = process.communicate()
    assert not Path(tempfile.gettempdir(), f"{NAME}{process.pid}").exists()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.root
def test_what_a_program_was_run_for_is_not_unseen(tmp_path: Path, tree: Path) -> None:
    """Over the loopback the other end of a connection acts in a softirq, in the task that sends.

    Not each time on a busy machine: a packet that meets its socket in use is left to the task that uses it.
    """
    assert json.loads(watch(tmp_path, tree).stdout) == []
    events = Counter(json.loads(watch(tmp_path, tree, how="blind").stdout))
    assert events["inet_sock_set_state"] > 50 and events["tcp_destroy_sock"] > 50


@pytest.mark.root
def test_a_buffer_that_overflows_is_no_witness(tmp_path: Path, tree: Path) -> None:
    done = watch(tmp_path, tree, kib=4)
    assert done.returncode and "the buffer of ftrace was too small" in done.stderr
