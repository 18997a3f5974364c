"""BTF that is made here, type by type."""

from __future__ import annotations

import struct

from tcpscope.kernel.btf import Btf


class Blob:
    """Builds BTF: `add` takes the words of one type, with text in the place of string offsets."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.strings = b"\0"
        self.count = 0

    def text(self, text: str) -> int:
        if not text:
            return 0
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text.encode()) - 1

    def add(self, kind: int, name: str, third: int = 0, *rest: int | str, count: int = 0, flag: bool = False) -> int:
        self.words += [self.text(name), flag << 31 | kind << 24 | count, third]
        self.words += [self.text(word) if isinstance(word, str) else word & 0xFFFFFFFF for word in rest]
        self.count += 1
        return self.count

    def data(self, magic: int = 0xEB9F, version: int = 1, flags: int = 0, layout: bytes = b"") -> bytes:
        types = struct.pack(f"<{len(self.words)}I", *self.words)
        size = 32 if layout else 24
        head = struct.pack("<HBBIIIII", magic, version, flags, size, 0, len(types), len(types), len(self.strings))
        if layout:
            head += struct.pack("<II", len(types) + len(self.strings), len(layout))
        return head + types + self.strings + layout

    def parse(self) -> Btf:
        return Btf.parse(self.data())
