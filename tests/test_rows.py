"""Rows in Python: their classes and the types of `tcpscope.open`, which `python -m tests.test_rows` writes."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address, ip_network
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tcpscope
from tcpscope import rows
from tcpscope.errors import UsageError
from tcpscope.kernel.spec import Spec
from tcpscope.output import Column
from tcpscope.request import Option, Request
from tcpscope.tool import Tool, find, names
from tcpscope.values import class_of, converter
from tests.conftest import DEADLINE

FILE = Path(rows.__file__)
TREE = FILE.parents[2]
TYPES = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "comm": "str",
    "text": "str",
    "time": "datetime",
    "errno": "int",
    "function": "str",
    "tcp_flags": "str",
    "address": "IPv4Address | IPv6Address",
    "list": "list[Holder]",
    "stack": "list[str]",
    "distribution": "list[list[int]]",
}
HEAD = '''"""The rows of each tool, and what `tcpscope.open` takes.

Written by `python -m tests.test_rows` from what the tools say of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import msgspec

from tcpscope.listeners import Holder

if TYPE_CHECKING:
    from os import PathLike
    from typing import Unpack

    from tcpscope import filters
    from tcpscope.events import Events
'''
ASKED = '''

class Asked(TypedDict, total=False):
    """What every tool takes: the filters, and when and how it gives rows. See `tcpscope.open`."""

    pid: filters.Numbers
    comm: filters.Names
    uid: filters.Numbers
    cgroup: filters.Numbers
    netns: filters.Numbers
    ipv4: bool
    ipv6: bool
    lport: filters.Ports
    rport: filters.Ports
    port: filters.Ports
    laddr: filters.Networks
    raddr: filters.Networks
    duration: float | None
    interval: float | None
    max_events: int | None
    buffer: int | None
    rate: int | None


class AskedInPart(Asked, total=False):
    """The same, with what changes the attributes of a row."""

    time: Literal["iso", "elapsed", "none"]
    columns: str | Sequence[str] | None
