"""Filters: each parser with good and bad values, and `matches` against a model that shares no code."""

from __future__ import annotations

import inspect
import ipaddress
import os
import pwd
import socket
import subprocess
import threading
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpscope import filters
from tcpscope.errors import NotPermittedError, UnsupportedError, UsageError
from tcpscope.filters import Filter, PortRange, address_bytes, address_text
from tcpscope.kernel import netns
from tests import examples  # noqa: F401  for its settings

ports = st.integers(1, 65535)
ipv4_addresses = st.ip_addresses(v=4)
ipv6_addresses = st.ip_addresses(v=6)


def error(parse: Any, *values: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        parse(*values, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("443", "443"),
        (443, "443"),
        ("80,443,8000-8100", "80,443,8000-8100"),
        (" 443 , 80 ", "80,443"),
        ("1-65535", "1-65535"),
        (["80", 443, "8000-8001"], "80,443,8000-8001"),
        ("80-90,85-95,96", "80-96"),
        ("80-90,82-83", "80-90"),
        ("80,80", "80"),
        (range(80, 83), "80-82"),
    ],
)
def test_ports(given: Any, expected: str) -> None:
    assert ",".join(map(str, filters.parse_ports(given))) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0", "port '0' is not a number from 1 to 65535"),
        ("65536", "port '65536' is not a number from 1 to 65535"),
        ("9" * 5000, "is not a number from 1 to 65535"),
        ("-5", "port '-5' is neither a number, nor a range, nor a service in /etc/services; such as 443, 8000-8100"),
        (-5, "port '-5' is neither"),
        ("80-", "port '80-' is neither"),
        ("1-2-3", "port '1-2-3' is neither"),
        ("no-such-service", "port 'no-such-service' is neither"),
        ("http\0", "port 'http\\x00' is neither"),
        ("٨٠", "port '٨٠' is neither"),
        ("443-80", "port range '443-80' is reversed; did you mean 80-443?"),
        ("", "a value is missing in ''"),
        ("80,,443", "a value is missing in '80,,443'"),
        ([], "a value is missing in ''"),
    ],
)
def test_bad_ports(given: Any, message: str) -> None:
    assert message in error(filters.parse_ports, given)


def test_names_of_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getservbyname", lambda name, protocol: {"https": 443, "http-alt": 8080}[name])
    assert filters.parse_ports("https,22,http-alt") == (PortRange(22, 22), PortRange(443, 443), PortRange(8080, 8080))


