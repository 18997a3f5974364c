"""What a reader and a program are told, and the exit status."""

from __future__ import annotations

import io
import json
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope.diagnose import Finding, Remedy, text, wording
from tcpscope.diagnose.cli import _Records, _Text
from tcpscope.diagnose.watching import Known, News
from tcpscope.filters import Filter
from tcpscope.kernel import netns
from tcpscope.kernel.netns import Namespace, Visible
from tcpscope.lab.hosts import Lab
from tcpscope.session import Stats
from tests.conftest import RunningTool, until

BEGAN_S = 1000.0
COMMAND = "nsenter -t 4711 -n sysctl -w net.ipv4.ip_local_port_range='1024 65535' # all of them, on one line to copy"
ELSEWHERE = 1


class Seen:
    """Of a watch of ten seconds of the connections of one process."""

    began_s, watched_s, now_s = BEGAN_S, 10.0, BEGAN_S + 10.0
    rules = left_out = ()
    request = SimpleNamespace(filter=Filter(pid=(4711,)))

    def account(self) -> Stats:
        return Stats(seen=9, shown=6, lost=3)

    def blind_spots(self) -> list[str]:
        return [f"what could not be seen {' and seen' * 20}"]


def finding(**values: Any) -> Finding:
    words = "clients of a service with a long name are refused " * 3
    given: dict[str, Any] = {
        "rule": "rule",
        "severity": "critical",
        "title": words,
        "observed": [words, words],
        "why": words,
        "remedies": [Remedy(words, COMMAND, "net.ipv4.a_sysctl_with_a_name", "32768 60999", "1024 65535", words)],
        "facts": {"netns": ELSEWHERE, "count": 3},
        "who": words,
        "look": ("connect --failed --raddr 192.0.2.1 -R 80",),
    }
    return Finding(**given | values)


def told(teller: Any, *whats: str, of: Finding, quiet_s: float | None = None, goes_on: bool = True) -> str:
    """What is written of a finding that was certain after 3.4 s, and lasted until 8 s."""
    known = Known(of, BEGAN_S + 3.4, BEGAN_S + 8.0)
    for what in whats:
        teller.tell(News(what, known))  # type: ignore[arg-type]
    teller.end([of] if goes_on else [], lambda finding: quiet_s)
    written: str = teller._stream.getvalue().decode()
    return written


@pytest.mark.parametrize("columns", [80, 100])
def test_no_line_is_longer_than_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """But commands: they are copied."""
    monkeypatch.setattr(text, "width_of", lambda stream: columns)
    monkeypatch.setattr("tcpscope.output.screen.width_of", lambda stream: columns)
    teller: Any = _Text(io.BytesIO(), Seen())  # type: ignore[arg-type]
    told(teller, "began", "worse", "explained", of=finding(), quiet_s=99.0)
    lines = told(teller, "ended", of=finding(), goes_on=False).splitlines()
    assert [line for line in lines if len(line) > columns] == [f"          # {COMMAND}"]
    assert max(map(len, lines)) > columns - 15
    begins = ("1. [critical]", "1. is [critical] now:", "1. is explained", "1. has ended, after 4.6 s", "1. is over")
    assert all(any(line.startswith(begin) for line in lines) for begin in begins)


@pytest.mark.parametrize(
    ("first_s", "words"),
    [
        (None, "certain 3.4 s after the beginning of the watch"),
        (BEGAN_S + 0.4, "first seen 0.4 s after the beginning of the watch, certain after 3.4 s"),
        (BEGAN_S - 70.0, "began 70 s before the watch; certain 3.4 s after its beginning"),
    ],
)
def test_since_when(first_s: float | None, words: str) -> None:
    teller: Any = _Text(io.BytesIO(), Seen())  # type: ignore[arg-type]
    assert f"   - {words}\n" in told(teller, "began", of=finding(first_s=first_s))


@pytest.mark.parametrize(("name", "words"), [("blue", "network namespace blue (1)"), (None, "network namespace 1")])
def test_where(monkeypatch: pytest.MonkeyPatch, name: str | None, words: str) -> None:
    """Two containers may have one address. Our own namespace needs no word."""
    wording._namespaces.cache_clear()
    monkeypatch.setattr(netns, "visible", lambda: Visible({1: Namespace(1, "/run/netns/blue", name)}, 0))
    for inode, line in ((ELSEWHERE, f"   Where: {words}\n"), (netns.own(), None), (None, None)):
        teller: Any = _Text(io.BytesIO(), Seen())  # type: ignore[arg-type]
        written = told(teller, "began", of=finding(facts={"netns": inode}))
        assert line in written if line else "Where:" not in written
    wording._namespaces.cache_clear()


