"""The lab's server: listens, and then does with its connections what the scenario says.

    server.py {"family": 2, "address": "192.0.2.2", "port": 8080, "backlog": 5, "closes": null, "pause":
    0.1}

`closes` is `null` (never accept), `"second"` (wait for the peer's end, pause, close), `"first"` (wait for
the request, answer, close), `"half"` (the same, but with shutdown(), and it waits for the peer's end) or `"unread"`
(pause, close). With `reuse_port` others can listen there, too.
"""

import json
import os
import socket
import sys
import threading
import time


def report(what: str, **details: object) -> None:
    print(json.dumps({"report": what, **details}), flush=True)


def serve(listener: socket.socket, closes: str, pause: float) -> None:
    while True:
        try:
            connection, (_, port, *_) = listener.accept()
        except OSError:  # EMFILE: there may be file descriptors again
            time.sleep(0.1)
            continue
        report("accepted", port=port)
        if closes == "unread":
            time.sleep(pause)
            connection.close()
            continue
        with connection:
            received = len(connection.recv(4096))
            if closes in ("first", "half"):
                connection.sendall(b"answer")
            if closes == "half":
                connection.shutdown(socket.SHUT_WR)
            if closes != "first":
                while chunk := connection.recv(4096):
                    received += len(chunk)
            if closes == "second":
                time.sleep(pause)
        report("closed", port=port, received=received)


def main() -> None:
    config = json.loads(sys.argv[1])
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write("lab-server")
    listener = socket.socket(config["family"])
    if config["family"] == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, config["address"] != "::")
    if config.get("reuse_port"):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((config["address"], config["port"]))
    listener.listen(config["backlog"])
    if config["closes"]:
        threading.Thread(target=serve, args=(listener, config["closes"], config["pause"]), daemon=True).start()
    report("listening", pid=os.getpid(), port=listener.getsockname()[1], inode=os.fstat(listener.fileno()).st_ino)
    sys.stdin.read()


if __name__ == "__main__":
    main()