def test_names_of_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name stands for all addresses that it has now; a line says which."""
    known = {"db.example": ["192.0.2.1", "2001:db8::1", "192.0.2.1"], "near": ["fe80::1%eth0"]}

    def look_up(name: str, *_: Any, **__: Any) -> list[Any]:
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(0, 0, 0, "", (address, 0)) for address in known[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    told: list[str] = []
    wanted = Filter.from_options(raddr="db.example,10.0.0.0/8", laddr=["near"], told=told.append)
    assert wanted == Filter.from_options(raddr="10.0.0.0/8,192.0.2.1,2001:db8::1", laddr="fe80::1")
    assert told == ["near is fe80::1", "db.example is 192.0.2.1, 2001:db8::1"]
    message = error(filters.parse_networks, "no.example")
    assert message == "no address is known of the host 'no.example'; Name or service not known"
    known["six"] = ["::1"]
    assert "-4 asks for IPv4, --raddr asks for IPv6" in error(Filter.from_options, raddr="six", ipv4=True)


@given(st.lists(st.tuples(ports, ports).map(sorted), min_size=1, max_size=8))
def test_ports_hold_what_was_given(pairs: list[list[int]]) -> None:
    parsed = filters.parse_ports(",".join(f"{first}-{last}" for first, last in pairs))
    wanted = {port for first, last in pairs for port in (first, last, (first + last) // 2)}
    assert all(any(port in range_ for range_ in parsed) for port in wanted)
    assert sum(len(range(a, b + 1)) for a, b in parsed) == len({p for a, b in pairs for p in range(a, b + 1)})
    assert filters.parse_ports(",".join(map(str, parsed))) == parsed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("192.0.2.1", ["192.0.2.1"]),
        ("10.0.0.0/8,2001:db8::/32", ["10.0.0.0/8", "2001:db8::/32"]),
        (["2001:db8::1", "10.0.0.1"], ["10.0.0.1", "2001:db8::1"]),
        ("::ffff:192.0.2.1", ["192.0.2.1"]),
        ("::ffff:10.0.0.0/104", ["10.0.0.0/8"]),
        ("::ffff:0:0/96", ["0.0.0.0/0"]),
        ("::/0", ["::/0"]),
        ("::/64", ["::/64"]),
        ("10.0.0.0/255.0.0.0", ["10.0.0.0/8"]),
        ("10.0.0.0/9,10.128.0.0/9,10.1.1.1", ["10.0.0.0/8"]),
        (ipaddress.ip_network("10.0.0.0/30"), ["10.0.0.0/30"]),
        (ipaddress.ip_address("::1"), ["::1"]),
    ],
)
def test_networks(given: Any, expected: list[str]) -> None:
    assert list(map(filters.network_text, filters.parse_networks(given))) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("10.0.0.5/8", "'10.0.0.5/8' has bits set behind its prefix; the network is 10.0.0.0/8"),
        ("::ffff:10.0.0.5/104", "the network is 10.0.0.0/8"),
        ("2001:db8::1/32", "the network is 2001:db8::/32"),
        ("10.0.0.0/33", "'10.0.0.0/33' is neither an address nor a network"),
        ("127.1", "'127.1' is neither"),
        ("0x7f.0x1", "'0x7f.0x1' is neither"),
        ("1" * 64 + ".example", "is neither"),
        ("exämple", "'exämple' is neither"),
        ("10.1", "'10.1' is neither"),
        ("fe80::1%eth0", "'fe80::1%eth0' has a zone; leave out '%' and what follows: 'fe80::1'"),
        ("", "a value is missing"),
        ("10.0.0.1,", "a value is missing in '10.0.0.1,'"),
    ],
)
def test_bad_networks(given: Any, message: str) -> None:
    assert message in error(filters.parse_networks, given)


def test_network_bytes() -> None:
    (ipv4,) = filters.parse_networks("10.0.0.0/8")
    assert filters.network_bytes(ipv4) == (
        bytes(10) + b"\xff\xff\x0a\0\0\0",
        b"\xff" * 13 + bytes(3),
    )
    (ipv6,) = filters.parse_networks("2001:db8::/32")
    assert filters.network_bytes(ipv6) == (b"\x20\x01\x0d\xb8" + bytes(12), b"\xff" * 4 + bytes(12))


def test_addresses() -> None:
    assert address_bytes("192.0.2.1") == bytes(10) + b"\xff\xff\xc0\0\2\1"
    assert address_bytes("::ffff:192.0.2.1") == address_bytes("192.0.2.1")
    assert address_text(address_bytes("::ffff:192.0.2.1")) == "192.0.2.1"
    assert address_text(bytes(16)) == "::"
    assert address_text(address_bytes("0.0.0.0")) == "0.0.0.0"
    assert "'nowhere' is not an address" in error(address_bytes, "nowhere")


@given(st.binary(min_size=16, max_size=16) | ipv4_addresses.map(address_bytes))
def test_addresses_come_back(address: bytes) -> None:
    assert address_bytes(address_text(address)) == address


@given(ipv4_addresses | ipv6_addresses)
def test_address_text_is_as_python_writes_it(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    assert ipaddress.ip_address(address_text(address_bytes(address))) == (mapped or address)


def test_pid() -> None:
    assert filters.parse_pid(os.getpid()) == filters.parse_pid(str(os.getpid())) == os.getpid()
    assert filters.parse_pid("1") == 1
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert error(filters.parse_pid, gone.pid) == f"no process with PID {gone.pid}"
    for bad in ("0", "-1", "4194305", "self", ""):
        assert error(filters.parse_pid, bad) == f"PID {bad!r} is not a number from 1 to 4194304"


def test_the_id_of_a_thread_is_no_pid() -> None:
    told: list[str] = []
    thread = threading.Thread(target=lambda: told.append(error(filters.parse_pid, threading.get_native_id())))
    thread.start()
    thread.join()
    assert told[0].endswith(f"is a thread; its process has PID {os.getpid()}")


def test_comm() -> None:
    assert filters.parse_comm("nginx") == "nginx"
    assert filters.parse_comm("é" * 7 + "x") == "é" * 7 + "x"
    message = error(filters.parse_comm, "é" * 8)
    assert message == "process name 'éééééééé' has 16 bytes; the kernel keeps 1 to 15"
    assert "has 0 bytes" in error(filters.parse_comm, "")
    assert "has a NUL in it" in error(filters.parse_comm, "a\0b")
    assert error(Filter.from_options, comm=["a", 3]) == "process name 3 is no text"
    assert error(filters.parse_comm, "\udcff") == "process name '\\udcff' is not UTF-8"


def test_uid() -> None:
    assert filters.parse_uid("root") == filters.parse_uid("0") == filters.parse_uid(0) == 0
    assert filters.parse_uid("987654") == 987654
    user = pwd.getpwuid(65534).pw_name
    assert f"did you mean '{user}'?" in error(filters.parse_uid, user + "y")
    assert "is not a number from 0 to 4294967294" in error(filters.parse_uid, 2**32 - 1)


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of the cgroup file system, at a place whose name is escaped in mountinfo."""
    mount = tmp_path / "c group"
    (mount / "system.slice/nginx.service").mkdir(parents=True)
    (mount / "1234").mkdir()
    (mount / "cgroup.procs").touch()
    (mount / "out").symlink_to("/")
    (mount / "loop").symlink_to("loop")
    mountinfo = tmp_path / "mountinfo"
    escaped = str(mount).replace(" ", "\\040")
    mountinfo.write_text(
        "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        f"41 31 0:38 / {escaped} rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
    )
    monkeypatch.setattr(filters, "_MOUNTINFO", mountinfo)
    return mount


