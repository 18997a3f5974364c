"""What --reason takes, and the table of reasons."""

from __future__ import annotations

from typing import Any

import pytest

from tcpscope.drop_reasons import FACTS, PREFIX, Wanted, constants
from tcpscope.errors import UnsupportedError, UsageError
from tcpscope.kernel.spec import Spec
from tcpscope.kernel.symbols import Symbols

ENUM = {
    0: "SKB_NOT_DROPPED_YET",
    2: f"{PREFIX}NOT_SPECIFIED",
    3: f"{PREFIX}NO_SOCKET",
    5: f"{PREFIX}TCP_CSUM",
    6: f"{PREFIX}TCP_FLAGS",
    7: f"{PREFIX}IP_OUTNOROUTES",
    9: f"{PREFIX}TCP_INVALID_SEQUENCE",
    10: f"{PREFIX}MAX",
    0xFFFF0000: f"{PREFIX}SUBSYS_MASK",
}
OF_QDISCS = {
    0: "QDISC_DROP_UNSPEC",
    0x30000: "__QDISC_DROP_REASON",
    0x30001: "QDISC_DROP_GENERIC",
    0x30002: "QDISC_DROP_OVERLIMIT",
    0x30003: "QDISC_DROP_MAX",
}
SPEC = Spec.of("drops")
DERIVED = SPEC.layout("drop").field("reason").derived or {}
SYMBOLS = Symbols(
    "1000 t skb_queue_purge\n"
    "1040 T next\n"
    "2000 t raw_rcv\n"
    "2010 t raw_rcv\t[module]\n"
    "2018 d no_function\n"
    "2020 T next\n"
    "3000 T kfree_skb_list\n"
    "3010 T last\n"
)


def facts_of(enumerators: dict[int, str], counters: tuple[str, ...] = ("LINUX_MIB_BEYOND_WINDOW",)) -> dict[str, Any]:
    return constants(SPEC, enumerators, SYMBOLS, lambda mib: 1 if mib in counters else None)


@pytest.mark.parametrize(
    ("text", "mode", "numbers", "named"),
    [
        (None, 0, (), False),
        ("TCP_CSUM", 1, (5,), True),
        ("tcp_csum, SKB_DROP_REASON_NO_SOCKET", 1, (3, 5), True),
        ("TCP_*", 1, (5, 6, 9), True),
        ("TCP_*,!TCP_CSUM", 1, (6, 9), True),
        ("!TCP_*", 2, (5, 6, 9), False),
        ("!NO_SOCKET,!TCP_CSUM", 2, (3, 5), False),
    ],
)
def test_reasons(text: str | None, mode: int, numbers: tuple[int, ...], named: bool) -> None:
    assert Wanted.of(text, ENUM) == (mode, numbers, named)


def test_keys() -> None:
    assert Wanted.of("TCP_CSUM,NO_SOCKET", ENUM).keys == [b"\3\0\0\0", b"\5\0\0\0"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NO_SOKET", "this kernel has no reason 'NO_SOKET'; did you mean 'NO_SOCKET'?"),
        ("TCP_SUM", "this kernel has no reason 'TCP_SUM'; did you mean 'TCP_CSUM' or "),
        ("SEQUENCE", "this kernel has no reason 'SEQUENCE'; there are TCP_INVALID_SEQUENCE"),
        ("!XYZ", "this kernel has no reason 'XYZ'; tcpscope drop --all --count shows the reasons that occur"),
        ("MAX", "this kernel has no reason 'MAX'; "),
        ("UDP_*", "this kernel has no reason 'UDP_*'; "),
        (",", "--reason is empty; "),
        ("TCP_*,!TCP_*", "nothing is left of these reasons"),
    ],
)
def test_reasons_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        Wanted.of(text, ENUM)
    assert message in str(error.value)


def test_a_kernel_without_reasons() -> None:
    with pytest.raises(UnsupportedError, match=r"gives no reasons; Linux does since 5\.17"):
        Wanted.of("NO_SOCKET", {})
    with pytest.raises(UnsupportedError):
        Wanted.of("DERIVED:*,!NO_SOCKET", {}, derived=DERIVED)
    assert Wanted.of("!derived:syn*", {}, derived=DERIVED) == (2, (0x7FFF0002, 0x7FFF0004, 0x7FFF0005), False)


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (None, {*DERIVED}),
        ("DERIVED:*", {*DERIVED}),
        ("derived:syn_queue_*,TCP_CSUM", {0x7FFF0002, 0x7FFF0004}),
        ("*QUEUE_FULL", {0x7FFF0001, 0x7FFF0002}),
        ("!NO_SOCKET", {*DERIVED}),
        ("!DERIVED:SYN_*", {0x7FFF0001}),
        ("TCP_*", set()),
    ],
)
def test_reasons_that_are_derived(text: str | None, taken: set[int]) -> None:
    """The programs that see a refused SYN are attached only if one of its reasons is asked for."""
    wanted = Wanted.of(text, ENUM, OF_QDISCS, DERIVED)
    assert {number for number in DERIVED if wanted.takes(number)} == taken


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (None, (0, ())),
        ("!DERIVED:*", (0, ())),
        ("!DERIVED:*,!NO_SOCKET", (2, (3,))),
        ("NO_SOCKET", (1, (3,))),
    ],
)
def test_reasons_that_no_packet_has_are_not_looked_up(text: str | None, left: tuple[int, tuple[int, ...]]) -> None:
    """Without an excluded reason no packet is asked for its own."""
    assert Wanted.of(text, ENUM, OF_QDISCS, DERIVED).without(DERIVED)[:2] == left


