"""The rows of each tool, and what `tcpscope.open` takes.

Written by `python -m tests.test_rows` from what the tools say of their columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import msgspec

from tcpscope.listeners import Holder

if TYPE_CHECKING:
    from os import PathLike
    from typing import Unpack

    from tcpscope import filters
    from tcpscope.events import Events


class ActionKind(StrEnum):
    CONNECT = "CONNECT"
    ACCEPT = "ACCEPT"
    CLOSE = "CLOSE"


class Answer(StrEnum):
    UNKNOWN = "UNKNOWN"
    NONE = "NONE"
    SYN_COOKIE = "SYN_COOKIE"
    RST = "RST"


class Cause(StrEnum):
    UNKNOWN = "UNKNOWN"
    ACCEPT_QUEUE_FULL = "ACCEPT_QUEUE_FULL"
    SYN_QUEUE_FULL = "SYN_QUEUE_FULL"
    COOKIE_SENT = "COOKIE_SENT"
    SYN_QUEUE_RESERVED = "SYN_QUEUE_RESERVED"
    OTHER = "OTHER"


class Closer(StrEnum):
    UNKNOWN = "UNKNOWN"
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class Counter(StrEnum):
    NONE = "NONE"
    IpExtInCsumErrors = "IpExtInCsumErrors"
    IpExtInNoRoutes = "IpExtInNoRoutes"
    IpInAddrErrors = "IpInAddrErrors"
    IpInHdrErrors = "IpInHdrErrors"
    IpOutNoRoutes = "IpOutNoRoutes"
    TcpExtBeyondWindow = "TcpExtBeyondWindow"
    TcpExtDelayedACKLost = "TcpExtDelayedACKLost"
    TcpExtIPReversePathFilter = "TcpExtIPReversePathFilter"
    TcpExtListenDrops = "TcpExtListenDrops"
    TcpExtListenOverflows = "TcpExtListenOverflows"
    TcpExtPAWSEstab = "TcpExtPAWSEstab"
    TcpExtPAWSOldAck = "TcpExtPAWSOldAck"
    TcpExtPAWSTimewait = "TcpExtPAWSTimewait"
    TcpExtTCPAOBad = "TcpExtTCPAOBad"
    TcpExtTCPAOKeyNotFound = "TcpExtTCPAOKeyNotFound"
    TcpExtTCPAORequired = "TcpExtTCPAORequired"
    TcpExtTCPAbortOnData = "TcpExtTCPAbortOnData"
    TcpExtTCPBacklogDrop = "TcpExtTCPBacklogDrop"
    TcpExtTCPDeferAcceptDrop = "TcpExtTCPDeferAcceptDrop"
    TcpExtTCPMD5Failure = "TcpExtTCPMD5Failure"
    TcpExtTCPMD5NotFound = "TcpExtTCPMD5NotFound"
    TcpExtTCPMD5Unexpected = "TcpExtTCPMD5Unexpected"
    TcpExtTCPMinTTLDrop = "TcpExtTCPMinTTLDrop"
    TcpExtTCPOFODrop = "TcpExtTCPOFODrop"
    TcpExtTCPOFOMerge = "TcpExtTCPOFOMerge"
    TcpExtTCPRcvQDrop = "TcpExtTCPRcvQDrop"
    TcpExtTCPReqQFullDrop = "TcpExtTCPReqQFullDrop"
    TcpExtTCPSYNChallenge = "TcpExtTCPSYNChallenge"
    TcpExtTCPZeroWindowDrop = "TcpExtTCPZeroWindowDrop"
    TcpExtTSEcrRejected = "TcpExtTSEcrRejected"
    TcpInCsumErrors = "TcpInCsumErrors"


class Direction(StrEnum):
    SENT = "SENT"
    RECEIVED = "RECEIVED"
    NONE = "NONE"


class DiscardKind(StrEnum):
    UNKNOWN = "UNKNOWN"
    LOST = "LOST"
    REFUSED = "REFUSED"
    HARMLESS = "HARMLESS"


class End(StrEnum):
    UNKNOWN = "UNKNOWN"
    OPEN = "OPEN"
    FIN = "FIN"
    FIN_WAIT2 = "FIN_WAIT2"
    RST_RECEIVED = "RST_RECEIVED"
    RST_SENT = "RST_SENT"
    RST = "RST"
    TIMEOUT = "TIMEOUT"
    KEEPALIVE = "KEEPALIVE"
    KILLED = "KILLED"


class FollowedBy(StrEnum):
    UNKNOWN = "UNKNOWN"
    NOTHING = "NOTHING"
    TIME_WAIT = "TIME_WAIT"
    FIN_WAIT2 = "FIN_WAIT2"


class Hop(StrEnum):
    UNKNOWN = "UNKNOWN"
    WRITE = "WRITE"
    TRANSMIT = "TRANSMIT"
    IP_OUT = "IP_OUT"
    QUEUE = "QUEUE"
    ENQUEUE = "ENQUEUE"
    SEGMENTED = "SEGMENTED"
    DEQUEUE = "DEQUEUE"
    START_XMIT = "START_XMIT"
    XMIT = "XMIT"
    ACKED = "ACKED"
    GRO = "GRO"
    MERGED = "MERGED"
    RECEIVE = "RECEIVE"
    IP_IN = "IP_IN"
    DELIVER = "DELIVER"
    FORWARD = "FORWARD"
    TCP_IN = "TCP_IN"
    BACKLOG = "BACKLOG"
    TCP = "TCP"
    READ = "READ"
    NETFILTER = "NETFILTER"
    FUNCTION = "FUNCTION"
    CONSUMED = "CONSUMED"
    DROPPED = "DROPPED"


class Kind(StrEnum):
    FAST = "FAST"
    SLOW_START = "SLOW_START"
    RACK_TIMEOUT = "RACK_TIMEOUT"
    RTO = "RTO"
    LOSS_PROBE = "LOSS_PROBE"
    SYN = "SYN"
    SYNACK = "SYNACK"
    SPURIOUS = "SPURIOUS"


class Outcome(StrEnum):
    ESTABLISHED = "ESTABLISHED"
    REFUSED = "REFUSED"
    REJECTED = "REJECTED"
    TIMED_OUT = "TIMED_OUT"
    UNREACHABLE = "UNREACHABLE"
    RESET = "RESET"
    GAVE_UP = "GAVE_UP"
    KILLED = "KILLED"
    FAILED = "FAILED"


class Passage(StrEnum):
    UNKNOWN = "UNKNOWN"
    RECEIVED = "RECEIVED"
    SENT = "SENT"


class Role(StrEnum):
    UNKNOWN = "UNKNOWN"
    ACTIVE = "ACTIVE"
    PASSIVE = "PASSIVE"
    LISTENER = "LISTENER"


class Step(StrEnum):
    UNKNOWN = "UNKNOWN"
    SYN = "SYN"
    ACK = "ACK"


class TcpState(StrEnum):
    ESTABLISHED = "ESTABLISHED"
    SYN_SENT = "SYN_SENT"
    SYN_RECV = "SYN_RECV"
    FIN_WAIT1 = "FIN_WAIT1"
    FIN_WAIT2 = "FIN_WAIT2"
    TIME_WAIT = "TIME_WAIT"
    CLOSE = "CLOSE"
    CLOSE_WAIT = "CLOSE_WAIT"
    LAST_ACK = "LAST_ACK"
    LISTEN = "LISTEN"
    CLOSING = "CLOSING"
    NEW_SYN_RECV = "NEW_SYN_RECV"


class Way(StrEnum):
    UNKNOWN = "UNKNOWN"
    RECEIVED = "RECEIVED"
    SENT = "SENT"


class Accept(msgspec.Struct, frozen=True):
    """A row of `accept`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    listener: IPv4Address | IPv6Address | None
    """address that the listener is bound to"""

    listener_cookie: int | None
    """socket cookie of the listener"""

    wait_us: int | None
    """time that it waited in the accept queue"""

    accept_queue: int | None
    """connections left in the listener's accept queue"""

    accept_limit: int | None
    """limit of the accept queue, which holds one connection more"""


