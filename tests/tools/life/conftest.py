"""A lab and a tool that watches it, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool, until
from tests.puppets import Puppet
from tests.tools.life.site import (
    CLOSE_WAIT,
    LIBRARY,
    PORTS,
    TFO_WITHOUT_COOKIES,
    Older,
    Pair,
    Site,
)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, ExitStack() as stack:
        for host in lab.hosts:
            host.sysctl("tcp_fastopen", TFO_WITHOUT_COOKIES)
        server, client = Puppet(lab.server, "server"), Puppet(lab.client, "client")
        for puppet in (server, client):
            puppet.do(LIBRARY)
        pairs = {name: Pair(None, lab, server, client) for name in ("fin", "reset", "open")}
        for pair in pairs.values():
            pair.exchange(5000, 700)
        waiting = Pair(None, lab, server, client, accept=False)
        orphan = Pair(None, lab, server, client)
        orphan.exchange(11, 22)
        lab.client.sysctl("tcp_fin_timeout", 3600)  # a full socket for so long, less a minute
        orphan.client.close()
        orphan.server.reaches(CLOSE_WAIT)
        until(lambda: any((s.rport, s.state) == (orphan.port, "FIN_WAIT2") for s in lab.client.sockets()), "FIN_WAIT2")
        lab.client.sysctl("tcp_fin_timeout", 60)  # as the tests expect it
        tool = stack.enter_context(
            RunningTool("life", "--live", "--port", f"{PORTS.start}-{PORTS.stop - 1}", "--laddr",
                        f"{lab.server.ipv4},{lab.client.ipv4},{lab.server.ipv6},{lab.client.ipv6}")
        )  # fmt: skip
        made = Site(lab, server, client, Older(pairs, waiting.port, orphan.port), tool)
        for pair in (*pairs.values(), waiting, orphan):
            pair.site = made
        pairs |= {"waiting": waiting, "orphan": orphan}
        yield made
        done = tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0
