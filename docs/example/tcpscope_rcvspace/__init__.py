"""How large has the kernel made the receive buffer of each connection that reads?

One row each time an application has read and the kernel decides about the buffer: the owner, both ends, how much the
application took in the last round-trip time, and the size of the buffer.
"""

from pathlib import Path

from tcpscope.tool import Stream

tool = Stream(
    Path(__file__).with_name("rcvspace.bpf.o"),
    ("time", "pid", "comm", "laddr", "lport", "raddr", "rport", "space_bytes", "rcvbuf_bytes"),
    important=("rcvbuf_bytes", "space_bytes", "raddr", "comm", "time"),
    examples={"rcvspace --comm curl": "of the connections of curl"},
)
