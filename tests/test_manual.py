"""Manual pages and completion: made of the command line's own texts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tcpscope import cli, manual

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = click.Context(cli.tcpscope, info_name="tcpscope", **cli.tcpscope.context_settings)
    return {path.name: path.read_text() for path in manual.write(root, tmp_path_factory.mktemp("man"))}


def test_every_command_has_a_page(pages: dict[str, str]) -> None:
    commands = cli.tcpscope.list_commands(click.Context(cli.tcpscope))
    assert pages.keys() >= {"tcpscope.1", "tcpscope-lab-run.1", *(f"tcpscope-{name}.1" for name in commands)}


def test_a_page_has_what_the_help_has(pages: dict[str, str]) -> None:
    text = pages["tcpscope-connlat.1"]
    sections = re.findall("^[.]SH (.*)", text, re.M)
    head = ["NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "OPTIONS", "FILTERS", "OUTPUT", "SEE ALSO"]
    assert sections == head
    assert r"tcpscope\-connlat \- Which connections take long to establish?" in text
    for option in cli.command_of(cli.toolbox.find("connlat")).params:
        assert option.opts[0].replace("-", r"\-") in text


def test_nothing_is_taken_for_a_macro(pages: dict[str, str]) -> None:
    known = {".TH", ".SH", ".B", ".BR", ".PP", ".TP", ".nf", ".fi"}
    assert ".nf\ntcpscope lab list\n" in pages["tcpscope-lab.1"]
    for text in pages.values():
        assert {line.split()[0] for line in text.splitlines() if line.startswith((".", "'"))} <= known
    assert manual._plain(r".x \n -y") == r"\&.x \en \-y"


def test_man_understands_them(pages: dict[str, str]) -> None:
    for text in pages.values():
        done = subprocess.run(["groff", "-man", "-Tutf8", "-ww"], input=text, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_help_writes_them(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "tcpscope", "help", "--man", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {str(path) for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["conn"], {"connect", "connlat"}),
        (["connect", "--fa"], {"--failed"}),
        (["tcplife", "-o", ""], {"table", "json", "csv", "screen"}),
        (["help", "tra"], {"trace", "tracer"}),
    ],
    ids=str,
)
def test_bash_completes(words: list[str], offered: set[str]) -> None:
    line = " ".join(f"'{word}'" for word in ["tcpscope", *words])
    script = (
        'eval "$(_TCPSCOPE_COMPLETE=bash_source tcpscope)" 2>/dev/null\n'
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _tcpscope_completion tcpscope\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete(shell: str) -> None:
    env = os.environ | {"COMP_WORDS": "tcpscope con", "COMP_CWORD": "con" if shell == "fish" else "1"}
    for what, expected in (("source", "_TCPSCOPE_COMPLETE"), ("complete", "connlat")):
        env["_TCPSCOPE_COMPLETE"] = f"{shell}_{what}"
        done = subprocess.run([BIN / "tcpscope"], capture_output=True, text=True, env=env, check=True)
        assert expected in done.stdout
