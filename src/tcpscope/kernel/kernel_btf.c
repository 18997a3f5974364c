// SPDX-License-Identifier: BSD-2-Clause
/* What the kernel has, by its BTF. */
#include "kernel_btf.h"

#include <bpf/bpf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * libbpf reads the file into memory twice, and finds a name by going through all types, more than a hundred thousand; some
 * fifty names are asked for. Here the file is mapped, where the kernel can, and all names go into one table: open
 * addressing, at most three quarters full.
 */
enum space { FUNCTION, TYPE, TYPEDEF, ENUMERATOR, NOTHING };

struct named {
	uint32_t name; /* its offset, 0: free */
	uint32_t space;
	int64_t value; /* of an enumerator; of others their type's number */
};

static enum space space_of(const struct btf_type *type)
{
	switch (btf_kind(type)) {
	case BTF_KIND_FUNC:
		return FUNCTION;
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_ENUM:
	case BTF_KIND_ENUM64:
		return TYPE;
	case BTF_KIND_TYPEDEF:
		return TYPEDEF;
	default:
		return NOTHING;
	}
}

size_t btf_bytes(const struct btf_type *type)
{
	size_t count = btf_elements(type), each = 0, once = 0;

	switch (btf_kind(type)) {
	case BTF_KIND_PTR:
	case BTF_KIND_FWD:
	case BTF_KIND_TYPEDEF:
	case BTF_KIND_VOLATILE:
	case BTF_KIND_CONST:
	case BTF_KIND_RESTRICT:
	case BTF_KIND_FUNC:
	case BTF_KIND_FLOAT:
	case BTF_KIND_TYPE_TAG:
		break;
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		once = sizeof(uint32_t);
		break;
	case BTF_KIND_ARRAY:
		once = sizeof(struct btf_array);
		break;
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		each = sizeof(struct btf_member);
		break;
	case BTF_KIND_ENUM:
		each = sizeof(struct btf_enum);
		break;
	case BTF_KIND_ENUM64:
		each = sizeof(struct btf_enum64);
		break;
	case BTF_KIND_FUNC_PROTO:
		each = sizeof(struct btf_param);
		break;
	case BTF_KIND_DATASEC:
		each = sizeof(struct btf_var_secinfo);
		break;
	default:
		return 0;
	}
	return sizeof(*type) + once + count * each;
}

/* Where that name is, or the place that is free for it. */
static struct named *place(const struct tcpscope_btf *btf, enum space space, const char *name)
{
	uint32_t hash = btf_hash(space, name, strlen(name));
	struct named *found;

	for (;; hash++) {
		found = &btf->table[hash & btf->mask];
		if (!found->name || (found->space == space && !strcmp(btf_name(btf, found->name), name)))
			return found;
	}
}

/* The first of each name counts, as it does for libbpf. */
static void put(struct tcpscope_btf *btf, enum space space, uint32_t name, int64_t value)
{
	struct named *found;

	if (!*btf_name(btf, name))
		return;
	found = place(btf, space, btf_name(btf, name));
	if (!found->name)
		*found = (struct named){name, space, value};
}

static uint32_t enumerators(const struct btf_type *type)
{
	return btf_is_any_enum(type) ? btf_elements(type) : 0;
}

struct enumerator {
	uint32_t name;
	int64_t value;
};

static struct enumerator enumerator_at(const struct btf_type *type, uint32_t index)
{
	const struct btf_enum64 *wide = &btf_enum64(type)[index];
	const struct btf_enum *narrow = &btf_enum(type)[index];

	if (btf_is_enum64(type))
		return (struct enumerator){wide->name_off, btf_enum64_value(wide)};
	/* signed or not */
	return (struct enumerator){narrow->name_off, btf_kflag(type) ? narrow->val : (int64_t)(uint32_t)narrow->val};
}

static uint32_t first_type(const struct tcpscope_btf *btf)
{
	return btf->first ?: 1;
}

