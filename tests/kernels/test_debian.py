import json
from pathlib import Path

import pytest

from tests.kernels import KERNELS, Kernel, debian
from tests.kernels.debian import FetchError, Mirror, find_mirror, source_entries

DEBIAN = 'ID=debian\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n'
UBUNTU = "ID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n"

ONE_LINE = """
# deb http://commented.example/debian bookworm main
deb-src http://sources.example/debian bookworm main
deb [arch=amd64] http://vendor.example/apt stable-tools main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main
deb http://mirror.example/debian-security bookworm-security main
"""

DEB822 = """
Types: deb deb-src
# a comment in between
URIs: http://mirror.example/debian
Suites: bookworm
 bookworm-updates
Components: main

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Enabled: no
"""


@pytest.mark.parametrize("sources", [ONE_LINE, DEB822])
def test_the_mirror_is_the_machines_own(sources: str) -> None:
    expected = Mirror("http://mirror.example/debian", "http://mirror.example/debian-security")
    assert find_mirror(sources, DEBIAN, None) == expected


def test_both_forms_of_sources_are_read_and_what_is_off_is_not() -> None:
    addresses = {address for address, _ in source_entries(ONE_LINE + "\n\n" + DEB822)}
    assert addresses == {
        "http://vendor.example/apt",
        "http://mirror.example/debian/",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security",
    }


def test_another_distribution_needs_the_variable() -> None:
    with pytest.raises(FetchError, match=debian.MIRROR_VARIABLE):
        find_mirror(ONE_LINE, UBUNTU, None)
    assert find_mirror(ONE_LINE, UBUNTU, "http://given.example/debian/") == Mirror("http://given.example/debian", None)


def test_backports_are_those_of_the_machines_release() -> None:
    assert debian.backports(DEBIAN) == "bookworm-backports"
    assert debian.backports("ID=debian\n") is None  # sid has no name
    assert debian.backports(UBUNTU) is None


def test_backports_have_no_security_archive() -> None:
    mirror = Mirror("http://m.example/debian", "http://m.example/debian-security")
    if not any(Path("/usr/share/keyrings", name).exists() for name in debian.KEYRINGS):
        pytest.skip("no Debian keyring here")
    assert "debian-security" in mirror.sources("trixie")
    assert "debian-security" not in mirror.sources("trixie-backports")


def test_a_cached_kernel_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(debian.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(debian, "run", lambda *command, **_: pytest.fail(f"called {command}"))
    root = tmp_path / "6.1"
    (root / "lib/modules/6.1.0-1-amd64").mkdir(parents=True)
    (root / "vmlinuz").touch()
    record = {"name": "6.1", "release": "6.1.0-1-amd64", "package_version": "6.1.1-1"}
    (root / "kernel.json").write_text(json.dumps({**record, "root": str(root), "vmlinuz": str(root / "vmlinuz")}))
    kernel = next(kernel for kernel in KERNELS if kernel.name == "6.1")
    assert debian.get(kernel).modules == root / "lib/modules/6.1.0-1-amd64"
    (root / "vmlinuz").unlink()
    assert debian.cached(kernel) is None
    (root / "vmlinuz").touch()
    assert debian.cached(kernel) is not None
    (tmp_path / "6.2").symlink_to(root)
    assert debian.cached(Kernel("6.2", "bookworm")) is None


def test_the_newest_kernel_of_a_version() -> None:
    """Names as Debian has them, with the flavours and the versions that are not meant."""
    packages = [
        "linux-image-amd64",
        "linux-image-5.10.0-9-amd64",
        "linux-image-5.10.0-46-amd64",
        "linux-image-5.10.0-47-rt-amd64",
        "linux-image-5.10.0-47-cloud-amd64",
        "linux-image-5.10.0-47-amd64-dbg",
        "linux-image-7.2.9+deb13-amd64",
        "linux-image-7.2.12+deb13-amd64",
        "linux-image-7.3.4+deb13-amd64",
        "linux-image-7.20.1+deb13-amd64",
        "linux-image-7.2.13+deb13-amd64-unsigned",
    ]
    assert debian.newest("5.10", packages) == "linux-image-5.10.0-46-amd64"
    assert debian.newest("7.2", packages) == "linux-image-7.2.12+deb13-amd64"
    assert debian.newest("7.1", packages) is None


class Suite:
    """A suite that has these versions."""

    def __init__(self, *versions: str) -> None:
        self.packages = [f"linux-image-{version}.4+deb13-amd64" for version in versions]

    def fetch(self, kernel: Kernel) -> debian.Image:
        if debian.newest(kernel.name, self.packages) is None:
            raise debian.GoneError(kernel, debian.following(kernel.name, self.packages))
        return debian.Image(kernel.name, f"{kernel.name}.4", "1", "/", "/vmlinuz")


@pytest.mark.parametrize(
    ("there", "releases", "said"),
    [
        (("7.2", "7.3"), {"7.2": "7.2.4", "7.3": "7.3.4"}, ""),
        (("7.3",), {"7.3": "7.3.4"}, "no such row; 7.3 is one already"),
        (("7.3", "7.10"), {"7.3": "7.3.4"}, "no such row; 7.3 is one already"),
        (("7.4", "7.10"), {"7.2": "7.4.4"}, "no such row; 7.4 is one already"),
        (("7.1",), {}, "none is cached: no such row"),
    ],
)
def test_a_kernel_that_its_suite_has_no_more(there: tuple[str, ...], releases: dict[str, str], said: str) -> None:
    lines: list[str] = []
    kernels = (Kernel("7.2", "backports"), Kernel("7.3", "backports"))
    found = debian.rows(kernels, Suite(*there).fetch, lines.append)
    assert {name: image.release for name, image in found.items()} == releases
    assert said in "\n".join(lines)
    assert all(line.count("\n") == 0 for line in lines)
    assert bool(lines) == (there != ("7.2", "7.3"))
