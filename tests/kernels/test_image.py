"""A kernel's image: what is compressed in it, and the BTF in that."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess

import pytest

from tcpscope.kernel.btf import Btf, Kind
from tcpscope.kernel.features import BTF
from tests.kernels import KERNELS, debian
from tests.kernels.image import ImageError, btf_of, types_in, vmlinux

CONTENT = b"\x7fELF" + bytes(range(256)) * 40


def image(payload: bytes, sectors: int = 3, offset: int = 77) -> bytes:
    """A bzImage with this payload."""
    head = bytearray((sectors + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, offset, len(payload))
    return bytes(head) + bytes(offset) + payload + b"what follows"


def packed(program: str, data: bytes) -> bytes:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    options = ["-lc"] if program == "lz4" else ["-qc"]
    return subprocess.run([program, *options], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize("how", ["gzip", "xz", "zstd", "lz4"])
def test_every_compression_that_kernels_use(how: str) -> None:
    size = struct.pack("<I", len(CONTENT))  # which the kernel's build adds to all but xz
    payload = {
        "gzip": lambda: gzip.compress(CONTENT) + size,
        "xz": lambda: lzma.compress(CONTENT, check=lzma.CHECK_CRC32),
        "zstd": lambda: packed("zstd", CONTENT) + size,
        "lz4": lambda: packed("lz4", CONTENT) + size,
    }[how]()
    assert vmlinux(image(payload)) == CONTENT


@pytest.mark.parametrize(("data", "said"), [(b"\0" * 4096, "HdrS"), (image(b"BZh91AY"), "not known here: 425a6839")])
def test_what_is_no_image_is_said_in_one_line(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said) as caught:
        vmlinux(data)
    assert "\n" not in str(caught.value)


def test_the_btf_in_an_image_is_that_of_a_kernel() -> None:
    found = next((image for kernel in KERNELS if (image := debian.cached(kernel))), None)
    if found is None:
        pytest.skip("no kernel has been fetched here")
    kernel = Btf.parse(btf_of(found))
    assert kernel.find("tcp_sock", Kind.STRUCT) is not None
    assert kernel.func_params("tcp_connect") is not None


def test_btf_is_found_in_whatever_holds_it() -> None:
    btf = BTF.read_bytes()
    assert types_in(btf) == types_in(gzip.compress(btf, 1)) == btf
    with pytest.raises(ImageError, match="no BTF in it"):
        types_in(b"\x7fELF\x02\x01\x01" + bytes(57))
    with pytest.raises(ImageError, match="cut short"):
        types_in(b"\x7fELF\x02\x01\x01")


def test_a_broken_image_is_said_in_one_line() -> None:
    with pytest.raises(ImageError, match="broken"):
        vmlinux(image(gzip.compress(CONTENT)[:40]))
    with pytest.raises(ImageError, match="what is compressed in it is broken"):
        types_in(gzip.compress(CONTENT)[:40])