class Cong(msgspec.Struct, frozen=True):
    """A row of `cong`."""

    time: datetime
    """when the interval or the run ended"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    open_us: int
    """time in Open"""

    disorder_us: int
    """time in Disorder"""

    cwr_us: int
    """time in CWR"""

    recovery_us: int
    """time in Recovery"""

    loss_us: int
    """time in Loss"""

    changes: int
    """changes of the state"""

    ca_state: str | None
    """state at that moment; null: the connection has ended"""

    total: bool
    """over the whole run, not an interval"""


class Connect(msgspec.Struct, frozen=True):
    """A row of `connect`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    outcome: Outcome
    """how it ended; REFUSED: by a RST, REJECTED: by an ICMP message, TIMED_OUT: the kernel gave up, GAVE_UP: the
    application gave up, KILLED: by another program (ss -K, bpf_sock_destroy()), FAILED: errno says why"""

    syn_sent: bool
    """whether TCP made a SYN: the kernel counts that as TcpActiveOpens"""

    syn_dropped: bool | None
    """whether this host dropped the last SYN when it was sent: by a firewall rule, a full queue or for want of a
    route"""

    errno: int | None
    """error of the socket or, where it has none, of connect()"""

    syn_retrans: int
    """retransmissions of the SYN"""

    latency_us: int | None
    """from SYN_SENT, in connect(), to the outcome"""