'''


def columns_of(tool: Tool, **options: Any) -> tuple[Column, ...]:
    return tool.columns(Request(options={option.name: option.unset for option in tool.options} | options))


def classes() -> Iterator[tuple[str, str, tuple[Column, ...]]]:
    """Name, what it is a row of, columns. Those of summaries and of `rtt` follow from the options."""
    for name in names():
        if name != "rtt":
            yield name.title(), f"`{name}`", columns_of(find(name))
    yield "QueueEvents", "`queue --events`", columns_of(find("queue"), events=True)
    yield "CongEvents", "`cong --events`", columns_of(find("cong"), events=True)


def generated() -> str:
    known = list(classes())
    text = HEAD
    enums = {column.enum: column.labels for _, _, columns in known for column in columns if column.enum}
    for enum, labels in sorted(enums.items()):
        text += f"\n\nclass {class_of(enum)}(StrEnum):\n" + "".join(f'    {label} = "{label}"\n' for label in labels)
    for name, of, columns in known:
        text += f'\n\nclass {name}(msgspec.Struct, frozen=True):\n    """A row of {of}."""\n'
        for column in columns:
            type_ = class_of(column.enum) if column.enum else TYPES[column.kind]
            null = " | None" if column.nullable else ""
            doc = textwrap.fill(column.doc or "when it happened", 110, subsequent_indent="    ")
            text += f'\n    {column.name}: {type_}{null}\n    """{doc}"""\n'
    text += ASKED
    for name in names():
        text += "".join(overloads(find(name)))
    return text + (
        "\n\n@overload\ndef open(\n"
        "    tool: PathLike[str], /, *, event: str | None = ..., log: str | None = ..., **asked: Unpack[AskedInPart]\n"
        ") -> Events[Any]: ...\n"
        "\n\ndef open(tool: str | PathLike[str], /, **asked: Any) -> Events[Any]:\n"
        '    """As in `tcpscope`, which has it without an import of this module."""\n'
        "    from tcpscope.events import Events\n\n"
        "    return Events(tool, asked)\n"
    )


def overloads(tool: Tool) -> Iterator[str]:
    if tool.name in ("queue", "cong"):
        yield overload(tool, f"{tool.name.title()}Events", "events")
        yield overload(tool, tool.name.title())
    elif tool.name != "rtt":
        yield overload(tool, tool.name.title())
    yield overload(tool, "Any")


def overload(tool: Tool, row: str, wanted: str = "") -> str:
    """With the flag `wanted`, or with the options that change nothing about the row; for any row with all."""
    modes = set() if row == "Any" else {"events", "count", "histogram", "by"}
    options = [option for option in tool.options if option.name == wanted or option.name not in modes]
    parameters = "".join(f"{parameter(option, option.name == wanted)}, " for option in options)
    star, asked = "*, " if parameters else "", "AskedInPart" if row == "Any" else "Asked"
    return (
        f'\n\n@overload\ndef open(tool: Literal["{tool.name}"], /, {star}{parameters}**asked: Unpack[{asked}]) '
        f"-> Events[{row}]: ...\n"
    )


def parameter(option: Option, must: bool) -> str:
    if must:
        return f"{option.name}: Literal[True]"
    null = " | None" if option.unset is None else ""
    several = " | Sequence[str]" if option.names else ""
    return f"{option.name}: {option.type.__name__}{several}{null} = ..."


def formatted(text: str) -> str:
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(FILE), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, cwd=TREE).stdout


def test_the_classes_are_those_of_the_tools() -> None:
    assert FILE.read_text() == formatted(generated()), "python -m tests.test_rows"


def test_values_in_place_of_text() -> None:
    known = {column.name: column for column in columns_of(find("connect"))}
    columns = [known[name] for name in ("time", "raddr", "outcome", "errno")]
    time = "2026-11-28T12:00:00.000001Z"
    row = SimpleNamespace(time=time, raddr="192.0.2.1", outcome="REFUSED", errno="ECONNREFUSED")
    found = converter("connect", columns)(row)
    assert found.time == datetime(2026, 11, 28, 12, 0, 0, 1, UTC)
    assert (found.raddr, found.errno) == (ip_address("192.0.2.1"), 111)
    assert found.outcome is rows.Outcome.REFUSED
    row = SimpleNamespace(time=1.5, raddr=None, outcome="17", errno="none")  # of a kernel that has more outcomes
    found = converter("connect", columns)(row)
    assert (found.time, found.raddr, found.outcome, found.errno) == (1.5, None, "17", 0)


def test_every_errno_and_every_label() -> None:
    life = {column.name: column for column in columns_of(find("life"))}
    convert = converter("life", [life["errno"], life["end"]])
    for label in Spec.of("life").labels("end").values():
        assert convert(SimpleNamespace(errno="4095", end=label)).end is rows.End[label]
    assert convert(SimpleNamespace(errno="4095", end="FIN")).errno == 4095


@pytest.mark.root
@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"failed": True, "faild": True}, "'connect' has no 'faild'; did you mean 'failed'?"),
        ({"rprt": 1}, "'connect' has no 'rprt'; did you mean 'rport'?"),
        ({"time": "utc"}, "time 'utc'; allowed: iso, elapsed, none"),
        ({"columns": ("tme",)}, "unknown column 'tme'; did you mean 'time'?"),
        ({"lport": "x"}, "port 'x' is neither a number, nor a range"),
        ({"duration": "1"}, "--duration '1'; give a number of seconds above 0"),
        ({"max_events": -1}, "--max-events -1; give a number above 0"),
        ({"buffer": 5000}, "--buffer 5000; give a power of two from 4K to 1024M"),
        ({"failed": 1}, "failed=1; give a value of type bool"),
        ({"failed": ["x"]}, "failed=['x']; give a value of type bool"),
        ({"count": True, "by": 1}, "by=1; give a value of type str or a sequence of them"),
        ({"count": True, "by": [1]}, "by=[1]; give a value of type str or a sequence of them"),
        ({"count": True, "by": ["radr"]}, "unknown column 'radr'; did you mean 'raddr'?"),
        ({"count": True, "by": []}, "--by is empty"),
        ({"columns": "tme"}, "unknown column 'tme'; did you mean 'time'?"),
        ({"columns": []}, "--columns is empty"),
        ({"columns": "raddr,raddr"}, "--columns has 'raddr' twice"),
        ({"columns": [1]}, "--columns [1]; names as text with commas, or a sequence of names"),
        ({"columns": 1}, "--columns 1; names as text with commas, or a sequence of names"),
        ({"columns": "time", "time": "none"}, "--columns has 'time'; --time none removes that column"),
        ({"comm": 1}, "comm=1; give a value of type str"),
        ({"comm": b"x"}, "comm=b'x'; give a value of type str"),
        ({"pid": 1.5}, "pid=1.5; give a value of type int or str or several of them"),
        ({"pid": True}, "pid=True; give a value of type int or str or several of them"),
        ({"ipv4": 1}, "ipv4=1; give a value of type bool"),
        ({"ipv6": None}, "ipv6=None; give a value of type bool"),
        ({"rport": 80.0}, "rport=80.0; give a value of type int or str or several of them"),
        ({"rport": b"80"}, "rport=b'80'; give "),
        ({"rport": [80, None]}, "rport=[80, None]; give "),
        ({"rport": {80: 81}}, "rport={80: 81}; give "),
        (
            {"raddr": 1.5},
            "raddr=1.5; give a value of type str or IPv4Address or IPv6Address or IPv4Network or",
        ),
        ({"netns": object}, "netns=<class 'object'>; give "),
        ({"duration": 10**400}, "--duration 1000"),
        ({"rport": [80, "x"]}, "port 'x' is neither a number, nor a range"),
        ({"raddr": [ip_network("10.0.0.0/8"), "x"]}, "no address is known of the host 'x'"),
    ],
)
def test_wrong_usage(keywords: dict[str, Any], error: str) -> None:
    with pytest.raises(UsageError, match=re.escape(error)):
        tcpscope.open("connect", **keywords)


def refused(times: int = 1) -> int:
    """A port of this host where so many connections are refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    for _ in range(times):
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) == 111
    return port


@pytest.mark.root
def test_an_attempt_as_the_client_sees_it() -> None:
    before = datetime.now(UTC)
    with tcpscope.open("connect", duration=DEADLINE, failed=True, raddr="127.0.0.1") as events:
        port = refused()
        row = next(row for row in events if row.rport == port)
    assert isinstance(row, rows.Connect)
    assert before - timedelta(seconds=1) <= row.time <= datetime.now(UTC)
    assert (row.outcome, row.errno, row.family) == (rows.Outcome.REFUSED, 111, 4)
    assert row.raddr == ip_address("127.0.0.1")


@pytest.mark.root
@pytest.mark.parametrize("columns", ["rport, raddr", ("rport", "raddr"), ["rport", "raddr"]])
def test_lists_as_text_and_as_sequences(columns: Any) -> None:
    """Of columns, of ports, of networks."""
    port = refused()
    wanted = {"rport": [1, port], "raddr": [ip_network("127.0.0.0/8"), "::1"]}
    with tcpscope.open("connect", duration=DEADLINE, columns=columns, max_events=1, **wanted) as events:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) == 111
        (row,) = events
    assert row.__struct_fields__ == ("rport", "raddr")
    assert (row.rport, row.raddr) == (port, ip_address("127.0.0.1"))


@pytest.mark.root
@pytest.mark.parametrize("by", ["rport,outcome", ("rport", "outcome"), ["rport", "outcome"]])
def test_groups_as_text_and_as_sequences(by: Any) -> None:
    with tcpscope.open("connect", raddr=ip_address("127.0.0.1"), count=True, by=by) as events:
        port = refused(2)
        events.stop()
        found = [(row.outcome, row.count) for row in events if row.rport == port]
    assert found == [("REFUSED", 2)]


@pytest.mark.root
def test_an_iteration_ends_once() -> None:
    with tcpscope.open("connect", duration=0.1) as events:
        list(events)
        assert list(events) == []
    with tcpscope.open("connect") as events:
        batches = events.batches()
    assert list(batches) == []


@pytest.mark.parametrize("name", [None, 1, ["connect"], b"connect"])
def test_no_name_of_a_tool(name: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"tool={name!r}; give the name of a tool")):
        tcpscope.open(name)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("connect", {}),
    ("connect", {"count": True, "interval": 0.05}),
    ("rtt", {"interval": 0.05}),
    ("queue", {"interval": 0.05}),
    ("life", {"live": True}),
    ("list", {}),
]


@pytest.mark.root
@pytest.mark.parametrize(("name", "keywords"), KINDS)
@pytest.mark.parametrize("begun", [False, True])
def test_a_closed_one_gives_no_more_rows(name: str, keywords: dict[str, Any], begun: bool) -> None:
    events = tcpscope.open(name, duration=DEADLINE, **keywords) if name != "list" else tcpscope.open(name)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()):
        refused()
        iterator = iter(events)
        if begun and name != "life":
            next(iterator)
        events.close()
        events.close()
        rest = list(iterator)

    async def later() -> list[Any]:
        return [row async for row in events]

    assert (len(rest) == 0) or begun  # of the batch that it had begun
    assert (list(events), list(events.batches()), asyncio.run(later())) == ([], [], [])
    assert events.stats.seen >= 0


@pytest.mark.root
def test_a_closed_one_gives_back_its_buffer() -> None:
    """Also while somebody keeps the object."""

    def mapped() -> int:
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "bpf-map" in line]
        return sum(int(end, 16) - int(begin, 16) for begin, _, end in (line[0].partition("-") for line in lines))

    before, buffer = mapped(), 16 << 20
    events = tcpscope.open("connect", buffer=buffer)
    assert mapped() >= before + buffer
    events.close()
    assert mapped() < before + buffer
    assert list(events) == [] and events.stats.lossless


@pytest.mark.root
@pytest.mark.parametrize(("name", "keywords"), KINDS)
def test_who_forgets_to_close_is_told(name: str, keywords: dict[str, Any]) -> None:
    def forget() -> int:
        with pytest.warns(ResourceWarning, match=f"unclosed <tcpscope {name}>"):
            tcpscope.open(name, **keywords)
            gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    assert forget() == forget()


@pytest.mark.root
def test_a_warning_is_only_for_who_forgets() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tcpscope.open("connect", duration=0.01) as events:
            list(events)
        del events
        with contextlib.suppress(UsageError):
            tcpscope.open("connect", pid=-1)
        gc.collect()


@pytest.mark.root
def test_in_another_thread_and_stopped_from_this_one() -> None:
    found: list[Any] = []
    with tcpscope.open("connect", duration=DEADLINE, pid=os.getpid()) as events:
        thread = threading.Thread(target=lambda: found.extend(events))
        thread.start()
        port = refused(3)
        events.stop()
        thread.join()
    assert [row.outcome for row in found if row.rport == port] == ["REFUSED"] * 3


@pytest.mark.root
def test_in_asyncio() -> None:
    """The loop goes on while the rows are waited for: it is the loop that makes them."""

    async def later() -> int:
        await asyncio.sleep(0.2)
        return refused()

    async def first() -> Any:
        with tcpscope.open("connect", duration=DEADLINE, pid=os.getpid()) as events:
            beside = asyncio.create_task(later())
            async for row in events:
                if beside.done() and row.rport == beside.result():
                    return row
        return None

    assert asyncio.run(first()).outcome is rows.Outcome.REFUSED


@pytest.mark.root
def test_many_in_asyncio() -> None:
    """More than the threads of asyncio, which are others' too."""

    async def resolved() -> None:
        opened = [tcpscope.open("connect", pid=1) for _ in range(8)]
        tasks = [asyncio.create_task(anext(aiter(events), None)) for events in opened]
        await asyncio.sleep(0.1)
        async with asyncio.timeout(DEADLINE):
            await asyncio.to_thread(int)
        for events in opened:
            events.stop()
        await asyncio.gather(*tasks)
        for events in opened:
            events.close()

    asyncio.run(resolved())


@pytest.mark.root
def test_a_task_that_is_cancelled() -> None:
    """What its thread still reads is for the next one; to close waits for the thread."""

    async def cancelled() -> list[Any]:
        with tcpscope.open("connect", duration=DEADLINE, pid=os.getpid()) as events:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    async for row in events:
                        raise AssertionError(row)
            port = refused()
            return [next(row for row in events if row.rport == port)]

    for _ in range(5):
        assert [row.errno for row in asyncio.run(cancelled())] == [111]


@pytest.mark.root
def test_an_iteration_that_is_left_is_gone_on_with() -> None:
    with tcpscope.open("connect", duration=DEADLINE, pid=os.getpid(), max_events=6) as events:
        port = refused(6)
        found = [next(iter(events))]
        for row in events:
            found.append(row)
            break
        found += next(events.batches())
        found += events
        stats = events.stats
    assert [row.rport for row in found] == [port] * 6
    assert stats.shown == 6


@pytest.mark.root
def test_nothing_stays_of_what_failed_to_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for keywords in ({"duration": "1"}, {"columns": ("nosuch",)}, {"interval": 0}, {"max_events": -1}):
        with pytest.raises(UsageError):
            tcpscope.open("connect", **keywords)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcpscope.events.converter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tcpscope.open("connect")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.root
def test_ctrl_c_ends_the_readmes_example() -> None:
    section = (TREE / "README.md").read_text().partition("\n## From Python\n")[2]
    example = section.partition("```python\n")[2].partition("```")[0]
    source = example.replace("    for e in events:", "    print('ready', flush=True)\n    for e in events:")
    command = [sys.executable, "-W", "error", "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()
        assert process.stderr.read() == ""


def test_the_examples_pass_mypy(tmp_path: Path) -> None:
    """The README's, and one that asks for an attribute that is not there."""
    section = (TREE / "README.md").read_text().partition("\n## From Python\n")[2]
    (example,) = re.findall(r"^```python\n(.*?)^```$", section.partition("\n## ")[0], re.M | re.S)
    good, wrong = tmp_path / "good.py", tmp_path / "wrong.py"
    good.write_text(
        f"{example}\nfrom ipaddress import ip_address, ip_network\n\n"
        "tcpscope.open('connect', rport=[80, '8000-8100'], raddr=ip_network('10.0.0.0/8'), columns='time,raddr')\n"
        "tcpscope.open('connect', rport='80,443', laddr=[ip_address('::1')], count=True, by=['raddr', 'rport'])\n"
        "tcpscope.open('states', pid=[1, 2], comm=('a', 'b'), uid='root,33', cgroup='/a', netns=range(9))\n"
        "tcpscope.open('rtt', by=('raddr', 'rport'), columns=['raddr', 'p99_us'], port=range(80, 90))\n"
    )
    wrong.write_text(
        "import tcpscope\n\n"
        "for event in tcpscope.open('connect', failed=True):\n    reveal_type(event.raddr)\n"
        "    print(event.raddress)\n\n"
        "tcpscope.open('connect', smoothed=True)\n"
        "for refusal in tcpscope.open('queue', events=True):\n    reveal_type(refusal.cause)\n"
        "for part in tcpscope.open('connect', columns=('raddr',)):\n    reveal_type(part)\n"
        "tcpscope.open('connect', raddr=80)\n"
    )

    def mypy(path: Path) -> str:
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path / "cache", path]
        environment = os.environ | {"MYPYPATH": str(TREE / "src")}  # it does not see an editable install
        return subprocess.run(command, capture_output=True, text=True, env=environment).stdout

    assert mypy(good).startswith("Success")
    said = mypy(wrong)
    assert 'Revealed type is "ipaddress.IPv4Address | ipaddress.IPv6Address' in said
    assert '"Connect" has no attribute "raddress"' in said
    assert 'wrong.py:7: error: No overload variant of "open"' in said
    assert 'Revealed type is "tcpscope.rows.Cause' in said
    assert 'wrong.py:11: note: Revealed type is "Any"' in said
    assert 'wrong.py:12: error: No overload variant of "open"' in said


if __name__ == "__main__":
    FILE.write_text(formatted(generated()))
