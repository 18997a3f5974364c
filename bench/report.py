"""docs/performance.md, from the figures of a run."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.subjects import CONNECT, COUNT, GROUPS, JSON, PEERS, STATES, TABLE, TOP, TRACE, Group, Subject

TEXT = Path(__file__).with_name("page.md")
Figures = Sequence[float]


def page(results: dict[str, Any]) -> str:
    """The whole page. Parts that were not run are said to be missing."""
    parts = {
        "targets": _targets(results),
        "host": _kernel(results.get("host"), "This machine"),
        "guest": _kernel(results.get("guest"), "In a virtual machine"),
        "user": _user(results.get("micro")),
        "attach": _attach([r for r in (results.get("host"), results.get("guest")) if r]),
    }
    text = TEXT.read_text()
    for name, content in parts.items():
        text = text.replace(f"<!-- {name} -->", content or "(not measured)")
    return text


# --- figures -----------------------------------------------------------------------------------------------------


def spread(figures: Figures, digits: int = 0) -> str:
    """Median and, in brackets, the quartiles."""
    if not figures:
        return "-"
    low, high = (min(figures), max(figures)) if len(figures) < 4 else quantiles(figures, n=4)[::2]
    return f"{median(figures):,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def added(costs: dict[str, list[Any]], name: str, clock: str) -> list[float | None]:
    """Per round: ns that a connection takes longer than in the same round without a tool."""
    return [
        None if with_tool is None or nothing is None else with_tool[clock] - nothing[clock]
        for with_tool, nothing in zip(costs.get(name, []), costs["nothing"], strict=False)
    ]


def per_event(costs: dict[str, list[Any]], name: str) -> list[float | None]:
    """Per round: ns of the tool's own time on a processor per row that it printed."""
    return [cost["tool_cpu_ns"] / cost["rows"] if cost and cost["rows"] else None for cost in costs.get(name, [])]


def bpf_time(runs: dict[str, list[Any]], name: str, per: str) -> list[float]:
    """Per round: ns in BPF programs per event or per connection."""
    return [run["program_ns"] / run[per] for run in runs.get(name, []) if run]


def ratios(one: Sequence[float | None], other: Sequence[float | None]) -> list[float]:
    """Round by round, so that what disturbs a round disturbs both sides."""
    return [a / b for a, b in zip(one, other, strict=False) if a is not None and b is not None and b > 0]


def known(figures: Sequence[float | None]) -> list[float]:
    return [figure for figure in figures if figure is not None]


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (titles, *rows)]
    lines.insert(1, "|---" + "|---:" * (len(titles) - 1) + "|")
    return "\n".join(lines)


# --- sections ----------------------------------------------------------------------------------------------------


def _kernel(part: dict[str, Any] | None, where: str) -> str:
    if not part:
        return ""
    plan, load = part["plan"], f"{part['load_before']:.1f} before, {part['load_after']:.1f} after"
    nothing = [cost for cost in next(iter(part["cost"].values()))["nothing"] if cost]
    lines = [
        f"{where}, Linux {part['kernel']}, {part['cpus']} processor{'s' if part['cpus'] > 1 else ''}, {part['began']}, "
        f"load {load}.\n"
        f"{plan['rounds']} rounds of {plan['batches']} x {plan['connections']:,} connections, {plan['starts']} starts. "
        f"Without a tool a connection takes {spread([cost['wall_ns'] for cost in nothing])} ns.",
    ]
    for group in GROUPS:
        if group.title not in part["cost"]:
            continue
        text = group.text.format(exchanges=plan["exchanges"])
        if group.unit != "connection":
            alone = known([cost and cost["cpu_ns"] for cost in part["cost"][group.title]["nothing"]])
            text = f"{text[:-1]}. Without a tool a {group.unit} takes {spread(alone)} ns of CPU time:"
        lines += ["", text, ""]
        lines.append(_rows(part, group) if group.reference else _aggregate(part, group))
        if group.title == "states" and part["burst"]:
            lines += [
                "",
                f"At {plan['burst_per_second']:,} connections per second for {plan['burst_seconds']} s, "
                f"which is {plan['burst_per_second'] * 10:,} events per second:",
                "",
                _burst(part),
            ]
    return "\n".join(lines)