def test_cgroup(cgroups: Path) -> None:
    nginx = cgroups / "system.slice/nginx.service"
    inode = nginx.stat().st_ino
    for path in (str(nginx), "/system.slice/nginx.service", "system.slice/nginx.service", f"{nginx}/"):
        assert filters.parse_cgroup(path) == inode
    assert filters.parse_cgroup("/") == filters.parse_cgroup(str(cgroups)) == cgroups.stat().st_ino
    assert filters.parse_cgroup("./1234") == (cgroups / "1234").stat().st_ino
    assert filters.parse_cgroup("1234") == filters.parse_cgroup(1234) == 1234


def test_bad_cgroup(cgroups: Path) -> None:
    message = error(filters.parse_cgroup, "system.slice/nginx.servce")
    assert message == f"no cgroup 'system.slice/nginx.servce' in {cgroups}; did you mean 'nginx.service'?"
    for bad in ("", "..", "/../..", "out", "out/etc", "loop", "cgroup.procs", "/etc", "a\0b", "x" * 9999):
        assert "no cgroup" in error(filters.parse_cgroup, bad)
    assert "cgroup id '0'" in error(filters.parse_cgroup, "0")


def test_the_cgroup_of_this_process() -> None:
    """The kernel's own word for where we are leads to an id, wherever cgroup v2 is mounted."""
    ours = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    try:
        mount = filters.cgroup_mount()
    except UnsupportedError:
        pytest.skip("cgroup v2 is not mounted")
    if ours and not ours[0].startswith("/.."):
        assert filters.parse_cgroup(ours[0]) == (mount / ours[0].lstrip("/")).stat().st_ino


def test_no_cgroup_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text("31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n")
    monkeypatch.setattr(filters, "_MOUNTINFO", tmp_path / "mountinfo")
    assert filters.parse_cgroup("7") == 7
    with pytest.raises(UnsupportedError, match="not mounted"):
        filters.parse_cgroup("/system.slice")


