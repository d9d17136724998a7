/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rule lookup: from a query to the verdict of the first rule that matches.
 *
 * The compiled policy is an image: an array of 64-bit words, in blocks, that
 * vgw/policy/compile.py writes and only this file reads. Each of four fields of a
 * query (remote address, local address, service, source port) is looked up by
 * binary search among sorted ranges; a range names a bit vector with one bit per
 * rule that admits the value. The first bit set in all four vectors is the first
 * rule that matches. Tiers begin at block boundaries of the vectors, so that `pass`
 * goes on with the first block of the next tier.
 *
 * Cost: at most 2 * (VGW_ADDRESS_STEPS + VGW_VALUE_STEPS) steps and 4 * VGW_VECTOR_BLOCKS block reads,
 * whatever the packet.
 */
#ifndef VGW_POLICY_H
#define VGW_POLICY_H

#include "branchless.h"
#include "clock.h"
#include "maps.h"
#include "protocols.h"

#define VGW_IMAGE_FORMAT 1
#define VGW_ADDRESS_STEPS 14    /* binary search among at most 2^14 ranges of addresses */
#define VGW_VALUE_STEPS 13      /* and 2^13 of services or source ports */
#define VGW_VECTOR_BLOCKS 6     /* of 512 rules each */
#define VGW_BLOCK_RULES (VGW_IMAGE_BLOCK_WORDS * 64)

/* Block 0 starts with the format; two blocks of fields for each path follow. */
#define IMAGE_FORMAT_BLOCK 0
#define IMAGE_FIELDS_BLOCK(path) (1 + 2 * (path))

enum image_field {
	IMAGE_REMOTE,  /* first range; ranges: high halves, low halves, vectors */
	IMAGE_REMOTE_COUNT,
	IMAGE_LOCAL,
	IMAGE_LOCAL_COUNT,
	IMAGE_SERVICE, /* first range; ranges: first value << 32 | vector */
	IMAGE_SERVICE_COUNT,
	IMAGE_SOURCE,
	IMAGE_SOURCE_COUNT,
	IMAGE_BLOCKS,  /* blocks in a vector */
	IMAGE_RULES,   /* first rule word; bit n of a vector is word IMAGE_RULES + n */
	IMAGE_DEFAULT, /* rule word of the default */
};

/* A rule word: rule id << 32 | first vector block of the next tier << 16 | flags << 8 | action. */
#define RULE_ID(word) ((u32)((word) >> 32))
#define RULE_NEXT_TIER(word) ((u32)((word) >> 16) & 0xffff)
#define RULE_FLAGS(word) ((u32)((word) >> 8) & 0xff)
#define RULE_ACTION(word) ((u32)(word) & 0xff)

static __always_inline const struct image_block *image_block(void *image, u32 index)
{
	return bpf_map_lookup_elem(image, &index);
}

/* Reads a word into *value. Returns false where the image has no such word. */
static __always_inline bool image_read(void *image, u32 index, u64 *value)
{
	const struct image_block *block = image_block(image, index / VGW_IMAGE_BLOCK_WORDS);

	if (!block)
		return false;
	*value = block->words[index % VGW_IMAGE_BLOCK_WORDS];
	return true;
}

/*
 * Both searches keep `low` on the last range that starts at or before the value,
 * as an absolute word index: the image's first range starts at the least value.
 * They leave the block of the value's vector in *vector, or return false for a
 * malformed image.
 */
static __always_inline bool search_address(void *image, struct lookup *lookup, u32 count,
					   const struct vgw_address *address, u32 *vector)
{
	u64 high = ntohll(address->halves[0]), rest = ntohll(address->halves[1]);
	u64 start, start_rest, beyond;
	u32 half;

#pragma clang loop unroll(disable)
	for (u32 step = 0; step < VGW_ADDRESS_STEPS; step++) {
		if (lookup->size <= 1)
			break;
		half = lookup->size >> 1;
		if (!image_read(image, lookup->low + half, &start) ||
		    !image_read(image, lookup->low + half + count, &start_rest))
			return false;
		beyond = is_less(high, start) |
			 (is_less(rest, start_rest) & is_zero(high ^ start));
		lookup->low += half * (1 - beyond);
		lookup->size -= half;
		forget_values();
	}
	if (!image_read(image, lookup->low + 2 * count, &start))
		return false;
	*vector = start / VGW_IMAGE_BLOCK_WORDS;
	return true;
}

