"""Network namespaces that end with their owner.

A `Namespace` is a network namespace with a name in `/run/netns`, so that `ip netns exec NAME ...` works in another
terminal. One worker thread lives in it. Sockets and child processes that the worker creates belong to the namespace,
and the whole process can use them.

A process that is killed cannot remove its names. So a name contains the process's number and start time, and the
owner holds a lock on the file of the namespace. `sweep()` removes names whose owner lives by neither of the two.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import queue
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import ParamSpec, TypeVar

from tcpscope.errors import NotPermittedError, TcpscopeError, UnsupportedError

P = ParamSpec("P")
T = TypeVar("T")

NAMES = Path("/run/netns")  # where iproute2 looks, too
PREFIX = "tcpscope"

CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _call(function: str, *args: int | bytes | None) -> None:
    if getattr(_libc, function)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def start_time(pid: int) -> int | None:
    """When the process was started, in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()  # the command name before it may hold anything
    return None if state in "ZX" else int(fields[18])


class Namespace:
    """A new network namespace `tcpscope-PID-STARTTIME-TITLE`; gone after `close()`."""

    def __init__(self, title: str) -> None:
        try:
            self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise UnsupportedError(f"there is no {error.filename}", "a lab needs /proc: mount it") from None
        pid = os.getpid()
        self.path = NAMES / f"{PREFIX}-{pid}-{start_time(pid)}-{title}"
        self.name = self.path.name
        self.inode = 0
        self._named = self._closed = False
        self._lock: int | None = None
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name=f"netns {title}", daemon=True)
        self._worker.start()
        try:
            self.run(self._create)
        except OSError as error:
            self.close()
            raise _explain(error) from error

    def _work(self) -> None:
        try:
            while call := self._calls.get():
                call()
            if self.inode:
                # The kernel's thread may live a moment longer than join(). It must not hold the namespace then.
                _call("setns", self._home, CLONE_NEWNET)
        finally:
            os.close(self._home)

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in the namespace's thread. Return what it returns, or raise what it raises.

        Calls run one after the other, so a function that blocks delays all later calls.
        """
        if threading.current_thread() is self._worker:
            return function(*args, **kwargs)
        if self._closed:
            raise RuntimeError(f"the network namespace {self.name} is closed")
        future: Future[T] = Future()

        def call() -> None:
            try:
                future.set_result(function(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future.result()

    def _create(self) -> None:
        _call("unshare", CLONE_NEWNET)
        self.inode = Path("/proc/thread-self/ns/net").stat().st_ino
        NAMES.mkdir(mode=0o755, exist_ok=True)
        self.path.touch(mode=0o444, exist_ok=False)
        self._named = True
        _call("mount", b"/proc/thread-self/ns/net", os.fsencode(self.path), b"none", MS_BIND, None)
        self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Remove the name and end the worker. Open sockets keep the namespace alive, without a name."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._named:
            _remove(self.path)
        self._closed = True
        self._calls.put(None)
        if threading.current_thread() is not self._worker:
            self._worker.join(timeout=60)


def _explain(error: OSError) -> TcpscopeError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermittedError(
            "cannot make a network namespace", "run as root, or with CAP_SYS_ADMIN", ("CAP_SYS_ADMIN",)
        )
    if error.errno == errno.ENOSPC:
        return UnsupportedError("no further network namespace is allowed", "see /proc/sys/user/max_net_namespaces")
    if error.errno == errno.EINVAL:
        return UnsupportedError("this kernel has no network namespaces", "CONFIG_NET_NS is not set")
    return TcpscopeError(f"cannot make a network namespace: {error}")


def _remove(path: Path) -> None:
    try:
        _call("umount2", os.fsencode(path), MNT_DETACH)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):  # not mounted, or another sweep was quicker
            raise
    path.unlink(missing_ok=True)


def _abandoned(path: Path) -> bool:
    match = re.fullmatch(rf"{PREFIX}-(\d+)-(\d+)-.+", path.name)
    if not match or start_time(int(match[1])) == int(match[2]):
        return False
    # In another PID namespace the owner has another number. So its lock is asked, too.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def sweep() -> list[str]:
    """Remove the namespaces of dead labs, and return their names. Other living labs are not touched."""
    if not NAMES.is_dir():
        return []
    abandoned = [path for path in sorted(NAMES.glob(f"{PREFIX}-*")) if _abandoned(path)]
    try:
        for path in abandoned:
            _remove(path)
    except PermissionError as error:
        raise NotPermittedError(
            f"cannot remove {error.filename or path}",
            "run as root, or with CAP_SYS_ADMIN",
            ("CAP_SYS_ADMIN",),
        ) from error
    return [path.name for path in abandoned]