static int put_all(struct tcpscope_btf *btf)
{
	const struct btf_type *type;
	uint64_t names = 0, places = 1;
	struct enumerator found;

	for (uint32_t id = first_type(btf); id < btf->count; id++) {
		type = btf_type_at(btf, id);
		names += (space_of(type) != NOTHING) + enumerators(type);
	}
	while (3 * places < 4 * names + 4)
		places *= 2;
	btf->mask = places - 1;
	btf->table = calloc(places, sizeof(*btf->table));
	if (!btf->table)
		return -ENOMEM;
	for (uint32_t id = first_type(btf); id < btf->count; id++) {
		type = btf_type_at(btf, id);
		if (space_of(type) != NOTHING)
			put(btf, space_of(type), type->name_off, id);
		for (uint32_t i = 0; i < enumerators(type); i++) {
			found = enumerator_at(type, i);
			put(btf, ENUMERATOR, found.name, found.value);
		}
	}
	return 0;
}

/* "btf: Allow mmap of vmlinux btf" (6.16); before, the file is read. */
static int get_file(struct tcpscope_btf *btf, const char *path)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC), error = 0;
	struct stat status;
	ssize_t length = 0;

	if (fd < 0)
		return -errno;
	if (fstat(fd, &status) < 0) {
		error = -errno;
		goto out;
	}
	btf->data = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (btf->data != MAP_FAILED) {
		btf->size = status.st_size;
		goto out;
	}
	btf->data =
		mmap(NULL, status.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (btf->data == MAP_FAILED) {
		error = -errno;
		btf->data = NULL;
		goto out;
	}
	btf->size = status.st_size;
	for (size_t at = 0; at < btf->size; at += length) {
		length = read(fd, (char *)btf->data + at, btf->size - at);
		if (length <= 0) {
			error = length < 0 ? -errno : -EIO;
			break;
		}
	}
out:
	close(fd);
	return error;
}

/* The sections lie in the file, and each type in its section. */
static int find_types(struct tcpscope_btf *btf)
{
	const struct btf_header *header = btf->data;
	uint64_t types, strings, at, bytes;
	uint32_t room = btf->base ? 1 << 12 : 1 << 17, *larger;

	if (btf->size < sizeof(*header) || header->magic != BTF_MAGIC)
		return -EINVAL;
	types = (uint64_t)header->hdr_len + header->type_off;
	strings = (uint64_t)header->hdr_len + header->str_off;
	if (types % 4 || types + header->type_len > btf->size || strings + header->str_len > btf->size ||
	    !header->str_len || ((const char *)btf->data)[strings + header->str_len - 1])
		return -EINVAL;
	btf->types = (const char *)btf->data + types;
	btf->strings = (const char *)btf->data + strings;
	btf->strings_size = header->str_len;
	btf->first = btf->base ? btf->base->count : 0;
	btf->count = first_type(btf);
	for (at = 0; at < header->type_len; at += bytes) {
		if (!btf->starts || btf->count - btf->first == room) {
			room *= 2;
			larger = realloc(btf->starts, room * sizeof(*larger));
			if (!larger)
				return -ENOMEM;
			btf->starts = larger;
		}
		if (at + sizeof(struct btf_type) > header->type_len)
			return -EINVAL;
		bytes = btf_bytes((const struct btf_type *)(btf->types + at));
		if (!bytes || at + bytes > header->type_len)
			return -EINVAL;
		btf->starts[btf->count++ - btf->first] = at;
	}
	return 0;
}

static struct tcpscope_btf *load(const struct tcpscope_btf *base, const char *path)
{
	struct tcpscope_btf *btf = calloc(1, sizeof(*btf));
	int error = -ENOMEM;

	if (btf) {
		btf->base = base;
		error = get_file(btf, path);
	}
	if (!error)
		error = find_types(btf);
	if (!error)
		error = put_all(btf);
	if (error) {
		tcpscope_btf_free(btf);
		errno = -error;
		return NULL;
	}
	return btf;
}

struct tcpscope_btf *tcpscope_btf_load(void)
{
	return load(NULL, KERNEL_BTF);
}

struct tcpscope_btf *tcpscope_btf_load_module(const struct tcpscope_btf *kernel, const char *module)
{
	char path[sizeof(MODULE_BTF) + 64];

	snprintf(path, sizeof(path), MODULE_BTF, module);
	return load(kernel, path);
}

