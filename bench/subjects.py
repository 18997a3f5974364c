"""The programs that are compared, grouped by the question that they answer."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.installed import TCPSCOPE, TREE

HEADERS = Path("/usr/src")


@dataclass(frozen=True)
class Subject:
    """A program. `rows`: it prints one row per event, so that its rows can be counted."""

    name: str
    project: str
    argv: tuple[str, ...]
    rows: bool = True

    @property
    def compiles(self) -> bool:
        """Does it compile C against kernel headers at every start? On an emulated processor that takes minutes."""
        return self.project == "bcc"


def _tcpscope(*arguments: str, rows: bool = True) -> Subject:
    return Subject(" ".join(("tcpscope", *arguments)), "tcpscope", (str(TCPSCOPE), *arguments), rows)


def _libbpf(name: str, *arguments: str, rows: bool = True) -> Subject:
    return Subject(" ".join((name, *arguments)), "libbpf-tools", (f"/usr/sbin/{name}", *arguments), rows)


def _bcc(name: str, *arguments: str, rows: bool = True) -> Subject:
    return Subject(" ".join((f"{name}-bpfcc", *arguments)), "bcc", (f"/usr/sbin/{name}-bpfcc", *arguments), rows)


def _bpftrace(name: str) -> Subject:
    return Subject(f"{name}.bt", "bpftrace", ("bpftrace", f"/usr/sbin/{name}.bt"))


STATES = (
    _tcpscope("states"),
    _tcpscope("states", "-o", "json"),
    _libbpf("tcpstates", "-T"),
    Subject("states.bt", "bpftrace", ("bpftrace", str(TREE / "bench/states.bt"))),
    _bcc("tcpstates", "-T"),
)
"""With a time stamp in every row, all of them. Debian's bpftrace has no such tool: bench/states.bt is ours."""

TABLE, JSON, TCPSTATES = (subject.name for subject in STATES[:3])

CONNECT = (
    _tcpscope("connect"),
    _tcpscope("connect", "-o", "json"),
    _libbpf("tcpconnect", "-t"),
)
LIFE = (
    _tcpscope("life"),
    _tcpscope("life", "-o", "json"),
    _libbpf("tcplife", "-T"),
)
RTT = (
    _tcpscope("rtt", "-i", "60", rows=False),
    _libbpf("tcprtt", rows=False),
)
QUEUE = (
    _tcpscope("queue", rows=False),
    _libbpf("tcpsynbl", rows=False),
)
PACKETS = (
    _tcpscope("retrans", rows=False),
    _tcpscope("drop", "--count", rows=False),
    _tcpscope("reset", rows=False),
    _tcpscope("cong", "-i", "60", rows=False),
    _bcc("tcpretrans", rows=False),
    _bcc("tcpdrop", rows=False),
)


STORM = (
    _tcpscope("drop", "--count", rows=False),
    _tcpscope("drop", "--count", "--by", "reason,raddr", rows=False),
    _bcc("tcpdrop", rows=False),
)


TRAFFIC = (
    _tcpscope("top", "-o", "csv", rows=False),
    _tcpscope("subnet", "-o", "csv", rows=False),
    _libbpf("tcptop", "-C", rows=False),
    _bcc("tcptop", "-C", rows=False),
)


OTHERS = (
    _tcpscope("trace", "--port", "1", rows=False),
    _tcpscope("trace", "--port", "1", "--summary", rows=False),
)
"""They follow nothing of the traffic, and nothing else either."""


COUNT, TOP, TRACE = STORM[0].name, TRAFFIC[0].name, OTHERS[0].name


@dataclass(frozen=True)
class Group:
    """Programs that answer the same question, over the same traffic.

    unit            what the traffic consists of: connections, SYNs that the kernel discards, or sends
    reference       the peer that the others are held against, if each prints a row per event
    per_connection  how many rows a connection is; None: each change of state, which the traffic program knows
    steady          sends of so many bytes, so many in a second, not as fast as possible
    """

    title: str
    text: str
    subjects: tuple[Subject, ...]
    unit: str = "connection"
    reference: str | None = None
    per_connection: int | None = None
    steady: tuple[int, int] | None = None


GROUPS = (
    Group("states", "Every change of state, a row per event:", STATES, reference="tcpstates -T"),
    Group("connect", "Active opens, a row per connection:", CONNECT, reference="tcpconnect -t", per_connection=1),
    Group("life", "Connections that have ended, a row at each end:", LIFE, reference="tcplife -T", per_connection=2),
    Group("rtt", "Round-trip times; {exchanges} exchanges of a byte on each connection:", RTT),
    Group("queue", "The queues of listeners:", QUEUE),
    Group("packets", "Retransmissions, discards, resets and congestion, of which this traffic has none:", PACKETS),
    Group("traffic", "Bytes by connection or network, over sends of a kilobyte:", TRAFFIC, unit="send"),
    Group("gbit", "Other traffic, 1 Gbit/s in sends of 1,000 bytes:", OTHERS, unit="send", steady=(1000, 125_000)),
    Group("small", "Other traffic, 100,000 sends of 100 bytes a second:", OTHERS, unit="send", steady=(100, 100_000)),
    Group("storm", "A storm of SYNs that the kernel discards:", STORM, unit="SYN"),
)

PEERS = (
    *(_libbpf(f"tcp{n}") for n in ("connlat", "top", "tracer")),
    *(_bpftrace(f"tcp{n}") for n in ("accept", "connect", "drop", "life", "retrans", "synbl")),
    *(
        _bcc(f"tcp{n}")
        for n in ("accept", "connect", "connlat", "drop", "life", "retrans", "rtt", "synbl", "top", "tracer")
    ),
)
"""The other TCP tools of the peers, to see which of them this kernel takes."""


def missing_packages() -> list[str]:
    """Packages of packages.txt without which peers are left out of the run."""
    wanted = {"libbpf-tools": "/usr/sbin/tcpstates", "bpftrace": "bpftrace", "bpfcc-tools": "/usr/sbin/tcpstates-bpfcc"}
    names = Path(__file__).with_name("packages.txt").read_text().split()
    return [
        name
        for name in names
        if (name in wanted and not shutil.which(wanted[name]))
        or (name.startswith("linux-headers") and not any(HEADERS.glob("linux-headers-*")))
    ]
