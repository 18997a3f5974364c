"""A user's own BPF program (`tcpscope run`): compiled, attached and shown as those of tcpscope are."""
