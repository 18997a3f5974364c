"""The tools' rows against the kernel's counters, over a mix of connections of all kinds, many at a time."""

from __future__ import annotations

import errno
from collections import Counter

from tests.record import PORTS, Script, Test, Watch, recorded
from tests.tools.connect.attempts import CONNECT

ACCEPT = Watch("accept", "--port", PORTS)
LIFE = Watch("life", "--live", "--port", PORTS)
TRACER = Watch("tracer", "--port", PORTS)

CONNECTIONS, SEED = 2000, 1
PORT, REFUSED_PORT = 9000, 9001
KINDS = {
    "client_closes": 600,
    "server_closes": 400,
    "server_resets": 200,
    "client_resets": 200,
    "unread": 100,
    "kept": 100,
    "refused": 200,
    "silent": 100,
    "abandoned": 60,
    "shut_down": 40,
}
ACCEPTED = CONNECTIONS - sum(KINDS[kind] for kind in ("refused", "silent", "abandoned", "shut_down"))
SILENT = {"198.51.100.0/24": "198.51.100.77", "2001:db8:51::/64": "2001:db8:51::77"}
"""Networks that nobody answers from, and an address of each."""
ON_THE_WAY = ("SYN_RECV", "ESTABLISHED", "CLOSE_WAIT", "FIN_WAIT1", "FIN_WAIT2", "CLOSING", "LAST_ACK")


@recorded(CONNECT, ACCEPT, LIFE, TRACER)
def test_a_mix_of_connections(script: Script) -> Test:
    """Four tools at the same time over the same connections: what each has seen is what the kernel has counted."""
    client, server = script.hosts
    for prefix in SILENT:
        server.blackhole(prefix)
    for host in script.hosts:
        host.sysctl("tcp_tw_reuse", 0)
    server.sysctl("somaxconn", 4096)
    server.sysctl("tcp_max_syn_backlog", 4096)
    program = server.process("mix-server")
    served = program.listener(PORT, "::", backlog=4096, dual=True)("mix_serve", ACCEPTED, wait=False)
    made = client.process("mix-client")(
        "mix_connect", CONNECTIONS, SEED, PORT, REFUSED_PORT, server.ipv4, server.ipv6, *SILENT.values()
    )
    served.join()
    for state in ON_THE_WAY:  # a connection outlives its program: the last FIN may be under way
        client.until_sockets(0, "==", state=state, rport=PORT)
        server.until_sockets(0, "==", state=state, lport=PORT)
    counters = {host: host.counters() for host in script.hosts}
    seen = yield
    saw = Counter({name: int(number) for name, _, number in (word.partition("=") for word in made.data.split())})
    counted = {host: asked.counters for host, asked in counters.items()}
    connected = saw["0"]
    outcomes = {errno.errorcode.get(int(name), "none"): saw[name] for name in saw if name.isdigit()}

    # The client's own account adds up.
    assert {kind: saw[kind] for kind in KINDS} == KINDS and sum(KINDS.values()) == CONNECTIONS
    assert outcomes == {
        "none": ACCEPTED,
        "ECONNREFUSED": KINDS["refused"],
        "ETIMEDOUT": KINDS["silent"],
    }
    assert saw["given_up"] == KINDS["abandoned"] + KINDS["shut_down"]

    rows = seen.rows(CONNECT)
    errnos = Counter("given up" if row["outcome"] == "GAVE_UP" else row["errno"] for row in rows)
    assert errnos == outcomes | {"given up": saw["given_up"]}
    assert sum(row["syn_sent"] for row in rows) == counted[client]["TcpActiveOpens"] == CONNECTIONS
    failed = sum(row["outcome"] in ("REFUSED", "TIMED_OUT") for row in rows)
    assert failed == counted[client]["TcpAttemptFails"] > 0
    assert not seen.rows(CONNECT, server)

    assert len(seen.rows(ACCEPT, server)) == counted[server]["TcpPassiveOpens"] == served.ret == connected
    assert not seen.rows(ACCEPT, client)

    stats = seen.run(TRACER).stats
    assert stats is not None
    may_lack = stats["missed"]  # what a kernel that preempts programs has left out, the account has: seen.run()
    for host in script.hosts:
        rows = seen.rows(LIFE, host)
        assert len(rows) == connected
        resets = sum(row["state"] in ("ESTABLISHED", "CLOSE_WAIT") for row in rows)
        assert resets == counted[host]["TcpEstabResets"] > 0
        steps = Counter(row["action"] for row in seen.rows(TRACER, host))
        expected = Counter({"CONNECT" if host is client else "ACCEPT": connected, "CLOSE": connected})
        assert steps <= expected
        may_lack -= (expected - steps).total()
    assert may_lack >= 0
