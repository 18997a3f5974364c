"""Whether a guest can run under KVM here. A ``/dev/kvm`` that exists proves nothing: some of them hang every guest."""

import os


def usable() -> bool:
    return os.environ.get("TCPSCOPE_KVM") == "1" and os.access("/dev/kvm", os.R_OK | os.W_OK)
