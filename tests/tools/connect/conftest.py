"""A lab and tools that watch it, for all tests of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tcpscope.lab.hosts import Lab
from tests.conftest import RunningTool
from tests.puppets import Puppet
from tests.tools.connect.site import (
    CALLS,
    LISTEN,
    PATIENT,
    SILENT,
    Site,
    knows,
)


@pytest.fixture(scope="module")
def sees_every_call() -> bool:
    """Not only the system call connect()."""
    return knows("connected", "connected__fexit")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Lab() as lab, ExitStack() as stack:
        lab.server.blackhole("198.51.100.0/24")
        lab.server.blackhole("2001:db8:51::/64")
        client, older, server = Puppet(lab.client, "client"), Puppet(lab.client, "older"), Puppet(lab.server, "server")
        client.do(CALLS), older.do(CALLS), server.do(LISTEN)
        # With the usual number of SYNs it would be given up after two minutes.
        started = older.ask("started(address, 6999, options=options)", address=SILENT["4"], options=PATIENT)
        assert started == "EINPROGRESS"
        here = "--netns", str(lab.client.inode)
        tools = [
            RunningTool("connect", *here),
            RunningTool("connect", "--failed", *here),
            RunningTool("connect", "--count", *here),
            RunningTool("connect", "--count", "--by", "comm,outcome", "-i", "1", "--time", "none", *here),
        ]
        found = Site(lab, [stack.enter_context(tool) for tool in tools], client, server, older)
        yield found
        done = found.tool.stop()
        assert done.status == 0
        assert done.stats is not None
        assert done.stats["lost"] == done.stats["table_full"] == done.stats["missed"] == 0
        assert done.stats["shown"] == len(done.rows)
        assert Counter(row["rport"] for row in done.rows) == +found.expected
