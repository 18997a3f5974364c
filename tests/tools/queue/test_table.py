"""`queue` as a table of listeners, against sock_diag, the kernel's own counters and the test's clock.

A step that must come after a look waits for two rows of a listener: the second one is of a look that began later than
the wait. Of a new listener one row will do.
"""

from __future__ import annotations

from dataclasses import replace

from tcpscope.tools.queue import _Rates
from tests.record import PORTS, Process, Script, Test, Watch, recorded
from tests.test_sampling import LISTENER
from tests.tools.queue.refusals import (
    EVENTS,
    PORT,
    SMALL_BACKLOG,
    TABLE,
    TRACED,
    Run,
    all_events,
    is_exact,
    needs_exact,
    values,
)

FOUR = Watch("queue", "-d", "0.1", "-4", "--port", PORTS, moment=True)
SIX = Watch("queue", "-d", "0.1", "-6", "--port", PORTS, moment=True)


@recorded(FOUR, SIX)
def test_a_listener_of_both_families_is_of_each(script: Script) -> Test:
    """Witness: to which of the listeners a client of that family gets."""
    shown = {"4": {"4", "mapped"}, "6": {"6", "only6", "mapped"}}
    families = ("4", "6", "mapped", "only6")
    server, client = script.server.process("server"), script.client.process("client")
    runs = {name: Run(script, name, port=8000 + n, owner=server) for n, name in enumerate(families)}
    calls = {
        (kind, name): client.socket(kind).connect(script.server.address(kind), run.port, may_fail=True)
        for kind in shown
        for name, run in runs.items()
    }
    script.moment()
    seen = yield
    for kind, watch in (("4", FOUR), ("6", SIX)):
        assert sorted(row["lport"] for row in seen.rows(watch)) == sorted(runs[name].port for name in shown[kind])
        assert {name for name in runs if calls[kind, name].errno == "none"} == shown[kind]


@recorded(TABLE, EVENTS, TRACED)
def test_as_sock_diag_and_the_counters_say(script: Script) -> Test:
    run = Run(script, "mapped")
    cookie, fd = run.listener.cookie(), run.listener.fd()
    run.overflow_at_ack(4)
    run.end()
    at_ack = run.overflows()
    run.start(2)
    run.until_overflows(at_ack, 2)
    run.end()
    sysctls = {
        name: script.server.sysctl(name if name == "somaxconn" else f"tcp_{name}")
        for name in ("somaxconn", "max_syn_backlog", "syncookies")
    }
    found = script.server.sockets()
    script.server.until_rows(TABLE, lport=run.port, fd=fd)
    seen = yield
    counted = run.change("ListenOverflows")
    row = seen.rows(TABLE, script.server, lport=run.port)[-1]
    # The socket counts a refused ACK once more, when the packet is thrown away; as it does a RST for a request.
    assert row["drops"] >= counted + at_ack.ret
    (listener,) = (one for one in found.sockets if one.state == "LISTEN")
    assert (row["accept_queue"], row["accept_limit"]) == (listener.recv_q, listener.send_q) == (6, 5)
    assert (row["laddr"], row["family"], row["netns"]) == ("::", 6, script.server.inode)
    assert row["limit_from"] == "listen()"
    assert row["cookie"] == listener.cookie == cookie.ret
    assert {name: row[name] for name in sysctls} == {name: call.ret for name, call in sysctls.items()}
    assert row["abort_on_overflow"] is False
    assert row["holders"] == [{"pid": run.owner.pid, "comm": "server", "uid": 0, "fd": fd.ret}]
    assert (row["pid"], row["comm"]) == (run.owner.pid, "server")
    if is_exact(seen):
        assert len(all_events(seen, run)) == counted
        assert row["overflows"] == row["overflows_at_syn"] + row["overflows_at_ack"] == counted
        assert (row["overflows_at_syn"], row["overflows_at_ack"]) == (counted - at_ack.ret, at_ack.ret)
        assert row["syn_drops"] == row["cookies"] == 0
    else:
        assert row["overflows"] is row["overflows_at_syn"] is row["overflows_at_ack"] is row["cookies"] is None