class Connlat(msgspec.Struct, frozen=True):
    """A row of `connlat`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    outcome: Outcome
    """how it ended; REFUSED: by a RST, REJECTED: by an ICMP message, TIMED_OUT: the kernel gave up, GAVE_UP: the
    application gave up, KILLED: by another program (ss -K, bpf_sock_destroy()), FAILED: errno says why"""

    syn_sent: bool
    """whether TCP made a SYN: the kernel counts that as TcpActiveOpens"""

    syn_dropped: bool | None
    """whether this host dropped the last SYN when it was sent: by a firewall rule, a full queue or for want of a
    route"""

    errno: int | None
    """error of the socket or, where it has none, of connect()"""

    syn_retrans: int
    """retransmissions of the SYN"""

    latency_us: int | None
    """from SYN_SENT, in connect(), to the outcome"""


class Drop(msgspec.Struct, frozen=True):
    """A row of `drop`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int | None
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    location: str | None
    """kernel function that discarded it, and the offset in it"""

    reason: str | None
    """why, in the kernel's words, since Linux 5.17; DERIVED: the kernel gives no reason"""

    packet_bytes: int | None
    """length of the IP packet"""

    flags: str | None
    """TCP flags"""

    kind: DiscardKind | None
    """LOST; REFUSED by a listener, or by a port without one; HARMLESS"""

    counter: Counter | None
    """SNMP counter in which the kernel counted it"""

    state: TcpState | None
    """state of the socket"""

    direction: Passage | None
    """RECEIVED, also to be forwarded; SENT by this host"""

    device: str | None
    """network device"""

    stack: list[str] | None
    """kernel stack, innermost first"""


class Life(msgspec.Struct, frozen=True):
    """A row of `life`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    role: Role | None
    """who opened it: active = this host, passive = the remote end"""

    state: TcpState
    """state in which it ended, or in which an open one is"""

    end: End | None
    """how it ended. FIN: both ends closed; FIN_WAIT2: the remote end's FIN was still missing, a timewait socket
    waits for it; RST: sent or received; KEEPALIVE, TIMEOUT: nobody answered; KILLED: by another program (ss
    -K, bpf_sock_destroy()); OPEN: it has not ended"""

    closed_by: Closer | None
    """whose FIN or RST came first"""

    errno: int
    """error of the socket"""

    tx_bytes: int
    """data sent, retransmissions included"""

    acked_bytes: int | None
    """data that the remote end has acknowledged"""

    rx_bytes: int
    """data received"""

    tx_segs: int
    """segments sent, retransmissions and those without data included"""

    rx_segs: int
    """segments received"""

    tx_data_segs: int
    """segments sent with data"""

    rx_data_segs: int
    """segments received with data"""

    retrans: int
    """retransmitted segments, those of the handshake included"""

    syn_retrans: int | None
    """retransmissions of the SYN, or of a passive connection's SYN-ACK"""

    srtt_us: int | None
    """smoothed round-trip time"""

    min_rtt_us: int | None
    """smallest round-trip time of the last five minutes"""

    handshake_us: int | None
    """from connect() to ESTABLISHED; of a passive connection from its SYN-ACK to the answer"""

    duration_us: int | None
    """from connect() or, passive, the handshake's end, to the end"""

    established_us: int | None
    """from ESTABLISHED to the end"""


