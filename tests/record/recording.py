"""A recording: a folder with what the kernel said of itself, and a folder for each of its parts (parts.py).

kernel.json, btf               release, what tcpscope makes of the kernel, its type information
NUMBER/script, NUMBER/log      see actor/main.c
NUMBER/NAME.out, .err          of each tool
NUMBER/tools.json              its command line, exit status
NUMBER/unseen.json             what no program was run for, on a kernel that has such tasks (unseen.py)
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tcpscope.kernel.btf import Btf
from tests.kernels.offline import Offline
from tests.record import parts
from tests.record.script import Came, Host, Script
from tests.record.unseen import DISCARD, Unseen
from tests.record.watch import Watch

Row = dict[str, Any]


@dataclass
class Run:
    """A tool that was recorded; `rows` and `stats` from its JSON lines."""

    argv: list[str]
    status: int
    stdout: str
    stderr: str

    @cached_property
    def _records(self) -> list[Row]:
        return [json.loads(line) for line in self.stdout.splitlines() if line.startswith("{")]

    @cached_property
    def rows(self) -> list[Row]:
        return [
            record
            for record in self._records
            if record.keys() not in ({"stats"}, {"summary"}, {"began"}, {"ended"}, {"worse"}, {"explained"})
        ]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The last record of `diagnose`, but for the account."""
        (summary,) = (record["summary"] for record in self._records if record.keys() == {"summary"})
        return dict(summary)

    @cached_property
    def began(self) -> list[Row]:
        """What `diagnose` told, with the numbers of that moment."""
        return [record["began"] for record in self._records if record.keys() == {"began"}]

    @cached_property
    def stats(self) -> dict[str, int] | None:
        return next((record["stats"] for record in self._records[::-1] if record.keys() == {"stats"}), None)

    @cached_property
    def by_netns(self) -> dict[int, list[Row]]:
        found = defaultdict(list)
        for row in self.rows:
            found[row.get("netns", 0)].append(row)
        return found

    def problems(self, unseen: float) -> list[str]:
        """What is wrong with its end or its account; nothing, as it should be. It may miss what was `unseen` by all."""
        found = [] if self.status == 0 else [f"it ended with status {self.status}: {self.stderr.strip()}"]
        if self.stats is not None:
            stats = self.stats
            if stats["seen"] != stats["shown"] + stats["filtered"] + stats["lost"]:
                found.append(f"the account does not add up: {stats}")
            found += [f"{name} {stats[name]}: {self.stderr.strip()}" for name in ("lost", "table_full") if stats[name]]
            if stats["missed"] > unseen:
                found.append(f"missed {stats['missed']}")
        return found


@dataclass
class Played:
    """One scenario, as it was played."""

    text: str = ""
    failure: str = ""
    calls: dict[int, Came] = field(default_factory=dict)
    pids: dict[int, int] = field(default_factory=dict)
    inodes: dict[int, int] = field(default_factory=dict)

    def may_be_of(self, event: Unseen) -> bool:
        """Whether it was played when that happened, and names one of these ports."""
        return self.was_played_at(event.us) and bool(self.words & set(map(str, event.ports)))

    def was_played_at(self, us: float) -> bool:
        if not self.calls:
            return False
        begin_us = min(came.begin_ns for came in self.calls.values()) / 1000
        end_us = max(came.end_ns for came in self.calls.values()) / 1000
        return begin_us <= us <= end_us

    @cached_property
    def words(self) -> set[str]:
        return set(self.text.split())


class Machine:
    """The kernel on which it was recorded, by what it said there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        about = json.loads((folder / "kernel.json").read_text())
        self.release: str = about["release"]
        self.config: dict[str, str] = about["config"]
        self.wall_clock_us: tuple[float, float] = tuple(about["wall_clock_us"])
        """time.time() of that machine before and after."""
        self._hooks: dict[str, dict[str, str | None]] = about["hooks"]

    @cached_property
    def kernel(self) -> Offline:
        """What its BTF says of it."""
        return Offline(Btf.parse((self._folder / "btf").read_bytes()), functions=self.functions_can_be_hooked)

    @property
    def functions_can_be_hooked(self) -> bool:
        return self.config["functions"] == "yes"

    def hook(self, probe: str, hook: str) -> str | None:
        """The program that is attached there for this hook of a probe; None for none."""
        return self._hooks[probe].get(hook)

    def hooks(self, probe: str) -> dict[str, str | None]:
        """Hook -> the program that is attached there, None for none."""
        return self._hooks[probe]

    @property
    def preempts_programs(self) -> bool:
        """Whether a process may be preempted within a program on a tracepoint: since 7.0 these are under SRCU."""
        return self.kernel.btf.field("tp_transition_snapshot", "srcu_gp") is not None

    @property
    def gives_cookies(self) -> bool:
        """Whether tracing programs can ask for a cookie (5.12). Elsewhere it is known if somebody has asked."""
        return self.kernel.enumerator("BPF_FUNC_check_mtu") is not None


def read_log(folder: Path) -> dict[str, Played]:
    """The scenarios by their names, from the script and the actor's log."""
    found: list[tuple[str, Played]] = []
    for line in (folder / parts.SCRIPT).read_text().splitlines(keepends=True):
        if line.startswith("S "):
            found.append((line[2:].rstrip("\n"), Played()))
        else:
            found[-1][1].text += line
    for line in (folder / "log").read_text().splitlines():
        kind, scenario, rest = line.split(" ", 2)
        played = found[int(scenario)][1]
        if kind == "f":
            played.failure = played.failure or rest
            continue
        numbers = rest.split(" ", 5)
        if kind == "r":
            step, begin, end, ret, error, data = numbers
            played.calls[int(step)] = Came(int(begin), int(end), int(ret), int(error), data)
        else:
            (played.pids if kind == "p" else played.inodes)[int(numbers[0])] = int(numbers[1])
    return dict(found)


