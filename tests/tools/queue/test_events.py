"""`queue --events`: each refusal, against the kernel's own counters."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from tests.record import Call, Script, Socket, Test, Watch, recorded
from tests.record.script import AF_INET, IPPROTO_TCP, TCP_FASTOPEN, TCP_SYNCNT
from tests.tools.queue.refusals import (
    BACKLOG,
    EVENTS,
    FAMILIES,
    PORT,
    TABLE,
    TRACED,
    Run,
    all_events,
    check,
    moved,
    needs_exact,
    values,
)

STACKS_PORT = 8100
STACKS = Watch("queue", "--events", "--stack", "--lport", str(STACKS_PORT))
SOCK_STREAM, IPPROTO_MPTCP = 1, 262
SYSCTLS = {"somaxconn": "somaxconn", "max_syn_backlog": "tcp_max_syn_backlog", "syncookies": "tcp_syncookies"}


def limits(script: Script) -> dict[str, Call]:
    """What the sysctls of the server say, by the names of the columns."""
    return {column: script.server.sysctl(name) for column, name in SYSCTLS.items()}


def check_event(run: Run, row: dict[str, Any], sysctls: dict[str, Call]) -> None:
    assert row["netns"] == run.host.inode
    assert (row["laddr"], row["lport"], row["family"]) == (run.laddr, run.port, int(run.kind))
    assert row["raddr"] == run.peer.address(run.kind)
    assert row["rport"] in run.ports()
    assert (row["pid"], row["comm"], row["uid"]) == (run.owner.pid, "server", 0)
    assert (row["accept_queue"], row["accept_limit"]) == (BACKLOG + 1, BACKLOG)
    assert {name: row[name] for name in sysctls} == {name: call.ret for name, call in sysctls.items()}
    assert (row["cause"], row["answer"], row["count"]) == ("ACCEPT_QUEUE_FULL", "NONE", 1)


@pytest.mark.concurrent  # the counters of the processor that refuses
@pytest.mark.parametrize("family", FAMILIES)
@recorded(EVENTS, TRACED)
def test_the_queue_is_full_at_the_syn(script: Script, family: str) -> Test:
    sysctls = limits(script)
    run = Run(script, family)
    refused = run.overflow_at_syn(3)
    found = script.server.sockets()
    run.end()
    seen = yield
    needs_exact(seen)
    (listener,) = (one for one in found.sockets if one.state == "LISTEN")
    assert (listener.recv_q, listener.send_q) == (BACKLOG + 1, BACKLOG)
    rows = all_events(seen, run)
    assert values(rows, "rport") == run.ports(*refused)
    for row in rows:
        check_event(run, row, sysctls)
        assert (row["step"], row["syn_queue"]) == ("SYN", 0)


@pytest.mark.concurrent
@pytest.mark.parametrize("family", FAMILIES)
@recorded(EVENTS, TRACED)
def test_the_queue_is_full_at_the_final_ack(script: Script, family: str) -> Test:
    sysctls = limits(script)
    run = Run(script, family)
    run.overflow_at_ack(4)
    before = run.overflows()
    for made in run.clients:
        made.send("the server throws this away, too")
    run.until_overflows(before, 4)
    kept, until_now = script.server.sockets(), run.overflows()
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert values(rows, "rport") == {found.rport for found in kept.sockets if found.state == "SYN_RECV"}
    assert len(values(rows, "rport")) == 4
    assert all(count >= 2 for count in Counter(row["rport"] for row in rows).values())
    for row in rows:
        check_event(run, row, sysctls)
        assert row["step"] == "ACK"
    rows.sort(key=lambda row: row["time"])
    before_the_end = rows[: until_now.ret - run.before.counters["TcpExtListenOverflows"]]
    assert len(before_the_end) >= 8
    assert all(4 <= row["syn_queue"] <= 5 for row in before_the_end)
    assert all(row["syn_queue"] <= 4 for row in rows[len(before_the_end) :])  # others have been reset already


@pytest.mark.concurrent
@recorded(EVENTS, TRACED)
def test_ten_runs_in_a_row_agree(script: Script) -> Test:
    server, client = script.server.process("server"), script.client.process("client")
    runs, late = [], []
    for number in range(10):
        run = Run(script, FAMILIES[number % 3], port=8000 + number, owner=server, client=client)
        run.overflow_at_ack(1 + number % 4)
        late.append(run.start(2))
        script.server.flush()
        run.end()
        runs.append(run)
        run.listener.close()
    seen = yield
    needs_exact(seen)
    for number, run in enumerate(runs):
        rows = run.events(seen)
        steps = Counter(row["step"] for row in rows)
        assert {row["rport"] for row in rows if row["step"] == "SYN"} == run.ports(*late[number])
        assert steps["SYN"] >= 2
        assert steps["ACK"] >= 1 + number % 4
    assert len(all_events(seen, runs[0], runs[-1])) == sum(len(run.events(seen)) for run in runs)


@recorded(EVENTS, TRACED)
def test_clients_that_send_and_close(script: Script) -> Test:
    """Ten of them, as in the lab's accept-overflow: all are told that they are connected, four stay requests."""
    run = Run(script)
    cookie = run.listener.cookie()
    run.overflow_at_ack(4)
    run.finish(*run.clients)
    script.client.agent("link", "down")
    script.server.flush(), script.client.flush()
    found = script.server.sockets()
    run.after = script.server.counters()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert values(rows, "cookie", "pid", "comm") == {(cookie.ret, run.owner.pid, "server")}
    assert values(rows, "laddr", "lport") == {run.target}
    assert values(rows, "cause", "step", "answer") == {("ACCEPT_QUEUE_FULL", "ACK", "NONE")}
    assert values(rows, "accept_queue", "accept_limit") == {(6, 5)}
    (listener,) = (one for one in found.sockets if one.state == "LISTEN")
    assert (listener.recv_q, listener.send_q, listener.cookie) == (6, 5, cookie.ret)
    kept = {one.rport for one in found.sockets if one.state == "SYN_RECV"}
    assert values(rows, "rport") == kept
    assert len(kept) == 4


