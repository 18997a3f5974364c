"""A fixed buffer over a long path: diagnose says whose it is."""

import pytest

from tcpscope.errors import UnsupportedError
from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenarios.window_limited import WindowLimited
from tests.conftest import RunningTool
from tests.lab.scenarios.diagnosed import findings

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("buffer", ["receive", "none"])
def test_whose_buffer_it_is(lab: Lab, run_tool: type[RunningTool], buffer: str) -> None:
    try:
        lab.client.netem(delay_ms=1)
    except UnsupportedError:
        pytest.skip("this kernel has no netem")
    scenario = WindowLimited(buffer=buffer)
    found = findings(lab, run_tool, scenario)
    if buffer == "none":
        assert found == []
        return
    (finding,) = found
    assert (finding["rule"], finding["facts"]["pid"]) == ("window_limited", scenario.server.pid)
    assert finding["remedies"][0]["name"] == "SO_RCVBUF"
    assert finding["remedies"][0]["present"] == scenario.size
