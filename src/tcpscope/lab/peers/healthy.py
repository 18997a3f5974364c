"""Both ends of healthy traffic.

    healthy.py {"case": "bulk", "end": "server", "family": 2, "address": "192.0.2.2", "port": 8080, "seconds": 10}

The server reports that it listens, the client that it is ready. A line of input to both begins the traffic, and a
further line begins it again. The client reports what it has done since its start.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

REQUEST, ANSWER = 100, 4000  # bytes
BACKLOG = 128
SO_MAX_PACING_RATE = 47
PATH = 10_000_000  # bytes a second
ONE_FAILURE = 0.2  # seconds for which a balancer leaves out an instance that has refused

config = json.loads(sys.argv[1])
address, port, seconds = config["address"], config["port"], config["seconds"]
done = Counter[str]()
lock = threading.Lock()


def report(what: str, **details: object) -> None:
    print(json.dumps({"report": what, **details}), flush=True)


def count(what: str, number: int = 1) -> None:
    with lock:
        done[what] += number


def read(connection: socket.socket, size: int) -> bool:
    """False at the end."""
    while size:
        data = connection.recv(size)
        if not data:
            return False
        size -= len(data)
    return True


# -- what a server does with a connection that it has accepted


def answer(connection: socket.socket) -> None:
    """Each request, until the client closes."""
    while read(connection, REQUEST):
        connection.sendall(bytes(ANSWER))


def answer_and_close(connection: socket.socket) -> None:
    """One request."""
    read(connection, REQUEST)
    connection.sendall(bytes(ANSWER))


def swallow(connection: socket.socket) -> None:
    while connection.recv(1 << 18):
        pass


def stream(connection: socket.socket) -> None:
    """The client has said all that it has to say, and listens."""
    swallow(connection)
    for _ in range(20):
        connection.sendall(bytes(ANSWER))
        time.sleep(seconds / 20)


# -- servers


def listening(at: int = port) -> socket.socket:
    listener = socket.socket(config["family"])
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if config["family"] == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
    listener.bind((address, at))
    listener.listen(BACKLOG)
    return listener


def threads(handle: Callable[[socket.socket], None]) -> Callable[[], None]:
    """A server that has a thread for each connection."""

    def handled(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            handle(connection)

    def serve(listener: socket.socket) -> None:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=handled, args=(connection,), daemon=True).start()

    def run() -> None:
        listener = listening()
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        report("listening", pid=os.getpid(), port=port, inode=os.fstat(listener.fileno()).st_ino)
        sys.stdin.read()

    return run


def two_instances() -> None:
    """At this port and the next one. One after the other ends what it has, exits, and is started anew: twice each."""
    pids = [instance(port), instance(port + 1)]
    report("listening", pid=pids[0], port=port, inode=0)
    for _ in sys.stdin:
        for turn in range(4):
            time.sleep(seconds / 6)
            os.kill(pids[turn % 2], signal.SIGTERM)
            os.waitpid(pids[turn % 2], 0)
            pids[turn % 2] = instance(port + turn % 2)


def instance(at: int) -> int:
    """A process that answers requests until SIGTERM, or until its parent ends."""
    ready, started = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(started)
        os.read(ready, 1)
        os.close(ready)
        return pid
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    listener = listening(at)
    os.write(started, b"x")
    open_ones = {listener}
    while os.getppid() == parent:
        ready_ones = select.select(open_ones, [], [], 0.02)[0]
        for each in ready_ones:
            if each is listener:
                open_ones.add(listener.accept()[0])
            elif answers(each) and not stop:
                continue
            else:
                open_ones.remove(each)
                each.close()
        if stop and listener not in ready_ones:
            listener.close()
            open_ones.discard(listener)
            if not ready_ones:
                break
    os._exit(0)  # it closes what is idle


def answers(connection: socket.socket) -> bool:
    """One request; false at the end."""
    there = read(connection, REQUEST)
    if there:
        connection.sendall(bytes(ANSWER))
    return there


# -- clients


def connect(at: int = port) -> socket.socket:
    connection = socket.socket(config["family"])
    try:
        connection.connect((address, at))
    except ConnectionError:
        connection.close()
        count("refused")
        raise
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    count("connected")
    return connection


def ask(connection: socket.socket) -> bool:
    """False if the server has closed."""
    connection.sendall(bytes(REQUEST))
    there = read(connection, ANSWER)
    count("answers", there)
    return there


def side_by_side(client: Callable[[float], None], number: int = 8) -> Callable[[], None]:
    """So many at a time. Each gets the time at which it ends."""

    def run() -> None:
        end = time.monotonic() + seconds
        all_of_them = [threading.Thread(target=client, args=(end,)) for _ in range(number)]
        for each in all_of_them:
            each.start()
        for each in all_of_them:
            each.join()

    return run


def turns(end: float) -> Iterator[None]:
    """Twenty a second, or fewer. TIME_WAIT keeps a local port for 60 s, and half of them in use would be a finding."""
    while (began := time.monotonic()) < end:
        yield
        time.sleep(max(0.0, began + 0.05 - time.monotonic()))


def browse(end: float) -> None:
    """Ten requests on each connection."""
    for _ in turns(end):
        with connect() as connection:
            for _ in range(10):
                ask(connection)


def one_each(end: float) -> None:
    """One request on each connection, which the server closes."""
    for _ in turns(end):
        with connect() as connection:
            ask(connection)
            read(connection, 1)


def pass_on(end: float) -> None:
    """One request on each connection, which the client closes first: it gets the TIME_WAIT."""
    for _ in turns(end):
        with connect() as connection:
            ask(connection)


def upload() -> None:
    """As fast as it goes, or as the path takes it."""
    end = time.monotonic() + seconds
    with connect() as connection:
        if config["case"] == "lossy-path":
            connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, PATH)  # nothing else is lost
        while time.monotonic() < end:
            connection.sendall(bytes(1 << 16))
            count("bytes", 1 << 16)


def rest() -> None:
    """Connections that are used once and kept."""
    kept = [connect() for _ in range(50)]
    for each in kept:
        ask(each)
    time.sleep(seconds)
    for each in kept:
        each.close()


def half_close(end: float) -> None:
    """It says that it will send no more, and reads what comes."""
    with connect() as connection:
        connection.sendall(bytes(REQUEST))
        connection.shutdown(socket.SHUT_WR)
        while read(connection, ANSWER):
            count("answers")


def check_health() -> None:
    """One connect a second, to a port at which nobody listens."""
    for turn in range(max(1, round(seconds))):
        if turn:
            time.sleep(1)
        with contextlib.suppress(ConnectionRefusedError):
            connect(port + 1)


def scan() -> None:
    """Each of a thousand ports, once."""
    for at in range(port - 500, port + 500):
        with contextlib.suppress(ConnectionRefusedError):
            connect(at).close()


def balance(end: float) -> None:
    """To one instance after the other; not to one that has refused a moment ago."""
    turn = 0
    refused: dict[int, float] = {}
    while time.monotonic() < end:
        turn += 1
        at = port + turn % 2
        if time.monotonic() < refused.get(at, 0.0):
            continue
        try:
            with connect(at) as connection:
                for _ in range(10):
                    if select.select([connection], [], [], 0.001)[0] or not ask(connection):
                        break  # the server has closed it
        except ConnectionError:
            refused[at] = time.monotonic() + ONE_FAILURE


CASES = {
    "web-server": (threads(answer), side_by_side(browse)),
    "short-connections": (threads(answer_and_close), side_by_side(one_each)),
    "bulk": (threads(swallow), upload),
    "lossy-path": (threads(swallow), upload),
    "idle": (threads(answer), rest),
    "half-closed": (threads(stream), side_by_side(half_close, 20)),
    "health-check": (threads(answer), check_health),
    "port-scan": (threads(answer), scan),
    "time-wait": (threads(answer), side_by_side(pass_on)),
    "restart": (two_instances, side_by_side(balance, 4)),
}


def main() -> None:
    with open("/proc/self/comm", "w") as comm:  # noqa: PTH123 (pathlib would take a fifth of the start)
        comm.write(f"lab-{config['end']}")
    serve, play = CASES[config["case"]]
    if config["end"] == "server":
        serve()
        return
    report("ready", pid=os.getpid())
    for _ in sys.stdin:
        play()
        report("played", **done)


if __name__ == "__main__":
    main()