class Recording:
    """What the folder of a part holds."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder = folder
        self.machine = machine

    @cached_property
    def scenarios(self) -> dict[str, Played]:
        return read_log(self.folder)

    @cached_property
    def inodes(self) -> list[int]:
        """The network namespaces of all hosts."""
        return [inode for played in self.scenarios.values() for inode in played.inodes.values()]

    @cached_property
    def runs(self) -> dict[str, Run]:
        return {
            name: Run(
                argv,
                status,
                (self.folder / f"{name}.out").read_text(errors="replace"),
                (self.folder / f"{name}.err").read_text(errors="replace"),
            )
            for name, (argv, status) in json.loads((self.folder / "tools.json").read_text()).items()
        }

    @cached_property
    def unseen(self) -> list[Unseen]:
        """What no program was run for, by the word of independent witnesses. Nothing where functions can be hooked."""
        file = self.folder / "unseen.json"
        records = json.loads(file.read_text()) if file.exists() else []
        return [Unseen(**record | {"ports": tuple(record["ports"])}) for record in records]

    @cached_property
    def incomplete(self) -> set[str]:
        """The scenarios that may have lost something to it: played at that time, with one of these ports."""
        return {name for name, played in self.scenarios.items() if any(map(played.may_be_of, self.unseen))}

    @cached_property
    def without_discards(self) -> set[str]:
        """The scenarios that may have lost a discarded packet to it."""
        times = [event.us for event in self.unseen if event.event == DISCARD]
        return {name for name, played in self.scenarios.items() if any(map(played.was_played_at, times))}


def read(folder: Path) -> list[Recording]:
    """All parts of a recording."""
    machine = Machine(folder)
    return [Recording(part, machine) for part in parts.of(folder)]


MISSED_AT_MOST = 10
"""Of a tool in a recording, on kernels that preempt programs, and on a machine with other programs. No row may be
missing for it: the tests see to that."""

ONE_COPY = ("diagnose", "drop", "reset")
"""Tools with programs at functions or tracepoints that have no second copy: the kernel leaves one out in a softirq that
interrupts it, and counts that. All scenes of a recording pass them."""
ONE_COPY_AT_MOST = 50


class Seen:
    """What a test gets at its `yield`: the part of the recording that comes from the test's own hosts."""

    def __init__(self, recording: Recording, script: Script) -> None:
        self.recording, self._script = recording, script
        self.machine = recording.machine

    def run(self, watch: Watch) -> Run:
        """The whole run of a tool. It must have ended well and seen everything.

        Where the kernel may preempt a process at the two ends of a program (compat.bpf.h), it leaves that program out
        until the process goes on, and counts that. At most a tool has missed 50 in a recording on 7.x. Without
        functions a program is at the end of every system call, and one preempted process counts thousands; what such a
        tool shows is compared with the rows of one that has functions.
        """
        run = self.recording.runs[watch.name]
        unseen = sum(each.is_change for each in self.recording.unseen)
        without = bool(watch.lacks) and self.machine.functions_can_be_hooked and self.machine.preempts_programs
        may_miss = ONE_COPY_AT_MOST if watch.argv[0] in ONE_COPY else self.left_out_at_most
        if problems := run.problems(math.inf if without else unseen + may_miss):
            pytest.fail(f"tcpscope {' '.join(run.argv)}: {'; '.join(problems)}", pytrace=False)
        return run

    @property
    def left_out_at_most(self) -> int:
        """Runs of programs that a tool may miss.

        A program without a second copy is left out in a softirq that interrupts it. In a guest nobody else has packets.
        """
        shared = not self.machine.functions_can_be_hooked
        return MISSED_AT_MOST if self.machine.preempts_programs or shared else 0

    def of_all(self, watch: Watch) -> list[Row]:
        """Its rows of the hosts of all scenarios, and of nobody else."""
        return [row for inode in self.recording.inodes for row in self.run(watch).by_netns[inode]]

    def rows(self, watch: Watch, *hosts: Host, **wanted: Any) -> list[Row]:
        """Its rows of these hosts (of both without one) in which these columns have these values, in their order."""
        run = self.run(watch)
        if len(hosts) == 1:
            rows = run.by_netns[hosts[0].inode]
        else:
            inodes = {host.inode for host in hosts or self._script.hosts}
            rows = [row for row in run.rows if row["netns"] in inodes]
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def row(self, watch: Watch, *hosts: Host, **wanted: Any) -> Row:
        """The only one of these."""
        rows = self.rows(watch, *hosts, **wanted)
        if len(rows) != 1:
            others = "\n".join(map(str, rows or self.rows(watch, *hosts)))
            pytest.fail(f"{len(rows)} rows of {watch.argv[0]} with {wanted}, not one:\n{others}")
        return rows[0]
