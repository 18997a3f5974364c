"""What a scenario is. One file in `tcpscope.lab.scenarios` holds one class:

    @dataclass
    class AcceptOverflow(Scenario):
        \"\"\"What happens, and why. This text is the help page.\"\"\"

        title = "one line"
        backlog: int = parameter(5, "argument of listen()")

        def prepare(self, lab): ...   # start the programs; nothing is wrong yet
        def act(self, lab): ...       # make the fault; return when the applications have seen all of it
        def calm(self, lab): ...      # true when all retransmissions and timers of the kernels have ended

Callers use `run()`. Or they call `setup()`, `fault()` and `settle()`, and start a tool between two of them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import pkgutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tcpscope.errors import TcpscopeError, UsageError, did_you_mean
from tcpscope.lab import scenarios
from tcpscope.lab.hosts import Host, Lab
from tcpscope.lab.programs import Program, until
from tcpscope.lab.sockets import Socket
from tcpscope.output import endpoint

PORT = 8080
FAMILIES = ("4", "6", "mapped")


@dataclass(frozen=True)
class Step:
    """Something that the scenario did, and on which host."""

    host: str
    text: str


@dataclass(frozen=True)
class Listener:
    """The server's listening socket. `recv_q` and `send_q` are the last seen length and limit of the accept queue."""

    address: str
    port: int
    netns: int
    pid: int
    comm: str
    backlog: int
    inode: int
    cookie: int
    recv_q: int
    send_q: int


