"""Fetches a kernel of the matrix from Debian and unpacks it outside of the tree, once.

The package lists of a foreign suite are kept apart from the machine's own (``Dir::State::lists`` and others):
nothing is installed and no source is added. The mirror is the one that the machine uses itself.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.kernels import Kernel

MIRROR_VARIABLE = "TCPSCOPE_DEBIAN_MIRROR"
CACHE_VARIABLE = "TCPSCOPE_CACHE"
KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")


class FetchError(Exception):
    """A kernel could not be fetched; the message says what to do."""


class GoneError(FetchError):
    """The suite has no such kernel any more. `instead` is the version that follows there, None if there is none."""

    def __init__(self, kernel: Kernel, instead: str | None) -> None:
        super().__init__(f"{kernel.suite} has no kernel {kernel.name}")
        self.kernel, self.instead = kernel, instead


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel on this machine; ``root`` holds ``boot`` and ``lib/modules/<release>`` as ``/`` would."""

    name: str
    release: str
    package_version: str
    root: str
    vmlinuz: str

    @property
    def modules(self) -> Path:
        return Path(self.root) / "lib/modules" / self.release


@dataclass(frozen=True, slots=True)
class Mirror:
    archive: str
    security: str | None

    def sources(self, suite: str) -> str:
        keyring = next((k for k in KEYRINGS if Path("/usr/share/keyrings", k).exists()), None)
        if keyring is None:
            raise FetchError("Debian's keys are missing; install the package debian-archive-keyring")
        options = f"[arch=amd64 signed-by=/usr/share/keyrings/{keyring}]"
        lines = [f"deb {options} {self.archive} {suite} main"]
        if self.security and suite not in ("sid", "experimental") and not suite.endswith("-backports"):
            lines.append(f"deb {options} {self.security} {suite}-security main")
        return "\n".join(lines) + "\n"


def cache_directory() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache/tcpscope/kernels"


def source_entries(text: str) -> Iterator[tuple[str, str]]:
    """Yield (address, suite) of every ``deb`` entry, from both forms of apt's source files."""
    for line in text.splitlines():
        if one_line := re.match(r"\s*deb\s+(?:\[[^]]*\]\s*)?(\S+)\s+(\S+)", line):
            yield one_line[1], one_line[2]
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace():
                fields[name] = f"{fields.get(name, '')} {line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.lower()
                fields[name] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes").lower() != "no":
            for address in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield address, suite


def _fields(os_release: str) -> dict[str, str]:
    return dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', os_release, re.MULTILINE))


def find_mirror(sources: str, os_release: str, given: str | None) -> Mirror:
    """Choose the mirror: what the user names, or what a Debian machine uses for its own release."""
    release = _fields(os_release)
    archive = security = None
    if release.get("ID") == "debian":
        names = {release.get("VERSION_CODENAME", "sid"), "stable", "oldstable", "testing", "unstable", "sid"}
        for address, suite in source_entries(sources):
            if suite in names:
                archive = archive or address.rstrip("/")
            elif suite.endswith("-security") and suite.removesuffix("-security") in names:
                security = security or address.rstrip("/")
    if given:
        archive = given.rstrip("/")
    if archive is None:
        raise FetchError(
            "the kernels of the matrix come from Debian, and this machine's apt sources name no Debian "
            f"mirror; set {MIRROR_VARIABLE} to the address of one (the folder that holds dists/ and pool/)"
        )
    return Mirror(archive, security)


def machine_mirror() -> Mirror:
    files = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    files = [file for file in files if file.suffix in (".list", ".sources") and file.is_file()]
    sources = "\n\n".join(file.read_text(errors="replace") for file in files)
    return find_mirror(sources, os_release(), os.environ.get(MIRROR_VARIABLE))


def os_release() -> str:
    file = Path("/etc/os-release")
    return file.read_text() if file.exists() else ""


def backports(os_release: str) -> str | None:
    """The suite with newer packages for a Debian release; None elsewhere."""
    release = _fields(os_release)
    codename = release.get("VERSION_CODENAME") if release.get("ID") == "debian" else None
    return f"{codename}-backports" if codename else None