def test_a_derived_reason_without_its_first_part() -> None:
    with pytest.raises(UsageError, match="did you mean 'DERIVED:SYN_QUEUE_FULL'"):
        Wanted.of("SYN_QUEUE_FULL", ENUM, OF_QDISCS, DERIVED)


def test_facts_by_number() -> None:
    made = facts_of(ENUM)
    labels = {name: SPEC.layout("drop").field(name).labels or {} for name in ("kind", "counter")}

    def fact(number: int, ipv6: bool = False, made: dict[str, Any] = made) -> tuple[str, str]:
        values = made["facts"][ipv6][number]
        return labels["kind"][values["kind"]], labels["counter"][values["counter"]]

    assert fact(5) == fact(5, True) == ("LOST", "TcpInCsumErrors")
    assert (fact(7), fact(7, True)) == (("LOST", "IpOutNoRoutes"), ("LOST", "NONE"))
    assert fact(6) == ("LOST", "NONE")
    assert fact(2) == ("UNKNOWN", "NONE")
    assert fact(9) == ("LOST", "TcpExtBeyondWindow")
    assert fact(9, made=facts_of(ENUM, counters=())) == ("LOST", "NONE")
    assert [made["facts"][0][number]["of_tcp"] for number in (2, 3, 5, 7)] == [False, False, True, False]
    assert made["overflow_has_reason"] is False
    assert facts_of(ENUM | {11: f"{PREFIX}TCP_LISTEN_OVERFLOW"})["overflow_has_reason"] is True


def test_every_counter_is_one_of_the_events() -> None:
    """Otherwise it would be shown as not known; and one that no reason has stands in the program."""
    labels = SPEC.layout("drop").field("counter").labels or {}
    named = {name for fact in FACTS.values() for name in (fact.counter, fact.ipv4) if name}
    assert named <= set(labels.values())
    by_program = {
        "TcpExtListenOverflows",
        "TcpExtTCPDeferAcceptDrop",
        "TcpExtTCPOFODrop",
        "TcpExtTCPRcvQDrop",
        "TcpExtTCPReqQFullDrop",
    }
    counted = {entry["counter"] for entry in facts_of({}, counters=())["watched"]}
    assert 0 not in counted and len(counted) == len(facts_of({})["watched"]) == 8
    assert set(labels.values()) - named == {"NONE", *by_program}


def test_without_reasons_the_program_looks_at_the_receiver() -> None:
    facts = facts_of({})["facts"]
    assert facts[0][0] == facts[1][0] == {"kind": 0, "counter": 0, "rule": 1, "no_device": False, "of_tcp": False}


def test_places() -> None:
    """Of two functions with one name it is not known which is meant."""
    places = facts_of(ENUM)["places"]
    assert len(places) == 16
    assert [place for place in places if place["end"]] == [
        {"begin": 0x3000, "end": 0x3010, "only": 1},
        {"begin": 0x1000, "end": 0x1040, "only": 0},
    ]


@pytest.mark.parametrize(
    ("text", "mode", "numbers"),
    [
        ("QDISC_DROP_OVERLIMIT", 1, (0x30002,)),
        ("qdisc_drop_*", 1, (0x30001, 0x30002)),
        ("QDISC_DROP", 1, (8, 0x30001, 0x30002)),
        ("!QDISC_DROP", 2, (8, 0x30001, 0x30002)),
        ("QDISC_DROP,!QDISC_DROP_GENERIC", 1, (8, 0x30002)),
    ],
)
def test_what_a_queue_discipline_says_in_more_detail(text: str, mode: int, numbers: tuple[int, ...]) -> None:
    enumerators = ENUM | {8: f"{PREFIX}QDISC_DROP"}
    assert Wanted.of(text, enumerators, OF_QDISCS)[:2] == (mode, numbers)


def test_without_such_names_it_is_one_reason() -> None:
    assert Wanted.of("QDISC_DROP", ENUM | {8: f"{PREFIX}QDISC_DROP"}).numbers == (8,)
    with pytest.raises(UsageError, match="no reason 'QDISC_DROP_OVERLIMIT'"):
        Wanted.of("QDISC_DROP_OVERLIMIT", ENUM)
