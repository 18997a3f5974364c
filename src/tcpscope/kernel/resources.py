"""Errors that say that the machine has too little of something now, and not that the kernel lacks anything.

The loader may leave a hook out for every other error. For one of these it ends.
"""

from __future__ import annotations

import errno
import os
import resource

from tcpscope.errors import ResourceError

_HELP = {
    errno.ENOMEM: "free memory, or raise the memory limit of the cgroup",
    errno.EMFILE: "raise the limit of open files per process ('ulimit -n', now {files})",
    errno.ENFILE: "raise the machine's limit of open files (fs.file-max)",
    errno.EAGAIN: "try again",
    errno.EINTR: "try again",
}


def exhausted(error: int | None, what: str) -> ResourceError | None:
    """The error to raise if the errno `error` is one of these; else None. `what` has failed."""
    return ResourceError(f"{what}: {os.strerror(error or 0)}", help_for(error)) if error in _HELP else None


def help_for(error: int | None) -> str:
    """What helps against this errno; empty if it is not one of these."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _HELP[error].format(files=files) if error in _HELP else ""


def failed(error: int | None, what: str) -> ResourceError | OSError:
    """The error to raise because `what` has failed with the errno `error`."""
    return exhausted(error, what) or OSError(error, f"{what}: {os.strerror(error or 0)}")
