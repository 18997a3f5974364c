"""Traffic at which `diagnose` stays silent: nothing above info is found about its two hosts.

Each scene shows by counters that it did what it says. The recorded ones play side by side. What they leave open stays
until the tool has ended.
"""

from __future__ import annotations

import json
from socket import IPPROTO_TCP, SOL_SOCKET, TCP_NODELAY
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.healthy import CASES, Healthy
from tests.conftest import RunningTool
from tests.record import Call, Script, Seen, Test, recorded
from tests.record.script import Process, Socket
from tests.tools.queue.refusals import DIAGNOSE

ROUNDS = 10
SECONDS = 1.5


def test_ten_times_in_a_row(lab: Lab, run_tool: type[RunningTool]) -> None:
    """All cases at once on one machine, ten times; each time looked at by another `diagnose`.

    The path that loses segments has a link of its own. There segments go one by one. So would those of the bulk
    transfer, which are more than a veth takes.
    """
    ports = {case: 7000 + 10 * n for n, case in enumerate(CASES)} | {"port-scan": 8500}  # 500 below to 500 above
    with Lab() as path:
        scenes = [
            (path if case == "lossy-path" else lab, Healthy(case=case, seconds=SECONDS, port=port))
            for case, port in ports.items()
        ]
        for where, scene in scenes:
            scene.setup(where)
        hosts = ",".join(str(host.inode) for where in (lab, path) for host in where.hosts)
        for again in range(1, ROUNDS + 1):
            with run_tool("diagnose", "--netns", hosts, "-d", "300") as tool:
                for _, scene in scenes:
                    scene.begin()
                for _, scene in scenes:
                    scene.played()
            assert tool.done is not None
            assert above_info([json.loads(line) for line in tool.done.stdout.splitlines()]) == [], f"time {again}"
        outcomes = {case: scene.outcome(where) for (where, scene), case in zip(scenes, ports, strict=True)}
    assert outcomes["lossy-path"].client_counters["TcpRetransSegs"] >= ROUNDS
    counters = outcomes["web-server"].client_counters  # of all but that
    done = [scene.done for where, scene in scenes if where is lab]
    opened = sum(each.get("connected", 0) + each.get("refused", 0) for each in done)
    assert counters["TcpActiveOpens"] == opened > ROUNDS * 1000
    assert counters["TcpAttemptFails"] >= ROUNDS * 999
    assert counters["TcpExtTW"] > ROUNDS * 100


