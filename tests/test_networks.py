"""Lists of networks with names."""

from __future__ import annotations

from ipaddress import ip_address
from itertools import count
from pathlib import Path

import pytest

from tcpscope.errors import UsageError
from tcpscope.filters import address_bytes
from tcpscope.networks import MOST, PRIVATE, Named, checked, listed, read


def file_of(folder: Path, text: str) -> str:
    path = folder / "networks"
    path.write_text(text)
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    text = (
        "office 10.1.0.0/16\n\n# a comment\n2001:db8::/32 lab # with one more\n192.0.2.7\n::ffff:192.0.2.0/120 mapped\n"
    )
    found = {str(each.network): each.name for each in read(file_of(tmp_path, text))}
    assert found == {"10.1.0.0/16": "office", "2001:db8::/32": "lab", "192.0.2.7/32": None, "192.0.2.0/24": "mapped"}


@pytest.mark.parametrize(
    "line, says",
    [
        ("office 10.1.0.0/33", "'10.1.0.0/33' is neither an address nor a network"),
        ("10.1.0.0/33 office", "'10.1.0.0/33' is neither an address nor a network"),
        ("office", "'office' is neither an address nor a network"),
        ("10.0.0.0/8 192.168.0.0/16", "'10.0.0.0/8 192.168.0.0/16'; give a network and one name"),
        ("head office 10.0.0.0/8", "'head office 10.0.0.0/8'; give a network and one name"),
        ("a b c", "'a b c'; give a network and one name"),
        ("0" * 5000, "a line of more than 4096 characters; give a list of networks"),
        ("office 10.1.2.0/16", "'10.1.2.0/16' has bits set behind its prefix; the network is 10.1.0.0/16"),
        ("fe80::%eth0/10 x", "'fe80::%eth0/10' has a zone"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = file_of(tmp_path, f"loop 127.0.0.0/8\n{line}\n")
    with pytest.raises(UsageError) as error:
        list(read(path))
    assert str(error.value).startswith(f"{path}:2: {says}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "networks"
    if content:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        list(read(str(path)))
    assert str(error.value) == f"{path}: {'not a text' if content else 'No such file or directory'}"


def test_a_file_without_end() -> None:
    with pytest.raises(UsageError, match="/dev/zero:1: a line of more than"):
        list(read("/dev/zero"))


def test_no_more_is_read_than_may_be() -> None:
    taken = count()
    with pytest.raises(UsageError, match=f"too many networks; at most {MOST}"):
        checked(listed(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in taken))
    assert next(taken) == MOST + 1


def test_each_network_counts_once() -> None:
    twice = [*listed(["10.0.0.0/8", "10.0.0.0/8", "::ffff:10.0.0.0/104"])]
    assert checked(twice) == (Named(twice[0].network),)
    with pytest.raises(UsageError, match=r"10\.0\.0\.0/8 has two names: none and office"):
        checked([*twice, Named(twice[0].network, "office")])


def test_a_key_has_the_bits_of_the_mapped_form() -> None:
    """`struct network_key`: the number of bits, the family, 16 bytes."""
    (four, six) = listed(["192.0.2.0/24", "2001:db8::/32"])
    assert four.key == (32 + 96 + 24).to_bytes(4, "little") + b"\4\0\0\0" + address_bytes("192.0.2.0")
    assert six.key == (32 + 32).to_bytes(4, "little") + b"\6\0\0\0" + address_bytes("2001:db8::")


def test_the_usual_networks_have_every_address() -> None:
    for text in ("127.9.9.9", "10.1.1.1", "172.31.0.1", "192.168.7.7", "8.8.8.8", "::1", "fd00::1", "2001:db8::1"):
        assert any(ip_address(text) in each.network for each in PRIVATE)
    assert len(checked(PRIVATE)) == len(PRIVATE)