def test_netns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("/proc/self/ns/net").stat().st_ino
    assert filters.parse_netns(own) == filters.parse_netns(str(own)) == own
    assert filters.parse_netns(f"pid:{os.getpid()}") == own
    assert filters.parse_netns("/proc/self/ns/net") == own
    (tmp_path / "blue").symlink_to("/proc/self/ns/net")
    (tmp_path / "1234").symlink_to("/proc/self/ns/net")
    (tmp_path / "stale").touch()
    monkeypatch.setattr(netns, "NAMED", tmp_path)
    assert filters.parse_netns("blue") == own
    assert filters.parse_netns("1234") == own
    monkeypatch.setattr(netns, "exists", lambda inode: False)
    assert error(filters.parse_netns, 1234).startswith("no network namespace 1234; ")
    monkeypatch.setattr(netns, "exists", lambda inode: None)
    assert filters.parse_netns(1234) == 1234
    assert error(filters.parse_netns, "blu") == f"no network namespace 'blu' in {tmp_path}; did you mean 'blue'?"
    assert "give a name, an inode number or pid:N" in error(filters.parse_netns, "xyz")
    for bad in ("stale", "/etc/passwd", "/dev/null", "/proc/self/ns/mnt", "/no/such", "/a\0b"):
        assert "is not a network namespace" in error(filters.parse_netns, bad)
    assert "PID 'x' is not a number" in error(filters.parse_netns, "pid:x")
    assert "network namespace '4294967296' is not a number" in error(filters.parse_netns, 2**32)


def test_from_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "exists", lambda inode: True)
    assert Filter.from_options() == Filter()
    assert Filter().is_empty
    wanted = Filter.from_options(
        pid=str(os.getpid()),
        comm="nginx",
        uid="root",
        cgroup="17",
        netns="4026531840",
        ipv4=True,
        lport="80,443",
        rport=[1024, "2000-3000"],
        port="80",
        laddr="10.0.0.0/8",
        raddr=("192.0.2.1", "198.51.100.0/24,2001:db8::1"),
    )
    assert not wanted.is_empty
    assert wanted.rport == (PortRange(1024, 1024), PortRange(2000, 3000))
    assert wanted.describe() == [
        ("--pid", str(os.getpid())),
        ("--comm", "nginx"),
        ("--uid", "0"),
        ("--cgroup", "17"),
        ("--netns", "4026531840"),
        ("-4", ""),
        ("--lport", "80,443"),
        ("--rport", "1024,2000-3000"),
        ("--port", "80"),
        ("--laddr", "10.0.0.0/8"),
        ("--raddr", "192.0.2.1,198.51.100.0/24,2001:db8::1"),
    ]
    assert Filter.from_options(ipv6=True) == Filter.from_options(family=6) == Filter(family=6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipv4": True, "ipv6": True}, "-4 and -6 exclude each other; leave out both to see IPv4 and IPv6"),
        ({"ipv4": True, "family": 6}, "-4 and -6 exclude each other"),
        ({"family": 5}, "family 5 is neither 4 nor 6"),
        ({"ipv4": True, "raddr": "::1"}, "-4 asks for IPv4, --raddr asks for IPv6"),
        ({"ipv6": True, "laddr": "::ffff:10.0.0.1"}, "-6 asks for IPv6, --laddr asks for IPv4"),
        ({"laddr": "10.0.0.1", "raddr": "::1"}, "--laddr asks for IPv4, --raddr asks for IPv6"),
        (
            {"port": "80", "lport": "443", "rport": "1-79"},
            "--port 80 is neither in --lport 443 nor in --rport 1-79",
        ),
    ],
)
def test_contradictions(options: dict[str, Any], message: str) -> None:
    assert message in error(Filter.from_options, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"ipv4": True, "raddr": "::1,10.0.0.1"},
        {"laddr": "10.0.0.1,::1", "raddr": "::1"},
        {"port": "80", "lport": "443"},
        {"port": "80", "lport": "443", "rport": "70-90"},
    ],
)
def test_no_contradictions(options: dict[str, Any]) -> None:
    Filter.from_options(**options)


