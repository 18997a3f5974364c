"""One end of connections that move a known number of bytes: the client sends, then the server.

    transfer.py {"comm": "lab-client", "family": 2, "address": "192.0.2.2", "port": 8080, "listens": false,
    "plan": [[1000000, 100000, 2.0]]}

`plan` has for each connection, in the order of their connects, how much the client sends, how much the server sends
then, and the seconds that each of the two takes. An end reports what TCP_INFO says. What the server has received it
reads before the client's FIN comes, which would count as a byte.

    {"do": "go"}   to the client: connect, and begin
"""

import json
import os
import socket
import struct
import sys
import threading
import time

PIECES = 50  # of what one end sends
TCP_INFO = struct.Struct("=104x 2Q 2Q 64x 2Q")
"""struct tcp_info, include/uapi/linux/tcp.h: pacing rates, bytes acked, received, ..., sent, retransmitted."""
lock = threading.Lock()


def report(what: str, **details: object) -> None:
    with lock:
        print(json.dumps({"report": what, **details}), flush=True)


def counted(connection: socket.socket) -> dict[str, int]:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO.size)
    _, _, acked, received, sent, again = TCP_INFO.unpack(info)
    return {"acked": acked, "received": received, "sent": sent, "retransmitted": again}


def send(connection: socket.socket, size: int, seconds: float) -> None:
    began = time.monotonic()
    for piece in range(PIECES):
        connection.sendall(bytes(size * (piece + 1) // PIECES - size * piece // PIECES))
        time.sleep(max(0.0, began + seconds * (piece + 1) / PIECES - time.monotonic()))


def receive(connection: socket.socket, size: int) -> None:
    while size:
        got = len(connection.recv(min(size, 1 << 16)))
        if not got:
            sys.exit(f"the other end has closed, with {size} bytes to come")
        size -= got


def serve(connection: socket.socket, number: int, up: int, down: int, seconds: float) -> None:
    with connection:
        receive(connection, up)
        received = counted(connection)["received"]
        send(connection, down, seconds)
        connection.recv(1)  # the client closes when it has all
        report("done", number=number, info=counted(connection) | {"received": received})


def use(connection: socket.socket, number: int, up: int, down: int, seconds: float) -> None:
    with connection:
        began = time.monotonic()
        send(connection, up, seconds)
        receive(connection, down)
        took = time.monotonic() - began
        report("done", number=number, port=connection.getsockname()[1], info=counted(connection), seconds=took)


def main() -> None:
    config = json.loads(sys.argv[1])
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write(config["comm"])
    where = (config["address"], config["port"])
    if config["listens"]:
        listener = socket.socket(config["family"])
        if config["family"] == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, config["address"] != "::")
        listener.bind(where)
        listener.listen(len(config["plan"]))
        report("listening", pid=os.getpid(), port=where[1], inode=os.fstat(listener.fileno()).st_ino)
    else:
        sys.stdin.readline()
    for number, entry in enumerate(config["plan"]):
        if config["listens"]:
            connection, work = listener.accept()[0], serve
        else:
            connection, work = socket.socket(config["family"]), use
            connection.connect(where)
        threading.Thread(target=work, args=(connection, number, *entry), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
