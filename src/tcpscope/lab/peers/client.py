"""The lab's client: connects when told to, with one thread per connection.

    client.py {"family": 2, "address": "192.0.2.2", "port": 8080}

    {"do": "connect", "number": 10}      ten at once
    {"do": "finish", "send": 10, "closes": "first", "pause": 0.1}   what is connected sends ten bytes and closes

`closes` is `"first"`, `"half"`: shutdown(), wait for the server's end, close; or `"second"`: wait for the server's end,
pause, close. A connection reports how long the end took, from close() or shutdown() on.
"""

import json
import os
import socket
import sys
import threading
import time

connected: dict[int, socket.socket] = {}
lock = threading.Lock()


def report(what: str, **details: object) -> None:
    with lock:
        print(json.dumps({"report": what, **details}), flush=True)


def connect(number: int, family: int, address: str, port: int) -> None:
    connection = socket.socket(family)
    started = time.monotonic()
    error = connection.connect_ex((address, port))
    seconds = time.monotonic() - started
    own_port = connection.getsockname()[1]
    if error == 0:
        connected[number] = connection
    else:
        connection.close()
    report("connected", number=number, port=own_port, errno=error, seconds=seconds)


def finish(number: int, connection: socket.socket, send: int, closes: str, pause: float) -> None:
    error = 0
    began = time.monotonic()
    with connection:
        try:
            connection.sendall(b"x" * send)
            began = time.monotonic()
            if closes == "half":
                connection.shutdown(socket.SHUT_WR)
            if closes != "first":
                while connection.recv(4096):
                    pass
            if closes == "second":
                time.sleep(pause)
        except OSError as failure:
            error = failure.errno or 0
    report("finished", number=number, errno=error, seconds=time.monotonic() - began)


def main() -> None:
    config = json.loads(sys.argv[1])
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write("lab-client")
    report("ready", pid=os.getpid())
    started = 0
    for line in sys.stdin:
        command = json.loads(line)
        if command.pop("do") == "connect":
            for _ in range(command["number"]):
                threading.Thread(target=connect, args=(started,), kwargs=config, daemon=True).start()
                started += 1
        else:
            for number in sorted(connected):
                arguments = (number, connected.pop(number), *command.values())
                threading.Thread(target=finish, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