@recorded(EVENTS, TRACED)
def test_clients_one_after_the_other(script: Script) -> Test:
    """As in the lab's accept-overflow-serial: the seventh is refused at its SYN, and each repeat of it."""
    run = Run(script)
    cookie = run.listener.cookie()
    for number in range(1, BACKLOG + 2):
        (made,) = run.connect()
        run.waiting(number)
        run.finish(made)
    late = run.client.socket()
    late.option(IPPROTO_TCP, TCP_SYNCNT, 1)
    before = script.client.counter("TcpExtTCPSynRetrans")
    call = late.connect(*run.target, may_fail=True)
    repeated, local = script.client.counter("TcpExtTCPSynRetrans"), late.name()
    script.server.flush()
    run.after = script.server.counters()
    seen = yield
    needs_exact(seen)
    assert call.errno == "ETIMEDOUT"
    rows = all_events(seen, run)
    assert len(rows) == 1 + repeated.ret - before.ret >= 2
    assert values(rows, "cookie", "pid", "comm", "rport") == {(cookie.ret, run.owner.pid, "server", local.ret)}
    assert values(rows, "cause", "step", "answer") == {("ACCEPT_QUEUE_FULL", "SYN", "NONE")}
    assert values(rows, "accept_queue", "accept_limit", "syn_queue") == {(6, 5, 0)}


@recorded(EVENTS, TRACED)
def test_a_reset_in_place_of_silence(script: Script) -> Test:
    script.server.sysctl("tcp_abort_on_overflow", 1)
    run = Run(script)
    run.overflow_at_ack(4)
    script.server.until_counter("TcpExtEmbryonicRsts", 4, "==")
    (late,) = run.start()
    # Its SYN once more, which a RST would have prevented.
    script.client.until_sockets(1, field="retransmits", state="SYN_SENT", lport=run.clients[late])
    script.server.flush()
    run.end()
    seen = yield
    needs_exact(seen)
    rows = all_events(seen, run)
    assert [(row["step"], row["answer"]) for row in rows[:4]] == [("ACK", "RST")] * 4
    assert len(rows) >= 4 + 2
    for row in rows[4:]:
        assert (row["step"], row["answer"]) == ("SYN", "NONE")  # a SYN never gets a RST
        assert row["rport"] in run.ports(late)
    assert values(rows, "abort_on_overflow") == {True}
    assert run.change("EmbryonicRsts") == 4


@recorded(EVENTS, TRACED, STACKS)
def test_stacks_of_one_port(script: Script) -> Test:
    other, run = Run(script), Run(script, port=STACKS_PORT)
    other.overflow_at_syn(1)
    run.overflow_at_ack(1)
    run.start()
    script.server.flush()
    other.end(), run.end()
    seen = yield
    needs_exact(seen)
    lports = Counter(row["lport"] for row in all_events(seen, other, run))
    tool = seen.run(STACKS)
    assert tool.stats is not None
    assert tool.stats["shown"] == len(tool.rows)
    assert tool.stats["filtered"] >= lports[other.port] >= 1
    assert values(tool.rows, "lport") == {run.port}
    rows = seen.rows(STACKS)
    assert len(rows) == lports[run.port]
    assert values(rows, "step") == {"SYN", "ACK"}
    for row in rows:
        functions = [frame.partition("+")[0] for frame in row["stack"]]
        way = ["tcp_v4_rcv"]
        if row["step"] == "SYN":
            way = ["tcp_conn_request", "tcp_rcv_state_process", "tcp_v4_do_rcv", *way]
        elif seen.machine.functions_can_be_hooked:
            way = ["tcp_check_req", *way]  # it has returned when the tracepoint fires
        # A function whose return another tool hooks is there twice: it calls a trampoline, and that calls it.
        assert [name for name, _ in itertools.groupby(name for name in functions if name in way)] == way


