"""What the verifier says of a program that it refuses."""

from __future__ import annotations

_LINES = 6


def verifier_lines(log: str) -> list[str]:
    """The lines of a verifier's log, the reason last; none if the kernel did not ask the verifier.

    Since 7.3 the log has a report of some fifty lines after the reason, with excerpts of the source. It is omitted.
    """
    lines = log.partition("\nVerification failed: ")[0].splitlines()
    statistics = ("processed ", "verification time", "stack depth")
    return [line for line in lines if line.strip() and not line.startswith(statistics)]


def verifier_summary(log: str) -> str:
    """The end of a verifier's log, which has the reason, with a hint for the commonest mistake."""
    lines = verifier_lines(log)
    if not lines:
        return ""
    shown = lines[-_LINES:]
    text = f"the verifier's last lines ({len(lines) - len(shown)} earlier lines omitted): " + " | ".join(shown)
    if "invalid mem access 'inv'" in text or "invalid mem access 'scalar'" in text:
        text += " | in programs of type kprobe and tracepoint follow kernel pointers with BPF_CORE_READ, not directly"
    return text