NOBODY_LISTENS = Listener("", 0, 0, 0, "", 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Client:
    """One connection, as its application saw it: the errno of connect() and of the calls after it, and how long
    connect() and the end took."""

    number: int
    local_port: int
    errno: int
    connect_seconds: float
    finish_errno: int | None = None
    finish_seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What happened between `setup()` and `settle()`. The counters contain only those that have changed."""

    listener: Listener
    clients: tuple[Client, ...]
    counters: Counter[str]
    client_counters: Counter[str]
    server_sockets: tuple[Socket, ...]
    client_sockets: tuple[Socket, ...]

    @property
    def server_states(self) -> Counter[str]:
        return Counter(found.state for found in self.server_sockets)

    @property
    def client_states(self) -> Counter[str]:
        return Counter(found.state for found in self.client_sockets)

    @property
    def connected(self) -> list[Client]:
        return [client for client in self.clients if client.errno == 0]

    @property
    def failed(self) -> list[Client]:
        return [client for client in self.clients if client.errno != 0]


def parameter(default: Any, help: str, choices: tuple[Any, ...] = ()) -> Any:
    """A field of a scenario that is an option for its user. The default gives its type."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Scenario:
    """Base of every scenario: the three phases, the programs, the outcome."""

    title: ClassVar[str]
    counters: ClassVar[tuple[str, ...]] = ()
    """The SNMP counters that the scenario changes. They are printed even if they did not change."""

    def __post_init__(self) -> None:
        for field in self.parameters():
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if choices and value not in choices:
                allowed = ", ".join(map(str, choices))
                raise UsageError(f"{self.name()}: {field.name} cannot be '{value}'", f"it is one of {allowed}")
            if isinstance(value, (int, float)) and value < 0:
                raise UsageError(f"{self.name()}: {field.name} cannot be {value}", "it is not negative")
        self.steps: list[Step] = []
        self.on_step: Callable[[Step], None] = lambda step: None
        self._clients: dict[int, Client] = {}
        self._listener = NOBODY_LISTENS

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def parameters(cls) -> list[dataclasses.Field[Any]]:
        return [field for field in dataclasses.fields(cls) if "help" in field.metadata]

    # The phases

    def setup(self, lab: Lab) -> None:
        """Start the programs. Start a tool after this, so that it sees the fault."""
        self.prepare(lab)
        self._before = [host.counters() for host in lab.hosts]

    def fault(self, lab: Lab) -> None:
        """Make the fault. When this returns, the applications have seen its effects. The kernels may still be busy."""
        self.act(lab)

    def settle(self, lab: Lab, freeze: bool = False) -> Outcome:
        """Wait until nothing moves any more, or with `freeze` stop it by taking the link down; then look."""
        if freeze:
            lab.freeze()
        else:
            until(lambda: self.calm(lab), f"{self.name()} to come to rest")
        return self.outcome(lab)

    def run(self, lab: Lab, freeze: bool = False) -> Outcome:
        """All three phases."""
        self.setup(lab)
        self.fault(lab)
        return self.settle(lab, freeze)

    def prepare(self, lab: Lab) -> None:
        raise NotImplementedError

    def act(self, lab: Lab) -> None:
        raise NotImplementedError

    def calm(self, lab: Lab) -> bool:
        raise NotImplementedError

    # What the phases are made of

    def step(self, host: str, text: str) -> None:
        """Record a step in `steps`, and pass it to `on_step`."""
        self.steps.append(Step(host, text))
        self.on_step(self.steps[-1])

    def sysctl(self, host: Host, name: str, value: int) -> None:
        host.sysctl(name, value)
        self.step(host.role, f"{name} = {value}")

    def listen(
        self,
        lab: Lab,
        backlog: int,
        family: str = "4",
        closes: str | None = None,
        pause: float = 0,
        with_client: bool = True,
        address: str | None = None,
        reuse_port: bool = False,
    ) -> Program:
        """Start the server and the client program. `family` is one of FAMILIES; `mapped` is IPv4 to a `::`
        listener. `address`: listen at another one than the server's. With `reuse_port` others can listen there, too:
        `another_server()`."""
        kind = socket.AF_INET if family == "4" else socket.AF_INET6
        address = address or ("::" if family == "mapped" else lab.server.address(kind))
        self._config: dict[str, Any] = {
            "family": kind,
            "address": address,
            "port": PORT,
            "backlog": backlog,
            "closes": closes,
            "pause": pause,
            "reuse_port": reuse_port,
        }
        self.server = Program(lab.server, "server", **self._config)
        target = socket.AF_INET6 if family == "6" else socket.AF_INET
        if with_client:
            self.client = Program(lab.client, "client", family=target, address=lab.server.address(target), port=PORT)
        self.listens(lab, address, backlog)
        if with_client:
            self.client.hear("ready")
        self._tell_of(self.server)
        return self.server

    def listens(self, lab: Lab, address: str, backlog: int) -> None:
        """Wait until `server` says that it listens."""
        found = self.server.hear("listening")
        self._listener = Listener(
            address=address,
            port=found["port"],
            netns=lab.server.inode,
            pid=found["pid"],
            comm="lab-server",
            backlog=backlog,
            inode=found["inode"],
            cookie=0,
            recv_q=0,
            send_q=0,
        )
        self._look_at_listener(lab)

    def another_server(self, lab: Lab) -> Program:
        """One more program with a socket of its own at the same address."""
        made = Program(lab.server, "server", **self._config)
        made.hear("listening")
        self._tell_of(made)
        return made

    def _tell_of(self, server: Program) -> None:
        does = {None: "never accepts", "first": "accepts, closes first", "second": "accepts, closes second"}
        does |= {"unread": "accepts, closes", "half": "accepts, shuts down first"}
        config = self._config
        where, what = endpoint(str(config["address"]), PORT), does[config["closes"]]
        self.step("server", f"listen(fd, {config['backlog']}) on {where}, {what} (lab-server, pid {server.pid})")

    def connect(self, number: int) -> None:
        """Let the client start `number` connects at once. `connected()` waits for them."""
        self.client.tell(do="connect", number=number)

    def connected(self, number: int) -> list[Client]:
        """Wait until `number` connects have succeeded or failed."""
        ended = []
        for _ in range(number):
            found = self.client.hear("connected")
            client = Client(found["number"], found["port"], found["errno"], found["seconds"])
            self._clients[client.number] = client
            ended.append(client)
        return ended

    def finish(self, number: int, send: int = 10, closes: str = "first", pause: float = 0) -> None:
        """Let each connection send `send` bytes and close. Wait until `number` connections have done so."""
        self.client.tell(do="finish", send=send, closes=closes, pause=pause)
        for _ in range(number):
            found = self.client.hear("finished")
            client = self._clients[found["number"]]
            self._clients[client.number] = dataclasses.replace(
                client, finish_errno=found["errno"], finish_seconds=found["seconds"]
            )

    def waiting(self, lab: Lab) -> int:
        """How many connections wait for accept()."""
        return sum(found.recv_q for found in lab.server.sockets() if found.state == "LISTEN")

    def queued(self, lab: Lab, number: int) -> None:
        """Wait until `number` connections wait for accept(). (connect() returns before the server has the last ACK.)"""
        until(lambda: self.waiting(lab) >= number, f"{number} in the accept queue")

    def _look_at_listener(self, lab: Lab) -> None:
        for found in lab.server.sockets():
            if found.state == "LISTEN" and found.lport == self._listener.port:
                self._listener = dataclasses.replace(
                    self._listener, cookie=found.cookie, recv_q=found.recv_q, send_q=found.send_q
                )

    def outcome(self, lab: Lab) -> Outcome:
        """What has happened up to now."""
        self._look_at_listener(lab)
        after = [host.counters() for host in lab.hosts]
        client, server = (
            Counter({name: now[name] - then.get(name, 0) for name in now if now[name] != then.get(name, 0)})
            for now, then in zip(after, self._before, strict=True)
        )
        return Outcome(
            listener=self._listener,
            clients=tuple(self._clients[number] for number in sorted(self._clients)),
            counters=server,
            client_counters=client,
            server_sockets=tuple(lab.server.sockets()),
            client_sockets=tuple(lab.client.sockets()),
        )


def describe(clients: list[Client]) -> str:
    """`10 connected, 0 failed`, with the errors by name."""
    errors = Counter(client.errno for client in clients if client.errno)
    names = "".join(f" ({os.strerror(number)}: {count})" for number, count in errors.items())
    return f"{len(clients) - errors.total()} connected, {errors.total()} failed{names}"


def names() -> list[str]:
    """Every scenario: the directory is the list."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(scenarios.__path__))


def load(name: str) -> type[Scenario]:
    """The scenario's class. Its parameters are its fields: `load("accept-overflow")(clients=20)`."""
    if name not in names():
        raise UsageError(
            f"there is no scenario '{name}'", did_you_mean(name, names()) or "'tcpscope lab list' shows them"
        )
    module = importlib.import_module(f"{scenarios.__name__}.{name.replace('-', '_')}")
    for found in vars(module).values():
        if inspect.isclass(found) and issubclass(found, Scenario) and found.__module__ == module.__name__:
            return found
    raise TcpscopeError(f"{module.__name__} holds no scenario")
