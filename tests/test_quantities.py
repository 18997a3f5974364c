"""Numbers and times as people type them."""

import pytest

from tcpscope.errors import UsageError
from tcpscope.quantities import microseconds, seconds, whole


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2", 2), ("0.5", 0.5), (".5", 0.5), ("2.", 2), ("300us", 0.0003), ("200ms", 0.2), ("1.5s", 1.5), ("5m", 300)],
)
def test_seconds(text: str, expected: float) -> None:
    assert seconds(text) == pytest.approx(expected, rel=1e-12)


def test_hours_and_days() -> None:
    assert (seconds("1h"), seconds("2d"), seconds(" 0 ")) == (3600, 172800, 0)


@pytest.mark.parametrize(
    "text",
    ["", "s", "-1", "+1", "1_0", "1e3", "٣", "１", "²", "nan", "inf", "0x1", "1 h", "1h30m", "5M", "1.2.3", "9" * 400],
)
def test_no_time(text: str) -> None:
    assert seconds(text) is None


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("7", 7), (" 99 ", 99), ("007", None), ("100", None)])
def test_whole(text: str, expected: int | None) -> None:
    assert whole(text, 99) == expected


@pytest.mark.parametrize("text", ["", "-1", "+1", "1_0", "1.0", "1e1", "٣", "²", "1" + "0" * 400])
def test_no_whole_number(text: str) -> None:
    assert whole(text, 99) is None


@pytest.mark.parametrize(
    ("text", "us"),
    [("300us", 300), ("10ms", 10_000), ("1.5s", 1_500_000), (" 2s ", 2_000_000), ("0.5ms", 500)],
)
def test_microseconds(text: str, us: int) -> None:
    assert microseconds("--min", text) == us


@pytest.mark.parametrize("text", ["10", "", "ms", "0.5us", "0s", "-1ms"])
def test_no_microseconds(text: str) -> None:
    with pytest.raises(UsageError, match=f"--min {text}"):
        microseconds("--min", text)