def _rows(part: dict[str, Any], group: Group) -> str:
    """Programs that print a row per event."""
    costs, runs, reference = part["cost"][group.title], part["bpf"][group.title], group.reference or ""
    ready = part["ready"] if group.title == "states" else None
    short = reference.split()[0]
    rows = []

    def ratio(figures: Figures, name: str) -> str:
        return "1" if name == reference else spread(figures, 2)

    for subject in group.subjects:
        name = subject.name
        if name in part["absent"]:
            rows.append([f"{subject.project}: `{name}`", "does not run here", *[""] * (10 if ready else 9)])
            continue
        mine = [cost for cost in costs[name] if cost]
        wall = added(costs, name, "wall_ns")
        cpu = added(costs, name, "cpu_ns")
        events = per_event(costs, name)
        rows.append(
            [
                f"{subject.project}: `{name}`",
                *([spread(known(ready[name]))] if ready else []),
                spread(known(wall)),
                ratio(ratios(wall, added(costs, reference, "wall_ns")), name),
                spread(known(cpu)),
                ratio(ratios(cpu, added(costs, reference, "cpu_ns")), name),
                spread(known(events)),
                ratio(ratios(events, per_event(costs, reference)), name),
                *_memory(mine),
                spread(bpf_time(runs, name, "events")),
                _lost(mine),
            ]
        )
    return table(
        [
            "tool",
            *(["start to ready, ms"] if ready else []),
            "added per connection, ns",
            f"x `{short}`",
            "the same by CPU time, ns",
            f"x `{short}`",
            "tool's CPU per event, ns",
            f"x `{short}`",
            "peak memory, MB",
            "BPF maps, MB",
            "BPF time per event, ns",
            "lost at full speed",
        ],
        rows,
    )


def _memory(costs: Sequence[Any]) -> list[str]:
    """The most of all rounds, in MB: of the process, and of its maps in the kernel."""
    return [f"{max((cost[kind] for cost in costs), default=0) / 1024:.1f}" for kind in ("peak_kb", "maps_kb")]


def _lost(costs: Sequence[Any]) -> str:
    """Of all rounds together; what the tool itself says, where that is another number."""
    if not costs:
        return "-"
    events = sum(cost["events"] for cost in costs)
    lost = events - sum(cost["rows"] for cost in costs)
    said = sum(cost["lost_said"] for cost in costs)
    text = f"{lost:,} of {events:,}" if lost else "0"
    return text if said == lost else f"{text} (says {said:,})"


def _burst(part: dict[str, Any]) -> str:
    rows = []
    for subject in STATES:
        if costs := [cost for cost in part["burst"].get(subject.name, []) if cost]:
            rates = [cost["events"] / cost["seconds"] for cost in costs]
            rows.append([f"{subject.project}: `{subject.name}`", spread(rates), _lost(costs)])
    return table(["tool", "events per second, really", "lost"], rows)


def _aggregate(part: dict[str, Any], group: Group) -> str:
    """Programs that put together what they see."""
    costs, runs = part["cost"][group.title], part["bpf"][group.title]
    rows = []
    for subject in group.subjects:
        name = subject.name
        if name in part["absent"]:
            rows.append([f"{subject.project}: `{name}`", "does not run here", "", "", "", ""])
            continue
        mine = [cost for cost in costs[name] if cost]
        rows.append(
            [
                f"{subject.project}: `{name}`",
                spread(known(added(costs, name, "wall_ns"))),
                spread(known(added(costs, name, "cpu_ns"))),
                spread(bpf_time(runs, name, "connections")),
                *_memory(mine),
            ]
        )
    return table(
        [
            "tool",
            f"added per {group.unit}, ns",
            "the same by CPU time, ns",
            f"BPF time per {group.unit}, ns",
            "peak memory, MB",
            "BPF maps, MB",
        ],
        rows,
    )


def _user(micro: dict[str, Any] | None) -> str:
    if not micro:
        return ""

    def row(title: str, key: str) -> list[str]:
        return [title, spread([figure / 1e6 for figure in micro[key]], 2 if key != "drain" else 0)]

    return table(
        ["", "million per second"],
        [
            row(f"draining the ring buffer, events of {micro['record_bytes']} bytes", "drain"),
            row("decoding and JSON lines, all columns", "json"),
            row("decoding and JSON lines, the columns of the table", "json_default"),
            row("decoding and the table", "table"),
            row("decoding and CSV, all columns", "csv"),
        ],
    )


