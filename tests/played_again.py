"""Live tests on a kernel that runs no program in some of its tasks (tests/record/unseen.py)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tests.lacks import functions_cannot_be_hooked


def seen_in(
    fixture: str, make: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test with this fixture is played once more, with another one of these, if it fails on such a kernel."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @wraps(test)
        def again(**given: Any) -> None:
            try:
                test(**given)
            except (Exception, pytest.fail.Exception):  # a row that is missing may be no failed assertion
                if not functions_cannot_be_hooked():
                    raise
                with make() as other:
                    test(**given | {fixture: other})

        return again

    return decorate


seen = seen_in("lab", Lab)
