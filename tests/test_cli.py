"""The command line: what is wrong is said in one line, before anything is loaded; names, help, weight."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tcpscope
from tcpscope import cli, tool
from tcpscope.errors import UnsupportedError, UsageError
from tcpscope.filters import Filter
from tcpscope.kernel import features, loaded, netns
from tcpscope.request import Request


class Run:
    """One call of the command line, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Status, standard output, standard error."""
        self._monkeypatch.setattr(sys, "argv", ["tcpscope", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        return end.value.code, *self._capsys.readouterr()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("something was loaded")

    monkeypatch.setattr(loaded.Loaded, "__init__", refuse)
    monkeypatch.setattr(features.Kernel, "__init__", refuse)


NO_PID = str(next(pid for pid in range(4_194_304, 0, -1) if not Path(f"/proc/{pid}").exists()))


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats"], "no command 'stats'; did you mean 'states'?"),
        (["tcpstate"], "no command 'tcpstate'; did you mean 'states'?"),
        (["xyz"], "no command 'xyz'; there are accept, cong, connect, "),
        (["top", "--by", "raddrs"], "--by raddrs; did you mean 'raddr'?"),
        (["top", "--by", "time"], "--by time; there are connection, cookie, netns"),
        (["top", "--by", ","], "--by is empty; give names of columns"),
        (["top", "--sort", "comm"], "--sort comm; it sorts by tx_bytes"),
        (["top", "--by", "pid", "--sort", "srtt_us"], "--sort srtt_us; it sorts by connections, tx_bytes"),
        (["top", "--sort", "cookie"], "--sort cookie; it sorts by tx_bytes"),
        (["top", "--by", "connection,pid"], "--by connection,pid; connection stands alone"),
        (["tcptop", "--rows", "5"], "'top' has no option '--rows'; use -n ROWS"),
        (["tcpsubnet", "-J"], "'subnet' has no option '-J'; use -o json"),
        (["help", "xyz"], "no command 'xyz'; there are"),
        (["help", "rtt", "xyz"], "help for 'xyz'; 'rtt' has no commands of its own"),
        (["states", "--columns", "lprot"], "unknown column 'lprot'; did you mean 'lport'?"),
        (["states", "--columns", "pid,xyz"], "unknown column 'xyz'; there are time, cookie, netns"),
        (["states", "--columns", ","], "--columns is empty; give names of columns, separated by commas"),
        (["queue", "--columns", "acept_queue"], "unknown column 'acept_queue'; did you mean 'accept_queue'?"),
        (["queue", "--events", "--columns", "setp"], "unknown column 'setp'; did you mean 'step'?"),
        (["queue", "--columns", "step"], "unknown column 'step'; there are time, netns"),
        (["rtt", "--columns", "p95_us"], "unknown column 'p95_us'; did you mean 'p99_us'?"),
        (["rtt", "--columns", "pid"], "unknown column 'pid'; there are time, count"),
        (["list", "--columns", "holder"], "unknown column 'holder'; did you mean 'holders'?"),
        (["states", "--pid", "1", "--pid", "1,"], "a value is missing in '1,1,'; give one PID or more"),
        (["states", "-L", "1", "-L", "0"], "port '0' is not a number from 1 to 65535"),
        (["states", "-n", "1", "--max-events", "2"], "--max-events is given 2 times; give it once"),
        (["connect", "--count", "--by", "pid", "--by", "uid"], "--by is given 2 times; give it once"),
        (["states", "--port", "65536"], "port '65536' is not a number from 1 to 65535"),
        (["states", "-L", "0"], "port '0' is not a number from 1 to 65535"),
        (["states", "-R", "80-70"], "port range '80-70' is reversed; did you mean 70-80?"),
        (["states", "-R", "no-such"], "port 'no-such' is neither a number, nor a range, nor a service"),
        (["states", "--raddr", "10.0.0.0/33"], "'10.0.0.0/33' is neither an address nor a network; such as 192.0.2.1"),
        (["states", "--laddr", "10.0.0.1/8"], "'10.0.0.1/8' has bits set behind its prefix; the network is 10.0.0.0/8"),
        (["states", "--laddr", "fe80::1%eth0"], "'fe80::1%eth0' has a zone; leave out '%' and what follows"),
        (["states", "-p", NO_PID], f"no process with PID {NO_PID}"),
        (["states", "-p", "-1"], "PID '-1' is not a number from 1 to 4194304"),
        (["states", "--netns", "pid:" + NO_PID], f"no process with PID {NO_PID}"),
        (["states", "--netns", "no-such"], "no network namespace 'no-such' in /run/netns; give a name"),
        (["states", "--netns", "/etc/passwd"], "'/etc/passwd' is not a network namespace"),
        (["states", "--cgroup", "/no/such"], "no cgroup '/no/such' in /"),
        (["states", "-u", "roott"], "no user 'roott'; did you mean 'root'?"),
        (["states", "--comm", "sixteen-letters!"], "process name 'sixteen-letters!' has 16 bytes; the kernel keeps 1"),
        (["states", "-4", "-6"], "-4 and -6 exclude each other; leave out both to see IPv4 and IPv6"),
        (["states", "-6", "--raddr", "10.0.0.1"], "-6 asks for IPv6, --raddr asks for IPv4; a connection is of one"),
        (["states", "--port", "80", "-L", "1", "-R", "2"], "--port 80 is neither in --lport 1 nor in --rport 2"),
        (["queue", "-i", "0"], "--interval 0; give a time above 0, such as 30, 200ms, 5m or 1h"),
        (["rtt", "-i", "-1"], "--interval -1; give a time above 0"),
        (["rtt", "-i", "nan"], "--interval nan; give a time above 0"),
        (["rtt", "-i", "soon"], "--interval soon; give a time above 0"),
        (["states", "-d", "0"], "--duration 0; give a time above 0"),
        (["states", "-d", "1_0"], "--duration 1_0; give a time above 0"),
        (["states", "-d", "٣"], "--duration ٣; give a time above 0"),
        (["states", "-n", "0"], "Invalid value for '-n' / '--max-events': '0' is not a number from 1 to 2147483647"),
        (["states", "-n", "1_0"], "Invalid value for '-n' / '--max-events': '1_0' is not a number from 1"),
        (["states", "-n", "1" + "0" * 400], "Invalid value for '-n' / '--max-events': '1" + "0" * 400 + "' is not a"),
        (["rtt", "--max-keys", "٣"], "Invalid value for '--max-keys': '٣' is not a number from 0"),
        (["lab", "run", "syn-flood", "--backlog", "1_0"], "Invalid value for '--backlog': '1_0' is not a number"),
        (["lab", "run", "syn-flood", "--syns", "1", "--syns", "2"], "--syns is given 2 times; give it once"),
        (["states", "--stats"], "--stats; the account is a record of JSON: -o json; --verbose prints it on stderr"),
        (["diagnose", "--stats"], "--stats; the account is a record of JSON: -o json"),
        (["states", "--explain", "-o", "csv"], "--explain and -o csv; the explanation is text"),
        (["rtt", "--no-header", "-o", "json"], "--no-header and -o json; JSON has no titles"),
        (["states", "--buffer", "5000"], "--buffer 5000; give a power of two from 4K to 1024M"),
        (["states", "--buffer", "2K"], "--buffer 2K; give a power of two from 4K to 1024M"),
        (["states", "--buffer", "2048M"], "--buffer 2048M; give a power of two from 4K to 1024M"),
        (["states", "--buffer", "9" * 5000], f"--buffer {'9' * 5000}; give a power of two from 4K to 1024M"),
        (["states", "--buffer", "much"], "--buffer much; give a power of two from 4K to 1024M"),
        (["states", "-o", "xml"], "Invalid value for '-o' / '--output': 'xml' is not one of 'table', 'json', 'csv'."),
        (["states", "--time", "local", "-o", "json"], "time 'local'; allowed: iso, elapsed, none"),
        (["states", "-w", "-o", "csv"], "--wide; only a table"),
        (["states", "-w", "--columns", "pid"], "--wide; only a table without --columns"),
        (["states", "--colums", "pid"], "No such option"),
        (["states", "-p"], "Option '-p' requires an argument."),
        (["states", "80"], "Got unexpected extra argument (80)"),
        (["states", "-i", "1"], "No such option"),
        (["rtt", "--by", "rader"], "--by rader; did you mean 'raddr'?"),
        (["rtt", "--by", "none,raddr"], "--by none,raddr; 'none' and 'connection' stand alone"),
        (["rtt", "--max-keys", "7"], "--max-keys 7; needs --by"),
        (["rtt", "--max-keys", "0"], "--max-keys 0; a number from 1 to 1048576"),
        (["connect", "--by", "raddr"], "--by raddr; needs --count"),
        (["connect", "-i", "1"], "--interval 1; needs --count"),
        (["connect", "--count", "--by", "radr"], "unknown column 'radr'; did you mean 'raddr'?"),
        (["connect", "--count", "--by", ","], "--by is empty"),
        (["connect", "--count", "--by", "time"], "--by has 'time'"),
        (["connect", "--count", "--columns", "pid"], "unknown column 'pid'; there are time, raddr, rport, count"),
        (["connlat", "--min", "10"], "--min 10; give a time with its unit, such as 300us, 10ms or 1.5s"),
        (["connlat", "--min", "-1ms"], "--min -1ms; give a time with its unit"),
        (["connlat", "--min", "0.4us"], "--min 0.4us; give a time from 1us on"),
        (["connlat", "--min", "1 h"], "--min 1 h; give a time with its unit"),
        (["connlat", "--by", "raddr"], "--by raddr; needs --histogram"),
        (["connlat", "-i", "0.5"], "--interval 0.5; needs --histogram"),
        (["connlat", "--histogram", "--by", "latency"], "unknown column 'latency'; did you mean 'latency_us'?"),
        (["connlat", "--histogram", "--columns", "pid"], "unknown column 'pid'; there are time, outcome"),
        (["connlat", "--histogram", "-i", "0"], "--interval 0; give a time above 0"),
        (["connect", "--histogram"], "No such option"),
        (["list", "-d", "1"], "--duration 1; needs --interval: without it there is one snapshot"),
        (["connect", "-P", "80"], "'connect' has no option '-P'; use -R PORTS for remote ports"),
        (["tcpaccept", "-P", "80"], "'accept' has no option '-P'; use -L PORTS for local ports"),
        (["tcplife", "-tw"], "'life' has no option '-t'; every row has a time; --time elapsed counts seconds"),
        (["connect", "-U"], "'connect' has no option '-U'; use --columns with uid among the names"),
        (["tcpconnlat", "10"], "'connlat' takes no argument; use --min for the shortest latency"),
        (["diagnose", "--timestamp"], "'diagnose' has no option '--timestamp'; every row has"),
        (["diagnose", "-o", "csv"], "Invalid value for '-o' / '--output': 'csv' is not one of 'table', 'json'."),
        (["queue", "-R", "80"], "--rport 80; a listener has no remote end; with --events the peers are known"),
        (["queue", "--stack"], "--stack; it goes with --events"),
        (["queue", "--buffer", "64K"], "--buffer; it goes with --events"),
        (["drop", "--count", "--buffer", "64K"], "--buffer; --count counts in the kernel and needs no buffer"),
        (["list", "--buffer", "64K"], "No such option"),
        (["rtt", "--buffer", "64K"], "No such option"),
        (["queue", "--events", "-i", "1"], "--interval 1; with --events rows come as events happen"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_usage(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert err.startswith(f"tcpscope: {message}"), err
    assert len(err.splitlines()) == 1
    assert (status, out) == (2, "")
    if message == "No such option":  # click's words change
        assert arguments[1] in err
    if "--colums" in arguments:
        assert "--columns" in err


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_namespace_that_does_not_exist(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "exists", lambda inode: inode != 7)
    message = "no network namespace 7; no process, mount, open file or socket holds it"
    assert run("states", "--netns", "7") == (2, "", f"tcpscope: {message}\n")
    with pytest.raises(UsageError, match=message):
        tcpscope.open("states", netns=7)


def test_a_namespace_of_which_nobody_can_say_whether_it_exists(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken, and one line says so."""
    monkeypatch.setattr(netns, "exists", lambda inode: None)
    monkeypatch.setattr(cli, "show", lambda tool, request, *_: None)
    message = "network namespace 4026540000 is not found; not all processes can be looked at"
    assert run("states", "--netns", "4026540000") == (0, "", f"tcpscope: {message}\n")


