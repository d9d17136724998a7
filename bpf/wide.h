/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The first rule in all classes of a wide image.
 *
 * The ANDed records name the candidate blocks. Where the classes have a rule of a block in
 * common it is a match, and the least number of all matches is the first rule. Blocks
 * come in the order of their first rules, so the lookup ends where a match is before
 * all that is left.
 *
 * Cost: a word of the record for each field and candidate block, and where several groups
 * of places are in common two lines of the vector. A program takes VGW_STEPS, which is enough
 * for small images: verifying more of them would take every endpoint longer to attach. Large
 * images are the stage's alone.
 */
#ifndef VGW_WIDE_H
#define VGW_WIDE_H

#include "image.h"

#define VGW_STEPS 4        /* to a block or to a next tier, that a program takes by itself */
#define VGW_STAGE_STEPS 72 /* and a stage: to all blocks and tiers that an image can have */

/* The maps in which the records of the fields' classes are; no record is in two. */
struct record_parts {
	const u64 *of[FIELDS];
};

/* The fields are ANDed at the end, so that what is read of one waits for no other. */
static __always_inline u64 blocks_in_common(const struct class_record *records)
{
	return records[FIELD_REMOTE].blocks & records[FIELD_LOCAL].blocks &
	       records[FIELD_SERVICE].blocks & records[FIELD_SOURCE].blocks;
}

/*
 * Leaves the blocks in which all classes have rules in lookup->left, and where the records are
 * in `parts`. Returns false for a malformed image.
 */
static __always_inline bool wide_begin(const struct image *image, const struct image_header *header,
				       struct lookup *lookup, struct record_parts *parts)
{
#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++) {
		struct class_record *record = &lookup->records[field];
		u64 number = lookup->classes[field];

		parts->of[field] = part_with(image, number, VGW_IMAGE_LINE_WORDS);
		if (!parts->of[field])
			return false;
		record->blocks = parts->of[field][place_in_part(image, number, VGW_IMAGE_LINE_WORDS)];
		record->refs = number + 1;
	}
	forget_values();
	lookup->left = header->used & blocks_in_common(lookup->records);
	forget_values();
	return true;
}

/* Takes the field's word for block lookup->block. */
static __always_inline void block_ref(const struct image *image, const struct record_parts *parts,
				      struct lookup *lookup, u32 field)
{
	struct class_record *record = &lookup->records[field];
	u64 number = record->refs + count_bits(record->blocks & lookup->before);

	record->ref = parts->of[field][place_in_part(image, number, VGW_IMAGE_LINE_WORDS)];
}

/*
 * Takes the fields' words for block lookup->block, and leaves in lookup->summary the groups
 * of places in which all have rules.
 */
static __always_inline void block_refs(const struct image *image, const struct record_parts *parts,
				       struct lookup *lookup)
{
	const struct class_record *records = lookup->records;

#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++)
		block_ref(image, parts, lookup, field);
	lookup->summary = (records[FIELD_REMOTE].ref & records[FIELD_LOCAL].ref &
			   records[FIELD_SERVICE].ref & records[FIELD_SOURCE].ref) >> 32;
	forget_values();
}

/* The vector of the field's class in the block that is looked into, or NULL. */
static __always_inline const void *vector(const struct image *image, const struct lookup *lookup,
					  u32 field)
{
	u64 line = REF_VECTOR(lookup->records[field].ref);
	const struct image_line *lines = part_with(image, line, 1);

	if (!lines)
		return NULL;
	return &lines[place_in_part(image, line, 1) & ~1ULL];
}

/* Leaves the rules of the field's class in a group of places in its groups. */
static __always_inline bool field_group(const struct image *image, struct lookup *lookup,
					u64 group, u32 field)
{
	u64 ref = lookup->records[field].ref;
	const u32 *groups;

	lookup->groups[field] = ref;
	if (REF_HAS_ONE_GROUP(ref))
		return true;
	groups = vector(image, lookup, field);
	if (!groups)
		return false;
	lookup->groups[field] = groups[group & 31];
	return true;
}

/* Leaves the place of the first match in lookup->place, where lookup->summary has one group. */
static __always_inline bool place_in_group(const struct image *image,
					   const struct image_header *header,
					   struct lookup *lookup)
{
	u64 group = lowest_bit(header, lookup->summary);
	const u64 *groups = lookup->groups;
	u64 common;

#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++) {
		if (!field_group(image, lookup, group, field))
			return false;
		forget_values();
	}
	common = groups[FIELD_REMOTE] & groups[FIELD_LOCAL] & groups[FIELD_SERVICE] &
		 groups[FIELD_SOURCE] & 0xffffffff;
	if (common)
		lookup->place = group * 32 + lowest_bit(header, common);
	return true;
}

/* The vectors of all fields in the block that is looked into. */
struct vectors {
	const struct image_line *of[FIELDS];
};