def above_info(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was found, at whatever time."""
    found = [record["began"] for record in records if "began" in record]
    found += [finding for record in records if "summary" in record for finding in record["summary"]["findings"]]
    return [finding for finding in found if finding["severity"] != "info"]


SO_MAX_PACING_RATE = 47
PAGE = 4000  # bytes of an answer: actor/bytes.c
LOSS = "table inet loss { chain in { type filter hook input priority 0; tcp dport %d numgen inc mod 1000 999 drop; }; }"


def assert_silent(seen: Seen, script: Script) -> None:
    inodes = [host.inode for host in script.hosts]
    found = above_info([{"summary": seen.run(DIAGNOSE).summary}])
    assert [finding for finding in found if finding["facts"]["netns"] in inodes] == []


class Traffic:
    """A server with workers, and clients; both hosts' counters before and after.

    Each scene has a port of its own: what a kernel runs no program for is known by its port (record/unseen.py). Two
    scenes consist of data, of which no segment matters here. Their ports are not looked at for that.
    """

    after: dict[str, Call]

    def __init__(self, script: Script, port: int, workers: int = 0, clients: int = 1) -> None:
        self._script = script
        self.before = {host.role: host.counters() for host in script.hosts}
        self.server = script.server.process("server")
        self.listener = self.server.listener(port, backlog=128)
        self.port = port
        self.target = (script.server.ipv4, port)
        self.workers = [self.server.fork("worker") for _ in range(workers)]
        self.clients = [script.client.process("client") for _ in range(clients)]

    def connect(self, client: Process, worker: Process | None = None) -> tuple[Socket, Socket]:
        """A connection that a worker has accepted."""
        near = client.socket()
        near.connect(*self.target)
        near.option(IPPROTO_TCP, TCP_NODELAY, 1)
        return near, (worker.at(self.listener) if worker else self.listener).accept()

    def short(self, number: int) -> None:
        """So many connections of each client, one question each, all clients at a time. Clients close first."""
        answers = [worker("answer_all", self.listener.slot, number, wait=False) for worker in self.workers]
        asks = [client("ask_all", *self.target, number, wait=False) for client in self.clients]
        for each in (*asks, *answers):
            each.join()

    def end(self) -> None:
        """What remains stays until the tools have ended."""
        for host in self._script.hosts:
            host.flush()
        self.after = {host.role: host.counters() for host in self._script.hosts}
        self._script.stay()

    def change(self, role: str, name: str) -> int:
        """By how much a counter of that host has moved."""
        return self.after[role].counters[name] - self.before[role].counters[name]


@recorded(DIAGNOSE)
def test_busy_web_server(script: Script) -> Test:
    """Four workers; each of four clients makes five connections, with a hundred requests on each."""
    traffic = Traffic(script, 7300, workers=4, clients=4)
    pairs = list(zip(traffic.clients, traffic.workers, strict=True))
    got: list[Call] = []
    for _ in range(5):
        made = [traffic.connect(client, worker) for client, worker in pairs]
        answers = [far("answer", wait=False) for _, far in made]
        got += (asks := [near("ask", 100, wait=False) for near, _ in made])
        for ask, (near, _) in zip(asks, made, strict=True):
            ask.join()
            near.close()
        for answer, (_, far) in zip(answers, made, strict=True):
            answer.join()
            far.close()
    traffic.end()
    seen = yield
    assert sum(ask.ret for ask in got) == 4 * 5 * 100 * PAGE
    assert traffic.change("server", "TcpPassiveOpens") == 4 * 5
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_many_short_connections(script: Script) -> Test:
    traffic = Traffic(script, 7301, workers=4, clients=4)
    traffic.short(200)
    traffic.end()
    seen = yield
    assert traffic.change("server", "TcpPassiveOpens") == traffic.change("client", "TcpActiveOpens") == 800
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_time_wait_in_numbers_at_a_proxy(script: Script) -> Test:
    """A fifth of its local ports."""
    with script.older():
        script.client.sysctl("ip_local_port_range", "30000 34999")
    traffic = Traffic(script, 7302, workers=1, clients=1)
    traffic.short(1000)
    waiting = script.client.diag(state="TIME_WAIT", rport=traffic.port)
    traffic.end()
    seen = yield
    assert waiting.ret == 1000
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_bulk_transfer(script: Script) -> Test:
    traffic = Traffic(script, 5303)
    near, far = traffic.connect(*traffic.clients)
    size = 64 << 20
    read = far.read(size, wait=False)
    near.send_all(size)
    read.join()
    traffic.end()
    seen = yield
    assert read.ret == size
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_path_that_loses_one_segment_in_a_thousand(script: Script) -> Test:
    """With a round trip of 20 ms where the kernel has netem."""
    traffic = Traffic(script, 5304)
    script.client.exec("ip", "link", "set", "dev", "veth0", "gso_max_segs", "1")
    dropping = script.server.exec("nft", LOSS % traffic.port, may_fail=True)
    for host in script.hosts:
        netem = ("netem", "delay", "10ms", "limit", "100000")
        host.exec("tc", "qdisc", "replace", "dev", "veth0", "root", *netem, may_fail=True)
    near, far = traffic.connect(*traffic.clients)
    near.option(SOL_SOCKET, SO_MAX_PACING_RATE, 10_000_000)  # no queue overflows
    size = 15_000_000  # ten thousand segments
    read = far.read(size, wait=False)
    near.send_all(size)
    read.join()
    near.until_acknowledged()
    traffic.end()
    seen = yield
    if dropping.ret:
        pytest.skip("this kernel has no nftables with numgen")
    assert read.ret == size
    assert traffic.change("client", "TcpOutSegs") >= 10_000
    assert 10 <= traffic.change("client", "TcpRetransSegs") < 100
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_idle_connections(script: Script) -> Test:
    """Fifty that are older than the watch, and fifty that are not."""
    with script.older():
        traffic = Traffic(script, 7305)
        older = [traffic.connect(*traffic.clients) for _ in range(50)]
    made = older + [traffic.connect(*traffic.clients) for _ in range(50)]
    for near, far in made:
        near.send("hello")
        far.read(5)
    open_ones = [host.diag(state="ESTABLISHED") for host in script.hosts]
    traffic.end()
    seen = yield
    assert [each.ret for each in open_ones] == [100, 100]
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_half_closed_streams(script: Script) -> Test:
    """Twelve clients have said all that they have to say; the server goes on for more than ten seconds."""
    traffic = Traffic(script, 7306)
    made = [traffic.connect(*traffic.clients) for _ in range(12)]
    for near, far in made:
        near.send("give me all")
        near.shutdown()
        far.until_end()
    script.client.until_sockets(12, "==", state="FIN_WAIT2", rport=traffic.port)
    half = script.server.diag(state="CLOSE_WAIT", lport=traffic.port)
    for _ in range(12):
        traffic.server.pause(1_000_000)
        for near, far in made:
            far.send("a piece of it")
            near.read(13)
    for near, far in made:
        far.close()
        near.until_end()
    traffic.end()
    seen = yield
    assert half.ret == 12
    assert traffic.change("client", "TcpInSegs") >= 12 * 12
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_health_check_that_is_refused(script: Script) -> Test:
    """Once a second, while others are served."""
    traffic = Traffic(script, 7307)
    checker = script.client.process("checker")
    checks: list[Call] = []
    near, far = traffic.connect(*traffic.clients)
    for _ in range(10):
        check = checker.socket()
        checks.append(check.connect(script.server.ipv4, traffic.port + 1, may_fail=True))
        check.close()
        near.send("hello")
        far.read(5)
        checker.pause(1_000_000)
    traffic.end()
    seen = yield
    assert {check.errno for check in checks} == {"ECONNREFUSED"}
    assert traffic.change("server", "TcpOutRsts") == traffic.change("client", "TcpAttemptFails") == 10
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_port_scan(script: Script) -> Test:
    """By connect() over sixty ports, and by SYNs alone over sixty others; one of each finds the server."""
    traffic = Traffic(script, 7400)
    (client,) = traffic.clients
    for port in range(traffic.port - 59, traffic.port + 1):
        tried = client.socket()
        tried.connect(script.server.ipv4, port, may_fail=True)
        tried.close()
    traffic.listener.accept().close()
    for port in range(traffic.port, traffic.port + 60):
        script.client.segment(script.client.ipv4, 20_000, script.server.ipv4, port)
    traffic.end()
    seen = yield
    assert traffic.change("server", "TcpOutRsts") == 59 + 59
    assert traffic.change("client", "TcpAttemptFails") == 59
    assert traffic.change("server", "TcpPassiveOpens") == 1
    assert_silent(seen, script)


@recorded(DIAGNOSE)
def test_rolling_restart(script: Script) -> Test:
    """Two instances. Each ends what it has and is started anew; twice a client tries one that is away."""
    traffic = Traffic(script, 7310)
    (client,), first, second = traffic.clients, traffic.port, traffic.port + 1
    instances = {first: traffic.server, second: script.server.process("server")}
    listeners = {first: traffic.listener, second: instances[second].listener(second, backlog=128)}

    def serve(port: int) -> tuple[Socket, Socket]:
        near = client.socket()
        near.connect(script.server.ipv4, port)
        far = listeners[port].accept()
        near.send("hello")
        far.read(5)
        return near, far

    refused: list[Call] = []
    for port, other in ((first, second), (second, first)):
        for _ in range(10):
            for each in (port, other):
                near, far = serve(each)
                near.close()
                far.close()
        kept = [serve(port) for _ in range(5)]
        listeners[port].close()
        for near, far in kept:
            far.close()
            near.until_end()
            near.close()
        instances[port].exit()
        for _ in range(2):
            tried = client.socket()
            refused.append(tried.connect(script.server.ipv4, port, may_fail=True))
            tried.close()
            near, far = serve(other)
            near.close()
            far.close()
        instances[port] = script.server.process("server")
        listeners[port] = instances[port].listener(port, backlog=128)
    for port in listeners:
        serve(port)
    traffic.end()
    seen = yield
    assert [call.errno for call in refused] == ["ECONNREFUSED"] * 4
    assert traffic.change("server", "TcpPassiveOpens") == 2 * (20 + 5 + 2) + 2
    assert traffic.change("server", "TcpOutRsts") == 4
    assert_silent(seen, script)
