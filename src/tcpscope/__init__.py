"""tcpscope: what the Linux kernel does to TCP connections, and why."""
