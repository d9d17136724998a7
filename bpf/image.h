/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The format of a compiled policy, which vgw/policy/ writes and only this directory reads.
 *
 * An image holds the rules of one path as an array of lines of 64 bytes. It begins with
 * the header. A reference (u32) leads from a search to the next line of it or to a class:
 * all values of a field that the same rules admit. The number of a class says at which word
 * of the records its record is, and what that is depends on the form of the image:
 *
 *   narrow  at most 64 rules. The record is one word, bit n of which is rule n.
 *   wide    rules stand in blocks of 512, at most 128 of them, in the order of the first
 *           rule of each; no block has rules of two tiers, and within a block rules are
 *           in their order. The record is two words, bit n of which says that block n has
 *           rules that admit the class; and then a word for each of those blocks, in their
 *           order: a summary << 32 | a vector. Bit n of the vector, a line, is the rule in
 *           place n of the block; bit n of the summary says that there are rules in group n,
 *           the 16 places from 16 * n on. Where there is one such group, the word has its
 *           16 bits instead of the vector. A record begins at a line and is all in one chunk.
 *
 * Class 0 is that of values which all rules admit; it restricts nothing and has no record.
 */
#ifndef VGW_IMAGE_H
#define VGW_IMAGE_H

#include "maps.h"

#define VGW_IMAGE_NARROW 0x76670201
#define VGW_IMAGE_WIDE 0x76670202

#define VGW_BLOCK_RULES (VGW_IMAGE_LINE_WORDS * 64)

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

#define IMAGE_EVERY_RULE 4 /* the line every_rule of the header, */
#define IMAGE_EVERY_REF 7  /* and the word every_ref */

/* A search by index: entry 0 for values below `low`, then one for 1 << shift values each. */
struct image_table {
	u32 low;
	u32 shift;
	u32 last;    /* number of the last entry, which is for all values above too */
	u32 entries; /* line of the first of them: references, 16 a line. last 0: the only class */
};

/* Searches of an image; IPv4 and IPv6 addresses have each their own. */
#define SEARCH_REMOTE(ipv6) (2 * (ipv6))
#define SEARCH_LOCAL(ipv6) (2 * (ipv6) + 1)
#define SEARCH_SERVICE 4
#define SEARCH_SOURCE 5

struct image_header {
	u32 format;
	u32 rules;       /* word that is the first rule word */
	u32 firsts;      /* wide: line of the numbers of each block's first rule */
	u32 records;     /* word that the numbers of classes count from */
	u32 vectors;     /* wide: line that the numbers of vectors count from */
	u32 unused[3];
	u64 used[2];     /* narrow: bits of all rules; wide: of all blocks */
	u64 by_default;  /* rule word of the default */
	u64 every_ref;   /* word for a block of a class that all rules admit */
	struct image_table searches[8]; /* six, and two that nothing uses */
	u8 bit_places[64];              /* see lowest_bit */
	u64 every_rule[VGW_IMAGE_LINE_WORDS]; /* a vector of all places */
};

/* A line of a search: the reference behind the last key that the value is not below. */
struct image_node {
	u32 keys[7]; /* ascending */
	u32 unused;
	u32 refs[8]; /* refs[0] is for values below keys[0] */
};

/* A vector by groups of places. */
struct image_groups {
	u16 groups[32];
};

struct image_refs {
	u32 refs[16];
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

/* An image in `policies`. Its first chunk is at hand: all of most images is in there. */
struct image {
	u64 first; /* number of that chunk */
	const struct image_chunk *chunk;
};

static __always_inline const struct image_chunk *image_chunk(u64 number)
{
	u32 key = number, zero = 0;
	void *chunk = policies.lookup(&key);

	if (!chunk)
		return NULL;
	return bpf_map_lookup_elem(chunk, &zero);
}

/* Opens the image of a path in a slot. Returns false where there is none. */
static __always_inline bool open_image(struct image *image, u64 slot, u64 path)
{
	image->first = (slot * VGW_PATH_COUNT + path) * VGW_IMAGE_CHUNKS;
	image->chunk = image_chunk(image->first);
	return image->chunk != NULL;
}

/* The chunk that a line is in, or NULL. */
static __always_inline const struct image_chunk *chunk_of_line(const struct image *image, u64 index)
{
	if (index < VGW_CHUNK_LINES)
		return image->chunk;
	return image_chunk(image->first + index / VGW_CHUNK_LINES);
}

static __always_inline const void *image_line(const struct image *image, u64 index)
{
	const struct image_chunk *chunk = chunk_of_line(image, index);
	const struct image_line *lines;

	if (!chunk)
		return NULL;
	lines = (const void *)chunk->lines;
	return &lines[index % VGW_CHUNK_LINES];
}

/* Reads number `index` of the u32s that begin at `line`. Returns false where there is none. */
static __always_inline bool image_ref(const struct image *image, u64 line, u64 index, u64 *ref)
{
	const struct image_refs *refs = image_line(image, line + index / 16);

	if (!refs)
		return false;
	*ref = refs->refs[index % 16];
	return true;
}

/* Reads a word of the image. Returns false where there is none. */
static __always_inline bool image_word(const struct image *image, u64 index, u64 *word)
{
	const struct image_line *line = image_line(image, index / VGW_IMAGE_LINE_WORDS);

	if (!line)
		return false;
	*word = line->words[index % VGW_IMAGE_LINE_WORDS];
	return true;
}

#endif
