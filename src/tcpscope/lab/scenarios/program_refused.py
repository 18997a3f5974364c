from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tcpscope.lab.hosts import Lab
from tcpscope.lab.scenario import Scenario, parameter

_HEAD = """\
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct dropped {
	struct sock *owner;
	u16 protocol;
};
const struct dropped *anchor __attribute__((unused));

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} events SEC(".maps");

char LICENSE[] SEC("license") = "GPL";

"""
_BODY = """\
	struct dropped event = {};

	event.owner = skb->sk;
	event.protocol = skb->protocol;
	bpf_ringbuf_output(&events, &event, sizeof(event), 0);
	return 0;
}
"""
_WAYS = {
    "tracepoint": """\
SEC("tracepoint/skb/kfree_skb")
int freed(struct trace_event_raw_kfree_skb *ctx)
{
	struct sk_buff *skb = ctx->skbaddr;
""",
    "tp_btf": """\
SEC("tp_btf/kfree_skb")
int BPF_PROG(freed, struct sk_buff *skb)
{
""",
}


@dataclass
class ProgramRefused(Scenario):
    """A program that looks at discarded packets follows skb->sk, and the kernel does not load it.

    Its hook is a classic tracepoint. There the verifier takes the packet's address for a number, since the context
    of the tracepoint has no types, and a program must not follow a number: it could read anything. The same line in
    a program of the type tp_btf is taken. There the verifier knows from the kernel's BTF that the argument is a
    struct sk_buff, and a bad pointer reads as zero.
    """

    title = "a BPF program that the verifier refuses, and the same one that it takes"

    way: str = parameter("tracepoint", "type of the hook: tracepoint is refused, tp_btf is not", tuple(_WAYS))

    def prepare(self, lab: Lab) -> None:
        self.listen(lab, backlog=1)

    def act(self, lab: Lab) -> None:
        with tempfile.TemporaryDirectory(prefix="tcpscope.") as folder:
            source = Path(folder) / "dropped.bpf.c"
            source.write_text(_HEAD + _WAYS[self.way] + _BODY)
            self.step("server", "tcpscope run dropped.bpf.c --explain")
            argv = [sys.executable, "-m", "tcpscope", "run", str(source), "--explain"]
            done = subprocess.run(argv, capture_output=True, text=True)
        for line in (done.stdout + done.stderr).splitlines():
            self.step("server", line)
        self.step("server", f"it ends with status {done.returncode}")

    def calm(self, lab: Lab) -> bool:
        return True
