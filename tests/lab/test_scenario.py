"""The directory is the list of scenarios; parameters are checked before anything is made."""

import dataclasses
import errno
from pathlib import Path

import pytest

from tcpscope.errors import UsageError
from tcpscope.lab import scenarios
from tcpscope.lab.scenario import Client, Scenario, describe, load, names


def test_the_directory_is_the_list() -> None:
    files = {path.stem for directory in scenarios.__path__ for path in Path(directory).glob("[!_]*.py")}
    if files:  # an editable install has a virtual path
        assert {name.replace("-", "_") for name in names()} == files
    assert {"accept-overflow", "accept-overflow-serial", "close-order", "server-dies", "syn-flood"} <= set(names())


@pytest.mark.parametrize("name", names())
def test_every_scenario_explains_itself(name: str) -> None:
    scenario = load(name)
    assert scenario.name() == name
    assert scenario.title
    assert not scenario.title.endswith(".")
    assert len((scenario.__doc__ or "").splitlines()) > 3
    assert scenario.parameters()
    for field in scenario.parameters():
        assert field.metadata["help"]
        assert type(field.default) in (int, str, float)
    assert not hasattr(Scenario, "SCENARIO")
    assert dataclasses.asdict(scenario()) == {field.name: field.default for field in scenario.parameters()}


def test_unknown_scenario() -> None:
    with pytest.raises(UsageError, match="did you mean 'syn-flood'"):
        load("sin-flood")
    with pytest.raises(UsageError, match="lab list"):
        load("xyz")


@pytest.mark.parametrize(("parameter", "value"), [("family", "5"), ("backlog", -1), ("abort_on_overflow", 2)])
def test_wrong_parameter(parameter: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{parameter} cannot be '?{value}"):
        load("accept-overflow")(**{parameter: value})


def test_errors_are_named() -> None:
    clients = [Client(n, 1000 + n, number, 0.0) for n, number in enumerate([0, errno.ETIMEDOUT, errno.ETIMEDOUT])]
    assert describe(clients) == "1 connected, 2 failed (Connection timed out: 2)"
    assert describe([]) == "0 connected, 0 failed"
