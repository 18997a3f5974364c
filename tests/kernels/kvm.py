"""Whether a guest runs under KVM here.

That ``/dev/kvm`` can be opened proves nothing: on some machines every guest hangs or QEMU aborts. So one
kernel is booted, and the answer is kept until the machine starts again. ``TCPSCOPE_KVM=0`` or ``1`` answers
without a trial.
"""

import os
from pathlib import Path

from tests.kernels import KERNELS, debian
from tests.kernels.guest import TREE, Guest

VARIABLE = "TCPSCOPE_KVM"
TRIAL_TIMEOUT_S = 20
ANSWER = TREE / ".cache/kvm"


def usable() -> bool:
    if (given := os.environ.get(VARIABLE)) is not None:
        return given == "1"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    this_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    try:
        boot, answer = ANSWER.read_text().split()
    except (OSError, ValueError):
        boot = answer = ""
    if boot != this_boot:
        answer = "yes" if _trial() else "no"
        ANSWER.parent.mkdir(parents=True, exist_ok=True)
        ANSWER.write_text(f"{this_boot} {answer}\n")
        print("guests run under KVM" if answer == "yes" else "KVM boots no guest here: emulating", flush=True)
    return answer == "yes"


def _trial() -> bool:
    with Guest(debian.get(KERNELS[-1])) as guest:
        return guest.run(["true"], {}, TRIAL_TIMEOUT_S, lambda _: None, kvm=True).status == 0