def test_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "exists", lambda inode: True)
    pids = (os.getpid(), os.getppid())
    assert Filter.from_options(pid=f"{pids[0]},{pids[1]}") == Filter.from_options(pid=pids) == Filter(pid=pids)
    assert Filter.from_options(comm=["a", "b,c"], uid="root,0,1") == Filter(comm=("a", "b", "c"), uid=(0, 1))
    assert Filter.from_options(cgroup=[2, "3"], netns=range(8, 10)) == Filter(cgroup=(2, 3), netns=(8, 9))
    assert Filter(comm="a", uid=0, netns=None) == Filter(comm=("a",), uid=(0,))
    assert Filter.from_options(comm="a,b").describe() == [("--comm", "a,b")]
    for option in ("pid", "comm", "uid", "cgroup", "netns"):
        for bad in ("", "1,", ",", []):
            assert "a value is missing" in error(Filter.from_options, **{option: bad})


def test_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "exists", lambda inode: True)
    row = {
        "pid": 7,
        "comm": "nginx",
        "uid": 0,
        "cgroup": 5,
        "netns": 9,
        "family": 4,
        "laddr": address_bytes("10.0.0.1"),
        "raddr": address_bytes("192.0.2.9"),
        "lport": 80,
        "rport": 50000,
    }
    hits: list[dict[str, Any]] = [
        {"uid": 0},
        {"netns": 9},
        {"comm": "nginx"},
        {"cgroup": 5},
        {"family": 4},
        {"lport": "70-90"},
        {"port": "80"},
        {"port": "50000"},
        {"laddr": "10.0.0.0/8"},
        {"raddr": "::1,192.0.2.9"},
    ]
    misses: list[dict[str, Any]] = [
        {"uid": 1},
        {"netns": 8},
        {"comm": "ngin"},
        {"cgroup": 6},
        {"family": 6},
        {"rport": "80"},
        {"port": "81"},
        {"laddr": "11.0.0.0/8"},
        {"raddr": "::/0"},
        {"lport": 80, "rport": 80},
    ]
    for options in hits:
        wanted = Filter.from_options(**options)
        assert wanted.matches(row)
        assert wanted.matches(SimpleNamespace(**row))
        assert not wanted.matches({})
        assert not wanted.matches(SimpleNamespace())
        assert not wanted.matches(dict.fromkeys(row))
    for options in misses:
        assert not Filter.from_options(**options).matches(row)
    assert Filter().matches({})
    assert Filter(cgroup=1).matches({"cgroup": 5, "in_cgroup": 1})
    assert not Filter(cgroup=1).matches({"cgroup": 5, "in_cgroup": 0})


