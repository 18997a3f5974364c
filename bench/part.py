"""All measurements on the kernel that is running: the same rounds on the machine and in a guest, in other sizes."""

import ctypes
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from bench import measure, workload
from bench.measure import CannotRun
from bench.subjects import GROUPS, PEERS, Group, Subject

TRACEFS = Path("/sys/kernel/tracing")
CLONE_NEWNS = 0x20000


@dataclass(frozen=True)
class Plan:
    """How much of each. `exchanges` go over each connection where round trips are measured."""

    starts: int
    rounds: int
    batches: int
    connections: int
    stats_rounds: int
    probe_ms: int
    limits: measure.Limits
    burst_rounds: int = 0
    burst_per_second: int = 10_000
    burst_seconds: int = 6
    exchanges: int = 5
    others: bool = True
    """Try the other TCP tools of the peers too?"""
    compiling_rounds: int = 1
    """How often a program takes part that compiles at every start. One such start can take minutes in a guest."""


SYNS = 10
"""For each connection of a plan, where the traffic is SYNs: they are so much cheaper. So are sends."""
SENDS = 20
REAL = measure.Limits(patience_s=20, idle=0.03)
EMULATED = measure.Limits(patience_s=400, idle=0.5)
PLANS = {
    "host": Plan(
        starts=15, rounds=9, batches=5, connections=4000, stats_rounds=3, probe_ms=1, limits=REAL, burst_rounds=3
    ),
    "guest": Plan(
        starts=3, rounds=3, batches=5, connections=400, stats_rounds=1, probe_ms=10, limits=EMULATED, others=False
    ),
    "quick-host": Plan(
        starts=3,
        rounds=2,
        batches=3,
        connections=1000,
        stats_rounds=1,
        probe_ms=1,
        limits=REAL,
        burst_rounds=1,
        burst_seconds=2,
    ),
    "quick-guest": Plan(
        starts=1,
        rounds=1,
        batches=3,
        connections=50,
        stats_rounds=1,
        probe_ms=20,
        limits=EMULATED,
        others=False,
        compiling_rounds=0,
    ),
}


def run(plan: Plan, say: Callable[[str], None], titles: Sequence[str] = ()) -> dict[str, Any]:
    """Everything, or the groups called `titles`, as plain data."""
    wanted = [group for group in GROUPS if not titles or group.title in titles]
    prepare()
    result: dict[str, Any] = {
        "kernel": ".".join(platform.release().split(".")[:2]),
        "cpus": os.cpu_count(),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "load_before": os.getloadavg()[0],
        "plan": asdict(plan),
        "cost": {},
        "bpf": {},
        "burst": {},
        "ready": {},
        "others": plan.others and not titles,
    }
    asked = chain(*(group.subjects for group in wanted))
    result["absent"] = absent((*(PEERS if result["others"] else ()), *asked), plan, say)
    present = {group.title: [s for s in group.subjects if s.name not in result["absent"]] for group in wanted}

    slow = plan.compiling_rounds
    if "states" in present:
        say(f"start to ready, {plan.starts} times")
        result["ready"] = _rounds(
            plan.starts, slow, present["states"], lambda s: measure.ready_ms(s, plan.probe_ms, plan.limits), say
        )
    for group in wanted:
        exchanges = plan.exchanges if group.title == "rtt" else 0

        def traffic(
            exchanges: int = exchanges, unit: str = group.unit, steady: tuple[int, int] | None = group.steady
        ) -> workload.Made:
            if steady:
                return workload.steady(plan.batches, *steady)
            if unit == "SYN":
                return workload.storm(plan.batches, plan.connections * SYNS)
            if unit == "send":
                return workload.sends(plan.batches, plan.connections * SENDS)
            return workload.connections(plan.batches, plan.connections, exchanges)

        def once(subject: Subject | None, group: Group = group, traffic: measure.Traffic = traffic) -> dict[str, Any]:
            cost = asdict(measure.cost(subject, traffic, plan.limits))
            if group.per_connection:
                cost["events"] = cost["connections"] * group.per_connection
            return cost

        title, subjects = group.title, present[group.title]
        rounds = plan.rounds if group.reference else -(-plan.rounds // 2)
        say(f"{title}: cost, {rounds} rounds")
        result["cost"][title] = _rounds(rounds, slow, [None, *subjects], once, say)
        say(f"{title}: run time of the BPF programs, {plan.stats_rounds} rounds")
        with measure.bpf_stats():
            result["bpf"][title] = _rounds(plan.stats_rounds, 0, subjects, once, say)
    if plan.burst_rounds and "states" in present:
        say(f"loss at {plan.burst_per_second} connections/s for {plan.burst_seconds} s, {plan.burst_rounds} rounds")
        result["burst"] = _rounds(
            plan.burst_rounds,
            slow,
            present["states"],
            lambda s: asdict(
                measure.cost(s, lambda: workload.rate(plan.burst_per_second, plan.burst_seconds), plan.limits)
            ),
            say,
        )
    result["load_after"] = os.getloadavg()[0]
    return result


def prepare() -> None:
    """A mount namespace of our own with what the peers look for: tracefs, and the headers of a Debian kernel."""
    release = platform.release()
    headers = Path("/usr/src") / f"linux-headers-{release}"
    common = Path("/usr/src") / f"linux-headers-{release.rpartition('-')[0]}-common"
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "a mount namespace of our own")
    _run("mount", "--make-rprivate", "/")
    if not (TRACEFS / "events").exists():
        _run("mount", "-t", "tracefs", "tracefs", str(TRACEFS))
    modules = Path("/lib/modules") / release
    if headers.exists() and not (modules / "build").exists():
        _run("mount", "-t", "tmpfs", "tmpfs", "/lib/modules")
        modules.mkdir()
        (modules / "build").symlink_to(headers)
        (modules / "source").symlink_to(common)


def has_headers() -> bool:
    """Is there what a program needs that compiles against the running kernel?"""
    return Path("/lib/modules", platform.release(), "build").exists()


def absent(subjects: Iterable[Subject], plan: Plan, say: Callable[[str], None]) -> dict[str, str]:
    """Programs that this kernel or this machine does not take -> what they say about it."""
    found = {}
    for subject in dict.fromkeys(subjects):
        if subject.compiles and has_headers():
            if not plan.compiling_rounds:
                found[subject.name] = "left out: it compiles at every start"
            continue
        try:
            with measure.Running(subject, plan.limits) as running:
                running.attached()
        except FileNotFoundError as error:
            found[subject.name] = f"not installed: {error.filename}"
        except CannotRun as error:
            found[subject.name] = str(error)
        say(f"  {subject.name}: {found.get(subject.name, 'attaches')}")
    return found


def _rounds(
    count: int,
    compiling: int,
    subjects: Sequence[Subject | None],
    once: Callable[[Any], Any],
    say: Callable[[str], None],
) -> dict[str, list[Any]]:
    """A B C, B C A, ...: one figure per subject and round, None for a round that it had no part in or failed in."""
    result: dict[str, list[Any]] = {subject.name if subject else "nothing": [] for subject in subjects}
    for number in range(count):
        start = number % len(subjects) if subjects else 0
        for subject in (*subjects[start:], *subjects[:start]):
            figures = result[subject.name if subject else "nothing"]
            if subject and subject.compiles and number >= compiling:
                figures.append(None)
                continue
            try:
                figures.append(once(subject))
            except CannotRun as error:
                say(f"  round {number + 1}, {subject and subject.name}: {error}")
                figures.append(None)
    return result


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
