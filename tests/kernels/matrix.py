"""The whole run: this machine's row beside the guests' rows, two of these at a time, the longest first.

A guest keeps a processor busy. The tests of this machine wait half of the time, so their row counts against no limit.
"""

from __future__ import annotations

import platform
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tests.kernels import HOST, KERNELS, TWO, btfs, choice, debian, guest, kvm, progress, rows, summary
from tests.kernels.rows import RESULTS, log_of
from tests.record import parts


@dataclass(frozen=True)
class Job:
    """A row to be made."""

    name: str
    make: Callable[[], summary.Row]


def run_all(arguments: Sequence[str], *, jobs: int, timeout_s: float) -> int:
    """Every test here and those of the kernel on every kernel; 0 if all is well."""
    began = time.monotonic()
    shutil.rmtree(RESULTS, ignore_errors=True)
    images = debian.rows(KERNELS, debian.get, print)
    if not btfs.fetched():
        btfs.fetch(False, print)
    under_kvm = kvm.usable()
    seconds, why = progress.expected_s()
    print(f"this will take about {max(1, round(seconds / 60))} minutes, {why}", flush=True)
    chosen = rows.compose(arguments)
    offers = choice.alone(images)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "where.md").write_text(choice.page(images, offers))
    print(f"{chosen.recorded} recorded tests; host ({platform.release()}): all tests; of the kernels:", flush=True)
    for name, image in images.items():
        runs = "all" if name not in offers else "those of every kernel, and what only it has"
        print(f"  {name} ({image.release}): {runs}", flush=True)
    shown = progress.Progress()
    wanted = _jobs(images, offers, chosen, arguments, timeout_s, under_kvm)
    recorded = rows.RECORDINGS / HOST / parts.RECORDED
    recorded.unlink(missing_ok=True)
    made = _run(wanted, jobs, shown, recorded.exists if chosen.script else lambda: True)
    if not arguments and all(row.good for row in made):
        progress.remember(time.monotonic() - began)
    for row in made:
        show_failures(row)
    return close(made, [job.name for job in wanted])


def _jobs(
    images: dict[str, debian.Image],
    offers: dict[str, dict[str, frozenset[str]]],
    chosen: rows.Chosen,
    arguments: Sequence[str],
    timeout_s: float,
    under_kvm: bool,
) -> list[Job]:
    """The rows in the order in which they begin."""

    def job(name: str, of: rows.Chosen, **how: Any) -> Job:
        image = images.get(name, images[names[-1]])
        return Job(
            name, lambda: rows.run_guest(name, image, of, arguments, timeout_s=timeout_s, under_kvm=under_kvm, **how)
        )

    names = list(images)
    first, *others = [job(name, chosen) for name in names if name not in offers]
    between = [job(name, rows.between(name, arguments, choice.paths(only))) for name, only in offers.items()]
    concurrent = rows.concurrent(arguments)
    two = [job(TWO, concurrent, processors=2)] if concurrent.script or concurrent.live else []
    return [Job(HOST, lambda: rows.run_host(arguments, show=lambda _: None)), first, *others, *between, *two]


def _run(
    jobs: Sequence[Job], at_once: int, shown: progress.Progress, ready: Callable[[], bool] = lambda: True
) -> list[summary.Row]:
    """Guests begin when it is `ready`, or this machine's row has ended. They count instructions and lose nothing by it.
    What is recorded here has the machine's clock, and two guests take a small machine whole.
    """
    order = {job.name: number for number, job in enumerate(jobs)}
    lock, turns, ended = threading.Lock(), threading.Semaphore(at_once), threading.Event()

    def one(job: Job) -> summary.Row:
        if job.name == HOST:
            try:
                return run(job)
            finally:
                ended.set()
        while not (ready() or ended.wait(0.2) or guest.stop.is_set()):
            pass
        return run(job)

    def run(job: Job) -> summary.Row:
        with nullcontext() if job.name == HOST else turns:
            if guest.stop.is_set():
                raise InterruptedError("told to stop before its turn came")
            shown.begin(job.name)
            try:
                row = job.make()
            except BaseException:
                guest.stop.set()
                raise
        with lock:
            save(row)
            shown.end(job.name, summary.counts_line(row) + (f"; {row.problem}" if row.problem else ""))
        return row

    with ThreadPoolExecutor(at_once + 1) as pool, shown.shown():
        try:
            return sorted(pool.map(one, jobs), key=lambda row: (row.name != HOST, order[row.name]))
        except BaseException:
            guest.stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def show_failures(row: summary.Row) -> None:
    """What pytest said of the tests of a row that failed; the whole of it if the row did not end well."""
    if row.good or not log_of(row.name).exists():
        return
    text = log_of(row.name).read_text(errors="replace")
    said = [part.partition("short test summary info")[0] for part in text.split("= FAILURES =")[1:]]
    said += [part.partition("short test summary info")[0] for part in text.split("= ERRORS =")[1:]]
    print(f"=== what failed on {row.name} ===", *(said or [text[-8000:]]), sep="\n", flush=True)


def save(row: summary.Row) -> None:
    """For `summary`, which puts rows of several commands together."""
    summary.save(row, RESULTS / f"{row.name.replace(' ', '-')}.json")


def close(made: Sequence[summary.Row], expected: Sequence[str] = ()) -> int:
    lines, good = summary.render(made, expected)
    if expected and (RESULTS / "where.md").exists():
        lines = ["=== what ran where ===", *(RESULTS / "where.md").read_text().splitlines(), *lines]
    print("", *lines, sep="\n", flush=True)
    return 0 if good else 1
