// SPDX-License-Identifier: BSD-2-Clause
/*
 * The kernel's BTF, cut down to what an object asks for: a thousand types instead of a hundred thousand. For each struct that
 * the object names, libbpf compares the names of all types. For a type that the kernel lacks it would also read the BTF of
 * every module, which takes CAP_SYS_ADMIN, unless the types come from a file. All of TCP is built in; an object that hooks a
 * function of a module finds that module's types in the file, too.
 */
#include "kernel_btf.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

struct bytes {
	char *data;
	size_t used, room;
	bool failed; /* no memory */
};

struct excerpt {
	const struct tcpscope_btf *kernel;
	uint32_t *numbers;  /* a type's number in the kernel -> here; 0: not in the excerpt */
	struct bytes order; /* its types, as numbers in the kernel */
	struct bytes types, strings;
};

/* Returns where the bytes begin, also if they found no room. */
static size_t append(struct bytes *to, const void *data, size_t size)
{
	size_t at = to->used, room = to->room ? to->room : 1 << 16;
	char *larger;

	while (room < at + size)
		room *= 2;
	if (room != to->room && !to->failed) {
		larger = realloc(to->data, room);
		to->failed = !larger;
		if (larger) {
			to->data = larger;
			to->room = room;
		}
	}
	if (to->failed)
		return at;
	memcpy(to->data + at, data, size);
	to->used += size;
	return at;
}

/* The number of the kernel's type `id` in the excerpt, which will have it. */
static uint32_t number_of(struct excerpt *excerpt, uint32_t id)
{
	if (!id || id >= excerpt->kernel->count)
		return 0;
	if (!excerpt->numbers[id]) {
		append(&excerpt->order, &id, sizeof(id));
		excerpt->numbers[id] = excerpt->order.used / sizeof(id);
	}
	return excerpt->numbers[id];
}

static uint32_t name_of(struct excerpt *excerpt, uint32_t name)
{
	const char *text = btf_name(excerpt->kernel, name);

	return *text ? append(&excerpt->strings, text, strlen(text) + 1) : 0;
}

/* Copies a type. What it contains comes later: its number is known. */
static void put(struct excerpt *excerpt, const struct btf_type *from)
{
	size_t at = append(&excerpt->types, from, btf_bytes(from));
	struct btf_type *type = (struct btf_type *)(excerpt->types.data + at);
	uint32_t count = btf_elements(from);

	if (excerpt->types.failed)
		return;
	type->name_off = name_of(excerpt, from->name_off);
	switch (btf_kind(from)) {
	case BTF_KIND_PTR:
		type->type = 0;
		break;
	case BTF_KIND_TYPEDEF:
	case BTF_KIND_VOLATILE:
	case BTF_KIND_CONST:
	case BTF_KIND_RESTRICT:
	case BTF_KIND_TYPE_TAG:
		type->type = number_of(excerpt, from->type);
		break;
	case BTF_KIND_ARRAY:
		btf_array(type)->type = number_of(excerpt, btf_array(from)->type);
		btf_array(type)->index_type = number_of(excerpt, btf_array(from)->index_type);
		break;
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
		for (uint32_t i = 0; i < count; i++) {
			btf_members(type)[i].name_off = name_of(excerpt, btf_members(from)[i].name_off);
			btf_members(type)[i].type = number_of(excerpt, btf_members(from)[i].type);
		}
		break;
	case BTF_KIND_ENUM:
		for (uint32_t i = 0; i < count; i++)
			btf_enum(type)[i].name_off = name_of(excerpt, btf_enum(from)[i].name_off);
		break;
	case BTF_KIND_ENUM64:
		for (uint32_t i = 0; i < count; i++)
			btf_enum64(type)[i].name_off = name_of(excerpt, btf_enum64(from)[i].name_off);
		break;
	case BTF_KIND_FUNC_PROTO: /* of a typedef */
		type->type = number_of(excerpt, from->type);
		for (uint32_t i = 0; i < count; i++) {
			btf_params(type)[i].name_off = name_of(excerpt, btf_params(from)[i].name_off);
			btf_params(type)[i].type = number_of(excerpt, btf_params(from)[i].type);
		}
		break;
	}
}