@recorded(EVENTS, TRACED)
def test_a_listener_closes_and_another_one_opens(script: Script) -> Test:
    """Both at the same port, and probably at the same address in the kernel: the second does not inherit anything."""
    server = script.server.process("server")
    first = Run(script, owner=server)
    first.overflow_at_ack(2)
    cookie = first.listener.cookie()
    first.listener.close()
    outcomes = [made.outcome() for made in first.start(2)]  # nobody listens
    second = Run(script, owner=server)
    second.overflow_at_syn(1)
    own = second.listener.cookie()
    for made in first.clients:
        made.close()
    second.end()
    seen = yield
    needs_exact(seen)
    assert {call.ret for call in outcomes} == {111}  # ECONNREFUSED
    rows = all_events(seen, first, second)
    assert {row["step"] for row in rows if row["cookie"] == cookie.ret} == {"ACK"}
    assert {row["step"] for row in rows if row["cookie"] == own.ret} == {"SYN"}
    assert values(rows, "cookie") <= {cookie.ret, own.ret}


@recorded(EVENTS, TRACED)
def test_fast_open(script: Script) -> Test:
    """A SYN with data makes a child inside of tcp_conn_request: the inner function is entered before the outer ends."""
    script.server.sysctl("tcp_fastopen", 0x602)
    script.client.sysctl("tcp_fastopen", 0x5)
    run = Run(script)
    run.listener.option(IPPROTO_TCP, TCP_FASTOPEN, 16)
    before = run.overflows()
    for _ in range(BACKLOG + 3):
        made = run.client.socket()
        made.linger()
        made.blocking(False)
        made.send_to("early", *run.target, may_fail=True)
        run.add(made)
    run.until_overflows(before, 2)
    run.end()
    seen = yield
    needs_exact(seen)
    assert run.change("TCPFastOpenPassive") >= BACKLOG
    rows = all_events(seen, run)
    assert run.change("ListenOverflows") == run.change("ListenDrops") >= 2
    assert values(rows, "cause", "step") == {("ACCEPT_QUEUE_FULL", "SYN")}


@recorded(EVENTS, TRACED, TABLE)
def test_mptcp(script: Script) -> Test:
    """The listener is a TCP socket that stands behind an MPTCP socket, which is what the process holds."""
    owner, client = script.server.process("server"), script.client.process("client")
    script.server.process("other").listener(8001)
    before, enabled = script.server.counters(), script.server.agent("sysctl", "mptcp/enabled", may_fail=True)
    listener = Socket(owner, owner.slot())
    made = owner("socket", listener.slot, AF_INET, SOCK_STREAM, IPPROTO_MPTCP, may_fail=True)
    listener.bind(script.server.ipv4, PORT, may_fail=True)  # without MPTCP what follows is refused and harmless
    listener.listen(BACKLOG, may_fail=True)
    clients = []
    for _ in range(BACKLOG + 3):
        clients.append(client.socket())
        clients[-1].start(script.server.ipv4, PORT)
        script.server.flush(), script.client.flush(), script.server.flush()  # its handshake has ended, well or not
    script.server.until_rows(TABLE, lport=8001)
    for each in clients:
        each.close()  # none sends its SYN again
    script.server.flush()
    after = script.server.counters()
    seen = yield
    if made.errno != "none":
        assert not seen.machine.kernel.has_type("mptcp_sock") or enabled.ret == 0
        pytest.skip("this kernel has no MPTCP")
    (found, *_) = seen.rows(TABLE, script.server, lport=PORT)[::-1]
    assert (found["accept_queue"], found["accept_limit"], found["pid"]) == (6, 5, owner.pid)
    needs_exact(seen)
    rows = seen.rows(EVENTS)
    check(rows, moved(before, after), exact=True)
    assert len(rows) >= 2
    assert values(rows, "cause", "step", "accept_queue", "pid") == {("ACCEPT_QUEUE_FULL", "SYN", 6, owner.pid)}
