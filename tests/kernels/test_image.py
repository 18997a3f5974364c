"""A kernel's image: what is compressed in it, and the BTF in that."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess

import pytest

from tcpscope.kernel.btf import Btf, Kind
from tcpscope.kernel.features import BTF, Kernel
from tcpscope.kernel.loaded import plan, plan_refusals
from tcpscope.kernel.spec import Spec
from tests.kernels import KERNELS, debian
from tests.kernels.image import ImageError, Offline, btf_of, vmlinux
from tests.lacks import functions_cannot_be_hooked

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


def test_what_is_said_without_the_kernel_is_what_the_kernel_says() -> None:
    """The running kernel's plan, made from its BTF alone."""
    btf = Btf.parse(BTF.read_bytes())
    offline = Offline(btf, functions=not functions_cannot_be_hooked())
    for probe in ("connections", "listeners", "rtt", "sockets"):
        spec = Spec.of(probe)
        plans = [plan(spec, plan_refusals(spec, kernel)) for kernel in (offline, Kernel())]
        chosen = [{hook: use.program for hook, use in each.items()} for each in plans]
        assert chosen[0] == chosen[1]
