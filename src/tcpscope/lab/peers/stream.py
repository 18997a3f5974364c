"""One end of several connections: a client that sends when it is told to, or a server that reads all of it.

    stream.py {"comm": "lab-client", "family": 2, "address": "192.0.2.2", "port": 8080, "listens": false}

    {"do": "connect", "number": 3, "source": null}      so many more connections, from this address
    {"do": "send", "size": 1000, "first": 0, "last": 3}  so much on each of these connections; nothing waits for it

The server reports each connection that it has accepted. What it reads it does not report.
"""

import json
import os
import socket
import sys
import threading

made: list[socket.socket] = []


def report(what: str, **details: object) -> None:
    print(json.dumps({"report": what, **details}), flush=True)


def read(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def serve(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=read, args=(connection,), daemon=True).start()
        report("accepted")


def connect(config: dict[str, int | str], number: int, source: str | None) -> None:
    for _ in range(number):
        connection = socket.socket(int(config["family"]))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source:
            connection.bind((source, 0))
        connection.connect((config["address"], config["port"]))
        connection.sendall(b"x" * 100)
        made.append(connection)
    report("connected", ports=[connection.getsockname()[1] for connection in made])


def send(size: int, first: int, last: int) -> None:
    for connection in made[first:last]:
        connection.sendall(bytes(size))
    report("sent")


def main() -> None:
    config = json.loads(sys.argv[1])
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write(config["comm"])
    if config["listens"]:
        listener = socket.socket(config["family"])
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config["family"] == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, config["address"] != "::")
        listener.bind((config["address"], config["port"]))
        listener.listen(128)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        report("listening", pid=os.getpid(), port=config["port"], inode=os.fstat(listener.fileno()).st_ino)
    for line in sys.stdin:
        command = json.loads(line)
        if command.pop("do") == "connect":
            connect(config, **command)
        else:
            send(**command)


if __name__ == "__main__":
    main()
