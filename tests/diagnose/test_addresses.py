"""Which addresses are those of a network namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tcpscope.diagnose import addresses
from tcpscope.kernel import netns
from tcpscope.listeners import Holder, Listener
from tests.conftest import until
from tests.test_sampling import LISTENER

FIB_TRIE = """Main:
  +-- 0.0.0.0/0 3 0 5
     |-- 0.0.0.0
        /0 universe UNICAST
     |-- 198.51.100.7
        /32 universe UNICAST
Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 127.0.0.0/31 1 0 0
        |-- 127.0.0.0
           /8 host LOCAL
     |-- 192.0.2.0
        /24 link UNICAST
     |-- 192.0.2.2
        /32 host LOCAL
     |-- 192.0.2.255
        /32 link BROADCAST
"""
IF_INET6 = "20010db8000000000000000000000002 02 40 00 80     eth0\n"


@pytest.fixture(autouse=True)
def _reads_anew() -> None:
    addresses._read.cache_clear()


def test_the_routes_of_the_kernel_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "self/net"
    folder.mkdir(parents=True)
    monkeypatch.setattr(addresses, "PROC", tmp_path)
    own = replace(LISTENER, netns=netns.inode_of("/proc/self/ns/net"))
    assert addresses.is_local("192.0.2.2", own) is None
    (folder / "fib_trie").write_text(FIB_TRIE)
    addresses._read.cache_clear()
    for address in ("192.0.2.2", "127.0.0.1", "127.9.9.9"):
        assert addresses.is_local(address, own) is True
    for address in ("192.0.2.0", "192.0.2.3", "192.0.2.255", "198.51.100.7", "2001:db8::2"):
        assert addresses.is_local(address, own) is False
    (folder / "if_inet6").write_text(IF_INET6)
    addresses._read.cache_clear()
    assert addresses.is_local("2001:db8::2", own) is True
    assert addresses.is_local("2001:db8::3", own) is False


def test_a_table_that_is_too_long_is_not_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self/net").mkdir(parents=True)
    (tmp_path / "self/net/fib_trie").write_text(FIB_TRIE)
    monkeypatch.setattr(addresses, "PROC", tmp_path)
    own = replace(LISTENER, netns=netns.inode_of("/proc/self/ns/net"))
    monkeypatch.setattr(addresses, "_BYTES_AT_MOST", len(FIB_TRIE) - 1)
    assert addresses.is_local("192.0.2.2", own) is None
    monkeypatch.setattr(addresses, "_BYTES_AT_MOST", len(FIB_TRIE))
    addresses._read.cache_clear()
    assert addresses.is_local("192.0.2.2", own) is True


@pytest.fixture
def elsewhere() -> Iterator[Listener]:
    """A listener of a process in a network namespace of its own, which has the address 192.0.2.77."""
    command = ["unshare", "--net", "sh", "-c", "ip address add 192.0.2.77/32 dev lo && ip link set lo up; echo; read x"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            inode = netns.inode_of(f"/proc/{child.pid}/ns/net")
            until(lambda: Path(f"/proc/{child.pid}/comm").read_text() == "sh\n", "the shell")
            holder = Holder(child.pid, "sh", 0, 3)
            yield replace(LISTENER, netns=inode, holders=(holder,), inside=frozenset({child.pid}))
        finally:
            child.kill()


@pytest.mark.root
def test_another_namespace_is_asked_by_a_process_that_is_in_it(elsewhere: Listener) -> None:
    assert addresses.is_local("192.0.2.77", elsewhere) is True
    assert addresses.is_local("192.0.2.78", elsewhere) is False
    inode, none = elsewhere.netns, replace(elsewhere, inside=frozenset())
    assert addresses.has(inode, "192.0.2.77", [none, elsewhere]) is True
    assert addresses.has(inode, "192.0.2.78", [none, elsewhere]) is False
    assert addresses.has(inode, "192.0.2.77", [none]) is None
    own = replace(elsewhere, netns=netns.inode_of("/proc/self/ns/net"))
    assert addresses.is_local("192.0.2.77", own) is False
    assert addresses.has(own.netns, "192.0.2.77", []) is False
    assert addresses.has(own.netns, "127.0.0.1", []) is True
    assert addresses.is_local("192.0.2.77", replace(elsewhere, inside=frozenset())) is None
    me = Holder(os.getpid(), "python", 0, 3)
    assert addresses.is_local("127.0.0.1", replace(elsewhere, holders=(me,), inside=frozenset({me.pid}))) is None
