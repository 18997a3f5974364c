"""The BTF of Debian's kernels, out of their packages. It tells without a boot what tcpscope can do there.

Of each package only the BTF is kept, compressed; that of a package which is gone from its suite stays.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tcpscope.errors import TcpscopeError
from tcpscope.kernel.btf import Btf
from tests.kernels import debian
from tests.kernels.image import ImageError, types_in

SUITES = ("bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports", "forky", "sid", "experimental")
"""Each with its -security. Of bullseye the mirrors have no backports any more; experimental has candidates."""
TRIES = 5  # a list may name packages that its mirror no longer has
_PACKAGE = re.compile(r"linux-image-(\d+\.\d+)\.(\d[\w.+~]*?(?:-(?!cloud|rt)[\w.]+)?)(-cloud|-rt)?-amd64")
_CANDIDATE = re.compile(r"linux-image-(\d+\.\d+)()(-cloud|-rt)?-amd64")  # elsewhere a package without files


@dataclass(frozen=True, order=True)
class Found:
    """A kernel of which the BTF is here, or could be had."""

    series: tuple[int, ...]
    suite: str
    flavour: str
    release: str

    @property
    def kind(self) -> tuple[tuple[int, ...], str]:
        return self.series, self.flavour

    @property
    def file(self) -> Path:
        return folder() / f"{self.release}.btf.gz"

    @property
    def btf(self) -> Btf:
        return Btf.parse(gzip.decompress(self.file.read_bytes()))


def folder() -> Path:
    return debian.cache_directory().with_name("btf")


def fetched() -> bool:
    """Whether the newest of each kind were fetched once, as far as they were to be had."""
    return _stamp().exists()


def _stamp() -> Path:
    return folder() / "fetched"


def cached() -> list[Found]:
    """From the oldest series to the newest."""
    records = [json.loads(path.read_text()) for path in folder().glob("*.json")]
    found = [Found(**{**record, "series": tuple(record["series"])}) for record in records]
    return sorted(kernel for kernel in found if kernel.file.exists())


def newest(*flavours: str) -> list[Found]:
    """Of those that are here the newest of each series and flavour, or of these flavours."""
    found = {kernel.kind: kernel for kernel in sorted(cached(), key=age) if not flavours or kernel.flavour in flavours}
    return sorted(found.values())


def age(kernel: Found) -> list[int]:
    """By this kernels of a series are sorted, the newest last; a candidate, which has no third number, is first."""
    return [int(number) for number in re.findall(r"\d+", kernel.release.removesuffix("-amd64"))]


def among(packages: Iterable[str], suite: str) -> list[list[Found]]:
    """The kernels among these packages, those of each series and flavour apart, the newest first."""
    found: dict[object, list[Found]] = {}
    for package in packages:
        if match := (_CANDIDATE if suite == "experimental" else _PACKAGE).fullmatch(package):
            series, flavour = tuple(debian.numbers(match[1])), (match[3] or "-plain")[1:]
            kernel = Found(series, suite, flavour, package.removeprefix("linux-image-"))
            found.setdefault(kernel.kind, []).append(kernel)
    return sorted(sorted(kernels, key=age, reverse=True) for kernels in found.values())


def fetch(everything: bool, say: Callable[[str], None]) -> None:
    """Fetch what is missing. A suite or a package that cannot be had is one line, and no failure."""
    folder().mkdir(parents=True, exist_ok=True)
    complete = True
    for suite in SUITES:
        with tempfile.TemporaryDirectory(prefix="tcpscope-btf-") as name:
            try:
                apt = debian.apt_of(Path(name) / "apt", suite)
                apt.run("apt-get", "update")
                packages = apt.run("apt-cache", "pkgnames", "linux-image-").split()
            except debian.FetchError as error:
                say(f"{suite}: its list cannot be read: {str(error).splitlines()[-1]}")
                complete = False
                continue
            kinds = among(packages, suite)
            wanted = (
                [[kernel] for kernels in kinds for kernel in kernels]
                if everything
                else [kernels[:TRIES] for kernels in kinds]
            )
            missing = [kernels for kernels in wanted if not kernels[0].file.exists()]
            if missing:
                say(f"{suite}: fetching the BTF of {len(missing)} kernels")
            with ThreadPoolExecutor(2) as pool:
                for problem in filter(None, pool.map(partial(_fetch_one, apt), missing)):
                    say(problem)
    if complete and cached():
        _stamp().touch()


def _fetch_one(apt: debian.Apt, kernels: Sequence[Found]) -> str:
    """Take the first of these that can be had; return why that is not the very first, or nothing."""
    problem = ""
    for kernel in kernels:
        try:
            if not kernel.file.exists():
                _keep(kernel, _take(apt, kernel))
            return f"{problem}; {kernel.release} instead" if problem else ""
        except (debian.FetchError, ImageError, TcpscopeError) as error:
            why = re.sub(r"^E: Failed to fetch \S+ +", "", str(error).splitlines()[-1])
            problem = problem or f"{kernel.release} cannot be had: {why}"
    return problem


def _take(apt: debian.Apt, kernel: Found) -> bytes:
    """The BTF out of the kernel's package, which is deleted at once."""
    image = f"linux-image-{kernel.release}"
    # From 7.2 on the image is empty and its two halves are packages of their own.
    parts = [part for part in apt.depends(image) if part.startswith("linux-binary-")]
    with tempfile.TemporaryDirectory(prefix="tcpscope-btf-") as name:
        apt.run("apt-get", "download", *(parts or [image]), cwd=Path(name))
        (archive,) = Path(name).glob("*.deb")
        return types_in(_vmlinuz(archive))


def _keep(kernel: Found, btf: bytes) -> None:
    Btf.parse(btf)
    new = kernel.file.with_suffix(".new")
    new.write_bytes(gzip.compress(btf, 3))
    new.rename(kernel.file)
    kernel.file.with_name(f"{kernel.release}.json").write_text(json.dumps(asdict(kernel)))


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