/* Leaves the place of the first match in half a block in lookup->place, if there is one. */
static __always_inline void place_in_half(const struct image_header *header,
					  const struct vectors *vectors, struct lookup *lookup,
					  u64 half)
{
	u64 words = 0, any = 0, word;

#pragma clang loop unroll(full)
	for (u32 i = 0; i < VGW_IMAGE_LINE_WORDS; i++) {
		word = vectors->of[FIELD_REMOTE][half].words[i] &
		       vectors->of[FIELD_LOCAL][half].words[i] &
		       vectors->of[FIELD_SERVICE][half].words[i] &
		       vectors->of[FIELD_SOURCE][half].words[i];
		lookup->common.words[i] = word;
		any |= word;
	}
	if (!any)
		return;
	forget_values();
#pragma clang loop unroll(full)
	for (u32 i = 0; i < VGW_IMAGE_LINE_WORDS; i++)
		words |= is_nonzero(lookup->common.words[i]) << i;
	words = lowest_bit(header, words) & (VGW_IMAGE_LINE_WORDS - 1);
	lookup->place = (half * VGW_IMAGE_LINE_WORDS + words) * 64 +
			lowest_bit(header, lookup->common.words[words]);
}

/*
 * Leaves the place of the first match in lookup->place, where lookup->summary has several
 * groups: all fields have vectors then.
 */
static __always_inline bool place_in_vectors(const struct image *image,
					     const struct image_header *header,
					     struct lookup *lookup)
{
	struct vectors vectors;

#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++) {
		vectors.of[field] = vector(image, lookup, field);
		if (!vectors.of[field])
			return false;
	}
	if (lookup->summary & 0xffff)
		place_in_half(header, &vectors, lookup, 0);
	forget_values();
	if (lookup->place == NO_PLACE && lookup->summary >> 16)
		place_in_half(header, &vectors, lookup, 1);
	return true;
}

/* Leaves the place of the first match of the block in lookup->place, or NO_PLACE. */
static __always_inline bool place_in_block(const struct image *image,
					   const struct image_header *header,
					   const struct record_parts *parts, struct lookup *lookup)
{
	bool whole = true;

	lookup->place = NO_PLACE;
	block_refs(image, parts, lookup);
	if (lookup->summary & (lookup->summary - 1))
		whole = place_in_vectors(image, header, lookup);
	else if (lookup->summary)
		whole = place_in_group(image, header, lookup);
	forget_values();
	return whole;
}

/* Lets lookup->best be the first match of block lookup->block, if it is before the best so far. */
static __always_inline bool match_block(const struct image *image, const struct image_header *header,
					const struct record_parts *parts, struct lookup *lookup)
{
	u64 word;

	if (!place_in_block(image, header, parts, lookup))
		return false;
	if (lookup->place == NO_PLACE)
		return true;
	if (!image_word(image,
			(u64)header->rules + lookup->block * VGW_BLOCK_RULES + lookup->place, &word))
		return false;
	if (word < lookup->best)
		lookup->best = word;
	forget_values();
	return true;
}

/* Whether block lookup->block may have a rule before the best match so far. */
static __always_inline bool may_improve(const struct image *image, const struct image_header *header,
					const struct lookup *lookup)
{
	u64 first;

	if (lookup->best == NO_RULE_WORD)
		return true;
	return image_ref(image, (u64)header->firsts + lookup->block, &first) &&
	       first < RULE_NUMBER(lookup->best);
}

/* Puts the first block left into lookup->block. Returns whether there is one. */
static __always_inline bool next_block(const struct image_header *header, struct lookup *lookup)
{
	u64 left = lookup->left;

	if (!left)
		return false;
	lookup->block = lowest_bit(header, left);
	lookup->before = (left & -left) - 1;
	forget_values();
	return true;
}

/*
 * Takes `steps` steps at most, each to a block or to the next tier, and leaves the word of the
 * first match that is not PASS in lookup->best, or NO_RULE_WORD. Returns false for a
 * malformed image; lookup->unfinished says whether more steps are needed.
 */
static __always_inline bool wide_match(const struct image *image, const struct image_header *header,
				       struct lookup *lookup, u32 steps)
{
	struct record_parts parts;

	lookup->unfinished = 0;
	if (!wide_begin(image, header, lookup, &parts))
		return false;
#pragma clang loop unroll(disable)
	for (u32 step = 0; step < steps; step++) {
		if (next_block(header, lookup) && may_improve(image, header, lookup)) {
			lookup->left &= lookup->left - 1;
			if (!match_block(image, header, &parts, lookup))
				return false;
		} else {
			if (RULE_ACTION(lookup->best) != VGW_ACTION_PASS)
				return true;
			lookup->left &= bits_from(RULE_NEXT_TIER(lookup->best));
			lookup->best = NO_RULE_WORD;
		}
		forget_values();
	}
	lookup->unfinished = 1;
	return true;
}

#endif
