"""Opens the network namespaces that can be seen, for iterators that visit the sockets of one namespace."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from tcpscope.errors import NotPermittedError, TcpscopeError
from tcpscope.kernel import netns
from tcpscope.kernel.features import has_capability


def numbers(namespaces: Iterable[int]) -> str:
    """Inode numbers as text."""
    return ", ".join(map(str, namespaces))


def opened(wanted: Sequence[int], notes: list[str]) -> Iterator[int]:
    """A file descriptor of each namespace to look at; -1 for this process's own, which needs no privilege.

    Without `wanted` these are all. What cannot be looked at is added to `notes`, or is an error if it is `wanted`.
    """
    visible = netns.visible()
    own = netns.own()
    refused = visible.hidden_processes
    without = "" if has_capability("CAP_SYS_PTRACE") else " without CAP_SYS_PTRACE"
    if hidden := [inode for inode in wanted if inode not in visible.namespaces]:
        number = f"network namespace {numbers(hidden)}"
        if refused and without:
            raise NotPermittedError(f"cannot find {number}", "needs CAP_SYS_PTRACE", ("CAP_SYS_PTRACE",))
        raise TcpscopeError(f"cannot enter {number}", "no process that can be seen is in it, and it has no name")
    for inode, namespace in visible.namespaces.items():
        if wanted and inode not in wanted:
            continue
        if inode == own:
            yield -1
            continue
        try:
            descriptor = netns.opened(namespace)
        except OSError:
            refused += 1
            continue
        if descriptor is None:
            if wanted:
                raise TcpscopeError(f"cannot enter network namespace {inode}", "it has gone")
            continue
        try:
            yield descriptor
        finally:
            os.close(descriptor)
    if refused and not wanted:
        number = f"{refused} process{'' if refused == 1 else 'es'}"
        notes.append(f"could not look into the network namespaces of {number}{without}")
