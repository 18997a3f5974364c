"""Live tests on a kernel that runs no program in some of its tasks (tests/record/unseen.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

from tcpscope.lab.hosts import Lab
from tests.lacks import functions_cannot_be_hooked


def seen(test: Callable[..., None]) -> Callable[..., None]:
    """A test with a `lab` is played once more, in another one, if it fails on such a kernel."""

    @wraps(test)
    def again(lab: Lab, **others: Any) -> None:
        try:
            test(lab=lab, **others)
        except (AssertionError, pytest.fail.Exception):
            if not functions_cannot_be_hooked():
                raise
            with Lab() as other:
                test(lab=other, **others)

    return again
