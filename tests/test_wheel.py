"""The wheel, in an empty virtual environment with no compiler in reach, traces; and it brings its own libraries."""

import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel() -> Path:
    subprocess.run(["make", "wheel"], cwd=ROOT, check=True, capture_output=True, timeout=600)
    (built,) = (ROOT / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a virtual environment that has the wheel and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
    subprocess.run([folder / "bin/pip", "install", "-q", str(wheel)], check=True, timeout=600)
    return folder / "bin"


def test_one_wheel_for_every_python_brings_libbpf_and_libelf(wheel: Path) -> None:
    assert "-abi3-manylinux" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("tcpscope.libs/libbpf", "tcpscope.libs/libelf", "tcpscope/bpf/transition.bpf.o", "tcpscope/py.typed"):
        assert any(name.startswith(part) for name in names), part
    assert not any(name.endswith((".c", "meson.build")) for name in names)
    headers = {name for name in names if name.endswith(".h")}
    assert headers == {f"tcpscope/bpf/{file.name}" for file in (ROOT / "src/tcpscope/bpf").glob("*.bpf.h")}


def test_it_is_small(environment: Path) -> None:
    package = next(environment.parent.glob("lib/python*/site-packages/tcpscope"))
    size = sum(file.stat().st_size for file in package.rglob("*") if file.suffix != ".pyc")
    assert size < 4_000_000


def test_its_headers_compile_a_program_of_the_users(environment: Path, tmp_path: Path) -> None:
    """Without the wheel's own folder of sources: the headers are those that it has installed."""
    env = {"PATH": f"{environment}:/usr/bin:/bin"}
    subprocess.run(["tcpscope", "new", "mine"], cwd=tmp_path, env=env, check=True, timeout=60)
    script = "from pathlib import Path; from tcpscope.own.compiler import HEADERS, compiled; "
    script += "print(HEADERS, len(compiled(Path('mine.bpf.c'))))"
    argv = [environment / "python", "-I", "-c", script]
    done = subprocess.run(argv, cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True, text=True)
    folder, size = done.stdout.split()
    assert Path(folder).is_relative_to(environment.parent) and int(size) > 1000
    assert done.stderr == ""


def test_it_traces_without_a_compiler(environment: Path, lab) -> None:
    path = str(environment)
    for compiler in ("cc", "gcc", "clang", "llvm-strip", "meson"):
        assert shutil.which(compiler, path=path) is None
    read_end, write_end = os.pipe()
    tool = subprocess.Popen(
        [environment / "tcpscope", "states", "-o", "json", "-n", "1", "-d", "60", "--netns", str(lab.server.inode)],
        env={"PATH": path, "TCPSCOPE_READY_FD": str(write_end)},
        pass_fds=[write_end],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        os.close(write_end)
        assert os.read(read_end, 16), tool.communicate()[1]
        with lab.server.run(socket.create_server, (lab.server.ipv4, 0)) as listener:
            port = listener.getsockname()[1]
            out, err = tool.communicate(timeout=60)
    finally:
        os.close(read_end)
        tool.kill()
        tool.wait()
    assert tool.returncode == 0, err
    row = json.loads(out)
    assert (row["new_state"], row["lport"], row["pid"]) == ("LISTEN", port, os.getpid())
