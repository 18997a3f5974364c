"""Which functions --functions means."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tcpscope import functions
from tcpscope.errors import UnsupportedError, UsageError
from tcpscope.kernel.btf import Btf, Ref, Struct
from tcpscope.kernel.features import BTF, Answer, Kernel

YES = Answer(True)
TAKING = {"ip_rcv": 0, "ip_output": 2, "tcp_v4_rcv": 0, "tcp_v4_do_rcv": 1, "far": 6}


def kernel(fentry: Answer = YES, taking: dict[str, int] = TAKING) -> Any:
    return SimpleNamespace(
        fentry=fentry,
        functions_with=lambda struct: taking if struct == "sk_buff" else {},
        parameters=lambda name: 3 if name in (*taking, "tcp_sendmsg") else None,
    )


def test_names_and_patterns() -> None:
    found = functions.chosen("tcp_v4_*, ip_output", kernel())
    assert [tuple(each) for each in found] == [
        ("ip_output", 2, True),
        ("tcp_v4_do_rcv", 1, False),
        ("tcp_v4_rcv", 0, False),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ip_rvc", "no such function that takes a packet; did you mean 'ip_rcv'"),
        ("ip_rvc*", "did you mean 'ip_rcv'"),
        ("nothing_like_it", "--functions nothing_like_it: the kernel has no such function that takes a packet"),
        ("tcp_sendmsg", "takes no packet"),
        ("far", "takes no packet"),
        (" , ", "is empty"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        functions.chosen(text, kernel())
    assert "\n" not in str(raised.value)


def test_at_most_so_many() -> None:
    many = {f"f{number}": 0 for number in range(functions.MOST + 1)}
    with pytest.raises(UsageError, match=r"--functions f\*: 33 functions; give patterns of at most 32"):
        functions.chosen("f*", kernel(taking=many))
    assert len(functions.chosen("f*", kernel(taking=dict(list(many.items())[1:])))) == functions.MOST


def test_where_functions_cannot_be_hooked() -> None:
    with pytest.raises(UnsupportedError, match="--functions ip_rcv: it forbids that; without --functions there are"):
        functions.chosen("ip_rcv", kernel(Answer(False, "it forbids that")))


@pytest.mark.kernel
def test_the_argument_is_that_of_the_btf() -> None:
    """Against the reader in Python."""
    btf = Btf.parse(BTF.read_bytes())
    found = Kernel().functions_with("sk_buff")
    assert found["ip_rcv"] == 0
    assert found["ip_output"] == 2
    assert "tcp_sendmsg" not in found
    for name in sorted(found)[::50]:
        parameters = btf.func_params(name)
        assert parameters is not None
        pointer = btf.resolve(parameters[found[name]][1])
        assert isinstance(pointer, Ref)
        struct = btf.resolve(pointer.type_id)
        assert isinstance(struct, Struct)
        assert struct.name == "sk_buff"
