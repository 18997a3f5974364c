"""The families of a scenario's tests.

Its plumbing is tried with each here. A guest runs one of them: what its kernel does for each family the recorded tests
of `queue` and `life` assert there.
"""

import pytest

from tcpscope.lab.scenario import FAMILIES

KERNEL_FAMILIES = [pytest.param(name, marks=pytest.mark.kernel if name == "4" else ()) for name in FAMILIES]
