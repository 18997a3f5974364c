// SPDX-License-Identifier: BSD-2-Clause
/* What the kernel has, by its BTF. */
#include "shim.h"

#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/*
 * libbpf finds a name by going through all types, more than a hundred thousand, and some fifty names are asked for. So all
 * of them go into one table: open addressing, at most half full, FNV-1a.
 */
enum space { FUNCTION, TYPE, TYPEDEF, ENUMERATOR, NOTHING };

struct named {
	uint32_t name; /* its offset, 0: free */
	uint32_t space;
	int32_t value; /* of an enumerator; of others their type's number */
};

struct tcpscope_btf {
	struct btf *btf;
	struct named *table;
	uint32_t mask;
};

static enum space space_of(const struct btf_type *type)
{
	switch (btf_kind(type)) {
	case BTF_KIND_FUNC:
		return FUNCTION;
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_ENUM:
		return TYPE;
	case BTF_KIND_TYPEDEF:
		return TYPEDEF;
	default:
		return NOTHING;
	}
}

/* Where that name is, or the place that is free for it. */
static struct named *place(const struct tcpscope_btf *btf, enum space space, const char *name)
{
	uint32_t hash = 2166136261u ^ space;
	struct named *found;

	for (const char *at = name; *at; at++)
		hash = (hash ^ (unsigned char)*at) * 16777619u;
	for (;; hash++) {
		found = &btf->table[hash & btf->mask];
		if (!found->name ||
		    (found->space == space && !strcmp(btf__name_by_offset(btf->btf, found->name), name)))
			return found;
	}
}

/* The first of each name counts, as it does for libbpf. */
static void put(struct tcpscope_btf *btf, enum space space, uint32_t name, int32_t value)
{
	struct named *found;

	if (!name)
		return;
	found = place(btf, space, btf__name_by_offset(btf->btf, name));
	if (!found->name)
		*found = (struct named){name, space, value};
}

static int put_all(struct tcpscope_btf *btf)
{
	uint32_t types = btf__type_cnt(btf->btf), names = 0, places = 1;
	const struct btf_type *type;

	for (uint32_t id = 1; id < types; id++) {
		type = btf__type_by_id(btf->btf, id);
		names += (space_of(type) != NOTHING) + (btf_is_enum(type) ? btf_vlen(type) : 0);
	}
	while (places < 2 * names)
		places *= 2;
	btf->mask = places - 1;
	btf->table = calloc(places, sizeof(*btf->table));
	if (!btf->table)
		return -ENOMEM;
	for (uint32_t id = 1; id < types; id++) {
		type = btf__type_by_id(btf->btf, id);
		if (space_of(type) != NOTHING)
			put(btf, space_of(type), type->name_off, id);
		for (int i = 0; btf_is_enum(type) && i < btf_vlen(type); i++)
			put(btf, ENUMERATOR, btf_enum(type)[i].name_off, btf_enum(type)[i].val);
	}
	return 0;
}

struct tcpscope_btf *tcpscope_btf_load(void)
{
	struct tcpscope_btf *btf = calloc(1, sizeof(*btf));
	int error = -ENOMEM;

	if (btf) {
		btf->btf = btf__parse_raw("/sys/kernel/btf/vmlinux");
		error = btf->btf ? put_all(btf) : -errno;
	}
	if (error) {
		tcpscope_btf_free(btf);
		errno = -error;
		return NULL;
	}
	return btf;
}

void tcpscope_btf_free(struct tcpscope_btf *btf)
{
	if (!btf)
		return;
	free(btf->table);
	btf__free(btf->btf);
	free(btf);
}

/* NULL if there is none. */
static const struct named *find(const struct tcpscope_btf *btf, enum space space, const char *name)
{
	const struct named *found = place(btf, space, name);

	return found->name ? found : NULL;
}

int tcpscope_btf_parameters(const struct tcpscope_btf *btf, const char *function)
{
	const struct named *found = find(btf, FUNCTION, function);
	const struct btf_type *type;

	if (!found)
		return -ENOENT;
	type = btf__type_by_id(btf->btf, btf__type_by_id(btf->btf, found->value)->type);
	return type ? btf_vlen(type) : -ENOENT;
}

int64_t tcpscope_btf_enumerator(const struct tcpscope_btf *btf, const char *name)
{
	const struct named *found = find(btf, ENUMERATOR, name);

	return found ? found->value : -ENOENT;
}

const char *tcpscope_btf_enumerator_at(const struct tcpscope_btf *btf, const char *enum_name, int index, int64_t *value)
{
	const struct named *found = find(btf, TYPE, enum_name);
	const struct btf_type *type = found ? btf__type_by_id(btf->btf, found->value) : NULL;

	if (!type || !btf_is_enum(type) || index < 0 || index >= btf_vlen(type))
		return NULL;
	*value = btf_kflag(type) ? btf_enum(type)[index].val : (uint32_t)btf_enum(type)[index].val; /* signed or not */
	return btf__name_by_offset(btf->btf, btf_enum(type)[index].name_off);
}

bool tcpscope_btf_has_type(const struct tcpscope_btf *btf, const char *name)
{
	return find(btf, TYPE, name);
}

bool tcpscope_btf_has_typedef(const struct tcpscope_btf *btf, const char *name)
{
	return find(btf, TYPEDEF, name);
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
