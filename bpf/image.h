/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The format of a compiled policy, which vgw/policy/ writes and only this directory reads.
 *
 * An image holds the rules of one path as an array of lines of 64 bytes. It begins with the
 * header. A small image is one map in `policies`. Of a longer one `policies` has a copy of the
 * beginning: a medium one is one map in `policies_medium`, and one that is longer still, or needs
 * more steps than a program takes, is large, in one or several maps of `policy_parts`. A reference
 * (u32) leads from a search to the next line of it or to a class: all values of a field that the
 * same rules admit. The number of a class is the word at which its record begins, and what that is
 * depends on the form of the image:
 *
 *   narrow  at most 64 rules. The record is one word, bit n of which is rule n.
 *   wide    rules stand in blocks of 1024, at most 64 of them, in the order of the first
 *           rule of each; no block has rules of two tiers, and within a block rules are
 *           in their order. The record is a word, bit n of which says that block n has
 *           rules that admit the class; and then a word for each of those blocks, in their
 *           order: a summary << 32 | a vector. Bit n of the vector, which is two lines, is the
 *           rule in place n of the block; bit n of the summary says that there are rules in
 *           group n, the 32 places from 32 * n on. Where there is one such group, the word has
 *           its 32 bits instead of the vector's line. No record and no vector is in two maps.
 *
 * Narrow images are small. The others are wide, medium and large ones under formats of their own.
 */
#ifndef VGW_IMAGE_H
#define VGW_IMAGE_H

#include "branchless.h"
#include "maps.h"

#define VGW_IMAGE_NARROW 0x76670301
#define VGW_IMAGE_WIDE 0x76670302
#define VGW_IMAGE_LARGE 0x76670303
#define VGW_IMAGE_MEDIUM 0x76670304

#define VGW_VECTOR_LINES 2
#define VGW_BLOCK_RULES (VGW_VECTOR_LINES * VGW_IMAGE_LINE_WORDS * 64)

/* Fields of a query, each with a search of its own. */
#define FIELD_REMOTE 0
#define FIELD_LOCAL 1
#define FIELD_SERVICE 2
#define FIELD_SOURCE 3
#define FIELDS 4

/* A reference: to a class, or to a line; and whether the next word of the value comes there. */
#define REF_KIND(ref) ((ref) >> 30)
#define REF_IS_TABLE(ref) ((ref) >> 31) /* of the two kinds of lines */
#define REF_CLASS 0
#define REF_NEXT_WORD(ref) ((ref) >> 29 & 1)
#define REF_INDEX(ref) ((ref) & 0x1fffffff)

/* A rule word: number of the rule << 32 | where the next tier begins << 16 | flags << 8 | action. */
#define RULE_NUMBER(word) ((word) >> 32)
#define RULE_NEXT_TIER(word) ((word) >> 16 & 0xffff) /* bit of a narrow image, block of a wide one */
#define RULE_FLAGS(word) ((word) >> 8 & 0xff)
#define RULE_ACTION(word) ((word) & 0xff)
#define NO_RULE_WORD (~0ULL)
#define NO_PLACE (~0ULL)

/* Of a block's word in a record: the vector, and whether it has the bits of its one group itself. */
#define REF_VECTOR(ref) ((ref) & 0xffffffff)
#define REF_HAS_ONE_GROUP(ref) (!((ref) >> 32 & ((ref) >> 32) - 1))

/* A search by index: entry 0 for values below `low`, then one for 1 << shift values each. */
struct image_table {
	u32 low;
	u32 shift;
	u32 last;    /* number of the last entry, which is for all values above too */
	u32 entries; /* number of the first of them among all u32s. last 0: the only class */
};

/*
 * Searches of an image. IPv4 and IPv6 addresses have each their own, and so have services and
 * source ports of TCP, of UDP and of all else.
 */
#define SEARCH_REMOTE(ipv6) (2 * (ipv6))
#define SEARCH_LOCAL(ipv6) (2 * (ipv6) + 1)
#define SEARCH_SERVICE(family) (4 + (family))
#define SEARCH_SOURCE(family) (7 + (family))

struct image_header {
	u32 format;
	u32 rules;       /* word that is the first rule word */
	u32 firsts;      /* wide: number of the first of each block's first rule, among all u32s */
	u32 unused[5];
	u64 used;        /* narrow: bits of all rules; wide: of all blocks */
	u64 by_default;  /* rule word of the default */
	u64 unused_words[2];
	struct image_table searches[12]; /* ten, and two that nothing uses */
	u8 bit_places[64];               /* see lowest_bit */
};

/* A line of a search: the reference behind the last key that the value is not below. */
struct image_node {
	u32 keys[7]; /* ascending */
	u32 unused;
	u32 refs[8]; /* refs[0] is for values below keys[0] */
};

/* Number of bits set (Hacker's Delight, 5-1). */
static __always_inline u64 count_bits(u64 bits)
{
	bits -= (bits >> 1) & 0x5555555555555555ULL;
	bits = (bits & 0x3333333333333333ULL) + ((bits >> 2) & 0x3333333333333333ULL);
	bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return (bits * 0x0101010101010101ULL) >> 56;
}

