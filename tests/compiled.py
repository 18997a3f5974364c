"""BPF objects of a test's own, compiled as those of tcpscope are."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tcpscope.kernel.spec import Spec

BPF = Path(__file__).resolve().parents[1] / "src/tcpscope/bpf"


def compiled(folder: Path, name: str, text: str) -> Spec:
    source = folder / f"{name}.bpf.c"
    source.write_text(text)
    subprocess.run(
        [
            "clang",
            "-target",
            "bpf",
            "-mcpu=v3",
            "-O2",
            "-g",
            "-D__TARGET_ARCH_x86",
            "-idirafter",
            "/usr/include/x86_64-linux-gnu",
            "-I",
            BPF,
            "-c",
            source,
            "-o",
            source.with_suffix(".o"),
        ],
        check=True,
    )
    return Spec(name, source.with_suffix(".o").read_bytes())