/* Can CO-RE ask for a type of this kind by its name? */
static bool is_asked_for(const struct btf_type *type)
{
	switch (btf_kind(type)) {
	case BTF_KIND_INT:
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_ENUM:
	case BTF_KIND_ENUM64:
	case BTF_KIND_TYPEDEF:
		return type->name_off;
	default:
		return false;
	}
}

/* Without a flavor: `sock___old` asks for `sock`. */
static size_t name_length(const char *name)
{
	size_t length = strlen(name);

	/* The last one counts, and only between other characters: bpf_core_essential_name_len() of libbpf. */
	for (size_t at = length < 5 ? 0 : length - 4; at-- > 0;)
		if (name[at] != '_' && !strncmp(name + at + 1, "___", 3) && name[at + 4] != '_')
			return at + 1;
	return length;
}

#define PLACES 4096

struct asked {
	const char *names[PLACES]; /* open addressing */
	uint32_t count;
};

static const char **asked_place(struct asked *asked, const char *name, size_t length)
{
	const char **place;

	for (uint32_t hash = btf_hash(0, name, length);; hash++) {
		place = &asked->names[hash % PLACES];
		if (!*place || (name_length(*place) == length && !memcmp(*place, name, length)))
			return place;
	}
}

static int ask(struct asked *asked, const struct btf *local)
{
	for (uint32_t id = 1; id < btf__type_cnt(local); id++) {
		const struct btf_type *type = btf__type_by_id(local, id);
		const char *name = btf__name_by_offset(local, type->name_off), **place;

		if (!is_asked_for(type))
			continue;
		place = asked_place(asked, name, name_length(name));
		if (*place)
			continue;
		if (++asked->count > PLACES / 2)
			return -E2BIG;
		*place = name;
	}
	return 0;
}

/* A type of a module that the kernel has, too: libbpf takes that of the kernel. */
static bool is_the_kernels(const struct tcpscope_btf *btf, uint32_t id, const char *name)
{
	return btf->base && id >= btf->first &&
	       (tcpscope_btf_has_type(btf->base, name) || tcpscope_btf_has_typedef(btf->base, name));
}

static int write_all(int fd, const void *data, size_t size)
{
	for (ssize_t length; size; data = (const char *)data + length, size -= length) {
		length = write(fd, data, size);
		if (length < 0)
			return -errno;
	}
	return 0;
}

int tcpscope_btf_excerpt(const struct tcpscope_btf *kernel, const struct btf *local, int fd)
{
	struct excerpt excerpt = {.kernel = kernel, .numbers = calloc(kernel->count, sizeof(uint32_t))};
	struct btf_header header = {.magic = BTF_MAGIC, .version = BTF_VERSION, .hdr_len = sizeof(header)};
	struct asked *asked = calloc(1, sizeof(*asked));
	int error = asked && excerpt.numbers ? ask(asked, local) : -ENOMEM;

	if (error)
		goto out;
	append(&excerpt.strings, "", 1);
	for (uint32_t id = 1; id < kernel->count; id++) {
		const struct btf_type *type = btf_type_at(kernel, id);
		const char *name = btf_name(kernel, type->name_off);

		if (is_asked_for(type) && *asked_place(asked, name, strlen(name)) && !is_the_kernels(kernel, id, name))
			number_of(&excerpt, id);
	}
	for (size_t at = 0; at < excerpt.order.used; at += sizeof(uint32_t))
		put(&excerpt, btf_type_at(kernel, *(uint32_t *)(excerpt.order.data + at)));
	if (excerpt.order.failed || excerpt.types.failed || excerpt.strings.failed) {
		error = -ENOMEM;
		goto out;
	}
	header.type_len = header.str_off = excerpt.types.used;
	header.str_len = excerpt.strings.used;
	error = write_all(fd, &header, sizeof(header));
	if (!error)
		error = write_all(fd, excerpt.types.data, excerpt.types.used);
	if (!error)
		error = write_all(fd, excerpt.strings.data, excerpt.strings.used);
out:
	free(excerpt.numbers);
	free(excerpt.order.data);
	free(excerpt.types.data);
	free(excerpt.strings.data);
	free(asked);
	return error;
}