class List(msgspec.Struct, frozen=True):
    """A row of `list`."""

    time: datetime
    """when the tool began to read the sockets"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    state: TcpState
    """state"""

    rx_queue_bytes: int | None
    """received and not yet read, a FIN included; null for a listener"""

    tx_queue_bytes: int | None
    """sent and not yet acknowledged, or not yet sent; null for a listener"""

    accept_queue: int | None
    """connections that wait for accept(); only for a listener"""

    accept_limit: int | None
    """limit of the accept queue; only for a listener"""

    uid: int | None
    """user that created the socket"""

    pid: int | None
    """process that holds it; of several the one that started first"""

    comm: str | None
    """name of that process"""

    holders: list[Holder]
    """every process that holds it: PID, name, user, file descriptor"""


class Pktlat(msgspec.Struct, frozen=True):
    """A row of `pktlat`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that took the data"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    wait_us: int | None
    """from the arrival of the first byte that was taken until the read"""

    taken_bytes: int
    """data that was taken"""

    left_bytes: int
    """data left to read"""

    tid: int | None
    """thread that took it"""

    thread: str | None
    """name of that thread"""


class Ports(msgspec.Struct, frozen=True):
    """A row of `ports`."""

    time: datetime
    """when the snapshot was taken"""

    netns: int
    """network namespace, as inode number"""

    family: int
    """IP version of the packets"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address; null: the row is about ports that bind() has taken for the local address"""

    rport: int | None
    """remote port"""

    level: str | None
    """warning or critical"""

    used: int
    """ports in use: those of the row's sockets, and `bound`"""

    available: int | None
    """ports from first_port to last_port, without the reserved ones"""

    percent: float | None
    """share of the available ports that is in use, 100 at most"""

    syn_sent: int
    """sockets in SYN_SENT"""

    established: int
    """established"""

    closing: int
    """in FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK or CLOSING"""

    time_wait: int
    """timewait sockets, also those that ss shows in FIN_WAIT2"""

    bound: int
    """ports of the range that bind() has taken: in the namespace, listeners too; without a remote end: for this
    address, without listeners"""

    pid: int | None
    """process that holds most"""

    comm: str | None
    """name of that process"""

    uid: int | None
    """user of that process"""

    held: int | None
    """sockets of the row that this process has opened or bound, those in TIME_WAIT too"""

    opened: int | None
    """calls of connect() since the snapshot before, those that found no port too; null without --interval"""

    opened_per_s: float | None
    """the same per second"""

    search_us: float | None
    """time in connect() from SYN_SENT to the SYN, in which it looks for a port: mean since the snapshot before"""

    search_max_us: int | None
    """the longest of them"""

    failed: int | None
    """calls that found no port since the snapshot before; null without --interval"""

    errno: str | None
    """EADDRNOTAVAIL: of connect(), EADDRINUSE: of bind() to port 0; of several the most frequent one"""

    failed_pid: int | None
    """process whose calls failed most"""

    failed_comm: str | None
    """name of that process"""

    first_port: int | None
    """of the range: ip_local_port_range, narrowed by IP_LOCAL_PORT_RANGE; null: the sockets have several ranges"""

    last_port: int | None
    """the range's last port"""

    reserved: int | None
    """ports of the range in ip_local_reserved_ports"""

    step_width: int | None
    """ip_local_port_step_width; null: the kernel has no such sysctl"""

    tw_reuse: int | None
    """tcp_tw_reuse: connect() may take a port that is in TIME_WAIT; 2: on the loopback device only"""


