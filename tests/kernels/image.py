"""A kernel without a boot: the type information (BTF) that lies in its image, and what tcpscope would make of it."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from functools import cached_property
from pathlib import Path
from typing import Any

from tcpscope.kernel import elf
from tcpscope.kernel.btf import Btf, Kind
from tcpscope.kernel.features import Answer, Kernel
from tests.kernels.debian import Image

_BOOT_SECTOR = 512
_SETUP_SECTORS, _PAYLOAD = 0x1F1, struct.Struct("<II")
_PROGRAMS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}
_PAYLOAD_AT = 0x248  # offset and length of what is compressed: Documentation/arch/x86/boot.rst


class ImageError(Exception):
    """An image that cannot be read; the message says which and why."""


def vmlinux(data: bytes) -> bytes:
    """The ELF file in a bzImage."""
    if data[0x202:0x206] != b"HdrS":
        raise ImageError("no bzImage: the header HdrS is missing")
    offset, length = _PAYLOAD.unpack_from(data, _PAYLOAD_AT)
    start = ((data[_SETUP_SECTORS] or 4) + 1) * _BOOT_SECTOR + offset
    payload = data[start : start + length]
    if payload.startswith(b"\x1f\x8b"):
        return gzip.decompress(payload[:-4])  # the last four bytes are the size, added by the kernel's build
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    for magic, program in _PROGRAMS.items():
        if payload.startswith(magic):
            return _by_program(program, payload[:-4])
    raise ImageError(f"a compression that is not known here: {payload[:4].hex()}")


def _by_program(program: str, payload: bytes) -> bytes:
    try:
        done = subprocess.run([program, "-dqc"], input=payload, capture_output=True)
    except FileNotFoundError:
        raise ImageError(f"the program {program} is missing, which unpacks it") from None
    if not done.stdout:
        raise ImageError(f"{program}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def btf_of(image: Image) -> bytes:
    """The image's BTF, kept beside it once it was looked for."""
    kept = Path(image.root) / f"btf-{image.release}"
    if not kept.exists():
        try:
            found = elf.sections(vmlinux(Path(image.vmlinuz).read_bytes()))[".BTF"]
        except (ImageError, KeyError, lzma.LZMAError) as error:
            raise ImageError(f"{image.vmlinuz}: {error}") from error
        kept.with_suffix(".new").write_bytes(found)
        kept.with_suffix(".new").rename(kept)
    return kept.read_bytes()


class Offline(Kernel):
    """What can be said of a kernel by its BTF alone. Functions can be hooked unless it is said that they cannot."""

    def __init__(self, btf: Btf, *, functions: bool = True) -> None:
        self._tried: dict[str, Answer] = {}
        self.__dict__["fentry"] = self.__dict__["kprobe"] = Answer(functions, "" if functions else "not on this kernel")
        self.__dict__["_btf"] = btf

    def release(self) -> None:
        """It has nothing to give back."""

    def parameters(self, function: str) -> int | None:
        found = self._types.func_params(function)
        return None if found is None else len(found)

    def enumerator(self, name: str) -> int | None:
        return self._types.enum_value(name)

    def has_type(self, name: str) -> bool:
        return any(self._types.find(name, kind) for kind in (Kind.STRUCT, Kind.UNION, Kind.ENUM))

    def _has_typedef(self, name: str, what: str) -> Answer:
        return self._has(self._types.find(name, Kind.TYPEDEF) is not None, what)

    def _try_fentry(self, function: str) -> Answer:
        return Answer(True)  # of more than six arguments only a trial could tell

    @cached_property
    def _types(self) -> Btf:
        types: Any = self.__dict__["_btf"]
        assert isinstance(types, Btf)
        return types
