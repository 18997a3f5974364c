"""The actor does what a script says, and says so when it cannot: on this kernel, without a tool."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.record.plugin import built
from tests.record.recording import Played, read_log
from tests.record.script import Script
from tests.record.watch import Watch

pytestmark = pytest.mark.root
DEADLINE_S = 60


def play(folder: Path, *scripts: Script, at_once: int = 8) -> list[Played]:
    """What came of these scenarios."""
    (folder / "script").write_text("".join(f"S {number}\n{script.text}" for number, script in enumerate(scripts)))
    command = [built(), folder / "script", folder / "log", str(at_once)]
    done = subprocess.run(command, cwd=folder, input="\n\n\n", capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout) == (0, "tools\nmoment\nplayed\n"), done.stderr
    return list(read_log(folder).values())


def played(folder: Path, script: Script) -> Played:
    (found,) = play(folder, script)
    assert not found.failure
    script.resolve(found)
    return found


def test_a_connection(tmp_path: Path) -> None:
    script = Script()
    server, client = script.server.process("server"), script.client.process("client")
    listener = server.listener(8000)
    made = client.socket()
    call = made.connect(script.server.ipv4, 8000)
    child = listener.accept()
    sent, got = made.send("hello"), child.read(5)
    names = made.name(), child.peer()
    who = client("exec", "sh", "-c", "readlink /proc/self/ns/net; cat /proc/$PPID/comm")
    opened = script.client.counter("TcpActiveOpens")
    played(tmp_path, script)
    assert (call.ret, sent.ret, got.ret, opened.ret) == (0, 5, 5, 1)
    assert names[0].ret == names[1].ret == child.accepted.ret
    assert names[0].data == names[1].data == script.client.ipv4
    assert who.data == f"net:[{script.client.inode}]%0aclient%0a"
    assert call.begin_us < call.end_us <= sent.begin_us < sent.end_us


def test_hosts_are_apart(tmp_path: Path) -> None:
    scripts = [Script() for _ in range(5)]
    for script in scripts:
        script.server.process("server").listener(8000)
        script.server.sysctl("tcp_syncookies", 2)
    for found in play(tmp_path, *scripts):
        assert not found.failure
    inodes = {inode for found in read_log(tmp_path).values() for inode in found.inodes.values()}
    assert len(inodes) == 10
    assert Path("/proc/self/ns/net").stat().st_ino not in inodes


def test_held_packets_come_in_order_and_lost_ones_never(tmp_path: Path) -> None:
    script = Script()
    script.server.process("server").listener(8000)
    client = script.client.process("client")
    with script.server.held():
        made = client.socket()
        made.start(script.server.ipv4, 8000)
        script.server.until_sockets(state="SYN_RECV")
        early = script.client.diag(state="ESTABLISHED")
    error = made.outcome()
    with script.client.losing():
        made.send("lost")
        script.client.flush(), script.server.flush()
        lost = script.server.diag("recv_q", state="ESTABLISHED", lport=8000)
    script.server.until_sockets(4, "==", "recv_q", state="ESTABLISHED", lport=8000)  # sent again
    played(tmp_path, script)
    assert (early.ret, error.ret, lost.ret) == (0, 0, 0)


def test_threads_share_sockets_and_forks_inherit_them(tmp_path: Path) -> None:
    script = Script()
    process = script.client.process("parent")
    listener = process.listener(8000)
    waiting = process.thread().at(listener).accept(wait=False)
    child = process.fork("child")
    same = child.at(listener).name()
    child.socket().connect(script.client.ipv4, 8000)
    waiting.accepted.join()
    name = child("exec", "sh", "-c", "cat /proc/$PPID/comm")
    played(tmp_path, script)
    assert same.ret == 8000
    assert waiting.accepted.errno == "none"
    assert name.data == "child%0a"
    assert child.pid != process.pid


def test_a_call_that_must_not_fail_ends_its_scenario_alone(tmp_path: Path) -> None:
    wrong, right = Script(), Script()
    wrong.client.process("client").socket().connect(wrong.server.ipv4, 8000)
    wrong.client.counters()
    right.client.counters()
    first, second = play(tmp_path, wrong, right)
    assert "connect 0 192.0.2.2 8000" in first.failure and "Connection refused" in first.failure
    assert max(first.calls) == len(wrong.lines) - 2
    assert not second.failure


def test_a_socket_that_could_not_be_made_is_waited_for_by_nobody(tmp_path: Path) -> None:
    script = Script()
    made = script.client.process("client").socket(protocol=254, may_fail=True)
    ready = made("poll", 4, -1, may_fail=True)
    played(tmp_path, script)
    assert (made.made.errno, ready.errno) == ("EPROTONOSUPPORT", "EBADF")


def test_signals_end_a_call_and_not_its_process(tmp_path: Path) -> None:
    script = Script()
    client, other = script.client.process("client"), script.client.process("other")
    listener = client.listener(8000)
    client("interrupt", 1)
    other.pause(50_000)
    waiting = listener.accept(may_fail=True)
    client("interrupt", 0)
    played(tmp_path, script)
    assert waiting.accepted.errno == "EINTR"


def test_a_program_that_fails_ends_its_scenario(tmp_path: Path) -> None:
    script, may = Script(), Script()
    script.client.exec("false")
    status = may.client.exec("false", may_fail=True)
    first, second = play(tmp_path, script, may)
    assert "exec false" in first.failure
    may.resolve(second)
    assert (second.failure, status.ret) == ("", 1)


def test_what_does_not_come_is_waited_for_no_longer_than_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.record.script.PATIENCE_S", 1)
    script = Script()
    script.client.until_sockets(1)
    (found,) = play(tmp_path, script)
    assert "waited in vain for >= 1, it is 0" in found.failure


def test_rows_are_those_of_the_host_that_are_whole(tmp_path: Path) -> None:
    script, watch = Script(), Watch("queue", "-i", "1")
    agent, file = script.server.agent, f"{watch.name}.out"
    netns, old = agent("netns"), agent("bytes", file)
    text = 'printf \'{"netns":%s,"lport":%s}\\n\' $0 80 $0 8000 1 8000 $0 80001 >>$1; printf \'{"netns":%s\' $0 >>$1'
    script.server.exec("sh", "-c", text, netns, file)
    wanted = agent("rows", file, old, "netns", netns, "lport", 8000)
    since, whole = agent("rows", file, old), agent("rows", file, 0)
    (tmp_path / file).write_text('{"netns":1,"lport":8000}\n')
    played(tmp_path, script)
    assert netns.ret == script.server.inode
    assert (wanted.ret, since.ret, whole.ret) == (1, 4, 5)


def test_who_is_killed_is_gone_and_a_step_of_it_fails(tmp_path: Path) -> None:
    script = Script()
    mortal = script.client.process("mortal")
    blocked = mortal.listener(8000).accept(wait=False)
    mortal.kill()
    blocked.accepted.join()
    script.client.until_sockets(0, "==")
    mortal.now()
    (found,) = play(tmp_path, script)
    assert "is not there for 'now'" in found.failure
    assert max(found.calls) == len(script.lines) - 2


def test_who_stays_lives_until_the_tools_have_ended(tmp_path: Path) -> None:
    mortal, staying = Script(), Script()
    for script in (mortal, staying):
        script.server.process("server").listener(8000)
    staying.stay()
    (tmp_path / "script").write_text(f"S mortal\n{mortal.text}S staying\n{staying.text}")
    command = [built(), tmp_path / "script", tmp_path / "log", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as actor:
        assert actor.stdin is not None and actor.stdout is not None
        for stage in ("tools", "moment", "played"):
            assert actor.stdout.readline() == f"{stage}\n"
            alive = [
                [pid for pid in found.pids.values() if Path(f"/proc/{pid}").exists()]
                for found in read_log(tmp_path).values()
            ]
            actor.stdin.write("\n")
    assert [len(pids) for pids in alive] == [0, 3]
    assert not any(Path(f"/proc/{pid}").exists() for pid in alive[1])


def test_who_rests_goes_on_when_all_others_have_come_to_the_moment(tmp_path: Path) -> None:
    one, other, third = Script(), Script(), Script()
    one.rest()
    late = one.client.agent("now")
    one.moment()
    early = other.client.agent("pause", 50_000)
    other.moment()
    last = other.client.agent("now")
    end = third.client.agent("pause", 100_000)
    for script, found in zip((one, other, third), play(tmp_path, one, other, third), strict=True):
        assert not found.failure
        script.resolve(found)
    assert max(early.end_us, end.end_us) < late.begin_us < last.begin_us


def test_who_waits_in_a_system_call_is_seen(tmp_path: Path) -> None:
    script = Script()
    waiting, other = script.client.process("waiting"), script.client.process("other")
    child = waiting.listener(8000).accept(wait=False)
    script.client.until_waiting(288, waiting, other, number=1)  # accept4
    other.socket().connect(script.client.ipv4, 8000)
    script.client.until_waiting(288, waiting, other, number=0)
    child.accepted.join()
    played(tmp_path, script)
    assert child.accepted.errno == "none"


def test_nothing_stays_when_the_actor_is_killed(tmp_path: Path) -> None:
    script = Script()
    script.client.process("client").listener(8000).accept(wait=False).accepted.join()
    (tmp_path / "script").write_text(f"S one\n{script.text}")
    command = [built(), tmp_path / "script", tmp_path / "log", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdin is not None and actor.stdout is not None
        assert actor.stdout.readline() == "tools\n"
        actor.stdin.write("\n")
        actor.stdin.flush()
        children = Path(f"/proc/{actor.pid}/task/{actor.pid}/children")
        end = time.monotonic() + DEADLINE_S
        while len(pids := children.read_text().split()) < 3:
            assert time.monotonic() < end
        actor.send_signal(signal.SIGKILL)
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end


def test_no_command_has_two_meanings() -> None:
    """Of two commands with one name the first would be taken."""
    sources = Path(__file__).with_name("actor").glob("*.c")
    names = [name for source in sources for name in re.findall(r'^\t\{"(\w+)", \w+\},$', source.read_text(), re.M)]
    assert len(names) > 50
    assert [name for name in names if names.count(name) > 1] == []