class Queue(msgspec.Struct, frozen=True):
    """A row of `queue`."""

    time: datetime
    """when the snapshot was taken"""

    netns: int
    """network namespace, as inode number"""

    family: int
    """IP version of the address"""

    laddr: IPv4Address | IPv6Address
    """address it listens on"""

    lport: int
    """port it listens on"""

    pid: int
    """process that accepts from it; if that is not known, one that holds it and should"""

    comm: str
    """name of that process"""

    accept_queue: int
    """connections that wait for accept()"""

    accept_limit: int
    """limit of the accept queue, which holds one connection more: listen()'s backlog, cut to somaxconn"""

    limit_from: str
    """where that limit comes from: listen()'s backlog or somaxconn (derived)"""

    syn_queue: int
    """handshakes that wait for the final ACK; the accept queue's limit holds for them, too"""

    overflows: int | None
    """handshakes refused because the accept queue was full, since the tool first saw the listener"""

    overflows_at_syn: int | None
    """overflows at the SYN"""

    overflows_at_ack: int | None
    """overflows at the final ACK: the client believes it is connected"""

    syn_drops: int | None
    """SYNs refused because the SYN queue was full, or its last quarter reserved"""

    cookies: int | None
    """SYNs answered by a SYN cookie"""

    drops: int
    """the socket's own count since listen() (sk_drops): one per refused SYN, two per refused final ACK"""

    accepts: int | None
    """accept() calls that returned a connection, since the tool first saw the listener"""

    accepts_per_s: float | None
    """accepts per second, since the snapshot before"""

    since_accept_ms: int | None
    """time since the last accept()"""

    oldest_wait_ms: int | None
    """how long ago the kernel answered the connection at the head of the accept queue with its first SYN-ACK"""

    somaxconn: int
    """net.core.somaxconn of the namespace"""

    max_syn_backlog: int
    """net.ipv4.tcp_max_syn_backlog of the namespace"""

    syncookies: int
    """net.ipv4.tcp_syncookies of the namespace"""

    abort_on_overflow: bool
    """net.ipv4.tcp_abort_on_overflow of the namespace"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    holders: list[Holder]
    """every process that holds it"""


class Reset(msgspec.Struct, frozen=True):
    """A row of `reset`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    direction: Direction
    """SENT or RECEIVED; NONE: it ended without a RST (--timeouts)"""

    cause: Cause | None
    """why this host sent it, or why it ended"""

    state: TcpState | None
    """state of the connection before; LISTEN if a listener answers"""

    reason: str | None
    """the kernel's own reason, since Linux 6.10"""

    unanswered: bool | None
    """whether this host had sent data, and received none since; null: not received"""

    stack: list[str] | None
    """kernel stack, innermost first"""


class Retrans(msgspec.Struct, frozen=True):
    """A row of `retrans`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    kind: Kind
    """RTO: the timer expired; SLOW_START: after that; FAST: fast recovery; RACK_TIMEOUT: the same, when RACK's
    reordering timer was due; LOSS_PROBE: of the tail; SYN; SYNACK; SPURIOUS: the kernel has found that it was
    not needed, and sends as fast as before"""

    state: TcpState
    """state of the connection"""

    ca_state: str | None
    """state of congestion control"""

    backoff: int | None
    """how often the RTO was doubled"""

    segs: int
    """number of segments that were sent again: TcpRetransSegs less TCPRetransFail; of SPURIOUS: those that were sent
    again since the kernel took them for lost"""

    errno: int
    """why it was not sent: EBUSY, the original waits in a queue of this host; ENOBUFS, a queue of this host is full;
    none: it was sent. Linux before 6.17 does not show such attempts"""

    data_bytes: int
    """data of these segments"""

    offset: int | None
    """place of the first byte in the data that this host has sent; the first of all is 0"""

    cwnd: int | None
    """congestion window, in segments"""

    ssthresh: int | None
    """slow start threshold, in segments; null: not known yet"""

    in_flight: int | None
    """segments that the kernel takes to be on their way"""

    lost_segs: int | None
    """segments that the kernel takes for lost"""

    sacked_segs: int | None
    """segments that arrived out of order (SACK, or duplicate ACKs)"""

    srtt_us: int | None
    """smoothed round-trip time"""

    rto_us: int | None
    """retransmission timeout"""

    since_us: int | None
    """of SPURIOUS: since the first of these segments was sent again"""


class States(msgspec.Struct, frozen=True):
    """A row of `states`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    role: Role | None
    """who opened it: active = this host, passive = the remote end"""

    old_state: TcpState
    """state before the transition"""

    new_state: TcpState
    """state after the transition"""

    followed_by: FollowedBy | None
    """what the kernel keeps after CLOSE: a timewait socket in TIME_WAIT or timed FIN_WAIT2, or nothing"""

    in_state_us: int | None
    """time spent in the old state"""


class Subnet(msgspec.Struct, frozen=True):
    """A row of `subnet`."""

    time: datetime
    """when the interval or the run ended"""

    network: str | None
    """network of the list; null: none of them has the address"""

    name: str | None
    """its name in the list"""

    tx_bytes: int
    """data sent for the first time"""

    rx_bytes: int
    """data received, once and in order"""

    retrans_bytes: int
    """data sent again"""

    tx_bytes_per_s: int
    """data sent for the first time, bytes per second"""

    rx_bytes_per_s: int
    """data received, bytes per second"""

    retrans_pct: float | None
    """data sent again, in percent of all that was sent; null: nothing was sent"""

    interval_us: int
    """how long the interval was"""

    total: bool
    """over the whole run, not an interval"""


