"""Which kernels are fetched, and what becomes of those that cannot be had."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.blob import Blob
from tests.kernels import btfs, debian
from tests.kernels.btfs import Found
from tests.kernels.image import ImageError

NAMES = ("6.1.0-9", "6.1.0-10", "6.1.0-10-cloud", "6.1.0-10-rt", "6.12.9+deb13", "6.12.10+deb13", "6.1", "6.1-rt")
PACKAGES = [f"linux-image-{name}-amd64" for name in NAMES]
OTHERS = ["linux-image-amd64", "linux-image-6.1.0-10-amd64-dbg", "linux-image-6.1.0-10-amd64-unsigned"]


class Apt:
    """A suite's packages, of which the mirror lacks some."""

    gone: tuple[str, ...] = ()
    update_fails = ""

    def __init__(self, suite: str) -> None:
        self.suite = suite

    def run(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        if arguments[0] == "update" and self.update_fails == self.suite:
            raise debian.FetchError("apt-get failed:\nno Release file")
        return "\n".join(PACKAGES + OTHERS) if self.suite == "bookworm" else ""


@pytest.fixture
def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a fetch into an empty cache says; nothing is fetched really."""
    lines: list[str] = []

    def take(apt: Apt, kernel: Found) -> bytes:
        if kernel.release in apt.gone:
            raise debian.FetchError("apt-get failed:\nE: Failed to fetch http://m.example/p.deb  404  Not Found")
        return Blob().data()

    monkeypatch.setenv(debian.CACHE_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(debian, "apt_of", lambda _, suite: Apt(suite))
    monkeypatch.setattr(btfs, "_take", take)
    return lines


def releases() -> list[str]:
    return [kernel.release for kernel in btfs.cached()]


def test_each_kind_apart_and_the_newest_first() -> None:
    kinds = [
        [(kernel.series, kernel.flavour, kernel.release) for kernel in kernels]
        for kernels in btfs.among(PACKAGES + OTHERS, "bookworm")
    ]
    assert kinds == [
        [((6, 1), "cloud", "6.1.0-10-cloud-amd64")],
        [((6, 1), "plain", "6.1.0-10-amd64"), ((6, 1), "plain", "6.1.0-9-amd64")],
        [((6, 1), "rt", "6.1.0-10-rt-amd64")],
        [((6, 12), "plain", "6.12.10+deb13-amd64"), ((6, 12), "plain", "6.12.9+deb13-amd64")],
    ]


def test_a_candidate_has_no_third_number() -> None:
    ((candidate,), _) = btfs.among(PACKAGES, "experimental")
    assert (candidate.release, candidate.flavour) == ("6.1-amd64", "plain")
    assert sorted([*btfs.among(PACKAGES, "bookworm")[1], candidate], key=btfs.age)[0] == candidate


def test_the_newest_of_each_kind_is_fetched(said: list[str]) -> None:
    assert not btfs.fetched()
    btfs.fetch(False, said.append)
    assert said == ["bookworm: fetching the BTF of 4 kernels"]
    assert releases() == ["6.1.0-10-cloud-amd64", "6.1.0-10-amd64", "6.1.0-10-rt-amd64", "6.12.10+deb13-amd64"]
    assert btfs.fetched()
    assert len(btfs.cached()[0].btf) == 1
    btfs.fetch(True, said.append)
    assert said[1:] == ["bookworm: fetching the BTF of 2 kernels"]
    assert [kernel.release for kernel in btfs.newest("plain")] == ["6.1.0-10-amd64", "6.12.10+deb13-amd64"]


def test_what_the_mirror_lacks_is_a_line_and_an_older_one_is_taken(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Apt, "gone", ("6.1.0-10-amd64", "6.1.0-10-rt-amd64"))
    btfs.fetch(False, said.append)
    assert said[1:] == [
        "6.1.0-10-amd64 cannot be had: 404  Not Found; 6.1.0-9-amd64 instead",
        "6.1.0-10-rt-amd64 cannot be had: 404  Not Found",
    ]
    assert releases() == ["6.1.0-10-cloud-amd64", "6.1.0-9-amd64", "6.12.10+deb13-amd64"]
    assert btfs.fetched()


def test_a_suite_that_cannot_be_read_is_a_line(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Apt, "update_fails", "trixie")
    btfs.fetch(False, said.append)
    assert "trixie: its list cannot be read: no Release file" in said
    assert len(releases()) == 4
    assert not btfs.fetched()  # the next run asks again


def test_without_a_mirror_nothing_is_taken_for_fetched(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise debian.FetchError("no mirror")

    monkeypatch.setattr(debian, "apt_of", none)
    btfs.fetch(False, said.append)
    assert said == [f"{suite}: its list cannot be read: no mirror" for suite in btfs.SUITES]
    assert not btfs.fetched()


def test_a_kernel_that_is_gone_from_its_suite_stays(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    btfs.fetch(False, said.append)
    before = releases()
    monkeypatch.setattr(Apt, "run", lambda *_, **__: "")
    btfs.fetch(False, said.append)
    assert releases() == before


def test_what_is_no_btf_is_not_kept(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btfs, "_take", lambda *_: b"no BTF" * 10)
    btfs.fetch(False, said.append)
    assert len(said) == 5
    assert all("cannot be had: BTF has magic" in line for line in said[1:])
    assert not releases()
    assert not btfs.fetched()


@pytest.fixture
def package(tmp_path: Path) -> Callable[[str], Path]:
    def build(path: str) -> Path:
        root = tmp_path / "root"
        (root / "DEBIAN").mkdir(parents=True)
        fields = ("Package: p", "Version: 1", "Architecture: all", "Maintainer: m", "Description: d", "")
        (root / "DEBIAN/control").write_text("\n".join(fields))
        (root / path).parent.mkdir(parents=True)
        (root / path).write_bytes(b"the image")
        archive = tmp_path / "p.deb"
        subprocess.run(["dpkg-deb", "-b", root, archive], check=True, capture_output=True)
        return archive

    return build


@pytest.mark.parametrize("path", ["boot/vmlinuz-6.1.0-9-amd64", "usr/lib/modules/7.3.4/vmlinuz"])
def test_the_image_is_found_in_its_package(package: Callable[[str], Path], path: str) -> None:
    assert btfs._vmlinuz(package(path)) == b"the image"


def test_a_package_without_an_image(package: Callable[[str], Path]) -> None:
    with pytest.raises(ImageError, match=r"p\.deb has no vmlinuz"):
        btfs._vmlinuz(package("usr/share/doc/p/copyright"))
