"""What the bench needs built: tcpscope as a user has it, and the traffic program.

The development environment starts slowly: its editable install looks for changed sources, and its site-packages hold
much that no user has. The bench therefore has a virtual environment of its own, with the same build and the
dependencies alone.
"""

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kernels.install import staged

TREE = Path(__file__).resolve().parents[1]
CACHE = TREE / ".cache/bench"
WORKLOAD = CACHE / "workload"
TCPSCOPE = CACHE / "venv/bin/tcpscope"
PYTHON = CACHE / "venv/bin/python"


def build() -> None:
    """Make everything anew; takes a few seconds."""
    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    source = Path(__file__).with_name("workload.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-o", WORKLOAD, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", CACHE / "venv"], check=True)
    site = next(CACHE.glob("venv/lib/python*/site-packages"))
    staged(CACHE / "stage")
    shutil.move(next(CACHE.glob("stage/**/tcpscope/__init__.py")).parent, site / "tcpscope")
    shutil.rmtree(CACHE / "stage")
    for name in _dependencies("tcpscope"):
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    TCPSCOPE.write_text(f"#!{PYTHON}\nimport sys\nfrom tcpscope.cli import main\nsys.exit(main())\n")
    TCPSCOPE.chmod(0o755)


def _dependencies(package: str) -> set[str]:
    """All that is installed because of `package`. What a marker excludes on this machine is not installed."""
    names: set[str] = set()
    for requirement in importlib.metadata.requires(package) or ():
        name = re.match(r"[\w.-]+", requirement)
        assert name
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if "extra ==" not in requirement:
                names |= _dependencies(name[0]) | {name[0]}
    return names