void tcpscope_btf_free(struct tcpscope_btf *btf)
{
	if (!btf)
		return;
	if (btf->data)
		munmap(btf->data, btf->size);
	free(btf->starts);
	free(btf->table);
	free(btf);
}

/* NULL if there is none. What the kernel and a module have, the kernel has. */
static const struct named *find(const struct tcpscope_btf *btf, enum space space, const char *name)
{
	const struct named *found = btf->base ? find(btf->base, space, name) : NULL;

	if (found)
		return found;
	found = place(btf, space, name);
	return found->name ? found : NULL;
}

int tcpscope_btf_parameters(const struct tcpscope_btf *btf, const char *function)
{
	const struct named *found = find(btf, FUNCTION, function);
	uint32_t prototype;

	if (!found)
		return -ENOENT;
	prototype = btf_type_at(btf, found->value)->type;
	return prototype && prototype < btf->count ? (int)btf_elements(btf_type_at(btf, prototype)) : -ENOENT;
}

int64_t tcpscope_btf_enumerator(const struct tcpscope_btf *btf, const char *name)
{
	const struct named *found = find(btf, ENUMERATOR, name);

	return found ? found->value : -ENOENT;
}

const char *tcpscope_btf_enumerator_at(const struct tcpscope_btf *btf, const char *enum_name, int index, int64_t *value)
{
	const struct named *named = find(btf, TYPE, enum_name);
	const struct btf_type *type = named ? btf_type_at(btf, named->value) : NULL;
	struct enumerator found;

	if (!type || index < 0 || (uint32_t)index >= enumerators(type))
		return NULL;
	found = enumerator_at(type, index);
	*value = found.value;
	return btf_name(btf, found.name);
}

bool tcpscope_btf_has_type(const struct tcpscope_btf *btf, const char *name)
{
	return find(btf, TYPE, name);
}

bool tcpscope_btf_has_typedef(const struct tcpscope_btf *btf, const char *name)
{
	return find(btf, TYPEDEF, name);
}

static bool points_to(const struct tcpscope_btf *btf, uint32_t id, const char *name)
{
	const struct btf_type *type = id && id < btf->count ? btf_type_at(btf, id) : NULL;

	if (!type || btf_kind(type) != BTF_KIND_PTR || !type->type || type->type >= btf->count)
		return false;
	type = btf_type_at(btf, type->type);
	return btf_kind(type) == BTF_KIND_STRUCT && !strcmp(btf_name(btf, type->name_off), name);
}

const char *tcpscope_btf_function_with(const struct tcpscope_btf *btf, const char *name, uint32_t *after,
				       int *parameter)
{
	for (uint32_t id = *after + 1; id < btf->count; id++) {
		const struct btf_type *type = btf_type_at(btf, id), *prototype;

		if (btf_kind(type) != BTF_KIND_FUNC || !type->type || type->type >= btf->count)
			continue;
		prototype = btf_type_at(btf, type->type);
		for (uint32_t i = 0; i < btf_elements(prototype); i++) {
			if (points_to(btf, btf_params(prototype)[i].type, name)) {
				*after = id;
				*parameter = i;
				return btf_name(btf, type->name_off);
			}
		}
	}
	return NULL;
}

int tcpscope_try_fentry(const struct tcpscope_btf *btf, const char *function)
{
	const struct named *found = find(btf, FUNCTION, function);
	struct bpf_insn instructions[] = {
		{.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0},
		{.code = BPF_JMP | BPF_EXIT},
	};
	LIBBPF_OPTS(bpf_prog_load_opts, options, .expected_attach_type = BPF_TRACE_FENTRY);
	int fd, link, error;

	if (!found)
		return -ENOENT;
	options.attach_btf_id = found->value;
	fd = bpf_prog_load(BPF_PROG_TYPE_TRACING, "tcpscope_try", "GPL", instructions, 2, &options);
	if (fd < 0)
		return -errno;
	link = bpf_link_create(fd, 0, BPF_TRACE_FENTRY, NULL);
	error = link < 0 ? -errno : 0;
	if (link >= 0)
		close(link);
	close(fd);
	return error;
}