static __always_inline bool search_value(void *image, struct lookup *lookup, u32 value,
					 u32 *vector)
{
	u32 half;
	u64 range;

#pragma clang loop unroll(disable)
	for (u32 step = 0; step < VGW_VALUE_STEPS; step++) {
		if (lookup->size <= 1)
			break;
		half = lookup->size >> 1;
		if (!image_read(image, lookup->low + half, &range))
			return false;
		lookup->low += half * (1 - is_less(value, range >> 32));
		lookup->size -= half;
		forget_values();
	}
	if (!image_read(image, lookup->low, &range))
		return false;
	*vector = (u32)range / VGW_IMAGE_BLOCK_WORDS;
	return true;
}

static __always_inline void search_among(struct lookup *lookup, const u64 *fields, u32 first)
{
	lookup->low = fields[first];
	lookup->size = fields[first + 1];
	forget_values();
}

/* Number of the lowest bit set; BPF has no instruction for it. */
static __always_inline u32 lowest_bit(u64 bits)
{
	u64 below = (bits & -bits) - 1;

	below -= (below >> 1) & 0x5555555555555555ULL;
	below = (below & 0x3333333333333333ULL) + ((below >> 2) & 0x3333333333333333ULL);
	below = (below + (below >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return (below * 0x0101010101010101ULL) >> 56;
}

static __always_inline void count_rule(u32 rule, u32 bytes)
{
	struct rule_counter *counter;
	void *counters;
	u32 zero = 0;

	counters = rule_counters.lookup(&zero);
	if (!counters)
		return;
	counter = bpf_map_lookup_elem(counters, &rule);
	if (!counter)
		return;
	__sync_fetch_and_add(&counter->packets, 1);
	__sync_fetch_and_add(&counter->bytes, bytes);
	counter->last_hit_ns = clock_now();
}

static __always_inline u32 verdict_of_action(u32 action)
{
	switch (action) {
	case VGW_ACTION_ACCEPT:
		return VGW_VERDICT_ACCEPT;
	case VGW_ACTION_REJECT:
		return VGW_VERDICT_REJECT;
	default:
		return VGW_VERDICT_DROP;
	}
}

static __always_inline void decide_by(struct scratch *work, u64 rule, u32 reason)
{
	work->decision.verdict = verdict_of_action(RULE_ACTION(rule));
	work->decision.reason = reason;
	work->decision.rule = RULE_ID(rule);
	work->decision.flags = RULE_FLAGS(rule);
}

static __always_inline bool admit_all(void *image, struct lookup *lookup, u32 vector)
{
	const struct image_block *block = image_block(image, vector);

	if (!block)
		return false;
	lookup->common = *block;
	return true;
}

static __always_inline bool admit_only(void *image, struct lookup *lookup, u32 vector)
{
	const struct image_block *block = image_block(image, vector);

	if (!block)
		return false;
#pragma clang loop unroll(full)
	for (u32 i = 0; i < VGW_IMAGE_BLOCK_WORDS; i++)
		lookup->common.words[i] &= block->words[i];
	return true;
}

/*
 * Leaves in lookup->bit the first rule in block `index` of all four vectors, or
 * VGW_BLOCK_RULES where there is none. Returns false for a malformed image.
 */
static __always_inline bool match_block(void *image, struct lookup *lookup, u32 index)
{
	u64 word, first = 0, number = 0, found;

	if (!admit_all(image, lookup, lookup->remote + index) ||
	    !admit_only(image, lookup, lookup->local + index) ||
	    !admit_only(image, lookup, lookup->service + index) ||
	    !admit_only(image, lookup, lookup->source + index))
		return false;
#pragma clang loop unroll(full)
	for (int i = VGW_IMAGE_BLOCK_WORDS - 1; i >= 0; i--) {
		word = lookup->common.words[i];
		found = is_nonzero(word);
		first = choose(found, word, first);
		number = choose(found, i, number);
	}
	lookup->bit = first ? number * 64 + lowest_bit(first) : VGW_BLOCK_RULES;
	forget_values();
	return true;
}

/*
 * Finds the first rule in all four vectors that is not PASS and leaves its word in
 * lookup->rule. Returns false where there is none.
 */
static __always_inline bool first_match(void *image, struct lookup *lookup, u32 blocks, u32 rules)
{
	lookup->next_tier = 0;
	forget_values();
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_VECTOR_BLOCKS; i++) {
		if (i >= blocks)
			break;
		if (i < lookup->next_tier)
			continue;
		if (!match_block(image, lookup, i))
			return false;
		if (lookup->bit == VGW_BLOCK_RULES)
			continue;
		if (!image_read(image, rules + i * VGW_BLOCK_RULES + lookup->bit, &lookup->rule))
			return false;
		forget_values();
		if (RULE_ACTION(lookup->rule) != VGW_ACTION_PASS)
			return true;
		lookup->next_tier = RULE_NEXT_TIER(lookup->rule);
		forget_values();
	}
	return false;
}

/* Leads each field of the query to its vector. Returns false for a malformed image. */
static __always_inline bool find_vectors(void *image, const u64 *fields,
					 const struct policy_query *query, struct lookup *lookup)
{
	search_among(lookup, fields, IMAGE_REMOTE);
	if (!search_address(image, lookup, fields[IMAGE_REMOTE_COUNT], &query->remote,
			    &lookup->remote))
		return false;
	search_among(lookup, fields, IMAGE_LOCAL);
	if (!search_address(image, lookup, fields[IMAGE_LOCAL_COUNT], &query->local,
			    &lookup->local))
		return false;
	search_among(lookup, fields, IMAGE_SERVICE);
	if (!search_value(image, lookup, query->service, &lookup->service))
		return false;
	search_among(lookup, fields, IMAGE_SOURCE);
	return search_value(image, lookup, query->source, &lookup->source);
}

/*
 * Judges work->query by the policy in `slot`; the decision is in the work memory. It is
 * a drop with NO_POLICY where the slot holds no readable policy: without one nothing
 * passes.
 */
static __always_inline void policy_judge(u32 slot, struct scratch *work)
{
	u32 first = IMAGE_FIELDS_BLOCK(work->query.path);
	const struct image_block *format, *fields, *rest;
	void *image = policies.lookup(&slot);

	decide(work, VGW_VERDICT_DROP, VGW_REASON_NO_POLICY);
	if (!image)
		return;
	format = image_block(image, IMAGE_FORMAT_BLOCK);
	fields = image_block(image, first);
	rest = image_block(image, first + 1);
	if (!format || !fields || !rest || format->words[0] != VGW_IMAGE_FORMAT)
		return;
	if (!find_vectors(image, fields->words, &work->query, &work->lookup))
		return;
	forget_values();
	if (first_match(image, &work->lookup, rest->words[IMAGE_BLOCKS - VGW_IMAGE_BLOCK_WORDS],
			rest->words[IMAGE_RULES - VGW_IMAGE_BLOCK_WORDS]))
		decide_by(work, work->lookup.rule, VGW_REASON_RULE);
	else if (work->query.ordinary)
		decide_by(work, rest->words[IMAGE_DEFAULT - VGW_IMAGE_BLOCK_WORDS],
			  VGW_REASON_DEFAULT);
	else
		decide(work, VGW_VERDICT_DROP, VGW_REASON_PROTOCOL);
}

#endif
