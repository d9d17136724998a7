/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The first rule in all classes of a wide image.
 *
 * The ANDed records name the candidate blocks. Where the classes have a rule of a block in
 * common it is a match, and the least number of all matches is the first rule. Blocks
 * come in the order of their first rules, so the lookup ends where a match is before
 * all that is left.
 *
 * Cost: two reads for each field and candidate block. The program's stage goes on after
 * VGW_STEPS: verifying more of them would take every endpoint longer to attach, and only
 * large policies need them.
 */
#ifndef VGW_WIDE_H
#define VGW_WIDE_H

#include "branchless.h"
#include "image.h"

#define VGW_STEPS 4         /* to a block or to a next tier, that a program takes by itself */
#define VGW_STAGE_STEPS 136 /* and a stage: for all blocks and tiers that an image can have */

/* The chunks in which the records of the fields' classes are; no record is in two. */
struct record_chunks {
	const struct image_chunk *of[FIELDS];
};

/*
 * Takes what the record of the field's class says. A field that restricts nothing has all
 * blocks, one word for each of them, and the vector of all places. Returns false for a
 * malformed image.
 */
static __always_inline bool wide_record(const struct image *image, const struct image_header *header,
					struct lookup *lookup, u32 field)
{
	u64 number = ((u64)header->records + lookup->classes[field]) & ~1ULL;
	struct class_record *record = &lookup->records[field];
	const struct image_line *line;

	record->admits[0] = record->admits[1] = ~0ULL;
	record->blocks[0] = record->blocks[1] = 0;
	record->refs[0] = record->refs[1] = IMAGE_EVERY_REF;
	record->vectors = IMAGE_EVERY_RULE;
	if (!lookup->classes[field])
		return true;
	line = image_line(image, number / VGW_IMAGE_LINE_WORDS);
	if (!line)
		return false;
	record->admits[0] = record->blocks[0] = line->words[number % VGW_IMAGE_LINE_WORDS];
	record->admits[1] = record->blocks[1] = line->words[number % VGW_IMAGE_LINE_WORDS + 1];
	record->refs[0] = number + 2;
	record->refs[1] = number + 2;
	record->vectors = header->vectors;
	if (header->used[1])
		record->refs[1] += count_bits(record->blocks[0]);
	return true;
}

/* The fields are ANDed at the end, so that what is read of one waits for no other. */
static __always_inline u64 blocks_in_common(const struct class_record *records, u32 half)
{
	return records[FIELD_REMOTE].admits[half] & records[FIELD_LOCAL].admits[half] &
	       records[FIELD_SERVICE].admits[half] & records[FIELD_SOURCE].admits[half];
}

/* Leaves the blocks in which all classes have rules in lookup->blocks. */
static __always_inline bool wide_begin(const struct image *image, const struct image_header *header,
				       struct lookup *lookup)
{
#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++) {
		if (!wide_record(image, header, lookup, field))
			return false;
		forget_values();
	}
	lookup->blocks[0] = header->used[0] & blocks_in_common(lookup->records, 0);
	lookup->blocks[1] = header->used[1] & blocks_in_common(lookup->records, 1);
	forget_values();
	return true;
}

/* Finds the chunks of the records that wide_begin took. Returns false for a malformed image. */
static __always_inline bool open_records(const struct image *image, const struct lookup *lookup,
					 struct record_chunks *chunks)
{
#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++) {
		chunks->of[field] = chunk_of_line(image, lookup->records[field].refs[0] /
								 VGW_IMAGE_LINE_WORDS);
		if (!chunks->of[field])
			return false;
	}
	return true;
}

/* Takes the field's word for block lookup->block. */
static __always_inline void block_ref(const struct record_chunks *chunks, struct lookup *lookup,
				      u32 field)
{
	const u64 *words = (const u64 *)chunks->of[field];
	struct class_record *record = &lookup->records[field];
	u64 half = lookup->block >> 6 & 1;
	u64 number = record->refs[half] + count_bits(record->blocks[half] & lookup->before);

	record->ref = words[number % (VGW_CHUNK_LINES * VGW_IMAGE_LINE_WORDS)];
}

/*
 * Takes the fields' words for block lookup->block, and leaves in lookup->summary the groups
 * of places in which all have rules.
 */
static __always_inline void block_refs(const struct record_chunks *chunks, struct lookup *lookup)
{
	const struct class_record *records = lookup->records;

#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++)
		block_ref(chunks, lookup, field);
	lookup->summary = (records[FIELD_REMOTE].ref & records[FIELD_LOCAL].ref &
			   records[FIELD_SERVICE].ref & records[FIELD_SOURCE].ref) >> 32;
	forget_values();
}

/* The vector of the field's class in the block that is looked into, or NULL. */
static __always_inline const struct image_line *vector(const struct image *image,
						       const struct lookup *lookup, u32 field)
{
	const struct class_record *record = &lookup->records[field];

	return image_line(image, record->vectors + REF_VECTOR(record->ref));
}