class Synbl(msgspec.Struct, frozen=True):
    """A row of `synbl`."""

    time: datetime
    """when the tool read the lengths from the kernel"""

    netns: int
    """network namespace, as inode number"""

    family: int
    """IP version of the address"""

    laddr: IPv4Address | IPv6Address
    """address it listens on"""

    lport: int
    """port it listens on"""

    cookie: int | None
    """socket cookie of the listener, what ss -e prints as sk:"""

    pid: int | None
    """process that called listen(); of an older listener, one that holds it"""

    comm: str | None
    """name of that process"""

    limit: int
    """limit of both queues: listen()'s backlog, cut to somaxconn"""

    handshakes: int
    """handshakes that completed"""

    accept_p50: int | None
    """accept queue: half of the lengths are not longer; known to 1/8"""

    accept_p99: int | None
    """accept queue: 99 % are not longer; known to 1/8"""

    accept_max: int | None
    """accept queue: longest"""

    accept_max_percent: int | None
    """accept queue: longest, in percent of the limit"""

    accept_full: int | None
    """handshakes that found the accept queue full"""

    syn_p50: int | None
    """SYN queue: half of the lengths are not longer; known to 1/8"""

    syn_p99: int | None
    """SYN queue: 99 % are not longer; known to 1/8"""

    syn_max: int | None
    """SYN queue: longest"""

    syn_max_percent: int | None
    """SYN queue: longest, in percent of the limit"""

    syn_full: int | None
    """handshakes that found the SYN queue full"""

    accept_histogram: list[list[int]]
    """[from, to, count] of the lengths of the accept queue, by power of two"""

    syn_histogram: list[list[int]]
    """[from, to, count] of the lengths of the SYN queue, by power of two"""

    total: bool
    """over the whole run, not an interval"""


