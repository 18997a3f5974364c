"""What the recorded tests of the rules about the way to an address have in common: connections, and what was found."""

from __future__ import annotations

from dataclasses import dataclass
from socket import IPPROTO_TCP, TCP_NODELAY
from typing import Any

from tests.record import Script, Seen, Socket
from tests.record.script import Host, Process
from tests.tools.queue.refusals import DIAGNOSE

PORT = 8300
BACKOFF = 4  # where TCP_INFO has it


@dataclass
class Scene:
    """A client and a server, each one process, with connections between them: the two ends of each."""

    script: Script
    client: Process
    server: Process
    listener: Socket
    ends: list[tuple[Socket, Socket]]

    @property
    def nears(self) -> list[Socket]:
        return [near for near, _ in self.ends]

    def connect(
        self, number: int = 1, sent: int = 100, *, source: str | None = None, by: Process | None = None
    ) -> list[tuple[Socket, Socket]]:
        """So many more connections, over which the client has sent something small; `source`: from this address."""
        made = []
        for _ in range(number):
            near = (by or self.client).socket()
            if source:
                near.bind(source, 0)
            near.connect(self.script.server.ipv4, PORT)
            near.option(IPPROTO_TCP, TCP_NODELAY, 1)
            far = self.listener.accept()
            near.send_all(sent)
            far.read(sent)
            near.until_acknowledged()
            made.append((near, far))
        self.ends += made
        return made

    def until_timeouts(self, number: int, *sockets: Socket) -> None:
        """Until so many RTOs have run out at each of these, of all without one."""
        for near in sockets or self.nears:
            near.process.until("info", near.slot, BACKOFF, 1, op=">=", value=number)


def scene(script: Script, number: int = 3) -> Scene:
    client, server = script.client.process("orders"), script.server.process("database")
    made = Scene(script, client, server, server.listener(PORT), [])
    made.connect(number)
    return made


def told(host: Host) -> None:
    """Wait until something was found about this host, and let the processes live until the tool has ended."""
    host.until_rows(DIAGNOSE, 1, since=0)
    host.script.stay()


def found(seen: Seen, script: Script) -> list[dict[str, Any]]:
    """All that was found about both hosts, by whatever rule."""
    netns = {host.inode for host in script.hosts}
    return [each for each in seen.run(DIAGNOSE).summary["findings"] if each["facts"]["netns"] in netns]


def began(seen: Seen, script: Script) -> list[dict[str, Any]]:
    """All that was told about both hosts, in its order, and what another finding explained later."""
    netns = {host.inode for host in script.hosts}
    return [each for each in seen.run(DIAGNOSE).began if each["facts"]["netns"] in netns]


def only(seen: Seen, script: Script, rule: str, host: Host) -> dict[str, Any]:
    """What this rule has found about this host. Nothing else was found about either."""
    (finding,) = found(seen, script)
    assert (finding["rule"], finding["facts"]["netns"]) == (rule, host.inode), finding
    return finding
