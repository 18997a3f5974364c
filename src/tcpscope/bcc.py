"""bcc's tools that are not there yet, and flags of its TCP tools that are called otherwise here.

Only read when somebody has given one.
"""

from __future__ import annotations

_TIME = "every row has a time; --time elapsed counts seconds from the start"
_CSV = "use -o csv"
_UID = "use --columns with uid among the names"
_CGROUP = "use --cgroup PATH"
_MOUNTS = "use --netns or --cgroup"

_ALL = {
    "-t": _TIME,
    "-T": _TIME,
    "--timestamp": _TIME,
    "-s": _CSV,
    "--csv": _CSV,
    "-N": "use --netns INODE, NAME or pid:N",
    "-C": _CGROUP,
    "--cgroupmap": _CGROUP,
    "-M": _MOUNTS,
    "--mntnsmap": _MOUNTS,
    "-Y": "use -o json, and systemd-cat for the journal",
    "--journal": "use -o json, and systemd-cat for the journal",
    "--ebpf": "use --explain to see which programs are attached",
}

_TOOLS = {
    "accept": {"-P": "use -L PORTS for local ports"},
    "cong": {
        "--dist": "use --histogram",
        "--microseconds": "leave it out: JSON and pipes have microseconds",
        "--localport": "use -L PORTS",
        "--remoteport": "use -R PORTS",
        "ARGUMENT": "use -i TIME for the interval and -d TIME for the duration",
    },
    "connect": {
        "-P": "use -R PORTS for remote ports",
        "-c": "use --count",
        "-U": _UID,
        "--print-uid": _UID,
        "--dns": "addresses are shown as numbers only",
    },
    "connlat": {"ARGUMENT": "use --min for the shortest latency, such as --min 10ms"},
    "drop": {"--netns-id": "use --netns INODE, NAME or pid:N", "--pid-netns": "use --netns pid:N"},
    "life": {
        "-D": "use -R PORTS for remote ports",
        "--remoteport": "use -R PORTS",
        "--localport": "use -L PORTS",
    },
    "pktlat": {
        "ARGUMENT": "use --min for the shortest wait, such as --min 10ms",
        "-t": "use --pid for the process; each row has the thread",
        "--tid": "use --pid for the process; each row has the thread",
        "-l": "use -L PORTS for local ports",
        "-r": "use -R PORTS for remote ports",
    },
    "queue": {"ARGUMENT": "use -i TIME for the interval and -d TIME for the duration"},
    "retrans": {
        "-c": "use --count",
        "-l": "tail loss probes are always shown: kind LOSS_PROBE",
        "--lossprobe": "tail loss probes are always shown: kind LOSS_PROBE",
        "-s": "use the column offset: -o json, or name it in --columns",
        "--sequence": "use the column offset: -o json, or name it in --columns",
    },
    "rtt": {
        "-P": "use -R PORTS for remote ports, -L PORTS for local ones",
        "-a": "use --laddr ADDRESS",
        "-A": "use --raddr ADDRESS",
        "-b": "use --by laddr",
        "--byladdr": "use --by laddr",
        "-B": "use --by raddr",
        "--byraddr": "use --by raddr",
        "-e": "the average is always shown: mean_us",
        "--extension": "the average is always shown: mean_us",
        "-m": "leave it out: a terminal shows milliseconds, JSON and pipes have microseconds",
        "--milliseconds": "leave it out: a terminal shows milliseconds, JSON and pipes have microseconds",
    },
    "synbl": {"ARGUMENT": "use -i TIME for the interval and -d TIME for the duration"},
    "states": {
        "-D": "use -R PORTS for remote ports",
        "--remoteport": "use -R PORTS",
        "--localport": "use -L PORTS",
    },
    "subnet": {
        "ARGUMENT": "use --net NETWORKS",
        "-J": "use -o json",
        "--json": "use -o json",
        "-f": "leave it out: numbers are bytes",
        "--format": "leave it out: numbers are bytes",
    },
    "top": {
        "-c": _CGROUP,
        "-C": "leave it out: in a pipe nothing is cleared",
        "--noclear": "leave it out: in a pipe nothing is cleared",
        "-S": "leave it out: there is no line of the load",
        "--nosummary": "leave it out: there is no line of the load",
        "-s": "use --sort tx_bytes or --sort rx_bytes",
        "-r": "use -n ROWS",
        "--rows": "use -n ROWS",
        "ARGUMENT": "use -i TIME for the interval and -d TIME for the duration",
    },
    "tracer": {"-U": _UID, "--print-uid": _UID},
}


def hint(tool: str, flag: str) -> str:
    """What to use in place of `flag`, or of an `ARGUMENT`; empty if no such tool of theirs has it."""
    return _TOOLS.get(tool, {}).get(flag) or _ALL.get(flag, "")
