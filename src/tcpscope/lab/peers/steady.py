"""One end of a single connection that does the same all the time, until its input ends.

    steady.py {"comm": "backup", "family": 2, "address": "192.0.2.2", "port": 8080, "listens": true, "does":
    "read", "buffer": {"receive": 4096}, "nodelay": false}

`does` is `"read"`, `"send"`, `"ask"` (a request in two small writes, then wait for its answer), or `"answer"`. `buffer`
has SO_RCVBUF and SO_SNDBUF.
"""

import json
import os
import socket
import sys
import threading
import time

REQUEST = 200
PAUSE = 0.005  # between two sends, or requests: so that a slow machine has time for other things
OPTIONS = {"receive": socket.SO_RCVBUF, "send": socket.SO_SNDBUF}


def report(what: str, **details: object) -> None:
    print(json.dumps({"report": what, **details}), flush=True)


def read(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def send(connection: socket.socket) -> None:
    while True:
        connection.sendall(bytes(1 << 16))
        time.sleep(PAUSE)


def ask(connection: socket.socket) -> None:
    while True:
        connection.sendall(bytes(REQUEST // 2))
        connection.sendall(bytes(REQUEST - REQUEST // 2))
        if not connection.recv(REQUEST):
            return
        time.sleep(PAUSE)


def answer(connection: socket.socket) -> None:
    asked = 0
    while chunk := connection.recv(1 << 16):
        asked += len(chunk)
        while asked >= REQUEST:
            asked -= REQUEST
            connection.sendall(b"answer")


def work(made: socket.socket, listens: bool, does: str) -> None:
    connection = made.accept()[0] if listens else made
    if listens:
        report("accepted")
    {"read": read, "send": send, "ask": ask, "answer": answer}[does](connection)


def main() -> None:
    config = json.loads(sys.argv[1])
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write(config["comm"])
    made = socket.socket(config["family"])
    for name, size in config["buffer"].items():
        made.setsockopt(socket.SOL_SOCKET, OPTIONS[name], size)
    if config["nodelay"]:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    where = (config["address"], config["port"])
    if config["listens"]:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if config["family"] == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, config["address"] != "::")
        made.bind(where)
        made.listen(5)
        report("listening", pid=os.getpid(), port=where[1], inode=os.fstat(made.fileno()).st_ino)
    else:
        sys.stdin.readline()  # connect when it is told to
        made.connect(where)
    threading.Thread(target=work, args=(made, config["listens"], config["does"]), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