def optional(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def several(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(strategy, max_size=2, unique=True).map(tuple)


few_ports = st.integers(78, 84)
few_addresses = st.sampled_from(
    ["10.0.0.1", "10.0.0.2", "10.255.0.1", "0.0.0.0", "::", "::1", "2001:db8::1", "2001:db8:1::1"]
)
few_networks = st.sampled_from(
    ["10.0.0.1", "10.0.0.0/30", "10.0.0.0/8", "0.0.0.0/0", "::/0", "2001:db8::/48", "::1", "::ffff:10.0.0.2"]
)
ranges = st.lists(st.tuples(few_ports, few_ports).map(sorted), max_size=3)
rows = st.fixed_dictionaries(
    {
        "pid": optional(st.integers(1, 3)),
        "comm": optional(st.sampled_from(["a", "b"])),
        "uid": optional(st.integers(0, 2)),
        "cgroup": optional(st.integers(1, 3)),
        "in_cgroup": optional(st.integers(0, 1)),
        "netns": optional(st.integers(1, 2)),
        "lport": optional(few_ports),
        "rport": optional(few_ports),
        "laddr": optional(few_addresses.map(address_bytes)),
        "raddr": optional(few_addresses.map(address_bytes)),
    }
)
options = st.fixed_dictionaries(
    {
        "pid": several(st.integers(1, 3)),
        "comm": several(st.sampled_from(["a", "b", "c"])),
        "uid": several(st.integers(0, 2)),
        "cgroup": several(st.integers(1, 3)),
        "netns": several(st.integers(1, 2)),
        "lport": ranges,
        "rport": ranges,
        "port": ranges,
        "laddr": st.lists(few_networks, max_size=2),
        "raddr": st.lists(few_networks, max_size=2),
    }
)


def model(wanted: dict[str, Any], row: dict[str, Any]) -> bool:
    """The rules once more, on integers."""

    def same(name: str) -> bool:
        return not wanted[name] or row[name] in wanted[name]

    def port_in(name: str, value: int | None) -> bool:
        return value is not None and any(first <= value <= last for first, last in wanted[name])

    def address_in(name: str) -> bool:
        if not wanted[name]:
            return True
        if row[name] is None:
            return False
        address = int.from_bytes(row[name], "big")
        for text in wanted[name]:
            base, _, prefix = text.partition("/")
            length = int(prefix or 128)
            if prefix and ":" not in base:
                length += 96
            start = int.from_bytes(address_bytes(base), "big")
            both_ipv4 = (start >> 32 == 0xFFFF) == (address >> 32 == 0xFFFF)
            if both_ipv4 and start >> 128 - length == address >> 128 - length:
                return True
        return False

    return (
        all(map(same, ("pid", "comm", "uid", "netns")))
        and (same("cgroup") or row["in_cgroup"] == 1)
        and (not wanted["lport"] or port_in("lport", row["lport"]))
        and (not wanted["rport"] or port_in("rport", row["rport"]))
        and (not wanted["port"] or port_in("port", row["lport"]) or port_in("port", row["rport"]))
        and address_in("laddr")
        and address_in("raddr")
    )


@given(options, rows)
def test_matches_is_the_model(wanted: dict[str, Any], row: dict[str, Any]) -> None:
    lists: dict[str, Any] = {
        name: filters.parse_ports([f"{first}-{last}" for first, last in wanted[name]])
        for name in ("lport", "rport", "port")
        if wanted[name]
    }
    lists |= {name: filters.parse_networks(wanted[name]) for name in ("laddr", "raddr") if wanted[name]}
    single = {name: wanted[name] for name in ("pid", "comm", "uid", "cgroup", "netns")}
    assert Filter(**single, **lists).matches(row) == model(wanted, row)


@given(options)
def test_describe_gives_the_filter_again(wanted: dict[str, Any]) -> None:
    given = {name: value for name, value in wanted.items() if value and name != "pid"}
    for name in ("lport", "rport", "port"):
        if name in given:
            given[name] = ",".join(f"{first}-{last}" for first, last in given[name])
    with suppress(UsageError), pytest.MonkeyPatch.context() as patch:  # a contradiction
        patch.setattr(netns, "exists", lambda inode: True)
        first = Filter.from_options(**given)
        described: dict[str, Any] = {option.removeprefix("--"): value for option, value in first.describe()}
        again = Filter.from_options(**described)
        assert again == first


def test_every_field_is_an_option() -> None:
    names = {field.name for field in fields(Filter)}
    assert names <= set(inspect.signature(Filter.from_options).parameters)


near_misses = st.text(alphabet="0123456789.:/-,%abcdefpidx ", max_size=30)


@given(st.text(max_size=40) | near_misses | st.characters(categories=["Cs"]))
def test_any_text_gives_a_value_or_a_usage_error(text: str) -> None:
    for parse in (
        filters.parse_ports,
        filters.parse_networks,
        filters.parse_pid,
        filters.parse_comm,
        filters.parse_uid,
        filters.parse_cgroup,
        filters.parse_netns,
        filters.address_bytes,
    ):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(netns, "exists", lambda inode: None)  # to look for one takes its time
                patch.setattr(socket, "getaddrinfo", lambda name, *_, **__: [(0, 0, 0, "", ("192.0.2.1", 0))])
                parse(text)
        except UsageError as caught:
            assert len(str(caught).splitlines()) == 1
        except (NotPermittedError, UnsupportedError):
            assert parse in (filters.parse_netns, filters.parse_cgroup)
