"""Which way of each hook this kernel can have (docs/design.md, "Ways of a hook")."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tcpscope.kernel.features import Kernel
from tcpscope.kernel.spec import Program, Spec


@dataclass(frozen=True)
class Hook:
    """One logical hook.

    program  the program in use; None: the hook is not attached
    refused  each better way, by the name of its program -> why this kernel cannot have it
    without  what is not known without the hook; None: the object does not work without it
    """

    name: str
    program: Program | None
    refused: Mapping[str, str]
    without: str | None = None


def plan_refusals(spec: Spec, kernel: Kernel) -> dict[str, str]:
    """Program -> why this kernel cannot have it. It has only what is known without loading the program."""
    answers = {program.name: kernel.can(program) for program in spec.programs}
    return {name: answer.why for name, answer in answers.items() if not answer}


def plan(spec: Spec, refused: Mapping[str, str], skip: frozenset[str] = frozenset()) -> dict[str, Hook]:
    """Hook -> its first way that is not in `refused`. A second copy without a way is omitted."""
    hooks = {}
    for name, ways in spec.hooks.items():
        if name in skip:
            continue
        best = next((way for way in ways if way.name not in refused), None)
        if not best and ways[0].again:
            continue
        better = ways[: ways.index(best)] if best else ways
        hooks[name] = Hook(name, best, {way.name: refused[way.name] for way in better}, ways[0].without)
    attached = {hook.program.name for hook in hooks.values() if hook.program}
    return {name: hook for name, hook in hooks.items() if not spec.hooks[name][0].unless & attached}