@recorded(TABLE, EVENTS, TRACED)
def test_a_full_syn_queue(script: Script) -> Test:
    server = script.server.process("server")
    script.server.sysctl("tcp_syncookies", 0)
    first = Run(script, backlog=SMALL_BACKLOG, owner=server)
    dropping = first.listener.cookie()
    first.flood(20)
    requests = first.requests()
    script.server.until_rows(TABLE, lport=first.port)
    first.end()
    first.listener.close()
    script.server.sysctl("tcp_syncookies", 1)
    second = Run(script, owner=server)
    answering = second.listener.cookie()
    second.flood(20)
    script.server.until_rows(TABLE, lport=second.port)
    second.end()
    seen = yield
    needs_exact(seen)
    all_events(seen, first, second)
    row = seen.rows(TABLE, script.server, cookie=dropping.ret)[-1]
    assert row["syn_queue"] == requests.ret == 20 - row["syn_drops"]
    assert row["syn_drops"] == row["drops"] == first.change("TCPReqQFullDrop") == first.change("ListenDrops")
    assert row["cookies"] == 0
    row = seen.rows(TABLE, script.server, cookie=answering.ret)[-1]
    assert row["cookies"] == second.change("SyncookiesSent") > 0
    assert (row["drops"], row["syn_drops"]) == (0, 0)


@recorded(TABLE)
def test_accepts_and_waiting(script: Script) -> Test:
    run = Run(script)
    script.server.until_rows(TABLE, 1, lport=run.port)
    earliest = run.client.now()
    run.fill(1)
    latest = run.client.now()
    run.connect(2)  # younger ones change nothing
    run.waiting(3)
    paused = run.client.pause(200_000)
    script.server.until_rows(TABLE, lport=run.port)
    run.connect(1)
    run.waiting(4)
    four = run.client.now()
    script.server.until_rows(TABLE, lport=run.port)
    before = run.owner.now()
    for _ in range(4):
        run.listener.accept()
    after = run.owner.now()
    script.server.until_rows(TABLE, lport=run.port)
    idle = run.owner.pause(100_000)
    script.server.until_rows(TABLE, lport=run.port)
    run.fill(1)
    last = run.owner.now()
    seen = yield
    rows = seen.rows(TABLE, script.server, lport=run.port)
    lengths = [row["accept_queue"] for row in rows]
    empty = rows[: lengths.index(3)]
    empty = [row for row in empty if row["accept_queue"] == 0]
    assert empty
    assert values(empty, "accepts", "since_accept_ms", "oldest_wait_ms") == {(0, None, None)}
    with_three = [row["oldest_wait_ms"] for row in rows[: lengths.index(4)] if row["accept_queue"] == 3]
    with_four = [row["oldest_wait_ms"] for row in rows if row["accept_queue"] == 4]
    assert_between(with_three[-1], paused.end_us - latest.begin_us, four.end_us - earliest.begin_us)
    assert_between(with_four[-1], four.end_us - latest.begin_us, after.end_us - earliest.begin_us)
    idle_rows = [row for row in rows if (row["accepts"], row["accept_queue"]) == (4, 0)]
    assert values(idle_rows, "oldest_wait_ms") == {None}
    assert_between(idle_rows[0]["since_accept_ms"], 0, idle.begin_us - before.begin_us)
    assert_between(idle_rows[-1]["since_accept_ms"], idle.end_us - after.end_us, last.end_us - before.begin_us)


def assert_between(found_ms: int, shortest_us: float, longest_us: float) -> None:
    assert shortest_us / 1000 - 1 <= found_ms <= longest_us / 1000


