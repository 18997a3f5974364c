"""What the verifier says of a program that it refuses."""

from __future__ import annotations

import re

LINES = 6
_POINTERS = "in programs of type kprobe and tracepoint follow kernel pointers with BPF_CORE_READ, not directly"
_BOUNDS = "the verifier must see that an index or size stays within bounds: test it first (if (n >= SIZE) return 0;)"
_CONTEXT = {
    "tracepoint": "the fields of the context are those of /sys/kernel/tracing/events/{target}/format",
    "tp": "the fields of the context are those of /sys/kernel/tracing/events/{target}/format",
}
_ARGUMENTS = (
    "this context has no such place: read the hook's arguments with BPF_PROG() or BPF_KPROBE(), as many as it has"
)
_HINTS = (
    (
        r"mem access '\w*map_value_or_null'|type=map_value_or_null",
        "bpf_map_lookup_elem() may return NULL: test its result before its use",
    ),
    (r"\w*mem_or_null", "bpf_ringbuf_reserve() may return NULL: test its result before its use"),
    (r"_or_null|[Pp]ossibly NULL pointer", "this pointer may be NULL: test it before its use"),
    (r"invalid mem access '(?:inv|scalar)'", _POINTERS),
    (r"cannot call GPL", 'only a program under the GPL may call this helper: char LICENSE[] SEC("license") = "GPL";'),
    (
        r"back-edge|infinite loop|program is too large|jumps is too complex|too many states",
        "the verifier must see the end of each loop: give it a constant bound (for (int i = 0; i < 64; i++))",
    ),
    (r"invalid bpf_context access|doesn't have \d+-th argument|dereference of modified ctx", "{context}"),
    (
        r"unknown func|program of this type cannot use helper|helper call is not allowed",
        "a program of the type {type} may not call this helper: take another one, or another type of hook",
    ),
    (
        r"unbounded|min value is negative|max value is outside|invalid access to|variable-offset|variable stack|"
        r"outside of the|out of bounds|invalid zero-sized read|math between|pointer arithmetic|invalid write to stack",
        _BOUNDS,
    ),
    (
        r"unknown#195896080|invalid CO-RE relocation",
        "this kernel lacks a field or a type that is read: ask for it with bpf_core_field_exists() first",
    ),
    (r"access beyond struct", "a cast does not tell the verifier another type: read such a field with BPF_CORE_READ"),
    (r"Unreleased reference", "on each way to the end, submit what was reserved (bpf_ringbuf_submit) or discard it"),
    (
        r"invalid (?:indirect )?read from stack|!read_ok",
        "something is used before it has a value: initialize it ( = {})",
    ),
    (r"combined stack size|stack depth", "a program has 512 bytes of stack: put what is large into a map"),
)


_INSTRUCTION = re.compile(r"(?!.*(?:195896080|CO-RE))\s*(?:\d+: |; |from \d+ to \d+|R\d+[_=])")
"""A line with an instruction, its source or the registers: they have words of the hints where nothing is wrong.
Libbpf has written those that read what the kernel lacks."""


def verifier_lines(log: str) -> list[str]:
    """The lines of a verifier's log, the reason last; none if the kernel did not ask the verifier.

    Since 7.3 the log has a report of some fifty lines after the reason, with excerpts of the source. It is omitted.
    """
    lines = log.partition("\nVerification failed: ")[0].splitlines()
    statistics = ("processed ", "verification time", "stack depth")
    return [line for line in lines if line.strip() and not line.startswith(statistics)]


def verifier_hint(log: str, section: str = "") -> str:
    """What helps against the commonest mistakes, by the last lines of the log; empty: none of them.

    `section` is the program's ELF section, such as `tracepoint/tcp/tcp_probe`.
    """
    type_, _, target = section.partition("/")
    context = _CONTEXT.get(type_, _ARGUMENTS).format(target=target or "CATEGORY/NAME")
    said = [line for line in verifier_lines(log)[-LINES:] if not _INSTRUCTION.match(line)]
    for line in reversed(said):
        for pattern, hint in _HINTS:
            if re.search(pattern, line):
                return hint.replace("{context}", context).replace("{type}", type_ or "its")
    return ""


def source_line(log: str) -> tuple[str, str, int] | None:
    """The line of the source that the reason belongs to: text, file, number. Before 6.9 the log has only the text."""
    for line in reversed(verifier_lines(log)):
        if found := re.fullmatch(r"; (\S.*?)(?: @ (\S+):(\d+))?", line):
            return found[1], found[2] or "", int(found[3] or 0)
    return None


def verifier_summary(log: str) -> str:
    """The end of a verifier's log, which has the reason, with a hint for the commonest mistakes."""
    lines = verifier_lines(log)
    if not lines:
        return ""
    shown = lines[-LINES:]
    text = f"the verifier's last lines ({len(lines) - len(shown)} earlier lines omitted): " + " | ".join(shown)
    if hint := verifier_hint(log):
        text += f" | {hint}"
    return text