class Top(msgspec.Struct, frozen=True):
    """A row of `top`."""

    time: datetime
    """when the interval or the run ended"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    tx_bytes: int
    """data sent for the first time"""

    rx_bytes: int
    """data received, once and in order"""

    retrans_bytes: int
    """data sent again"""

    tx_bytes_per_s: int
    """data sent for the first time, bytes per second"""

    rx_bytes_per_s: int
    """data received, bytes per second"""

    retrans_pct: float | None
    """data sent again, in percent of all that was sent; null: nothing was sent"""

    interval_us: int
    """how long the interval was"""

    srtt_us: int | None
    """smoothed round-trip time"""

    limit: str | None
    """what kept the sender from sending more for the longest time: application (it had nothing to send), rwnd (the
    remote end's receive window), sndbuf (the send buffer), cwnd (the congestion window)"""

    app_pct: float | None
    """share of time: the application had nothing to send"""

    rwnd_pct: float | None
    """share of time: the remote end's receive window was full"""

    sndbuf_pct: float | None
    """share of time: the send buffer was full"""

    cwnd_pct: float | None
    """share of time: data was under way, and the congestion window was full"""


class Trace(msgspec.Struct, frozen=True):
    """A row of `trace`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    packet: int
    """number of the packet in this run; segments have that of the packet they were cut from"""

    since_us: int | None
    """since the hop before"""

    seq: int
    """sequence number of its first byte"""

    ack: int
    """what it acknowledges"""

    packet_bytes: int | None
    """length of the IP packet"""

    data_bytes: int
    """data in it"""

    reason: str | None
    """of DROPPED: why, in the kernel's words, since Linux 5.17"""

    cpu: int
    """processor on which the hop was"""

    queue: int | None
    """transmit queue of the device"""

    flags: str
    """TCP flags"""

    device: str | None
    """network device"""

    hop: Hop
    """where the packet is"""

    before: Hop | None
    """the hop before"""

    direction: Way | None
    """RECEIVED, also to be forwarded; SENT by this host"""

    where: str | None
    """of NETFILTER: the hook; of DROPPED: the hook of netfilter that discards it; of FUNCTION: the function"""

    chain: str | None
    """of DROPPED: the base chain of nf_tables that discards it, as family:table:chain"""


class Tracer(msgspec.Struct, frozen=True):
    """A row of `tracer`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    action: ActionKind
    """CONNECT: an active open succeeded; ACCEPT: accept() returned the connection; CLOSE: it ended"""


class QueueEvents(msgspec.Struct, frozen=True):
    """A row of `queue --events`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    accept_queue: int | None
    """connections that wait for accept()"""

    accept_limit: int | None
    """limit of the accept queue, which holds one connection more: listen()'s backlog, cut to somaxconn"""

    syn_queue: int | None
    """handshakes that wait for the final ACK; the accept queue's limit holds for them, too"""

    somaxconn: int
    """net.core.somaxconn of the namespace"""

    max_syn_backlog: int
    """net.ipv4.tcp_max_syn_backlog of the namespace"""

    syncookies: int
    """net.ipv4.tcp_syncookies of the namespace"""

    abort_on_overflow: bool
    """net.ipv4.tcp_abort_on_overflow of the namespace"""

    cause: Cause
    """why it was refused; UNKNOWN if sampled and not certain"""

    step: Step | None
    """at which step of the handshake"""

    answer: Answer | None
    """how the kernel answered the peer"""

    count: int
    """number of refusals; 1 unless sampled"""

    stack: list[str] | None
    """kernel stack, innermost first"""


class CongEvents(msgspec.Struct, frozen=True):
    """A row of `cong --events`."""

    time: datetime
    """when it happened"""

    cookie: int | None
    """socket cookie, what ss -e prints as sk:"""

    netns: int
    """network namespace, as inode number"""

    lport: int | None
    """local port"""

    rport: int | None
    """remote port"""

    laddr: IPv4Address | IPv6Address
    """local address"""

    raddr: IPv4Address | IPv6Address | None
    """remote address"""

    family: int
    """IP version of the packets: a v4-mapped socket talks IPv4"""

    pid: int | None
    """process that called connect(), listen() or accept()"""

    uid: int | None
    """user of that process"""

    comm: str | None
    """name of that process"""

    cgroup: int | None
    """cgroup v2 id of that process"""

    ca_state: str
    """state that it left"""

    next_state: str | None
    """state that it entered; null: the connection has ended"""

    state: TcpState
    """state of the connection"""

    cwnd: int
    """congestion window at that moment, in segments"""

    ssthresh: int | None
    """slow start threshold at that moment, in segments; null: not known yet"""

    visit_us: int | None
    """how long it was in the old state"""


class Asked(TypedDict, total=False):
    """What every tool takes: the filters, and when and how it gives rows. See `tcpscope.open`."""

    pid: filters.Numbers
    comm: filters.Names
    uid: filters.Numbers
    cgroup: filters.Numbers
    netns: filters.Numbers
    ipv4: bool
    ipv6: bool
    lport: filters.Ports
    rport: filters.Ports
    port: filters.Ports
    laddr: filters.Networks
    raddr: filters.Networks
    duration: float | None
    interval: float | None
    max_events: int | None
    buffer: int | None
    rate: int | None


class AskedInPart(Asked, total=False):
    """The same, with what changes the attributes of a row."""

    time: Literal["iso", "elapsed", "none"]
    columns: str | Sequence[str] | None


@overload
def open(tool: Literal["accept"], /, **asked: Unpack[Asked]) -> Events[Accept]: ...


@overload
def open(
    tool: Literal["accept"], /, *, count: bool = ..., by: str | Sequence[str] | None = ..., **asked: Unpack[AskedInPart]
) -> Events[Any]: ...


@overload
def open(
    tool: Literal["cong"], /, *, all: bool = ..., events: Literal[True], **asked: Unpack[Asked]
) -> Events[CongEvents]: ...


@overload
def open(tool: Literal["cong"], /, *, all: bool = ..., **asked: Unpack[Asked]) -> Events[Cong]: ...


@overload
def open(
    tool: Literal["cong"],
    /,
    *,
    all: bool = ...,
    events: bool = ...,
    histogram: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["connect"], /, *, failed: bool = ..., **asked: Unpack[Asked]) -> Events[Connect]: ...


@overload
def open(
    tool: Literal["connect"],
    /,
    *,
    failed: bool = ...,
    count: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["connlat"], /, *, min: str | None = ..., **asked: Unpack[Asked]) -> Events[Connlat]: ...


@overload
def open(
    tool: Literal["connlat"],
    /,
    *,
    min: str | None = ...,
    histogram: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(
    tool: Literal["drop"],
    /,
    *,
    all: bool = ...,
    reason: str | Sequence[str] | None = ...,
    stack: bool = ...,
    **asked: Unpack[Asked],
) -> Events[Drop]: ...


@overload
def open(
    tool: Literal["drop"],
    /,
    *,
    all: bool = ...,
    reason: str | Sequence[str] | None = ...,
    stack: bool = ...,
    count: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["life"], /, *, live: bool = ..., **asked: Unpack[Asked]) -> Events[Life]: ...


@overload
def open(
    tool: Literal["life"],
    /,
    *,
    live: bool = ...,
    count: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["list"], /, **asked: Unpack[Asked]) -> Events[List]: ...


@overload
def open(tool: Literal["list"], /, **asked: Unpack[AskedInPart]) -> Events[Any]: ...


@overload
def open(tool: Literal["pktlat"], /, *, min: str | None = ..., **asked: Unpack[Asked]) -> Events[Pktlat]: ...


@overload
def open(
    tool: Literal["pktlat"],
    /,
    *,
    min: str | None = ...,
    histogram: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["ports"], /, *, warn: str | None = ..., **asked: Unpack[Asked]) -> Events[Ports]: ...


@overload
def open(tool: Literal["ports"], /, *, warn: str | None = ..., **asked: Unpack[AskedInPart]) -> Events[Any]: ...


@overload
def open(
    tool: Literal["queue"], /, *, events: Literal[True], stack: bool = ..., **asked: Unpack[Asked]
) -> Events[QueueEvents]: ...


@overload
def open(tool: Literal["queue"], /, *, stack: bool = ..., **asked: Unpack[Asked]) -> Events[Queue]: ...


@overload
def open(
    tool: Literal["queue"], /, *, events: bool = ..., stack: bool = ..., **asked: Unpack[AskedInPart]
) -> Events[Any]: ...


@overload
def open(
    tool: Literal["reset"], /, *, stack: bool = ..., timeouts: bool = ..., **asked: Unpack[Asked]
) -> Events[Reset]: ...


@overload
def open(
    tool: Literal["reset"],
    /,
    *,
    stack: bool = ...,
    timeouts: bool = ...,
    count: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["retrans"], /, **asked: Unpack[Asked]) -> Events[Retrans]: ...


@overload
def open(
    tool: Literal["retrans"],
    /,
    *,
    count: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(
    tool: Literal["rtt"],
    /,
    *,
    by: str | Sequence[str] = ...,
    smoothed: bool = ...,
    histogram: bool = ...,
    max_keys: int | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["states"], /, **asked: Unpack[Asked]) -> Events[States]: ...


@overload
def open(tool: Literal["states"], /, **asked: Unpack[AskedInPart]) -> Events[Any]: ...


@overload
def open(
    tool: Literal["subnet"],
    /,
    *,
    net: str | Sequence[str] | None = ...,
    net_file: str | None = ...,
    sort: str | None = ...,
    **asked: Unpack[Asked],
) -> Events[Subnet]: ...


@overload
def open(
    tool: Literal["subnet"],
    /,
    *,
    net: str | Sequence[str] | None = ...,
    net_file: str | None = ...,
    sort: str | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["synbl"], /, **asked: Unpack[Asked]) -> Events[Synbl]: ...


@overload
def open(tool: Literal["synbl"], /, *, histogram: bool = ..., **asked: Unpack[AskedInPart]) -> Events[Any]: ...


@overload
def open(tool: Literal["top"], /, *, sort: str | None = ..., **asked: Unpack[Asked]) -> Events[Top]: ...


@overload
def open(
    tool: Literal["top"], /, *, by: str | Sequence[str] = ..., sort: str | None = ..., **asked: Unpack[AskedInPart]
) -> Events[Any]: ...


@overload
def open(
    tool: Literal["trace"],
    /,
    *,
    min: str | None = ...,
    functions: str | Sequence[str] | None = ...,
    summary: bool = ...,
    **asked: Unpack[Asked],
) -> Events[Trace]: ...


@overload
def open(
    tool: Literal["trace"],
    /,
    *,
    min: str | None = ...,
    functions: str | Sequence[str] | None = ...,
    summary: bool = ...,
    by: str | Sequence[str] | None = ...,
    **asked: Unpack[AskedInPart],
) -> Events[Any]: ...


@overload
def open(tool: Literal["tracer"], /, **asked: Unpack[Asked]) -> Events[Tracer]: ...


@overload
def open(tool: Literal["tracer"], /, **asked: Unpack[AskedInPart]) -> Events[Any]: ...


@overload
def open(
    tool: PathLike[str], /, *, event: str | None = ..., log: str | None = ..., **asked: Unpack[AskedInPart]
) -> Events[Any]: ...


def open(tool: str | PathLike[str], /, **asked: Any) -> Events[Any]:
    """As in `tcpscope`, which has it without an import of this module."""
    from tcpscope.events import Events

    return Events(tool, asked)