/* Leaves the rules of the field's class in a group of places in its groups. */
static __always_inline bool field_group(const struct image *image, struct lookup *lookup,
					u64 group, u32 field)
{
	u64 ref = lookup->records[field].ref;
	const struct image_groups *groups;

	lookup->groups[field] = ref;
	if (REF_HAS_ONE_GROUP(ref))
		return true;
	groups = (const void *)vector(image, lookup, field);
	if (!groups)
		return false;
	lookup->groups[field] = groups->groups[group & 31];
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
		 groups[FIELD_SOURCE] & 0xffff;
	if (common)
		lookup->place = group * 16 + lowest_bit(header, common);
	return true;
}

/*
 * Leaves the place of the first match in lookup->place, where lookup->summary has several
 * groups: all fields have vectors then.
 */
static __always_inline bool place_in_vectors(const struct image *image,
					     const struct image_header *header,
					     struct lookup *lookup)
{
	const struct image_line *remote = vector(image, lookup, FIELD_REMOTE);
	const struct image_line *local = vector(image, lookup, FIELD_LOCAL);
	const struct image_line *service = vector(image, lookup, FIELD_SERVICE);
	const struct image_line *source = vector(image, lookup, FIELD_SOURCE);
	u64 words = 0, any = 0, word;

	if (!remote || !local || !service || !source)
		return false;
#pragma clang loop unroll(full)
	for (u32 i = 0; i < VGW_IMAGE_LINE_WORDS; i++) {
		word = remote->words[i] & local->words[i] & service->words[i] & source->words[i];
		lookup->common.words[i] = word;
		any |= word;
	}
	if (!any)
		return true;
	forget_values();
#pragma clang loop unroll(full)
	for (u32 i = 0; i < VGW_IMAGE_LINE_WORDS; i++)
		words |= is_nonzero(lookup->common.words[i]) << i;
	words = lowest_bit(header, words) & (VGW_IMAGE_LINE_WORDS - 1);
	lookup->place = words * 64 + lowest_bit(header, lookup->common.words[words]);
	return true;
}

/* Leaves the place of the first match of the block in lookup->place, or NO_PLACE. */
static __always_inline bool place_in_block(const struct image *image,
					   const struct image_header *header,
					   const struct record_chunks *chunks,
					   struct lookup *lookup)
{
	bool whole = true;

	lookup->place = NO_PLACE;
	block_refs(chunks, lookup);
	if (lookup->summary & (lookup->summary - 1))
		whole = place_in_vectors(image, header, lookup);
	else if (lookup->summary)
		whole = place_in_group(image, header, lookup);
	forget_values();
	return whole;
}

/* Lets lookup->best be the first match of block lookup->block, if it is before the best so far. */
static __always_inline bool match_block(const struct image *image, const struct image_header *header,
					const struct record_chunks *chunks, struct lookup *lookup)
{
	u64 word;

	if (!place_in_block(image, header, chunks, lookup))
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
	return image_ref(image, header->firsts, lookup->block, &first) &&
	       first < RULE_NUMBER(lookup->best);
}

/* Puts the first block left into lookup->block. Returns whether there is one. */
static __always_inline bool next_block(const struct image_header *header, struct lookup *lookup)
{
	u64 half = is_zero(lookup->blocks[0]);
	u64 blocks = lookup->blocks[half & 1];
	u64 bit = lowest_bit(header, blocks);

	lookup->block = half * 64 + bit;
	lookup->before = (1ULL << (bit & 63)) - 1;
	forget_values();
	return blocks != 0;
}

/* Takes lookup->block from the blocks left. */
static __always_inline void take_block(struct lookup *lookup)
{
	u64 half = lookup->block >> 6 & 1;

	lookup->blocks[half] &= lookup->blocks[half] - 1;
	forget_values();
}

/* Leaves only the blocks behind the tier that the best match so far passes. */
static __always_inline void pass_tier(struct lookup *lookup)
{
	u64 next = RULE_NEXT_TIER(lookup->best);
	u64 beyond = is_below(63, next);

	lookup->blocks[0] &= bits_from(choose(beyond, 64, next) & 127);
	lookup->blocks[1] &= bits_from(choose(beyond, next - 64, 0) & 127);
	lookup->best = NO_RULE_WORD;
	forget_values();
}

/*
 * Takes `steps` steps at most, each to a block or to the next tier, and leaves the word of the
 * first match that is not PASS in lookup->best, or NO_RULE_WORD. Returns false for a
 * malformed image; lookup->unfinished says whether more steps are needed.
 */
static __always_inline bool wide_match(const struct image *image, const struct image_header *header,
				       struct lookup *lookup, u32 steps)
{
	struct record_chunks chunks;

	lookup->unfinished = 0;
	if (!open_records(image, lookup, &chunks))
		return false;
#pragma clang loop unroll(disable)
	for (u32 step = 0; step < steps; step++) {
		if (next_block(header, lookup) && may_improve(image, header, lookup)) {
			take_block(lookup);
			if (!match_block(image, header, &chunks, lookup))
				return false;
		} else {
			if (RULE_ACTION(lookup->best) != VGW_ACTION_PASS)
				return true;
			pass_tier(lookup);
		}
		forget_values();
	}
	lookup->unfinished = 1;
	return true;
}

#endif
