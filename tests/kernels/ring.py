"""Every kernel of Debian's suites without a boot: its BTF, and whether tcpscope would find there what it needs.

    python -m tests.kernels ring            fetch the newest of each series and flavour, check all, write the page
    python -m tests.kernels ring --all      fetch every kernel that the suites hold
    python -m tests.kernels ring FILE ...   check BTF files, /sys/kernel/btf/vmlinux of another machine say

Of each package only the BTF is kept, compressed; one that is gone from its suite stays.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from tcpscope import tool
from tcpscope.kernel import elf
from tcpscope.kernel.btf import Btf, FuncProto, Kind, Ref
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Program, Spec
from tests.kernels import core, debian, image, signature
from tests.kernels.image import ImageError, vmlinux
from tests.kernels.offline import Offline

SUITES = ("bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports", "forky", "sid")
_PACKAGE = re.compile(r"linux-image-(\d+\.\d+)\.(\d[\w.+~]*?(?:-(?!cloud|rt)[\w.]+)?)(-cloud|-rt)?-amd64")


ASKS_FIRST = {
    "accept__fexit": "inet_csk_accept() lost two arguments with struct proto_accept_arg (6.10), which it asks for",
}
"""Programs that read more arguments than some kernels have, and not there."""


@dataclass(frozen=True, order=True)
class Found:
    """A kernel of which the BTF is here."""

    series: tuple[int, ...]
    suite: str
    flavour: str
    release: str

    @property
    def file(self) -> Path:
        return folder() / f"{self.release}.btf.gz"

    @property
    def btf(self) -> Btf:
        return Btf.parse(gzip.decompress(self.file.read_bytes()))


def folder() -> Path:
    return debian.cache_directory().with_name("btf")


def cached() -> list[Found]:
    """From the oldest series to the newest."""
    records = [json.loads(path.read_text()) for path in folder().glob("*.json")]
    return sorted(Found(**{**record, "series": tuple(record["series"])}) for record in records)


def newest(*flavours: str) -> list[Found]:
    """Of those that are here the newest of each series and flavour, or of these flavours."""
    found: dict[tuple[object, ...], Found] = {}
    for kernel in sorted(cached(), key=_age):
        if not flavours or kernel.flavour in flavours:
            found[kernel.series, kernel.flavour] = kernel
    return sorted(found.values())


def wanted(packages: Iterable[str], suite: str, everything: bool) -> list[Found]:
    """The kernels among these packages: all, or the newest of each series and flavour."""
    found: dict[tuple[tuple[int, ...], str], list[Found]] = {}
    for package in packages:
        if match := _PACKAGE.fullmatch(package):
            series, flavour = tuple(debian.numbers(match[1])), (match[3] or "-plain")[1:]
            kernel = Found(series, suite, flavour, package.removeprefix("linux-image-"))
            found.setdefault((series, flavour), []).append(kernel)
    newest = [max(kernels, key=_age) for kernels in found.values()]
    return sorted(kernel for kernels in found.values() for kernel in kernels) if everything else sorted(newest)


def _age(kernel: Found) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", kernel.release)]


def fetch(everything: bool, say: Callable[[str], None]) -> None:
    """Fetch what is missing. A suite or a package that cannot be had is one line, and no failure."""
    folder().mkdir(parents=True, exist_ok=True)
    for suite in SUITES:
        with tempfile.TemporaryDirectory(prefix="tcpscope-ring-") as name:
            apt = debian.apt_of(Path(name) / "apt", suite)
            try:
                apt.run("apt-get", "update")
                packages = apt.run("apt-cache", "pkgnames", "linux-image-").split()
            except debian.FetchError as error:
                say(f"{suite}: its list cannot be read: {str(error).splitlines()[-1]}")
                continue
            missing = [kernel for kernel in wanted(packages, suite, everything) if not kernel.file.exists()]
            if missing:
                say(f"{suite}: fetching the BTF of {len(missing)} kernels")
            with ThreadPoolExecutor(2) as pool:
                for problem in filter(None, pool.map(partial(_fetch, apt), missing)):
                    say(problem)


def _fetch(apt: debian.Apt, kernel: Found) -> str:
    """Nothing, or why it cannot be had."""
    named = f"linux-image-{kernel.release}"
    parts = [part for part in apt.depends(named) if part.startswith("linux-binary-")]
    with tempfile.TemporaryDirectory(prefix="tcpscope-ring-") as name:
        try:
            for package in parts or [named]:
                apt.run("apt-get", "download", package, cwd=Path(name))
            (archive,) = Path(name).glob("*.deb")
            btf = elf.sections(vmlinux(_vmlinuz(archive)))[".BTF"]
        except (debian.FetchError, ImageError, KeyError, ValueError) as error:
            return f"{kernel.release}: no BTF: {str(error).splitlines()[-1]}"
    Btf.parse(btf)
    kernel.file.with_suffix(".new").write_bytes(gzip.compress(btf, 3))
    kernel.file.with_suffix(".new").rename(kernel.file)
    kernel.file.with_name(f"{kernel.release}.json").write_text(json.dumps(asdict(kernel)))
    return ""


def _vmlinuz(archive: Path) -> bytes:
    """Out of a package, which is read no further than to it."""
    unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    pick = ["tar", "-xO", "--wildcards", "--occurrence=1", "*/vmlinuz*"]
    with subprocess.Popen(unpack, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar:
        picked = subprocess.run(pick, stdin=tar.stdout, capture_output=True)
        tar.kill()
    if not picked.stdout:
        raise ImageError(f"{archive.name} has no vmlinuz")
    return picked.stdout


def check(btf: Btf) -> dict[str, list[str]]:
    """Of each probe what a kernel with this BTF lacks that it needs: nothing, as it should be."""
    kernel = Offline(btf)
    lacks = {}
    for probe in signature.probes():
        spec = Spec.of(probe)
        hooks = plan(spec, plan_refusals(spec, kernel)).values()
        lacks[probe] = [f"no hook for '{hook.name}'" for hook in hooks if not hook.program and hook.without is None]
        lacks[probe] += [f"no {path}" for path in core.missing(spec, btf)]
        lacks[probe] += _arguments(spec, btf)
    return lacks


def _arguments(spec: Spec, btf: Btf) -> Iterator[str]:
    """Programs that would read more arguments than there are; behind those of a function is what it returns."""
    kernel = Offline(btf)
    for program in spec.programs:
        if program.type not in ("tp_btf", "fentry", "fexit") or not kernel.can(program):
            continue
        there = parameters(btf, program)
        reads = reads_of(spec, program.name)
        if program.name in ASKS_FIRST:
            continue
        if reads > there + (program.type == "fexit"):
            yield f"{program.target} has {there} arguments, {program.name} reads {reads}"


def parameters(btf: Btf, program: Program) -> int:
    """How many arguments a tracing program gets."""
    if program.type != "tp_btf":
        return len(btf.func_params(program.target) or ())
    alias = btf.find(f"btf_trace_{program.target}", Kind.TYPEDEF)
    assert alias is not None
    pointer = btf.resolve(alias.id)
    assert isinstance(pointer, Ref)
    prototype = btf.resolve(pointer.type_id)
    assert isinstance(prototype, FuncProto)
    return len(prototype.params) - 1  # the first is the tracepoint's own


def reads_of(spec: Spec, program: str) -> int:
    """How many arguments a program reads, by its instructions: loads of eight bytes from its context.

    The context is in r1 at first. What is copied from there is followed in a straight line, which is how clang unpacks
    arguments: at the beginning.
    """
    symbol = next(symbol for symbol in elf.symbols(spec.data) if symbol.name == program)
    code = elf.sections(spec.data)[symbol.section][symbol.value : symbol.value + symbol.size]
    holds, most = {1}, 0
    for opcode, registers, offset, _immediate in struct.iter_unpack("<BBhi", code):
        target, source = registers & 15, registers >> 4
        if opcode == 0x85:  # a call: r0 to r5 are lost
            holds -= set(range(6))
        elif opcode == 0xBF:  # target = source
            holds = holds | {target} if source in holds else holds - {target}
        elif opcode & 7 in (0, 1, 4, 7):  # loads and arithmetic overwrite their target
            if opcode == 0x79 and source in holds:
                most = max(most, offset // 8 + 1)
            holds.discard(target)
    return most


def without(btf: Btf) -> dict[str, list[str]]:
    """Of each tool what it will not know on a kernel with this BTF, as `features` says it."""
    kernel, found = Offline(btf), {}
    for name in tool.names():
        each = tool.find(name)
        spec = Spec.of(each.probes[0])
        hooks = plan(spec, plan_refusals(spec, kernel), event=each.event or None).values()
        found[name] = sorted({hook.without for hook in hooks if not hook.program and hook.without})
    return found


def page() -> str:
    """The table of docs/kernels.md: a row for each suite, series and flavour."""
    groups: dict[tuple[object, ...], list[Found]] = {}
    for kernel in cached():
        groups.setdefault((kernel.series, kernel.suite, kernel.flavour), []).append(kernel)
    lines = ["| series | suite | flavour | kernels | newest | tcpscope |", "|---|---|---|---:|---|---|"]
    for (series, suite, flavour), kernels in groups.items():
        lines.append(
            f"| {'.'.join(map(str, series))} | {suite} | {flavour} | {len(kernels)} | "
            f"{max(kernels, key=_age).release} | {verdict(kernels)} |"
        )
    return "\n".join([*lines, ""])


def verdict(kernels: Iterable[Found]) -> str:
    """What these kernels lack, all of them taken together."""
    return "; ".join(dict.fromkeys(lack for kernel in kernels for lack in judged(kernel))) or "everything"


def judged(kernel: Found) -> list[str]:
    """What a kernel lacks and what tools do not know there; kept beside its BTF until an object or a check changes."""
    kept, now = kernel.file.with_name(f"{kernel.release}.verdict"), _basis()
    try:
        basis, said = json.loads(kept.read_text())
        if basis == now:
            return list(said)
    except (OSError, ValueError, TypeError):
        pass
    btf = kernel.btf
    said = [f"`{probe}` cannot run: {lack}" for probe, lacks in check(btf).items() for lack in lacks]
    said += [f"`{name}` without {what}" for name, unknown in without(btf).items() for what in unknown]
    kept.write_text(json.dumps([now, said]))
    return said


@cache
def _basis() -> str:
    """Of what a verdict depends on."""
    sources = [Path(module.__file__).read_bytes() for module in (core, image, signature)]
    return hashlib.sha256(b"".join([*(Spec.of(probe).data for probe in signature.probes()), *sources])).hexdigest()


_TABLE = re.compile(r"(<!-- kernels -->\n).*?(\n<!-- end -->)", re.DOTALL)


def rewritten(text: str) -> str:
    """The page with the table of what is cached here."""
    return _TABLE.sub(lambda match: match[1] + page() + match[2].lstrip("\n"), text)


def stated(text: str) -> dict[tuple[str, str, str], str]:
    """What the page's table says: (series, suite, flavour) -> verdict."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 6]
    return {(row[0], row[1], row[2]): row[5] for row in cells if row[0][:1].isdigit()}
