"""The documents against the code: columns, commands, links, files, kernels, examples.

`python -m tests.test_docs` writes the tables of columns.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tcpscope import cli, errors
from tcpscope import tool as toolbox
from tcpscope.lab.hosts import Lab
from tcpscope.output import Column
from tcpscope.request import Request
from tests.kernels import KERNELS

TREE = Path(__file__).resolve().parents[1]
PAGES = sorted([*TREE.glob("*.md"), *TREE.glob("docs/**/*.md")])
COLUMNS = re.compile(r"<!-- columns: (?P<command>.*) -->\n(?P<table>(?:\n(?:\|.*\n)+)?)")
HEAD = "| column | unit | `null` | meaning |\n|---|---|---|---|\n"

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TREE)))


def offered(command: str) -> tuple[Column, ...]:
    """The columns of a tool called as in `command`."""
    name, *words = shlex.split(command)
    tool = toolbox.find(name)
    context = cli.command_of(tool).make_context(name, words)
    return tool.columns(Request(options={option.name: context.params[option.name] for option in tool.options}))


def table_of(command: str) -> str:
    """What should stand in the page."""
    text = HEAD
    for column in offered(command):
        null = "can be" if column.nullable else "-"
        unit = "-" if column.kind == "time" else column.unit or "-"  # shown as text, or in seconds
        text += f"| `{column.name}` | {unit} | {null} | {column.doc} |\n"
    return text


def rewritten(text: str) -> str:
    return COLUMNS.sub(lambda m: f"<!-- columns: {m['command']} -->\n\n{table_of(m['command'])}", text)


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def command_lines(page: Path) -> Iterator[str]:
    """Every `tcpscope ...` that the page tells somebody to type."""
    text = page.read_text()
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S):
        for line in block.splitlines():
            if found := re.match(r"(?:[#$] )?(?:sudo )?tcpscope (\w.*)", line):
                yield found[1].partition("  #")[0].strip()
    yield from re.findall(r"`(?:sudo )?tcpscope ([^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def parse(words: list[str]) -> None:
    """As the command line would, but nothing is run. Raises for what it would refuse."""
    command: click.Command = cli.tcpscope
    name = "tcpscope"
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            return
        name, found, words = command.resolve_command(click.Context(command), words)  # type: ignore[assignment]
        assert found is not None, name
        command = found
    if "--help" in words:
        return
    context = command.make_context(name, list(words))
    if beside := context.params.get("tool"):
        parse([word.replace("{client}", "1").replace("{server}", "1") for word in beside])
    if columns := context.params.get("columns"):
        known = {column.name for column in offered(" ".join([name, *without_columns(words)]))}
        assert set(columns.split(",")) <= known


def without_columns(words: list[str]) -> list[str]:
    at = words.index("--columns")
    return [*words[:at], *words[at + 2 :]]


def test_every_tool_has_a_page_and_every_page_a_tool() -> None:
    assert {page.stem for page in TREE.glob("docs/tools/*.md")} == set(toolbox.names())


def test_every_other_command_has_a_page() -> None:
    commands = set(cli.tcpscope.list_commands(click.Context(cli.tcpscope))) - set(toolbox.names())
    assert {name for name in commands if not (TREE / f"docs/{name}.md").exists()} == set()


@pytest.mark.parametrize("name", toolbox.names())
def test_a_page_begins_with_the_tools_own_words(name: str) -> None:
    title, _, summary = (TREE / f"docs/tools/{name}.md").read_text().splitlines()[:3]
    assert (title, summary) == (f"# {name}", toolbox.find(name).summary)


@pytest.mark.parametrize("name", toolbox.names())
def test_columns_are_those_of_the_code(name: str) -> None:
    text = (TREE / f"docs/tools/{name}.md").read_text()
    assert COLUMNS.search(text), "no table of columns"
    assert text == rewritten(text), "write them with: python -m tests.test_docs"


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in slugs(there), target


@pages
def test_commands_are_understood(page: Path) -> None:
    for line in command_lines(page):
        try:
            parse(shlex.split(line))
        except (click.ClickException, errors.TcpscopeError) as error:
            pytest.fail(f"tcpscope {line}: {error}")


@pytest.mark.parametrize("name", [*toolbox.names(), "diagnose"])
def test_examples_of_the_help_are_understood(name: str) -> None:
    command = cli.tcpscope.get_command(click.Context(cli.tcpscope), name)
    assert isinstance(command, cli.Command)
    for line in command.examples:
        parse(shlex.split(line))


@pages
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (TREE / "Makefile").read_text(), re.M))
    code = " ".join(re.findall(r"^```sh\n.*?^```$|`make[^`]*`", page.read_text(), re.M | re.S))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", code, re.M)) <= targets


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:src|tests|docs|bench)/[\w./*-]+)`", page.read_text()):
        assert list(TREE.glob(name.rstrip("/"))) or re.search(r"NAME|PROBE", name), name


@pages
def test_python_in_it_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.rstrip(",\n"), str(page), "exec")


def example(title: str, language: str = "python") -> str:
    """The example in a section of CONTRIBUTING.md."""
    text = (TREE / "CONTRIBUTING.md").read_text()
    section = re.split(r"^## ", text.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.M)[0]
    found = re.search(rf"^```{language}\n(.*?)^```$", section, re.M | re.S)
    assert found, title
    return found[1]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> types.ModuleType:
    """An example as a module."""
    made = types.ModuleType("tcpscope.example")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(example(request.param), made.__name__, "exec"), made.__dict__)
    return made


@pytest.mark.parametrize("module", ["A rule"], indirect=True)
def test_the_example_of_a_rule(module: types.ModuleType) -> None:
    seen = types.SimpleNamespace(queues=types.SimpleNamespace(histories={}))
    assert list(module.rule.check(seen)) == []


@pytest.mark.parametrize("module", ["A scenario"], indirect=True)
def test_the_example_of_a_scenario(module: types.ModuleType, lab: Lab) -> None:
    outcome = module.Idle(clients=2).run(lab)
    assert len(outcome.connected) == outcome.listener.recv_q == 2


@pytest.mark.root
def test_the_example_of_a_recorded_test(tmp_path: Path) -> None:
    (tmp_path / "test_example.py").write_text(example("Tests"))
    command = [sys.executable, "-m", "pytest", "-p", "tests.record.plugin", "-p", "tests.kernels.report"]
    where = ["-c", "/dev/null", "-p", "no:cacheprovider", "--rootdir", tmp_path]
    where += ["--record-to", tmp_path / "recording", tmp_path]
    done = subprocess.run([*command, *where], cwd=TREE, capture_output=True, text=True)
    assert "1 passed" in done.stdout, done.stdout


def test_the_readme_names_the_kernels_of_the_matrix() -> None:
    section = (TREE / "README.md").read_text().partition("\n## Kernels\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\d.]+) \| Debian ([\w-]+) \|", section, re.M)
    assert rows == [(kernel.name, kernel.suite) for kernel in KERNELS]


def test_the_readme_names_the_exit_statuses() -> None:
    text = (TREE / "README.md").read_text().partition("Exit status: ")[2].partition("\n\n")[0]
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    known = {kind.exit_status for kind in kinds if issubclass(kind, errors.TcpscopeError)}
    assert {int(number) for number in re.findall(r"\b(\d) \w", text)} == known | {0}


def test_the_readme_names_every_tool_and_every_filter() -> None:
    text = (TREE / "README.md").read_text()
    for name in toolbox.names():
        assert f"[`{name}`](docs/tools/{name}.md)" in text
        for alias in toolbox.find(name).aliases:
            assert f"`{alias}`" in text
    for option in (*cli.FILTERS, *cli.COMMON):
        assert option.name == "debug" or any(f"`{flag}" in text for flag in option.opts), option.opts


def test_every_rule_and_every_scenario_is_described() -> None:
    from tcpscope.diagnose import all_rules
    from tcpscope.lab.scenario import names

    pages = [TREE / "docs/diagnose.md", *(TREE / "docs/diagnose").glob("*.md")]
    diagnose = "".join(page.read_text() for page in pages)
    assert [rule.name for rule in all_rules() if f"`{rule.name}`" not in diagnose] == []
    lab = (TREE / "docs/lab.md").read_text()
    assert [name for name in names() if f"**{name}.**" not in lab] == []


if __name__ == "__main__":
    for path in PAGES:
        if (after := rewritten(path.read_text())) != path.read_text():
            path.write_text(after)
            print(path.relative_to(TREE))
