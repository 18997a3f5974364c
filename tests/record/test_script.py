"""Scripts are text, and calls know what came of them only when they were played."""

from __future__ import annotations

import pytest

from tests.record.recording import Played
from tests.record.script import Came, Script, ScriptError, encoded


def lines(script: Script) -> list[str]:
    return [line.split(" ", 1)[1] for line in script.text.splitlines()]


def test_each_step_has_its_number_and_its_process() -> None:
    script = Script()
    made = script.client.process("a name").socket("6")
    made.connect("2001:db8::2", 8000, may_fail=True)
    assert lines(script) == [
        "* ! spawn 0 0 client-agent",
        "* ! spawn 1 1 server-agent",
        "* ! spawn 2 0 a%20name",
        "* ! tools",
        "2 ! socket 0 10 1 0",
        "2 - connect 0 2001:db8::2 8000",
    ]
    assert [line.split()[0] for line in script.text.splitlines()] == [str(number) for number in range(6)]


def test_the_tools_run_from_the_first_step_on_unless_it_is_older() -> None:
    script = Script()
    with script.older():
        script.client.flush()
    script.server.flush()
    assert lines(script)[2:] == ["0 ! flush", "* ! tools", "1 ! flush"]
    with pytest.raises(ScriptError, match="run already"), script.older():
        pass


def test_what_a_call_returns_goes_into_another_one() -> None:
    script = Script()
    port = script.client.process("client").socket().name()
    script.server.until_sockets(3, state="SYN_RECV", rport=port)
    before = script.server.counter("TcpExtListenDrops")
    script.server.until_counter("TcpExtListenDrops", before + 2)
    assert lines(script)[-3:] == [
        f"1 ! until >= 3 100 diag count SYN_RECV 0 ${port.number}",
        "1 ! counter TcpExtListenDrops",
        f"1 ! until >= ${before.number}+2 100 counter TcpExtListenDrops",
    ]


@pytest.mark.parametrize(
    ("word", "text"),
    [("plain-1.x", "plain-1.x"), ("a b", "a%20b"), ("50%", "50%25"), ("$1", "%241"), ("é", "%C3%A9"), ("", "%20")],
)
def test_words_have_no_blanks(word: str, text: str) -> None:
    assert encoded(word) == text


def test_nothing_is_known_before_it_was_played() -> None:
    script = Script()
    process = script.client.process("client")
    call = process.now()
    for ask in (lambda: call.ret, lambda: call.begin_us, lambda: process.pid, lambda: script.client.inode):
        with pytest.raises(ScriptError):
            ask()
    script.resolve(Played(calls={call.number: Came(1000, 3000, -1, 111, "")}, pids={2: 77}, inodes={0: 5}))
    assert (call.ret, call.errno, call.begin_us, call.took_us) == (-1, "ECONNREFUSED", 1.0, 2.0)
    assert (process.pid, script.client.inode) == (77, 5)


def test_counters_and_sockets_are_read() -> None:
    script = Script()
    call = script.client.counters()
    found = "2,LISTEN,192.0.2.2,80,0.0.0.0,0,6,5,33,44,0;10,SYN_RECV,::1,80,::2,99,0,0,0,0,3;"
    other = script.client.sockets()
    script.resolve(
        Played(
            calls={call.number: Came(1, 2, 0, 0, "TcpInSegs=7 Ip6InReceives=2"), other.number: Came(1, 2, 0, 0, found)}
        )
    )
    assert call.counters == {"TcpInSegs": 7, "Ip6InReceives": 2}
    assert call.counters["TcpOutRsts"] == 0
    listening, request = other.sockets
    assert (listening.state, listening.lport, listening.recv_q, listening.send_q, listening.cookie) == (
        "LISTEN",
        80,
        6,
        5,
        33,
    )
    assert (request.raddr, request.rport, request.retransmits) == ("::2", 99, 3)