def _attach(parts: Sequence[dict[str, Any]]) -> str:
    titles = ["tool", *(f"Linux {part['kernel']}" for part in parts)]

    def answer(subject: Subject, part: dict[str, Any]) -> str:
        tried = any(subject in group.subjects for group in GROUPS if group.title in part["cost"])
        if not tried and not (subject in PEERS and part.get("others", part["plan"]["others"])):
            return "not tried"
        return str(part["absent"].get(subject.name, "works")).replace("|", "/")

    rows = [[f"{s.project}: `{s.name}`", *(answer(s, part) for part in parts)] for s in (*_all(), *PEERS)]
    return table(titles, rows).replace("---:", "---")


def _all() -> list[Subject]:
    return [subject for group in GROUPS for subject in group.subjects]


def _targets(results: dict[str, Any]) -> str:
    rows = []

    def target(title: str, bound: float, figures: Figures, unit: str, digits: int = 0, atleast: bool = False) -> None:
        if not figures:
            rows.append([title, "", "not measured", ""])
            return
        value = median(figures)
        reached = value >= bound if atleast else value <= bound
        word = "at least" if atleast else "at most"
        shown = spread(figures, digits)
        rows.append([title, f"{word} {bound:,g} {unit}".strip(), shown, "yes" if reached else "**no**"])

    host, micro = results.get("host"), results.get("micro")
    for where in ("host", "guest"):
        if not (part := results.get(where)):
            continue
        on = f"Linux {part['kernel']}"
        if where == "host":
            target(f"start to ready, {on}", 150, known(part["ready"].get(TABLE, [])), "ms")
        for group in GROUPS:
            costs, reference = part["cost"].get(group.title), group.reference
            if not costs or not reference or reference in part["absent"]:
                continue
            unit = f"x `{reference.split()[0]}`"
            mine = [subject.name for subject in group.subjects if subject.project == "tcpscope"]
            for name in mine:
                for clock, title in (("wall_ns", "by the clock"), ("cpu_ns", "by CPU time")):
                    one, other = added(costs, name, clock), added(costs, reference, clock)
                    target(f"added time {title}, `{name}`, {on}", 0.5, ratios(one, other), unit, digits=2)
            for name in mine:
                one, other = per_event(costs, name), per_event(costs, reference)
                target(f"CPU per event, `{name}`, {on}", 1, ratios(one, other), unit, digits=2)
    if micro:
        target("batch drain", 5, [figure / 1e6 for figure in micro["drain"]], "million events/s", atleast=True)
        target("JSON lines", 300, [figure / 1e3 for figure in micro["json"]], "thousand rows/s", atleast=True)
    if host:
        for name in (TABLE, JSON):
            burst = [cost for cost in host["burst"].get(name, []) if cost]
            lost = [float(max(c["events"] - c["rows"] for c in burst))] if burst else []
            target(f"lost at 100,000 events/s, `{name}`", 0, lost, "events")
            rate = median(c["events"] / c["seconds"] for c in burst) if burst else 0
            if burst and rate < 95_000:
                rows[-1][3] = f"**not shown**: the traffic came to {rate:,.0f} events/s only"
            peak = [cost["peak_kb"] / 1024 for cost in host["cost"].get("states", {}).get(name, []) if cost]
            target(f"peak memory of `{name}`", 40, peak, "MB", digits=1)
        for title, name, where, most in (
            ("storm", COUNT, "in a storm of discarded SYNs", 5),
            ("traffic", TOP, "for a send", 1),
        ):
            if costs := host["cost"].get(title):
                alone = median(known([cost and cost["cpu_ns"] for cost in costs["nothing"]]))
                more = [100 * ns / alone for ns in bpf_time(host["bpf"][title], name, "connections")]
                target(f"more CPU {where}, `{name}`", most, more, "%", digits=1)
        for title, of in (("gbit", "1 Gbit/s"), ("small", "100,000 small packets/s")):
            if costs := host["cost"].get(title):
                for clock, what in (("wall_ns", "time"), ("cpu_ns", "CPU time")):
                    both = zip(costs[TRACE], costs["nothing"], strict=True)
                    ratio = [with_tool[clock] / alone[clock] for with_tool, alone in both if with_tool and alone]
                    target(f"{what} of other traffic of {of}, `{TRACE}`", 1.05, ratio, "x without", digits=2)
        connect = CONNECT[0].name
        maps = [cost["maps_kb"] / 1024 for cost in host["cost"].get("connect", {}).get(connect, []) if cost]
        target(f"BPF maps of `{connect}`", 8, maps, "MB", digits=1)
    return table(["", "target", "measured", "reached"], rows)
