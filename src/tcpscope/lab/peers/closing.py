"""The lab's server that closes connections in a wrong way, and clients that a timer ends.

    closing.py {"family": 2, "address": "192.0.2.2", "port": 8080, "backlog": 128, "does": "never"}

`does` says what the server does with each connection: `"never"` (keep it, and neither read nor close), `"forget"` (read
the request, keep it, and never close), `"unread"` (answer and close, without reading the request), `"reset"` (read the
request, and close with a RST), `"now"` (close at once).

    closing.py {"family": 2, "address": "192.0.2.2", "port": 8080}

    {"do": "connect", "number": 3, "options": [[1, 9, 1]], "send": 0}   with these socket options; wait for the end
"""

import json
import os
import select
import socket
import struct
import sys
import threading

lock = threading.Lock()


def report(what: str, **details: object) -> None:
    with lock:
        print(json.dumps({"report": what, **details}), flush=True)


def serve(listener: socket.socket, does: str) -> None:
    kept = []
    while True:
        connection, _ = listener.accept()
        if does in ("never", "forget"):
            kept.append(connection)
            if does == "forget":
                connection.recv(4096)
            continue
        with connection:
            if does == "unread":
                select.select([connection], [], [])
                connection.sendall(b"answer")
            elif does == "reset":
                connection.recv(4096)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def last(target: tuple[str, int], family: int, options: list[list[int]], send: int) -> None:
    """A connection that waits for its end, and the error that this was."""
    with socket.socket(family) as connection:
        for option in options:
            connection.setsockopt(*option)
        connection.connect(target)
        report("connected", port=connection.getsockname()[1])
        go.wait()
        error = 0
        try:
            connection.sendall(b"x" * send)
            connection.recv(4096)
        except OSError as failure:
            error = failure.errno or 0
    report("ended", errno=error)


go = threading.Event()


def main() -> None:
    config = json.loads(sys.argv[1])
    target = config["address"], config["port"]
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write("lab-server" if "does" in config else "lab-client")
    if "does" in config:
        listener = socket.socket(config["family"])
        listener.bind(target)
        listener.listen(config["backlog"])
        threading.Thread(target=serve, args=(listener, config["does"]), daemon=True).start()
        inode = os.fstat(listener.fileno()).st_ino
        report("listening", pid=os.getpid(), port=listener.getsockname()[1], inode=inode)
    else:
        report("ready", pid=os.getpid())
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "go":
            go.set()
            continue
        for _ in range(command["number"]):
            details = (target, config["family"], command["options"], command["send"])
            threading.Thread(target=last, args=details, daemon=True).start()


if __name__ == "__main__":
    main()
