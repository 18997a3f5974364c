from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels import debian, qemu

OFFERED = "1:10.0.2+ds-2+deb13u1~bpo12+1"


class Apt:
    """A suite that has this QEMU, and packages that need no unpacking."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.downloaded: tuple[str, ...] = ()

    def run(self, command: str, *arguments: str, cwd: Path | None = None) -> str:
        match arguments[0]:
            case "update" if self._version == "unreachable":
                raise debian.FetchError("apt-get failed with status 100:\nE: Could not connect")
            case "pkgnames":
                return f"{qemu.PACKAGES[0]}-extra\n" + (qemu.PACKAGES[0] if self._version else "")
            case "download":
                self.downloaded = arguments[1:]
                assert cwd is not None
                (cwd / "qemu.deb").touch()
        return ""

    def version(self, _: str) -> str:
        return self._version


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Debian 12 with its QEMU, and a cache of its own."""
    monkeypatch.setenv(debian.CACHE_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(debian, "os_release", lambda: "ID=debian\nVERSION_CODENAME=bookworm\n")
    monkeypatch.setattr(qemu, "installed", lambda: (7, 2, 22))
    qemu.options.cache_clear()
    yield
    qemu.options.cache_clear()


def get(monkeypatch: pytest.MonkeyPatch, version: str, *, says: str = "", fresh: bool = False) -> list[str]:
    """What is said of a suite with this version, whose program runs if it says one."""
    apt, said = Apt(version), list[str]()

    def unpack(*command: str) -> None:
        program = Path(command[-1], "usr/bin", qemu.NAME)
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {says} (Debian {version})'\nexit {int(not says)}\n")
        program.chmod(0o755)

    monkeypatch.setattr(debian, "apt_of", lambda folder, suite: apt)
    monkeypatch.setattr(debian, "run", unpack)
    qemu.get(said.append, fresh=fresh)
    assert apt.downloaded in ((), qemu.PACKAGES)
    return said


def test_versions_are_compared_as_numbers() -> None:
    assert qemu.numbers(OFFERED) == qemu.numbers("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)") == (10, 0, 2)
    assert qemu.numbers("1:7.2+dfsg-7+deb12u18+b3") == (7, 2) < qemu.numbers("7.10") < qemu.numbers("10.0")
    assert qemu.numbers("") == qemu.numbers("none") == ()


def test_a_newer_one_is_used_with_its_own_firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert qemu.options() == ()
    (line,) = get(monkeypatch, OFFERED, says="10.0.2")
    assert line == "QEMU: fetching 10.0.2 of bookworm-backports, 7.2.22 is installed"
    folder = tmp_path / "qemu"
    firmware = [folder / part for part in qemu.FIRMWARE]
    assert qemu.options() == (
        "--qemu-bin",
        str(folder / "usr/bin" / qemu.NAME),
        *(f"--qemu-opt={word}" for path in firmware for word in ("-L", path)),
    )
    assert get(monkeypatch, "unreachable") == []  # it is there


@pytest.mark.parametrize("version", ["1:7.2+dfsg-7", ""])
def test_none_that_is_newer_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    assert get(monkeypatch, version) == []
    assert qemu.options() == ()
    assert get(monkeypatch, OFFERED, says="10.0.2") == []  # not looked at again
    assert len(get(monkeypatch, OFFERED, says="10.0.2", fresh=True)) == 1
    assert qemu.options() != ()


@pytest.mark.parametrize(
    ("version", "says", "why"),
    [("unreachable", "", "E: Could not connect"), (OFFERED, "", "10.0.2 of bookworm-backports does not run here")],
)
def test_what_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, says: str, why: str
) -> None:
    line = get(monkeypatch, version, says=says)[-1]
    assert line == f"QEMU: the installed 7.2.22 is used, `fetch --fresh` looks again: {why}"
    assert qemu.options() == ()
    assert [path.name for path in (tmp_path / "qemu").iterdir()] == [qemu.RECORD]


def test_other_distributions_use_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "os_release", lambda: "ID=ubuntu\nVERSION_CODENAME=noble\n")
    assert get(monkeypatch, "unreachable") == []
    assert qemu.options() == ()
