"""The image of a kernel: what is compressed in it, and the type information (BTF) that lies in that."""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
import zlib
from pathlib import Path

from tcpscope.errors import MalformedError
from tcpscope.kernel import elf
from tests.kernels.debian import Image

_BOOT_SECTOR = 512
_SETUP_SECTORS, _PAYLOAD = 0x1F1, struct.Struct("<II")
_PROGRAMS = {b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}
_GZIP, _ELF, _BTF = b"\x1f\x8b", b"\x7fELF", b"\x9f\xeb"
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
    try:
        if payload.startswith(_GZIP):
            return gzip.decompress(payload[:-4])  # the last four bytes are the size, added by the kernel's build
        if payload.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ImageError(f"what is compressed in it is broken: {error}") from error
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


def types_in(data: bytes) -> bytes:
    """The BTF in a file: it alone, also gzipped, or that of a vmlinux or a bzImage."""
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ImageError(f"what is compressed in it is broken: {error}") from error
    if data.startswith(_BTF):
        return data
    try:
        return elf.sections(data if data.startswith(_ELF) else vmlinux(data))[".BTF"]
    except KeyError:
        raise ImageError("no BTF in it") from None
    except MalformedError as error:
        raise ImageError(str(error)) from error


def btf_of(image: Image) -> bytes:
    """The image's BTF, kept beside it once it was looked for."""
    kept = Path(image.root) / f"btf-{image.release}"
    if not kept.exists():
        try:
            found = types_in(Path(image.vmlinuz).read_bytes())
        except ImageError as error:
            raise ImageError(f"{image.vmlinuz}: {error}") from error
        kept.with_suffix(".new").write_bytes(found)
        kept.with_suffix(".new").rename(kept)
    return kept.read_bytes()
