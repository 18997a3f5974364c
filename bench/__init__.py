"""tcpscope beside its peers, on the same traffic, in one run: `python -m bench` writes docs/performance.md."""