@recorded(TABLE)
def test_where_the_limit_comes_from(script: Script) -> Test:
    script.server.sysctl("somaxconn", 64)
    cut, own = Run(script, backlog=1000, port=8000), Run(script, backlog=63, port=8001)
    script.server.until_rows(TABLE, 1, lport=cut.port), script.server.until_rows(TABLE, 1, lport=own.port)
    script.server.sysctl("somaxconn", 10)
    script.server.until_rows(TABLE, lport=cut.port)
    seen = yield
    rows = seen.rows(TABLE, script.server, lport=cut.port)
    assert [row["somaxconn"] for row in rows] == sorted((row["somaxconn"] for row in rows), reverse=True)
    assert values(rows, "accept_limit", "limit_from", "somaxconn") == {
        (64, "somaxconn", 64),
        (64, "listen(), before somaxconn was lowered", 10),
    }
    rows = seen.rows(TABLE, script.server, lport=own.port, somaxconn=64)
    assert values(rows, "accept_limit", "limit_from") == {(63, "listen()")}


def until_walked(script: Script, process: Process, port: int) -> None:
    """Until the tool has walked over all open files: it knows the descriptor of a listener that is new now."""
    made = process.listener(port)
    script.server.until_rows(TABLE, 1, lport=port, fd=made.fd())


@recorded(TABLE)
def test_every_holder_is_named(script: Script) -> Test:
    """A listener of one process, inherited by another; and sockets that share a port, each with an owner."""
    parent, second = script.server.process("parent"), script.server.process("second")
    listener = parent.listener(PORT, "0.0.0.0", backlog=7, reuse_port=True)
    fd = listener.fd()
    child = parent.fork("child")
    until_walked(script, second, PORT + 1)
    second.listener(PORT, "0.0.0.0", backlog=9, reuse_port=True)
    until_walked(script, second, PORT + 2)
    parent.kill()
    until_walked(script, second, PORT + 3)
    seen = yield
    rows = seen.rows(TABLE, script.server, lport=PORT)
    both = [row for row in rows if {held["comm"] for held in row["holders"]} == {"parent", "child"}]
    assert both
    for row in both:
        assert {(held["pid"], held["fd"]) for held in row["holders"]} == {(parent.pid, fd.ret), (child.pid, fd.ret)}
        assert (row["pid"], row["comm"]) == (child.pid, "child")  # the parent leaves it to its child
        assert row["accept_limit"] == 7
    others = [row for row in rows if row["comm"] == "second"]
    assert others
    assert {(row["accept_limit"], len(row["holders"]), row["pid"]) for row in others} == {(9, 1, second.pid)}
    left = [row for row in rows if row["accept_limit"] == 7][-1]
    assert [(held["comm"], held["pid"]) for held in left["holders"]] == [("child", child.pid)]
    assert left["pid"] == child.pid


@recorded(TABLE)
def test_a_new_listener_does_not_inherit(script: Script) -> Test:
    server, client = script.server.process("server"), script.client.process("client")
    cookies = []
    for _ in range(3):
        run = Run(script, owner=server, client=client)
        cookies.append(run.listener.cookie())
        script.server.until_rows(TABLE, 1, cookie=cookies[-1])
        run.fill(3)
        for _ in range(3):
            run.listener.accept().close()
        script.server.until_rows(TABLE, lport=run.port)
        run.listener.close()
    seen = yield
    for cookie in cookies:
        rows = seen.rows(TABLE, script.server, cookie=cookie.ret)
        first = rows[0]
        assert (first["drops"], first["accepts"], first["since_accept_ms"]) == (0, 0, None)
        assert first["overflows"] in (0, None)
        assert first["accepts_per_s"] in (0.0, None)
        assert [row["accepts"] for row in rows] == sorted(row["accepts"] for row in rows)
        assert rows[-1]["accepts"] == 3


def test_rates_keep_nothing_of_listeners_that_are_gone() -> None:
    rates = _Rates()
    assert rates.of([replace(LISTENER, cookie=n, accepts=n) for n in range(100)]) == {}
    again = replace(LISTENER, cookie=7, accepts=9)
    assert rates.of([again]).keys() == {again.key}
    assert len(rates._before) == 1