/* The bits from number `first` on, which may be 64. */
static __always_inline u64 bits_from(u64 first)
{
	u64 half = first >> 1;

	return ~0ULL << (half & 63) << ((first - half) & 63);
}

/*
 * Number of the lowest bit set: BPF has no instruction for it. The product with a de Bruijn
 * sequence has another number in its top six bits for each bit (Leiserson, Prokop and
 * Randall, "Using de Bruijn sequences to index a 1 in a computer word", 1998).
 */
#define DE_BRUIJN_SEQUENCE 0x03f79d71b4cb0a89ULL

static __always_inline u64 lowest_bit(const struct image_header *header, u64 bits)
{
	return header->bit_places[(bits & -bits) * DE_BRUIJN_SEQUENCE >> 58];
}

/*
 * Numbers are u64 from here on, whatever their width in an image: BPF has 64-bit registers,
 * and the compiler cuts every result of 32-bit arithmetic down to its width.
 */

/* An image that is open: the map in which it begins, and all of it is unless it is large. */
struct image {
	const void *start;
	u64 last;   /* number of the last line of that map, a mask */
	u64 first;  /* large: number of the first part */
	bool large; /* a constant wherever it is asked for */
};

static __always_inline const void *image_part(u64 number)
{
	u32 key = number, zero = 0;
	void *part = policy_parts.lookup(&key);

	if (!part)
		return NULL;
	return bpf_map_lookup_elem(part, &zero);
}

/* Opens an image that is in one map of so many lines. Returns false where there is no map. */
static __always_inline bool open_map(struct image *image, void *map, u64 lines)
{
	u32 zero = 0;

	image->large = false;
	image->first = 0;
	image->last = lines - 1;
	image->start = NULL;
	if (map)
		image->start = bpf_map_lookup_elem(map, &zero);
	return image->start != NULL;
}

/* Number of the policy of a path in a slot, in `policies` and `policies_medium`. */
static __always_inline u64 policy_place(u64 slot, u64 path)
{
	return slot * VGW_PATH_COUNT + path;
}

/* Opens a small image, and the header of any, of a path in a slot. Returns false where there is none. */
static __always_inline bool open_image(struct image *image, u64 slot, u64 path)
{
	u32 key = policy_place(slot, path);

	return open_map(image, policies.lookup(&key), VGW_CHUNK_LINES);
}

/* Opens a medium image. Returns false where there is none. */
static __always_inline bool open_medium(struct image *image, u64 slot, u64 path)
{
	u32 key = policy_place(slot, path);

	return open_map(image, policies_medium.lookup(&key), VGW_MEDIUM_LINES);
}

/* Number of the first part of a large image. */
static __always_inline u64 first_part(u64 slot, u64 path)
{
	return policy_place(slot, path) * VGW_IMAGE_PARTS;
}

/*
 * Whether a large image is there. The programs ask so that they refer to the map: an endpoint has
 * the maps that its programs refer to, and its stages come later.
 */
static __always_inline bool has_parts(u64 slot, u64 path)
{
	u32 key = first_part(slot, path);

	return policy_parts.lookup(&key) != NULL;
}

/* Opens the first part of a large image. Returns false where there is none. */
static __always_inline bool open_parts(struct image *image, u64 slot, u64 path)
{
	image->large = true;
	image->last = VGW_PART_LINES - 1;
	image->first = first_part(slot, path);
	image->start = image_part(image->first);
	return image->start != NULL;
}

/* The map in which number `index` is of what a line has `each` of, or NULL. */
static __always_inline const void *part_with(const struct image *image, u64 index, u64 each)
{
	if (!image->large || index < VGW_PART_LINES * each)
		return image->start;
	return image_part(image->first + index / (VGW_PART_LINES * each));
}

/* Where that is in its map. */
static __always_inline u64 place_in_part(const struct image *image, u64 index, u64 each)
{
	return index & (image->last * each + each - 1);
}

static __always_inline const void *image_line(const struct image *image, u64 index)
{
	const struct image_line *lines = part_with(image, index, 1);

	if (!lines)
		return NULL;
	return &lines[place_in_part(image, index, 1)];
}

/* Reads number `index` of all the u32s. Returns false where there is none. */
static __always_inline bool image_ref(const struct image *image, u64 index, u64 *ref)
{
	const u32 *refs = part_with(image, index, 2 * VGW_IMAGE_LINE_WORDS);

	if (!refs)
		return false;
	*ref = refs[place_in_part(image, index, 2 * VGW_IMAGE_LINE_WORDS)];
	return true;
}

/* Reads a word of the image. Returns false where there is none. */
static __always_inline bool image_word(const struct image *image, u64 index, u64 *word)
{
	const u64 *words = part_with(image, index, VGW_IMAGE_LINE_WORDS);

	if (!words)
		return false;
	*word = words[place_in_part(image, index, VGW_IMAGE_LINE_WORDS)];
	return true;
}

#endif
