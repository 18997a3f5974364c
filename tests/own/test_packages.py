"""A tool from another package: docs/example is installed into a folder of its own, and nothing of ours is touched."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.own.programs import tcpscope

EXAMPLE = Path(__file__).resolve().parents[2] / "docs/example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which Python finds the example."""
    folder = tmp_path_factory.mktemp("example")
    source, target = folder / "source", folder / "target"
    shutil.copytree(EXAMPLE, source)
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", target, source], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return env | {"PYTHONPATH": str(target)}


def brought(folder: Path, source: str, name: str = "extra") -> dict[str, str]:
    """An environment with a package whose module has this source, and which brings a tool of this name."""
    (folder / "extra.py").write_text(source)
    info = folder / "extra-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[tcpscope.tools]\n{name} = extra\n")
    return os.environ | {"PYTHONPATH": str(folder)}


def test_it_is_a_command_like_ours(installed: dict[str, str]) -> None:
    assert "rcvspace  How large has the kernel made the receive buffer" in tcpscope(status=2, env=installed).stderr
    said = tcpscope("help", "rcvspace", status=0, env=installed).stdout
    assert "tcpscope rcvspace --comm curl" in said and "--raddr" in said
    assert "did you mean 'rcvspace'?" in tcpscope("rcvspac", status=2, env=installed).stderr
    assert "no command 'rcvspace'" in tcpscope("rcvspace", status=2).stderr  # without the package


@pytest.mark.root
def test_it_shows_its_events(lab, run_tool, installed: dict[str, str]) -> None:
    env = {"PYTHONPATH": installed["PYTHONPATH"]}
    with (
        lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener,
        run_tool("rcvspace", "--netns", str(lab.server.inode), env=env) as tool,
    ):
        port = listener.getsockname()[1]
        with lab.client.run(socket.create_connection, (lab.server.ipv4, port)) as made:
            child, (_, theirs) = listener.accept()
            with child:
                made.sendall(b"x" * 1000)
                assert child.recv(1000, socket.MSG_WAITALL)
                size = child.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
                row = tool.wait_for(len)[0]
    assert (row["lport"], row["rport"], row["pid"]) == (port, theirs, os.getpid())
    assert row["rcvbuf_bytes"] == size
    account = tool.done.stats
    assert account["lost"] == 0 and account["seen"] == account["shown"] + account["filtered"]


@pytest.mark.root
def test_python_has_it_too(installed: dict[str, str]) -> None:
    script = (
        "import tcpscope, socket\n"
        "with tcpscope.open('rcvspace', max_events=1, duration=60) as rows:\n"
        "    l = socket.create_server(('127.0.0.1', 0))\n"
        "    c = socket.create_connection(l.getsockname()); s, _ = l.accept()\n"
        "    c.send(b'x'); s.recv(1)\n"
        "    for row in rows: print(row.rcvbuf_bytes > 0, row.raddr.version)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=installed, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[0] == "True", done.stderr


@pytest.mark.root
def test_features_knows_it(installed: dict[str, str]) -> None:
    found = json.loads(tcpscope("features", "--json", status=0, env=installed).stdout)["tools"]
    (entry,) = [each for each in found if (each["tool"], each["probe"]) == ("rcvspace", "rcvspace")]
    assert entry["works"] is True
    assert entry["hooks"][0]["way"] == "tp_btf/tcp_rcv_space_adjust"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            "1 / 0",
            "tcpscope: the tool 'extra' of the package extra-package cannot be imported; "
            "ZeroDivisionError('division by zero')",
        ),
        (
            "tool = 5",
            "tcpscope: the tool 'extra' of the package extra-package is none; "
            "the module extra must have a variable `tool`, a tcpscope.tool.Tool",
        ),
    ],
)
def test_a_broken_one_names_its_package(tmp_path: Path, source: str, said: str) -> None:
    env = brought(tmp_path, source)
    assert tcpscope("extra", status=1, env=env).stderr.strip() == said
    others = " ".join(tcpscope("help", status=0, env=env).stdout.split())
    assert "extra (the tool 'extra' of the package extra-package" in others
    assert "retrans What is retransmitted" in others


def test_none_replaces_one_of_ours(tmp_path: Path) -> None:
    env = brought(tmp_path, "1 / 0", "retrans")
    assert "What is retransmitted" in tcpscope("help", "retrans", status=0, env=env).stdout


def test_none_replaces_a_command(tmp_path: Path) -> None:
    env = brought(tmp_path, "1 / 0", "features")
    assert "what is missing" in tcpscope("help", "features", status=0, env=env).stdout
    assert tcpscope("help", status=0, env=env).stdout.count(" features ") == 1
