"""Which tests are played at the same time."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.record import parts
from tests.record.watch import Watch

WATCHES = [Watch("connect", "--port", str(port)) for port in range(12)]


@given(st.lists(st.lists(st.sampled_from(WATCHES), unique=True)), st.integers(1, 8))
def test_each_test_is_played_once_and_each_watch_runs_in_one_part(asked: list[list[Watch]], tools: int) -> None:
    made = list(parts.split(list(enumerate(asked)), tools))
    assert sorted(item for part in made for item in part) == list(range(len(asked)))
    assert all(part == sorted(part) for part in made)
    watches = [{watch for item in part for watch in asked[item]} for part in made]
    assert sum(map(len, watches)) == len(set().union(*watches))


def test_a_part_has_few_tools_unless_its_tests_ask_for_more() -> None:
    one, two, three, four, *_ = WATCHES
    tests = [("a", [one]), ("b", [two]), ("c", [three]), ("d", [one, two, three]), ("e", [four]), ("f", [])]
    assert list(parts.split(tests, 2)) == [["a", "b", "c", "d"], ["e", "f"]]
    assert list(parts.split(tests, 4)) == [["a", "b", "c", "d", "e", "f"]]


def test_the_parts_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 9, 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / parts.SCRIPT).touch()
    assert [part.name for part in parts.of(tmp_path)] == ["1", "9", "10"]
