"""`tcpscope subnet` against what was sent and read: exactly, in the intervals and in the total."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.record import Script, Seen, Socket, Test, Watch, recorded

PORT = 6790
LISTED = "198.51.100.0/24,192.0.2.0/24,192.0.2.2,2001:db8::/32,2001:db8::2/128,::/0"
MIXED = Watch("subnet", "-i", "0.2", "--net", LISTED, "--port", f"{PORT}-{PORT + 2}")
NAMED = Watch("subnet", "-i", "86400", "--port", f"{PORT + 3}-{PORT + 4}", every_kernel=False)
NONE = Watch("subnet", "-i", "86400", "--net", "198.51.100.0/24,::/0", "--port", f"{PORT + 5}", every_kernel=False)
OFTEN = Watch("subnet", "-i", "0.01", "--net", LISTED, "--port", f"{PORT + 6}")
OLDER = Watch("subnet", "-i", "0.2", "--net", LISTED, "--port", f"{PORT + 7}")
OWNED = Watch("subnet", "-i", "0.2", "--net", LISTED, "--comm", "mine", "--port", f"{PORT + 8}", every_kernel=False)
NUMBERS = ("tx_bytes", "rx_bytes", "retrans_bytes")

Row = dict[str, Any]


def totals(seen: Seen, watch: Watch) -> dict[str | None, tuple[int, ...]]:
    """Network -> bytes sent and received over the run. The intervals of each network add up to it."""
    rows = seen.run(watch).rows
    found = {row["network"]: row for row in rows if row["total"]}
    assert len(found) == sum(row["total"] for row in rows)
    for network, total in found.items():
        parts = [row for row in rows if row["network"] == network and not row["total"]]
        for name in NUMBERS:
            assert sum(row[name] for row in parts) == total[name]
        assert total["interval_us"] >= sum(row["interval_us"] for row in parts) > 0
    return {network: (row["tx_bytes"], row["rx_bytes"]) for network, row in found.items()}


def pair(script: Script, port: int, kind: str = "4", comm: str = "client") -> tuple[Socket, Socket]:
    client, server = script.client.process(comm), script.server.process("server")
    listener = server.listener(port, script.server.address("4" if kind == "mapped" else kind))
    near = client.socket(kind)
    near.connect(script.server.address(kind), port)
    return near, listener.accept()


def exchange(near: Socket, far: Socket, there: int, back: int) -> None:
    near.send_all(there)
    far.read(there)
    far.send_all(back)
    near.read(back)
    near.until_acknowledged(), far.until_acknowledged()


def close(near: Socket, far: Socket) -> None:
    near.close()
    far.until_end()
    far.close()


@recorded(MIXED)
def test_networks(script: Script) -> Test:
    """The smallest network that has the remote address counts; a v4-mapped address is IPv4; one has moved nothing."""
    ends = [pair(script, PORT + number, kind) for number, kind in enumerate(("4", "6", "mapped"))]
    for near, far in ends:
        exchange(near, far, 5000, 700)
    script.server.agent.until("rows", f"{MIXED.name}.out", 0, op=">=", value=4)  # a look has shown it
    for near, far in ends:
        exchange(near, far, 60, 8)
    close(*ends[0])
    script.stay()
    seen = yield
    assert totals(seen, MIXED) == {
        "192.0.2.2": (2 * 5060, 2 * 708),
        "192.0.2.0/24": (2 * 708, 2 * 5060),
        "2001:db8::2": (5060, 708),
        "2001:db8::/32": (708, 5060),
    }
    assert len({row["time"] for row in seen.run(MIXED).rows if not row["total"]}) >= 2


@recorded(NAMED)
def test_the_usual_list(script: Script) -> Test:
    for number, kind in enumerate("46"):
        near, far = pair(script, PORT + 3 + number, kind)
        exchange(near, far, 100, 20)
        close(near, far)
    seen = yield
    rows = [row for row in seen.run(NAMED).rows if row["total"]]
    assert {(row["network"], row["name"], row["tx_bytes"], row["rx_bytes"]) for row in rows} == {
        ("0.0.0.0/0", "other-IPv4", 120, 120),
        ("::/0", "other-IPv6", 120, 120),
    }


@recorded(NONE)
def test_no_network_has_it(script: Script) -> Test:
    """All of IPv6 has no IPv4 address."""
    near, far = pair(script, PORT + 5, "mapped")
    exchange(near, far, 100, 20)
    close(near, far)
    seen = yield
    assert totals(seen, NONE) == {None: (120, 120)}
    assert {row["name"] for row in seen.run(NONE).rows} == {None}


@pytest.mark.concurrent
@recorded(OFTEN)
def test_looks_beside_ends(script: Script) -> Test:
    """Connections that end while it looks count once, in the kernel or here."""
    client, server = script.client.process("client"), script.server.process("server")
    listener = server.listener(PORT + 6)
    served = listener("answer_all", 2000, wait=False)
    asked = client("ask_all", script.server.ipv4, PORT + 6, 2000)
    served.join()
    seen = yield
    assert asked.ret == served.ret > 0
    assert totals(seen, OFTEN) == {"192.0.2.2": (asked.ret, 6000), "192.0.2.0/24": (6000, asked.ret)}
    stats = seen.run(OFTEN).stats
    assert stats and stats["lost"] == stats["table_full"] == 0
    assert stats["missed"] <= seen.left_out_at_most
    assert stats["shown"] >= 4000


@recorded(OLDER)
def test_older_than_the_tool(script: Script) -> Test:
    with script.older():
        near, far = pair(script, PORT + 7)
        exchange(near, far, 1000, 2000)
    exchange(near, far, 10, 20)
    close(near, far)
    seen = yield
    assert totals(seen, OLDER) == {"192.0.2.2": (10, 20), "192.0.2.0/24": (20, 10)}


@recorded(OWNED)
def test_the_filter(script: Script) -> Test:
    near, far = pair(script, PORT + 8, comm="mine")
    exchange(near, far, 100, 20)
    close(near, far)
    seen = yield
    assert totals(seen, OWNED) == {"192.0.2.2": (100, 20)}
    stats = seen.run(OWNED).stats
    assert stats and stats["filtered"] > 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--net", "10.0.0.0/33"], "'10.0.0.0/33' is neither an address nor a network; such as"),
        (["--net", ""], "'' is neither an address nor a network"),
        (["--net-file", "nowhere"], "nowhere: No such file or directory"),
        (["--net-file", "wrong"], "wrong:2: '10.0.0.0/99' is neither an address nor a network"),
        (["--sort", "network"], "--sort network; it sorts by tx_bytes"),
        (["10.0.0.0/8"], "'subnet' takes no argument; use --net"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "wrong").write_text("home 192.168.0.0/16\nwork 10.0.0.0/99\n")
    command = [sys.executable, "-m", "tcpscope", "subnet", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tcpscope: {says}")
    assert done.stderr.count("\n") == 1