def test_what_has_ended_is_forgotten() -> None:
    """A watch may go on for months. A fault that comes back has another number."""
    teller: Any = _Text(io.BytesIO(), Seen())  # type: ignore[arg-type]
    for number in (1, 2, 1):
        fault = finding(title=f"fault {number}", subject=(number,), remedies=[], look=())
        for what in ("began", "worse", "explained", "ended"):
            teller.tell(News(what, Known(fault, BEGAN_S + 3.4, BEGAN_S + 8.0)))  # type: ignore[arg-type]
        assert not [each for each in vars(teller).values() if isinstance(each, dict) and each]
    lasts = finding(title="fault 1", subject=(1,), remedies=[], look=())
    lines = told(teller, "began", of=lasts).splitlines()
    ends = [line for line in lines if "has ended" in line]
    assert ends == [f"{n}. has ended, after 4.6 s: fault {fault}" for n, fault in ((1, 1), (2, 2), (3, 1))]
    assert "4. [critical] fault 1" in lines
    assert not any("Nothing found" in line for line in lines)


def test_records() -> None:
    teller: Any = _Records(io.BytesIO(), Seen())  # type: ignore[arg-type]
    first = finding(first_s=BEGAN_S - 1.25, last_s=BEGAN_S + 8.0)
    began, ended, summary = map(json.loads, told(teller, "began", "ended", of=first).splitlines())
    assert (began["began"]["at_s"], ended["ended"]["at_s"]) == (3.4, 8.0)
    assert (began["began"]["first_s"], began["began"]["last_s"]) == (-1.2, 8.0)
    assert not {"about", "subject"} & began["began"].keys()
    summary = summary["summary"]
    assert (summary["filter"], summary["watched_s"]) == ("--pid 4711", 10.0)
    assert (summary["lost"], summary["table_full"], summary["missed"]) == (3, 0, 0)
    (last,) = summary["findings"]
    assert (last["title"], last["quiet_s"]) == (first.title, None)
    assert summary["notes"] == Seen().blind_spots()


@pytest.mark.root
def test_the_exit_status_says_whether_something_was_found(lab: Lab, run_tool: type[RunningTool]) -> None:
    def runs(*arguments: str, faults: bool) -> RunningTool:
        filters = ("--netns", str(lab.client.inode), "--netns", str(lab.server.inode))
        with run_tool("diagnose", "-d", "600", *arguments, *filters) as tool:
            if faults:
                for _ in range(9):
                    with lab.client.socket(socket.AF_INET) as refused:
                        refused.connect_ex((lab.server.ipv4, 9))
                until(lambda: any("began" in row for row in tool.rows), "the finding")
        return tool

    for arguments, faults, status in (((), True, 0), (("--exit-code",), False, 0), (("--exit-code",), True, 6)):
        done = runs(*arguments, faults=faults).done
        assert done is not None
        assert done.status == status
        assert bool(done.rows[-1]["summary"]["findings"]) == faults
        assert ("1 finding; the first: " in done.stderr) == (status == 6)


@pytest.mark.root
def test_a_watch_that_goes_on_says_when_a_fault_ends(lab: Lab, run_tool: type[RunningTool]) -> None:
    with run_tool("diagnose", "--watch", "--netns", str(lab.client.inode)) as tool:
        for _ in range(9):
            with lab.client.socket(socket.AF_INET) as refused:
                refused.connect_ex((lab.server.ipv4, 9))
        until(lambda: any("ended" in row for row in tool.rows), "the end", deadline=90)
    (ended,) = (row["ended"] for row in tool.rows if "ended" in row)
    (began,) = (row["began"] for row in tool.rows if "began" in row)
    assert (began["rule"], ended["rule"]) == ("connects_fail", "connects_fail")
    assert began["first_s"] <= began["at_s"]
    assert ended["at_s"] == ended["last_s"] >= ended["first_s"] == began["first_s"]
    assert tool.done is not None
    assert tool.done.rows[-1]["summary"]["findings"] == []
