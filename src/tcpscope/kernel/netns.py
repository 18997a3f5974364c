"""The network namespaces that can be seen from here.

The kernel has no list of them. A namespace exists while something holds it: a process, or a file in /run/netns,
to which `ip netns add` binds it (namespaces(7), ip-netns(8)). `visible` finds these. A namespace may also be held by
a thread that has left the namespace of its process, by a mount elsewhere, an open file or a socket. Only `exists`
looks for these.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import msgspec

from tcpscope.kernel import pidns
from tcpscope.kernel.resources import exhausted

NAMED = Path("/run/netns")
PROC = Path("/proc")

_FIRST_INODE = 0xEFFFFF00  # PROC_DYNAMIC_FIRST, fs/proc/generic.c, and the numbers just below for the first namespaces
_NS_GET_NSTYPE = 0xB703  # include/uapi/linux/nsfs.h
_CLONE_NEWNET = 0x40000000
_TRIES = 3


class Namespace(msgspec.Struct, frozen=True):
    """A network namespace. `path` opens it while its holder lives. `name` is its file in /run/netns."""

    inode: int
    path: str
    name: str | None = None


class Visible(msgspec.Struct, frozen=True):
    """The namespaces that were found, by inode, our own first; and how many processes could not be read."""

    namespaces: dict[int, Namespace]
    hidden_processes: int


def visible() -> Visible:
    """Our own namespace, those with a name, and those of all processes."""
    own = PROC / "self/ns/net"
    found = {inode_of(own): str(own)}
    names: dict[int, str] = {}
    for path in named():
        try:
            inode = inode_of(path)
        except OSError as error:
            if shortage := exhausted(error.errno, f"cannot open {path}"):
                raise shortage from None
            continue  # unbound, or not bound yet
        names.setdefault(inode, path.name)
        found.setdefault(inode, str(path))
    hidden = 0
    for path in (process / "ns/net" for process in _processes()):
        try:
            found.setdefault(_inode_in_link(path), str(path))
        except PermissionError:
            hidden += 1
        except OSError:
            continue  # the process is gone
    return Visible({inode: Namespace(inode, path, names.get(inode)) for inode, path in found.items()}, hidden)


def own() -> int:
    """The inode number of our own namespace. It opens no file."""
    return _inode_in_link(PROC / "self/ns/net")


def processes() -> dict[int, list[Path]]:
    """Namespaces, as inode, and the folders in /proc of the processes in each: of those that can be read."""
    found: dict[int, list[Path]] = {}
    for process in _processes():
        with suppress(OSError):
            found.setdefault(_inode_in_link(process / "ns/net"), []).append(process)
    return found


def hidden() -> list[Path]:
    """The folders in /proc of the processes whose namespace may not be read."""
    found = []
    for process in _processes():
        try:
            _inode_in_link(process / "ns/net")
        except PermissionError:
            found.append(process)
        except OSError:
            continue  # the process is gone
    return found


def exists(inode: int) -> bool | None:
    """Whether a network namespace with this inode exists. None: not all possible holders can be read."""
    seen = visible()
    if inode in seen.namespaces:
        return True
    if inode < _FIRST_INODE:
        return False
    text, mounts, hidden = f"net:[{inode}]", set[str](), seen.hidden_processes
    for process in _processes():
        try:
            space = str((process / "ns/mnt").readlink())
            if space not in mounts and f" {text} " in (process / "mountinfo").read_text(errors="replace"):
                return True
            mounts.add(space)
            if any(str(link.readlink()) == text for link in process.glob("task/*/ns/net")):
                return True
            if any(_held_by(link, inode) for link in (process / "fd").iterdir()):
                return True
        except PermissionError:
            hidden += 1
        except OSError:
            continue  # the process is gone
    everything = (PROC / "1").exists() and not pidns.inner(PROC)
    return None if hidden or not everything else False


@contextmanager
def held(inodes: Iterable[int]) -> Iterator[None]:
    """Keep these namespaces: the kernel gives the inode number of one that is gone to the next one.

    A namespace that cannot be seen from here, or that we may not open, is not kept.
    """
    with ExitStack() as stack:
        wanted = set(inodes)
        seen = visible().namespaces if wanted else {}
        for inode in wanted & seen.keys():
            with suppress(OSError):
                if (fd := opened(seen[inode])) is not None:
                    stack.callback(os.close, fd)
        yield


def opened(namespace: Namespace | None) -> int | None:
    """A file descriptor of a namespace that was found; None: it is gone.

    Its process may have ended since, or have entered another one, while others are still in it. Raises OSError if it
    may not be opened, ResourceError.
    """
    for _ in range(_TRIES):
        if namespace is None:
            return None
        try:
            fd = os.open(namespace.path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            pass
        except OSError as error:
            if shortage := exhausted(error.errno, f"cannot open {namespace.path}"):
                raise shortage from None
            raise
        else:
            if os.fstat(fd).st_ino == namespace.inode:
                return fd
            os.close(fd)
        namespace = visible().namespaces.get(namespace.inode)
    return None


def _held_by(link: Path, inode: int) -> bool:
    """Whether an open file (/proc/PID/fd/N) is this namespace, or a socket in it."""
    try:
        target = str(link.readlink())
    except FileNotFoundError:
        return False
    if not target.startswith("socket:["):
        return target == f"net:[{inode}]"
    from tcpscope.kernel._libbpf import lib

    found: int = lib.tcpscope_socket_netns(int(link.parts[-3]), int(link.name))
    if -found in (errno.EPERM, errno.EACCES):
        raise PermissionError(-found, os.strerror(-found), str(link))
    return found == inode


def named() -> list[Path]:
    """The files in /run/netns, in the order of their names."""
    try:
        return sorted(NAMED.iterdir())
    except OSError:
        return []


def inode_of(path: str | os.PathLike[str]) -> int:
    """The inode number of the network namespace that `path` opens; OSError if it opens anything else."""
    if not stat.S_ISREG(Path(path).stat().st_mode):  # opening a device or a pipe may do something
        if Path(path).is_symlink() and Path(path).readlink() == Path():  # it leads to the folder that it is in
            raise _hidden(path)
        raise OSError(errno.EINVAL, "not a network namespace", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl.ioctl(fd, _NS_GET_NSTYPE) != _CLONE_NEWNET:
            raise OSError(errno.EINVAL, "not a network namespace", str(path))
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _processes() -> Iterator[Path]:
    return (entry for entry in PROC.iterdir() if entry.name.isdecimal())


def _inode_in_link(path: Path) -> int:
    """The inode in a link such as `net:[4026531840]`. This is several times as fast as opening it.

    Without permission to read the link, newer kernels return an error, and 5.10 an empty link.
    """
    text = path.readlink().name
    if not text:
        raise _hidden(path)
    return int(text[len("net:[") : -1])


def _hidden(path: str | os.PathLike[str]) -> PermissionError:
    return PermissionError(errno.EACCES, "not permitted", str(path))
