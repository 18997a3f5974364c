"""Lists of networks with names: from the command line, or from a file."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tcpscope.errors import UsageError
from tcpscope.filters import Network, network_bytes, parse_network

MOST = 1 << 16
"""Most networks of a list."""
_EACH_LINE = "give a network and one name in each line"
_LONGEST = 4096
"""Most characters of a line of a file."""
_FAMILY_BITS = 32  # of a key


class Named(NamedTuple):
    """A network, and what the user calls it."""

    network: Network
    name: str | None = None

    @property
    def key(self) -> bytes:
        """`struct network_key` of bpf/traffic.bpf.h."""
        address, _ = network_bytes(self.network)
        bits = _FAMILY_BITS + 128 - self.network.max_prefixlen + self.network.prefixlen
        return struct.pack("=II16s", bits, self.network.version, address)


PRIVATE = tuple(
    Named(parse_network(text), name)
    for text, name in (
        ("127.0.0.0/8", "loopback"),
        ("10.0.0.0/8", "private"),
        ("172.16.0.0/12", "private"),
        ("192.168.0.0/16", "private"),
        ("169.254.0.0/16", "link-local"),
        ("0.0.0.0/0", "other-IPv4"),
        ("::1", "loopback"),
        ("fc00::/7", "private"),
        ("fe80::/10", "link-local"),
        ("::/0", "other-IPv6"),
    )
)
"""Loopback, what is private (RFC 1918, RFC 4193), what is link-local, and everything."""


def listed(texts: Iterable[str]) -> Iterator[Named]:
    """The networks of a list. UsageError for one that is none."""
    return (Named(parse_network(text)) for text in texts)


def read(path: str) -> Iterator[Named]:
    """The networks of a file: a line for each, with a name before or behind it, or without. `#` begins a comment.

    UsageError for a line that is none of this, or a file that cannot be read.
    """
    for number, line in enumerate(_lines(path), 1):
        if len(line) > _LONGEST:
            raise UsageError(f"{path}:{number}: a line of more than {_LONGEST} characters", "give a list of networks")
        if words := line.partition("#")[0].split():
            yield _line(words, f"{path}:{number}")


def _lines(path: str) -> Iterator[str]:
    """The lines of a file, one after the other: it may have no end. Of a line too long the begin."""
    try:
        with Path(path).open() as file:
            while line := file.readline(_LONGEST + 1):
                yield line
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', None) or 'not a text'}") from None


def _line(words: list[str], where: str) -> Named:
    if len(words) > 2:
        raise UsageError(f"{where}: '{' '.join(words)}'", _EACH_LINE)
    found, errors = [], []
    for word in words:
        try:
            found.append((parse_network(word), word))
        except UsageError as error:
            errors.append(error)
    names = [word for word in words if word not in [text for _, text in found]]
    if len(found) == 1:
        return Named(found[0][0], *names)
    if not found:  # of a name and a network with a mistake, the one that looks like a network
        wrong = next((each for each, word in zip(errors, words, strict=True) if "/" in word), errors[-1])
        raise UsageError(f"{where}: {wrong.message}", wrong.hint)
    raise UsageError(f"{where}: '{' '.join(words)}'", _EACH_LINE)


def checked(networks: Iterable[Named]) -> tuple[Named, ...]:
    """The networks, each once. UsageError for one with two names, or if they are too many."""
    known: dict[Network, Named] = {}
    for each in networks:
        if len(known) >= MOST and each.network not in known:
            raise UsageError("too many networks", f"at most {MOST}")
        before = known.setdefault(each.network, each)
        if before.name != each.name:
            names = " and ".join(name or "none" for name in (before.name, each.name))
            raise UsageError(f"{each.network} has two names: {names}", "give it once")
    return tuple(known.values())
