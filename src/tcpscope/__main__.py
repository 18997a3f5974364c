"""`tcpscope` and `python -m tcpscope`: SIGINT and SIGTERM end it quietly from the first import on.

A run catches them by itself (stop.py). Until then there is nothing to be put in order. When a run is over, its exit
status is known, and a signal does not replace it.
"""

import os
import signal
from typing import NoReturn


def _end(*_: object) -> NoReturn:
    os._exit(0)  # not an exception: what is imported may catch it, and the tool would go on


def main() -> NoReturn:
    """The command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        from tcpscope import cli
        from tcpscope.stop import Stop

        Stop.afterwards = signal.SIG_IGN
        cli.main()
    except MemoryError:
        os.write(2, b"tcpscope: no memory; free memory, or raise the limit ('ulimit -v')\n")
        os._exit(1)


if __name__ == "__main__":
    main()
