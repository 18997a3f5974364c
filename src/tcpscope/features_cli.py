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
    """The hooks of a probe on this kernel; whether the probe works, None for not known; and why.

    With privileges the probe is attached for a moment. Without them the answer comes from what can be read.
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
    """The capabilities without which the tool does not start on this kernel."""
    memory = () if kernel.accounts_memory_by_cgroup else ("CAP_SYS_RESOURCE",)
    return [*tool.capabilities, *memory]


def for_more(tool: toolbox.Tool, hooks: Mapping[str, Hook]) -> dict[str, str]:
    """Optional capabilities of the tool on this kernel -> what they are for."""
    level = perf_event_paranoid()
    probes = [hook.name for hook in hooks.values() if hook.program and hook.program.type in ("kprobe", "kretprobe")]
    if level > 2 and probes:
        reason = f"{', '.join(probes)}: kernel.perf_event_paranoid is {level}"
        return {"CAP_SYS_ADMIN": reason} | dict(tool.for_more)
    return dict(tool.for_more)


def report(kernel: Kernel) -> list[dict[str, Any]]:
    """For every tool: its hooks, how each is attached, why not in a better way, and what is not known without it."""
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
            print(f"  {hook['hook']:<14} {hook['way'] or 'not attached'}")
            for why in dict.fromkeys(hook["refused"].values()):
                print(f"  {'':<14} no better way: {why}" if hook["way"] else f"  {'':<14} {why}")
            if hook["not_known"]:
                print(f"  {'':<14} not known here: {hook['not_known']}")


features = click.Command(
    "features",
    params=[click.Option(["--json"], is_flag=True, help="Print JSON, for programs.")],
    callback=_run,
    help="Show for every tool which hooks it uses on this kernel, why it cannot use better ones, and what it does not "
    "know without them. As root, the probes are attached for a moment, to be sure.",
)
