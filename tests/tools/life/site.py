"""What the tests of `life` share.

A socket that was shut down in both directions keeps its counters while its program holds it: TCP_INFO is read after the
end, and every number must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.record import PORTS, Call, Host, Process, Script, Seen, Socket, Watch

LIFE = Watch("life", "--live", "--port", PORTS)
PORT = 8000
TFO_WITHOUT_COOKIES = 0x207  # client, server, neither needs a cookie

Row = dict[str, Any]


@dataclass
class End:
    """One end of a connection."""

    process: Process
    socket: Socket
    role: str

    @property
    def host(self) -> Host:
        return self.process.host


class Pair:
    """A connection: `server` has accepted it, `client` has opened it."""

    def __init__(
        self,
        script: Script,
        family: str = "4",
        *,
        accept: bool = True,
        port: int = PORT,
        client: Process | None = None,
        server: Process | None = None,
    ) -> None:
        self.script, self.port = script, port
        self.family = 6 if family == "6" else 4
        server = server or script.server.process("server")
        client = client or script.client.process("client")
        bound = "::" if family == "mapped" else script.server.address(family)
        self.listener = server.listener(port, bound, dual=family == "mapped")
        near = client.socket(family)
        self.connected = near.connect(script.server.address(family), port)
        self.local = near.name()
        self.client = End(client, near, "ACTIVE")
        # Nothing but SYNs has been sent so far. accept() takes the child's lock: then it is ESTABLISHED.
        self.opens = {"ACTIVE": near.info()}
        if accept:
            far = self.listener.accept()
            self.server = End(server, far, "PASSIVE")
            self.opens["PASSIVE"] = far.info()

    @property
    def ends(self) -> tuple[End, End]:
        return self.client, self.server

    def exchange(self, tx: int = 5000, rx: int = 700) -> None:
        """The client sends so much and receives so much; both have read all, and nothing is repeated afterwards."""
        for sender, reader, size in ((self.client, self.server, tx), (self.server, self.client, rx)):
            sent = sender.socket.send_all(size, wait=False)
            reader.socket.read(size)
            sent.join()
        for end in self.ends:
            end.socket.until_acknowledged()

    def both_shut_down(self) -> dict[str, Call]:
        """Both ends send their FIN at once; TCP_INFO of each at its end, by its role."""
        for end in self.ends:
            end.socket.shutdown()
        infos = {}
        for end in self.ends:
            end.socket.until_state("CLOSE")
            infos[end.role] = end.socket.info()
            end.socket.close()
        return infos

    def row(self, seen: Seen, role: str) -> Row:
        """How this end ended."""
        host = self.script.client if role == "ACTIVE" else self.script.server
        here, there = (self.local.ret, self.port) if role == "ACTIVE" else (self.port, self.local.ret)
        row = ended(seen, host, lport=here, rport=there)
        kind = "6" if self.family == 6 else "4"
        assert (row["laddr"], row["raddr"]) == (host.address(kind), host.peer.address(kind))
        assert (row["family"], row["role"]) == (self.family, role)
        owner = self.client.process if role == "ACTIVE" else self.listener.process
        assert (row["pid"], row["comm"], row["uid"]) == (owner.pid, owner.comm, 0)
        return row

    def syn_retrans(self, role: str) -> int:
        return self.opens[role].info["retrans"]


def ended(seen: Seen, host: Host, **wanted: Any) -> Row:
    """The row of the one connection that has ended there, with these values."""
    rows = [row for row in seen.rows(LIFE, host, **wanted) if row["end"] != "OPEN"]
    assert len(rows) == 1, rows
    return rows[0]


def check_numbers(row: Row, info: dict[str, int], fin_sent: bool = True, fin_received: bool = True) -> None:
    """The same numbers that TCP_INFO has. It counts a SYN and a FIN like a byte."""
    names = ("tx_bytes", "retrans", "tx_segs", "rx_segs", "tx_data_segs", "rx_data_segs", "srtt_us", "min_rtt_us")
    assert {name: row[name] for name in names} == {name: info[name] for name in names}
    assert row["acked_bytes"] == info["acked"] - (row["role"] == "ACTIVE") - fin_sent
    assert row["rx_bytes"] == info["received"] - fin_received


def check_end(row: Row, end: str | None, closed_by: str | None, state: str, errno: str = "none") -> None:
    assert (row["end"], row["closed_by"], row["state"], row["errno"]) == (end, closed_by, state, errno)


def hooked(seen: Seen, *programs: str) -> bool:
    """Whether the kernel offers one of these hooks, by its own account."""
    return any(program in programs for program in seen.machine.hooks("life").values())