def cached(kernel: Kernel) -> Image | None:
    record = cache_directory() / kernel.name / "kernel.json"
    try:
        image = Image(**json.loads(record.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    whole = Path(image.vmlinuz).exists() and image.modules.exists()
    return image if whole and image.release.startswith(f"{kernel.name}.") else None


def get(kernel: Kernel, *, fresh: bool = False) -> Image:
    """Return the kernel from the cache, without touching the network; fetch it where it is missing."""
    if not fresh and (image := cached(kernel)):
        return image
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / f"{kernel.name}.lock"):
        if not fresh and (image := cached(kernel)):
            return image
        return _fetch(kernel, cache)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def newest(version: str, packages: Iterable[str]) -> str | None:
    """The package of the newest kernel of this version: a suite may hold several versions, backports does."""
    pattern = re.compile(rf"linux-image-{re.escape(version)}\.\d+(-\d+|\+deb\d+)-amd64")
    found = [package for package in packages if pattern.fullmatch(package)]
    return max(found, key=lambda package: [int(number) for number in re.findall(r"\d+", package)], default=None)


def following(version: str, packages: Iterable[str]) -> str | None:
    """The lowest version above this one that is among the packages."""
    pattern = re.compile(r"linux-image-(\d+\.\d+)\.\d+(?:-\d+|\+deb\d+)-amd64")
    versions = {match[1] for package in packages if (match := pattern.fullmatch(package))}
    return min((other for other in versions if numbers(other) > numbers(version)), key=numbers, default=None)


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def rows(kernels: Iterable[Kernel], fetch: Callable[[Kernel], Image], say: Callable[[str], None]) -> dict[str, Image]:
    """The kernels of the matrix by name.

    One whose package is gone is replaced by the next one of its suite or, if that is a row already, left out; a line
    says which.
    """
    kernels = tuple(kernels)
    taken = {kernel.name for kernel in kernels}
    found: dict[str, Image] = {}
    for kernel in kernels:
        try:
            found[kernel.name] = fetch(kernel)
            continue
        except GoneError as gone:
            instead = gone.instead
        if instead is None or instead in taken:
            why = f"; {instead} is one already" if instead else ""
            say(f"kernel {kernel.name}: {kernel.suite} has it no more and none is cached: no such row{why}")
        else:
            say(f"kernel {kernel.name}: {kernel.suite} has it no more and none is cached: {instead} instead")
            taken.add(instead)
            found[kernel.name] = fetch(Kernel(instead, kernel.suite))
    return found


def _fetch(kernel: Kernel, cache: Path) -> Image:
    with tempfile.TemporaryDirectory(prefix=f".{kernel.name}-", dir=cache) as temporary:
        work = Path(temporary)
        apt = apt_of(work / "apt", kernel.suite)
        print(f"kernel {kernel.name}: reading the package list of {kernel.suite}", flush=True)
        apt.run("apt-get", "update")
        packages = apt.run("apt-cache", "pkgnames", "linux-image-").split()
        package = newest(kernel.name, packages)
        if package is None:
            raise GoneError(kernel, following(kernel.name, packages))
        # From 7.2 on the image is empty and its two halves are packages of their own.
        parts = [p for p in apt.depends(package) if re.match(r"linux-(binary|modules)-\d", p)]
        print(f"kernel {kernel.name}: fetching {package}", flush=True)
        apt.run("apt-get", "download", package, *parts, cwd=work)
        root = work / "root"
        archives = sorted(work.glob("*.deb"))
        for archive in archives:
            run("dpkg", "-x", str(archive), str(root))
            archive.unlink()
        if not (root / "lib").exists():
            (root / "lib").symlink_to("usr/lib")
        image = _image(kernel, root, apt.version(package))
        print(f"kernel {kernel.name}: listing the modules of {image.release}", flush=True)
        run("depmod", "-b", str(root), image.release)
        target = cache / kernel.name
        shutil.rmtree(target, ignore_errors=True)
        root.rename(target)
        image = _image(kernel, target, image.package_version)
        (target / "kernel.json").write_text(json.dumps(asdict(image), indent=2) + "\n")
        print(f"kernel {kernel.name}: {image.release} is ready", flush=True)
        return image


def _image(kernel: Kernel, root: Path, package_version: str) -> Image:
    releases = [p for p in (root / "lib/modules").iterdir() if (p / "kernel").is_dir()]
    vmlinuz = [*root.glob("boot/vmlinuz-*"), *root.glob("usr/lib/modules/*/vmlinuz")]
    if len(releases) != 1 or not vmlinuz:
        raise FetchError(f"kernel {kernel.name}: unexpected package contents: {releases} {vmlinuz}")
    return Image(kernel.name, releases[0].name, package_version, str(root), str(vmlinuz[0]))


class Apt:
    """apt with lists, cache and sources of its own."""

    def __init__(self, directory: Path, sources: str) -> None:
        for part in ("lists/partial", "archives/partial"):
            (directory / part).mkdir(parents=True)
        (directory / "sources.list").write_text(sources)
        settings = {
            "Dir::Etc::sourcelist": directory / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": directory / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": directory,
            "APT::Default-Release": "",
            "APT::Sandbox::User": "root",  # root cannot hand the directory of a user's cache to _apt
            "Acquire::Languages": "none",
            "Acquire::Check-Valid-Until": "false",  # the oldest suite gets no new release files
            "Acquire::Retries": "3",
        }
        self._options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]

    def run(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        return run(command, *self._options, *arguments, cwd=cwd)

    def field(self, package: str, name: str) -> str:
        shown = self.run("apt-cache", "--no-all-versions", "show", package)
        found = re.search(rf"^{name}: (.*)$", shown, re.MULTILINE)
        return found[1] if found else ""

    def depends(self, package: str) -> list[str]:
        return [part.split()[0] for part in self.field(package, "Depends").split(",") if part.split()]

    def version(self, package: str) -> str:
        return self.field(package, "Version")


def apt_of(directory: Path, suite: str) -> Apt:
    """apt for a suite of this machine's mirror."""
    return Apt(directory, machine_mirror().sources(suite))


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        raise FetchError(f"{command[0]} failed with status {done.returncode}:\n{last}")
    return done.stdout
