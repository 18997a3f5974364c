"""A test is played again where the kernel may have run no program, and only there."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from tests import played_again


@pytest.mark.parametrize("error", [AssertionError(), TypeError(), pytest.fail.Exception()])
@pytest.mark.parametrize("cannot_be_hooked", [True, False])
def test_it_is_played_again(monkeypatch: pytest.MonkeyPatch, cannot_be_hooked: bool, error: BaseException) -> None:
    monkeypatch.setattr(played_again, "functions_cannot_be_hooked", lambda: cannot_be_hooked)
    played = []

    @played_again.seen_in("where", lambda: nullcontext("there"))
    def test(where: str, other: Any) -> None:
        played.append((where, other))
        if where == "here":
            raise error

    if cannot_be_hooked:
        test(where="here", other=1)
    else:
        with pytest.raises(type(error)):
            test(where="here", other=1)
    assert played == [("here", 1), ("there", 1)][: 1 + cannot_be_hooked]


def test_a_skip_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(played_again, "functions_cannot_be_hooked", lambda: True)
    with pytest.raises(pytest.skip.Exception):
        played_again.seen_in("where", nullcontext)(lambda where: pytest.skip("why"))(where="here")
