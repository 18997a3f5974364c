"""A client that opens one connection after the other, and keeps them.

many.py {"family": 2, "address": "192.0.2.2", "port": 8080, "most": 2830}

{"do": "connect", "number": 1000}   so many more; it reports how many were opened, and how long connect() took
"""

import errno
import json
import os
import resource
import socket
import sys
import time

_OTHERS = 100  # files beside the connections


def report(what: str, **details: object) -> None:
    print(json.dumps({"report": what, **details}), flush=True)


def main() -> None:
    config = json.loads(sys.argv[1])
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write("lab-client")
    files, (soft, hard) = config["most"] + _OTHERS, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, max(hard, files)))
    where, family = (config["address"], config["port"]), config["family"]
    report("ready", pid=os.getpid())
    made = []
    for line in sys.stdin:
        took, refused, began_s = [], 0, time.process_time()
        for _ in range(json.loads(line)["number"]):
            connection = socket.socket(family)
            began = time.monotonic()
            error = connection.connect_ex(where)
            took.append(time.monotonic() - began)
            refused += error == errno.EADDRNOTAVAIL
            if error:
                connection.close()
            else:
                made.append(connection)
        took.sort()
        cpu = time.process_time() - began_s
        report("connected", opened=len(made), refused=refused, median=took[len(took) // 2], longest=took[-1], cpu=cpu)


if __name__ == "__main__":
    main()
