"""An sk_lookup program, made by hand: all connections to a network namespace go to one listener.

Constants and layouts: include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import struct

_NUMBER = {"x86_64": 321, "aarch64": 280}[os.uname().machine]
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_SOCKMAP, _PROGRAM, _ATTACH = 15, 30, 36
_LOOKUP, _RELEASE, _ASSIGN = 1, 86, 124  # helpers
_PASS = 1


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    room = ctypes.create_string_buffer(attributes.ljust(128, b"\0"))
    result: int = libc.syscall(_NUMBER, command, room, 128)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"bpf({command}): {os.strerror(ctypes.get_errno())}")
    return result


def _instructions(sockmap: int) -> bytes:
    def one(opcode: int, to: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
        return struct.pack("<BBhi", opcode, source << 4 | to, offset, immediate)

    return b"".join(
        (
            one(0xBF, 6, 1),  # r6 = context
            one(0x62, 10, 0, -4, 0),  # key = 0, on the stack
            one(0x18, 1, 1, 0, sockmap) + one(0),  # r1 = the map
            one(0xBF, 2, 10),
            one(0x07, 2, 0, 0, -4),  # r2 = &key
            one(0x85, immediate=_LOOKUP),
            one(0x15, 0, 0, 7, 0),  # no socket: let the kernel look
            one(0xBF, 7, 0),
            one(0xBF, 1, 6),
            one(0xBF, 2, 7),
            one(0xB7, 3),
            one(0x85, immediate=_ASSIGN),
            one(0xBF, 1, 7),
            one(0x85, immediate=_RELEASE),
            one(0xB7, 0, 0, 0, _PASS),
            one(0x95),
        )
    )


def to(listener: int) -> int:
    """Steer the connections of this process's network namespace to the listener `listener`, until this is closed."""
    with contextlib.suppress(ValueError):  # before 5.11 maps count against it, and root may raise it in the guest
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    sockmap = _bpf(_MAP_CREATE, struct.pack("<5I", _SOCKMAP, 4, 8, 1, 0))
    key, value = ctypes.c_uint32(0), ctypes.c_uint64(listener)
    places = struct.pack("<I4xQQQ", sockmap, ctypes.addressof(key), ctypes.addressof(value), 0)
    _bpf(_MAP_UPDATE, places)
    code, licence = ctypes.create_string_buffer(_instructions(sockmap)), ctypes.create_string_buffer(b"GPL")
    count = (len(code) - 1) // 8
    attributes = struct.pack("<IIQQ", _PROGRAM, count, ctypes.addressof(code), ctypes.addressof(licence))
    program = _bpf(_PROG_LOAD, attributes.ljust(68, b"\0") + struct.pack("<I", _ATTACH))
    netns = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        return _bpf(_LINK_CREATE, struct.pack("<4I", program, netns, _ATTACH, 0))
    finally:
        os.close(netns)
        os.close(program)
        os.close(sockmap)
