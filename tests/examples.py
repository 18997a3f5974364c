"""How hypothesis makes its examples here. To be imported by who uses it."""

from hypothesis import HealthCheck, settings

# An example may take long: the machine does other things, too.
settings.register_profile("tcpscope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tcpscope")
