"""Write the C source of the `_libbpf` extension. Run by the build: build_libbpf.py shim.h out.c"""

import sys
from pathlib import Path

from cffi import FFI

# Of libbpf only what is called. The C compiler holds these against libbpf's own headers.
LIBBPF = """
struct bpf_object; struct bpf_program; struct bpf_map; struct bpf_link;

void tcpscope_leave_modules(struct bpf_object *object);
void tcpscope_make_static(struct bpf_object *object);
int bpf_object__load(struct bpf_object *object);
void bpf_object__close(struct bpf_object *object);

struct bpf_program *bpf_object__next_program(const struct bpf_object *object, struct bpf_program *program);
const char *bpf_program__name(const struct bpf_program *program);
int bpf_program__set_autoload(struct bpf_program *program, bool autoload);
int bpf_program__set_attach_target(struct bpf_program *program, int program_fd, const char *function);
int bpf_program__set_log_buf(struct bpf_program *program, char *log, size_t size);
int bpf_program__fd(const struct bpf_program *program);
struct bpf_link *bpf_program__attach(const struct bpf_program *program);
int bpf_link__fd(const struct bpf_link *link);
int bpf_link__destroy(struct bpf_link *link);

struct bpf_map *bpf_object__find_map_by_name(const struct bpf_object *object, const char *name);
struct bpf_map *bpf_object__next_map(const struct bpf_object *object, const struct bpf_map *map);
int bpf_map__fd(const struct bpf_map *map);
bool bpf_map__autocreate(const struct bpf_map *map);
uint32_t bpf_map__map_flags(const struct bpf_map *map);
uint32_t bpf_map__max_entries(const struct bpf_map *map);
int bpf_map__reuse_fd(struct bpf_map *map, int fd);
int bpf_map__set_map_flags(struct bpf_map *map, uint32_t flags);
int bpf_map__set_max_entries(struct bpf_map *map, uint32_t max_entries);
int bpf_map__set_key_size(struct bpf_map *map, uint32_t size);
int bpf_map__set_value_size(struct bpf_map *map, uint32_t size);
void *bpf_map__initial_value(struct bpf_map *map, size_t *size);

int bpf_map_lookup_elem(int fd, const void *key, void *value);
int bpf_map_update_elem(int fd, const void *key, const void *value, uint64_t flags);
int bpf_map_delete_elem(int fd, const void *key);
struct bpf_map_batch_opts;
int bpf_map_lookup_batch(int fd, void *in, void *out, void *keys, void *values, uint32_t *count,
                         const struct bpf_map_batch_opts *options);
int bpf_map_lookup_and_delete_batch(int fd, void *in, void *out, void *keys, void *values, uint32_t *count,
                                    const struct bpf_map_batch_opts *options);
"""


def main(shim: str, output: str) -> None:
    declarations = Path(shim).read_text().partition("/* cffi */")[2].partition("/* end */")[0]
    ffi = FFI()
    ffi.cdef(LIBBPF + declarations)
    ffi.set_source(
        "tcpscope.kernel._libbpf",
        '#include <bpf/bpf.h>\n#include <bpf/btf.h>\n#include <bpf/libbpf.h>\n#include "shim.h"\n',
        py_limited_api=True,
    )
    ffi.emit_c_code(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
