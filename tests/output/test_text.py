"""Text on a terminal: what is escaped, how wide it is, where it is cut."""

import json
import unicodedata

import pytest

from tcpscope.output import cut, padded, printable, printable_json, width

HIDDEN = ["\x1b[2J", "\x7f", "\x9b31m", "\u202e", "\u2066", "\u200b", "\u2028", "\u2029", "\ufeff", "\U000e0041"]


@pytest.mark.parametrize("text", HIDDEN)
def test_what_moves_or_hides_text_is_escaped(text: str) -> None:
    shown = printable(f"a{text}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")


@pytest.mark.parametrize("text", [*HIDDEN, "é", "日本", "👍", '"', "\n", "plain"])
def test_json_is_escaped_and_keeps_its_values(text: str) -> None:
    given = {"comm": f"a{text}b"}
    encoded = printable_json(json.dumps(given, ensure_ascii=False).encode() + b"\n").decode()
    assert encoded.removesuffix("\n").isprintable()
    assert json.loads(encoded) == given
    assert text in encoded.removesuffix("\n") or not text.isprintable()


@pytest.mark.parametrize(
    ("text", "columns"),
    [("", 0), ("abc", 3), ("é", 1), ("e\u0301", 1), ("日本", 4), ("ｗ", 2), ("👍", 2), ("a日e\u0301", 4)],
)
def test_width(text: str, columns: int) -> None:
    assert width(text) == columns


@pytest.mark.parametrize("text", ["abcdef", "日本語版", "a日本語", "e\u0301" * 6, "👍👍👍"])
def test_padded_and_cut(text: str) -> None:
    for columns in range(1, 12):
        short = cut(text, columns)
        assert width(short) <= columns
        if width(text) <= columns:
            assert short == text
        else:
            assert short.endswith(">") and text.startswith(short[:-1]) and columns - width(short) <= 1
            following = text[len(short) - 1]
            assert not unicodedata.combining(following)  # a letter keeps its accents
        assert width(padded(short, 12)) == width(padded(short, 12, right=True)) == 12
    assert padded(text, 1) == text
