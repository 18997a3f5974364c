"""`tcpscope features`: what each tool can do on this kernel, and what is missing."""

from __future__ import annotations

import platform
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from tcpscope import tool as toolbox
from tcpscope.errors import TcpscopeError, UnsupportedError
from tcpscope.kernel.features import Kernel, perf_event_paranoid
from tcpscope.kernel.loaded import Loaded
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.ways import Hook, plan, plan_refusals

_WIDTH = 80


def examine(probe: str | Path, kernel: Kernel) -> tuple[dict[str, Hook], bool | None, str]:
    """The hooks of a probe on this kernel; whether the probe works (None: not known); and why not.

    With privileges it attaches the probe for a moment. Without them it answers from the kernel's BTF and files.
    """
    spec = Spec.of(probe)
    try:
        loaded = Loaded(spec, kernel)
    except TcpscopeError as error:
        works = False if isinstance(error, UnsupportedError) else None
        return plan(spec, plan_refusals(spec, kernel)), works, str(error)
    hooks = loaded.hooks
    loaded.close()
    return hooks, True, ""


def needed(tool: toolbox.Tool, kernel: Kernel) -> list[str]:
    """The capabilities that the tool needs to start on this kernel."""
    memory = () if kernel.accounts_memory_by_cgroup else ("CAP_SYS_RESOURCE",)
    return [*tool.capabilities, *memory]


def for_more(tool: toolbox.Tool, hooks: Mapping[str, Hook]) -> dict[str, str]:
    """Optional capability of the tool on this kernel -> what it is for."""
    level = perf_event_paranoid()
    probes = [hook.name for hook in hooks.values() if hook.program and hook.program.type in ("kprobe", "kretprobe")]
    if level > 2 and probes:
        reason = f"{', '.join(probes)}: kernel.perf_event_paranoid is {level}"
        return {"CAP_SYS_ADMIN": reason} | dict(tool.for_more)
    return dict(tool.for_more)


def report(kernel: Kernel) -> list[dict[str, Any]]:
    """One dict per tool and probe, as `features --json` prints them.

    way        ELF section of the program that is attached; None: the hook is not attached
    refused    program of each better way -> why this kernel cannot have it
    not_known  what the tool does not know without the hook; None: the hook is attached, or only newer kernels have it
    """
    result = []
    examined: dict[str | Path, tuple[dict[str, Hook], bool | None, str]] = {}  # many tools have the same probes
    for name in toolbox.names():
        try:
            tool = toolbox.find(name)
            probes = [*tool.probes, *(other for each in tool.probes for other in Spec.of(each).shared.values())]
        except (TcpscopeError, OSError) as error:  # of another package
            print(f"tcpscope: {name}: {error}", file=sys.stderr)
            continue
        for probe in probes:
            if probe not in examined:
                examined[probe] = examine(probe, kernel)
            hooks, works, why = examined[probe]
            result.append(
                {
                    "tool": name,
                    "probe": Spec.of(probe).name,
                    "works": works,
                    "why": why or None,
                    "capabilities": needed(tool, kernel),
                    "for_more": for_more(tool, hooks),
                    "hooks": [
                        {
                            "hook": hook.name,
                            "way": hook.program.section if hook.program else None,
                            "refused": dict(hook.refused),
                            "not_known": (hook.without or None) if hook.program is None else None,
                        }
                        for hook in hooks.values()
                    ],
                }
            )
    return result


def summary(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A report in a few lines: the tools that do not work, the ways that are refused, and what is not known."""
    broken = {entry["tool"]: entry for entry in reversed(found) if entry["works"] is not True}
    tools = dict.fromkeys(entry["tool"] for entry in found)
    needs = ", ".join(dict.fromkeys(capability for entry in found for capability in entry["capabilities"]))
    yield f"{len(tools) - len(broken)} of {len(tools)} tools work here. They need {needs}."
    for why in dict.fromkeys(f"{_doubt(entry)}: {entry['why']}" for entry in broken.values()):
        names = sorted(name for name, entry in broken.items() if f"{_doubt(entry)}: {entry['why']}" == why)
        yield f"{', '.join(names)}: {why}."
    refused: dict[str, tuple[set[str], set[str]]] = {}
    not_known: dict[str, list[str]] = {}
    for entry in found:
        for hook in entry["hooks"]:
            for program, why in hook["refused"].items():
                name, _, way = program.partition("__")
                ways, hooks = refused.setdefault(why, (set(), set()))
                (ways if way else hooks).add(way or name)
            if hook["not_known"]:
                not_known.setdefault(hook["not_known"], []).append(entry["tool"])
    for why, (ways, hooks) in refused.items():
        yield f"Without {', '.join(sorted(ways or hooks))}: {why}."
    of_tools: dict[str, list[str]] = {}
    for text, names in not_known.items():
        of_tools.setdefault(", ".join(dict.fromkeys(names)), []).append(text)
    for these, texts in of_tools.items():
        yield f"Not known in {these}: {'; '.join(texts)}."


def _doubt(entry: Mapping[str, Any]) -> str:
    return "cannot tell for sure" if entry["works"] is None else "does not work here"


def _run(json: bool, verbose: bool) -> None:
    found = report(Kernel())
    if json:
        sys.stdout.write(msgspec.json.encode({"kernel": platform.release(), "tools": found}).decode() + "\n")
        return
    print(f"Linux {platform.release()}")
    if not verbose:
        for line in (*summary(found), "Each hook: tcpscope features -v"):
            print(*textwrap.wrap(line, _WIDTH, subsequent_indent="    "), sep="\n")
        return
    for entry in found:
        print(f"\n{entry['tool']}  (probe {entry['probe']}, needs {', '.join(entry['capabilities'])})")
        for capability, purpose in entry["for_more"].items():
            print(f"  with {capability} also {purpose}")
        if entry["why"]:
            print(f"  {_doubt(entry)}: {entry['why']}")
        for hook in entry["hooks"]:
            print(f"  {hook['hook']:<17} {hook['way'] or 'not attached'}")
            for program, why in hook["refused"].items():
                way = program.partition("__")[2]
                print(f"  {'':<17} {f'not {way}: ' if way else ''}{why}")
            if hook["not_known"]:
                print(f"  {'':<17} not known here: {hook['not_known']}")


features = click.Command(
    "features",
    params=[
        click.Option(["--json"], is_flag=True, help="Print JSON, for programs."),
        click.Option(["-v", "--verbose"], is_flag=True, help="Print each hook of each tool."),
    ],
    callback=_run,
    help="Show what each tool can do on this kernel, and what is missing. With --verbose: which hooks each tool uses, "
    "why it cannot use better ones, and what it does not know without them. As root, it attaches each probe for a "
    "moment, to be sure.",
)