def test_no_arguments_is_a_question(run: Run) -> None:
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "Usage: tcpscope" in err


def test_help_and_version(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for name in tool.names():
        assert f"  {name} " in out
    status, out, _ = run("states", "-h")
    assert status == 0
    assert "How long was each connection in each state" in out
    for option in (*cli.FILTERS, *cli.OUTPUT):
        assert max(option.opts, key=len) in out
    assert run("--version")[1].startswith("tcpscope ")


@pytest.mark.parametrize("name", tool.names())
def test_a_tool_has_the_options_that_it_has_a_use_for(run: Run, name: str) -> None:
    """They follow from what the tool is."""
    found, text = tool.find(name), run(name, "--help")[1]
    used = {
        "--interval": bool(found.intervals),
        "--buffer": isinstance(found, tool.Stream),
    }
    assert {option: option in text for option in used} == used
    words = " ".join(text.split())
    assert "[default: 4M]" in words or not used["--buffer"]
    assert f"print results this often: seconds, or 200ms, 5m. [default: {found.intervals}]" in words.replace(
        "Print", "print"
    ) or (not used["--interval"])


def test_help_says_what_an_option_needs(run: Run) -> None:
    text = " ".join(run("queue", "--help")[1].split())
    for option in ("-R, --rport PORTS", "--raddr NETWORKS", "--buffer SIZE", "--stack"):
        assert f"{option} With --events:" in text
    text = " ".join(run("connect", "--help")[1].split())
    assert "--by NAMES With --count: group by" in text and "[default: raddr,rport]" in text
    assert "--interval TIME With --count: print results" in text
    text = " ".join(run("diagnose", "--help")[1].split())
    assert "--rport" in text and "[table|json]" in text and "[default: 30]" in text


def request_of(run: Run, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[str, Request]:
    """What a tool is asked to do."""
    asked: list[tuple[str, Request]] = []
    monkeypatch.setattr(cli, "show", lambda tool, request, *_: asked.append((tool.name, request)))
    assert run(*arguments)[0] == 0
    return asked[0]


def test_the_request(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path("/proc/self/ns/net").stat().st_ino
    name, request = request_of(
        run,
        monkeypatch,
        "states",
        "-p",
        str(os.getpid()),
        "--comm",
        "nginx",
        "-u",
        "0",
        "--cgroup",
        "7",
        "--netns",
        str(own),
        "-4",
        "-L",
        "80,443",
        "-R",
        "1-9",
        "--port",
        "443",
        "--laddr",
        "10.0.0.0/8",
        "--raddr",
        "::1,10.0.0.1",
        "-o",
        "csv",
        "--columns",
        "pid, comm",
        "--no-header",
        "--time",
        "none",
        "-d",
        "1.5m",
        "-n",
        "3",
        "--strict",
        "--buffer",
        "64K",
        "--debug",
    )
    assert name == "states"
    assert request.filter == Filter.from_options(
        pid=os.getpid(),
        comm="nginx",
        uid=0,
        cgroup=7,
        netns=own,
        ipv4=True,
        lport="80,443",
        rport="1-9",
        port=443,
        laddr="10.0.0.0/8",
        raddr="::1,10.0.0.1",
    )
    assert (request.output, request.columns, request.header, request.time) == ("csv", ("pid", "comm"), False, "none")
    assert (request.duration, request.max_events, request.buffer) == (90, 3, 65536)
    assert request.strict and request.debug
    assert request_of(run, monkeypatch, "states", "--explain")[1].explain
    assert request_of(run, monkeypatch, "states", "-o", "json", "--stats")[1].stats
    assert request_of(run, monkeypatch, "states")[1].filter.is_empty


@pytest.mark.parametrize(("called", "name"), [("tcpstates", "states"), ("tcprtt", "rtt"), ("tcpsynbl", "synbl")])
def test_bcc_names(run: Run, monkeypatch: pytest.MonkeyPatch, called: str, name: str) -> None:
    assert request_of(run, monkeypatch, called)[0] == name


def test_a_name_of_bcc_is_no_second_tool() -> None:
    assert tool.find("tcpstates") is tool.find("states")
    aliases = [alias for name in tool.names() for alias in tool.find(name).aliases]
    assert len(aliases) == len(set(aliases))
    assert not set(aliases) & set(tool.names())


def test_a_kernel_without_btf(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(features, "BTF", tmp_path / "vmlinux")
    status, out, err = run("states", "-d", "0.1")
    assert (status, out) == (3, "")
    assert err == (f"tcpscope: this kernel has no BTF ({tmp_path / 'vmlinux'}); it needs CONFIG_DEBUG_INFO_BTF=y\n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("arguments", "target", "hook"),
    [
        (["states"], "inet_sock_set_state", "'state' of the probe 'transition'"),
        (["states"], "tcp_destroy_sock", "'destroy' of the probe 'transition'"),
        (["list"], "tcp", "'existing' of the probe 'sockets'"),
        (["queue"], "task_file", "'seed' of the probe 'listeners'"),
    ],
)
def test_a_kernel_without_a_hook(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], target: str, hook: str
) -> None:
    """Status 3, which hook, and what is missing."""
    can = features.Kernel.can

    def cannot(kernel: features.Kernel, program: Any) -> features.Answer:
        missing = features.Answer(False, f"the kernel has no {target}")
        return missing if program.target == target else can(kernel, program)

    monkeypatch.setattr(features.Kernel, "can", cannot)
    status, out, err = run(*arguments)
    assert (status, out) == (3, "")
    assert err == f"tcpscope: this kernel offers no hook for {hook}; the kernel has no {target}\n"


@pytest.mark.root
def test_an_optional_hook_may_be_missing(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """--explain says what is then not known."""
    can = features.Kernel.can

    def cannot(kernel: features.Kernel, program: Any) -> features.Answer:
        return features.Answer(False, "no such luck") if program.hook == "timewait" else can(kernel, program)

    monkeypatch.setattr(features.Kernel, "can", cannot)
    many = ",".join(f"10.{n}.0.0/16" for n in range(0, 20, 2))
    status, out, err = run("states", "--explain", "-4", "--cgroup", "1", "--raddr", many)
    assert (status, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    (memory,) = (line.split()[1] for line in lines if line.startswith("memory "))
    assert 4.2 < float(memory) < 256  # the buffer alone has 4.2; tables are for as many sockets as the machine has
    assert "timewait not attached" in lines
    assert "not known on this kernel: what follows CLOSE" in lines
    assert "filter --cgroup 1: decided in the kernel" in lines
    assert "filter -4: decided in the kernel" in lines
    assert f"filter --raddr {many}: decided in the kernel" in lines


def test_a_known_error_later_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: Request) -> None:
        raise UnsupportedError("it", "helps")

    monkeypatch.setattr(tool.find("states"), "open", fail)
    assert run("states") == (3, "", "tcpscope: it; helps\n")


def modules_after(code: str) -> set[str]:
    """The modules that a fresh Python has after `code`."""
    script = f"{code}\nimport sys; sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


HEAVY = {"pyroute2", "hypothesis", "scapy", "pytest", "cffi", "mesonpy", "numpy", "asyncio", "ssl", "http", "email"}


def test_weight_of_the_library() -> None:
    loaded_modules = modules_after("import tcpscope")
    # An editable install has a loader of its own.
    editable = modules_after("pass")
    assert "tcpscope.cli" not in loaded_modules
    assert not (HEAVY | {"click", "msgspec", "_libbpf"}) & (loaded_modules - editable)


def test_weight_of_the_command_line() -> None:
    """Starting a tool imports that tool, and nothing of the lab, the diagnosis, or what they need."""
    loaded_modules = modules_after(
        "import sys; sys.argv = ['tcpscope', 'states', '--help']\n"
        "from tcpscope.cli import main\n"
        "try: main()\nexcept SystemExit: pass"
    )
    editable = modules_after("pass")
    assert not HEAVY & (loaded_modules - editable)
    ours = {name for name in loaded_modules if name.startswith("tcpscope.")}
    assert "tcpscope.tools.states" in ours
    assert not {name for name in ours if name.startswith(("tcpscope.lab", "tcpscope.diagnose", "tcpscope.tools.r"))}


@pytest.mark.parametrize("words", ["", "life", "tcplife", "lab run", "diagnose", "features"])
def test_help_of_a_command(run: Run, words: str) -> None:
    """`help NAME` prints what `NAME --help` prints."""
    status, asked, _ = run("help", *words.split())
    _, given, _ = run(*words.split(), "--help")
    assert (status, asked) == (0, given)
    assert asked.startswith(f"Usage: tcpscope {words}".rstrip() + " ")


@pytest.mark.parametrize("name", [*tool.names(), "diagnose"])
def test_help_begins_with_examples(run: Run, name: str) -> None:
    _, text, _ = run(name, "--help")
    order = [text.index(f"\n{title}") for title in ("Examples:", "Filters (", "Output:")]
    assert order == sorted(order)
    assert text.count(f"\n  tcpscope {name}") >= 2


def test_no_memory_is_one_line() -> None:
    """Also while modules are imported."""
    code = (
        "import tcpscope.cli, tcpscope.__main__ as m\ndef main(): raise MemoryError\ntcpscope.cli.main = main\nm.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "tcpscope: no memory; free memory, or raise the limit ('ulimit -v')\n"
