"""`tcpscope features`: what each tool can do on this kernel, and what is missing."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from typing import Any

import click
import msgspec

from tcpscope import tool as toolbox
from tcpscope.errors import TcpscopeError, UnsupportedError
from tcpscope.kernel.features import Kernel, perf_event_paranoid
from tcpscope.kernel.loaded import Hook, Loaded, plan, plan_refusals
from tcpscope.kernel.spec import Spec


def examine(probe: str, kernel: Kernel) -> tuple[dict[str, Hook], bool | None, str]:
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
    not_known  what the tool does not know without the hook; None: the hook is attached
    """
    result = []
    for name in toolbox.names():
        tool = toolbox.find(name)
        for probe in (*tool.probes, *(other for each in tool.probes for other in Spec.of(each).shared.values())):
            hooks, works, why = examine(probe, kernel)
            result.append(
                {
                    "tool": name,
                    "probe": probe,
                    "works": works,
                    "why": why or None,
                    "capabilities": needed(tool, kernel),
                    "for_more": for_more(tool, hooks),
                    "hooks": [
                        {
                            "hook": hook.name,
                            "way": hook.program.section if hook.program else None,
                            "refused": dict(hook.refused),
                            "not_known": hook.without if hook.program is None else None,
                        }
                        for hook in hooks.values()
                    ],
                }
            )
    return result


def _run(json: bool) -> None:
    found = report(Kernel())
    if json:
        sys.stdout.write(msgspec.json.encode({"kernel": platform.release(), "tools": found}).decode() + "\n")
        return
    print(f"Linux {platform.release()}")
    for entry in found:
        print(f"\n{entry['tool']}  (probe {entry['probe']}, needs {', '.join(entry['capabilities'])})")
        for capability, purpose in entry["for_more"].items():
            print(f"  with {capability} also {purpose}")
        if entry["why"]:
            print(f"  {'cannot tell for sure' if entry['works'] is None else 'does not work here'}: {entry['why']}")
        for hook in entry["hooks"]:
            print(f"  {hook['hook']:<17} {hook['way'] or 'not attached'}")
            for program, why in hook["refused"].items():
                way = program.partition("__")[2]
                print(f"  {'':<17} {f'not {way}: ' if way else ''}{why}")
            if hook["not_known"]:
                print(f"  {'':<17} not known here: {hook['not_known']}")


features = click.Command(
    "features",
    params=[click.Option(["--json"], is_flag=True, help="Print JSON, for programs.")],
    callback=_run,
    help="Show which hooks each tool uses on this kernel, why it cannot use better ones, and what it does not know "
    "without them. As root, it attaches each probe for a moment, to be sure.",
)
