"""An object and a kernel that has all that it asks for, as sources: for the tests of what looks at both."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tcpscope.kernel import elf
from tcpscope.kernel.btf import Btf
from tcpscope.kernel.spec import Spec

OBJECT = """
#define SEC(name) __attribute__((section(name), used))
#define INDEX __attribute__((preserve_access_index))
enum state { OPEN = 1, SHUT };
enum helper___mine { HELPER___mine = 7 };
struct inner { int deep; } INDEX;
struct row { short cells[4]; struct inner each[2]; } INDEX;
struct sock___ours { int mark; void *data; unsigned low : 3; enum state state; union { int hidden; }; } INDEX;
struct later { int since; } INDEX;
struct maybe { int field; } INDEX;
typedef struct { int value; } INDEX alias_t;
struct uses_alias { alias_t alias; } INDEX;
static long (*ktime)(void) = (void *)5;
#define exists(field) __builtin_preserve_field_info(field, 2)
static __attribute__((noinline)) long called(struct inner *inner) { return inner->deep; }
SEC("tp_btf/first") long first(struct sock___ours *sk)
{
    return sk->mark + (long)sk->data + sk->state + sk->hidden + __builtin_preserve_field_info(sk->low, 1);
}
SEC("tp_btf/second") long second(struct row *row) { return row->cells[2] + row->each[1].deep + called(row->each); }
SEC("tp_btf/asks") long asks(struct later *later, struct maybe *maybe)
{
    long sum = exists(later->since) ? later->since : 0;
    if (__builtin_preserve_type_info(*(struct maybe *)0, 0))
        sum += maybe->field;
    return sum + __builtin_preserve_enum_value(*(enum helper___mine *)HELPER___mine, 0);
}
struct new { int one, other; } INDEX;
static __attribute__((noinline)) long only_if_asked(struct new *new) { return new->one + (ktime() ? 1 : 2); }
SEC("tp_btf/guards") long guards(struct new *new) { return exists(new->one) ? only_if_asked(new) : 0; }
SEC("tp_btf/careless") long careless(struct new *new)
{
    long had = new->other;
    asm volatile("" : "+r"(had));
    return exists(new->other) ? had : 1;
}
SEC("tp_btf/alias") long alias(struct uses_alias *uses) { return uses->alias.value; }
"""

KERNEL = """
enum state { OPEN = 1, SHUT };
enum helper { HELPER = 9 };
struct inner { int more, deep; };
struct row { short cells[4]; struct inner each[2]; };
struct sock { void *data; long mark; unsigned one : 1, low : 3;
              struct { union { int x, hidden; }; }; enum state state; };
struct later { int since; };
struct maybe { int field; };
struct new { int one, other; };
typedef struct { int value; } alias_t;
struct uses_alias { alias_t alias; };
enum helper helper; struct row row; struct sock sock; struct later later; struct maybe maybe;
struct uses_alias uses; struct new new; struct inner inner;
"""


def compiled(text: str, folder: Path, *options: str) -> bytes:
    """An object of this source."""
    (folder / "it.c").write_text(text)
    command = ["clang", "-target", "bpf", "-mcpu=v3", "-g", *(options or ("-O2",)), "-c", "it.c", "-o", "it.o"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "it.o").read_bytes()


def spec_of(text: str, folder: Path) -> Spec:
    return Spec("own", compiled(text, folder))


def types_of(text: str, folder: Path) -> Btf:
    """The BTF of a kernel that has what this source declares."""
    return Btf.parse(elf.sections(compiled(text, folder, "-O0"))[".BTF"])
