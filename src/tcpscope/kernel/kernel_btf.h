/* SPDX-License-Identifier: BSD-2-Clause */
/* The kernel's BTF, as kernel_btf.c reads it. The format: Documentation/bpf/btf.rst, include/uapi/linux/btf.h. */
#ifndef TCPSCOPE_KERNEL_BTF_H
#define TCPSCOPE_KERNEL_BTF_H

#include "shim.h"

#include <bpf/btf.h>
#include <string.h>

#define KERNEL_BTF "/sys/kernel/btf/vmlinux"
#define MODULE_BTF "/sys/kernel/btf/%s"

struct named;

/* That of the kernel, or of a module: the numbers of its types, and the offsets of its names, go on behind those of the kernel. */
struct tcpscope_btf {
	const struct tcpscope_btf *base; /* of a module: the kernel */
	void *data;
	size_t size;
	const char *types, *strings; /* its two sections */
	uint32_t strings_size;
	uint32_t *starts; /* the number of a type, less `first` -> where it begins in `types` */
	uint32_t first;   /* the number of its first type: of the kernel that of `void` */
	uint32_t count;   /* of types, with those of the kernel, and with `void` */
	struct named *table;
	uint32_t mask;
};

static inline const struct btf_type *btf_type_at(const struct tcpscope_btf *btf, uint32_t id)
{
	if (id < btf->first)
		btf = btf->base;
	return (const struct btf_type *)(btf->types + btf->starts[id - btf->first]);
}

/* The name at this offset; none if it lies outside. The last name ends with the section. */
static inline const char *btf_name(const struct tcpscope_btf *btf, uint32_t offset)
{
	if (btf->base && offset >= btf->base->strings_size)
		offset -= btf->base->strings_size;
	else if (btf->base)
		btf = btf->base;
	return offset < btf->strings_size ? btf->strings + offset : "";
}

/* Members, parameters, enumerators. 16 bits before Linux 7.2, and eight zero bits above them. */
static inline uint32_t btf_elements(const struct btf_type *type)
{
	return type->info & 0xffffff;
}

/* Bytes of a type with what its kind adds; 0: the kind is newer than this reader. */
size_t btf_bytes(const struct btf_type *type);

/* Eight bytes a step, as in FNV-1a; the high bits of a product depend on all bits of its factors. */
static inline uint32_t btf_hash(uint64_t hash, const char *name, size_t length)
{
	uint64_t word;

	for (; length >= 8; name += 8, length -= 8) {
		memcpy(&word, name, 8);
		hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
		hash ^= hash >> 32;
	}
	word = 0;
	memcpy(&word, name, length);
	hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
	return hash ^ hash >> 32;
}

#endif
