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
 * Cost: at most VGW_REMOTE_STEPS + VGW_LOCAL_STEPS + VGW_SERVICE_STEPS + VGW_SOURCE_STEPS
 * steps and 4 * VGW_VECTOR_BLOCKS block reads, whatever the packet.
 */
#ifndef VGW_POLICY_H
#define VGW_POLICY_H

#include "branchless.h"
#include "clock.h"
#include "maps.h"
#include "protocols.h"

#define VGW_IMAGE_FORMAT 1
#define VGW_REMOTE_STEPS 13   /* binary search among at most 2^13 ranges of remote addresses, */
#define VGW_LOCAL_STEPS 8     /* 2^8 of local ones, */
#define VGW_SERVICE_STEPS 12  /* 2^12 of services, */
#define VGW_SOURCE_STEPS 8    /* and 2^8 of source ports */
#define VGW_VECTOR_BLOCKS 7   /* of 256 rules each */
#define VGW_BLOCK_RULES (VGW_IMAGE_BLOCK_WORDS * 64)

/* Block 0 starts with the format; three blocks of fields for each path follow. */
#define IMAGE_FORMAT_BLOCK 0
#define IMAGE_FIELDS_BLOCK(path) (1 + 3 * (path))

/* Where the tables of addresses begin, as word indices: pairs of halves, then vectors. */
struct image_addresses {
	u64 remote;
	u64 remote_count; /* ranges */
	u64 local;
	u64 local_count;
};

/* Where the tables of values begin: words of first value << 32 | vector. */
struct image_values {
	u64 service;
	u64 service_count;
	u64 source;
	u64 source_count;
};

struct image_rules {
	u64 blocks;       /* in a vector */
	u64 rules;        /* bit n of a vector is the rule in word rules + n */
	u64 by_default;   /* rule word of the default */
	u64 unused;
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

/* Reads the two words of an address at an even index, which lie in one block. */
static __always_inline bool image_read_address(void *image, u32 index, u64 *high, u64 *low)
{
	const struct image_block *block = image_block(image, index / VGW_IMAGE_BLOCK_WORDS);

	if (!block)
		return false;
	*high = block->words[index % VGW_IMAGE_BLOCK_WORDS & ~1];
	*low = block->words[(index % VGW_IMAGE_BLOCK_WORDS & ~1) + 1];
	return true;
}

/*
 * Both searches keep lookup->low on the number of the last range that starts at or
 * before the value: the first range of a table starts at the least value. They leave
 * the block of the value's vector in *vector, or return false for a malformed image.
 */
static __always_inline bool search_address(void *image, struct lookup *lookup, u32 first,
					   u32 count, u32 steps,
					   const struct vgw_address *address, u32 *vector)
{
	u64 high = ntohll(address->halves[0]), rest = ntohll(address->halves[1]);
	u64 start, start_rest, beyond;
	u32 half;

#pragma clang loop unroll(disable)
	for (u32 step = 0; step < steps; step++) {
		if (lookup->size <= 1)
			break;
		half = lookup->size >> 1;
		if (!image_read_address(image, first + 2 * (lookup->low + half), &start,
					&start_rest))
			return false;
		beyond = is_less(high, start) |
			 (is_less(rest, start_rest) & is_zero(high ^ start));
		lookup->low += half * (1 - beyond);
		lookup->size -= half;
		forget_values();
	}
	if (!image_read(image, first + 2 * count + lookup->low, &start))
		return false;
	*vector = start / VGW_IMAGE_BLOCK_WORDS;
	return true;
}

static __always_inline bool search_value(void *image, struct lookup *lookup, u32 first, u32 steps,
					 u32 value, u32 *vector)
{
	u32 half;
	u64 range;

#pragma clang loop unroll(disable)
	for (u32 step = 0; step < steps; step++) {
		if (lookup->size <= 1)
			break;
		half = lookup->size >> 1;
		if (!image_read(image, first + lookup->low + half, &range))
			return false;
		lookup->low += half * (1 - is_less(value, range >> 32));
		lookup->size -= half;
		forget_values();
	}
	if (!image_read(image, first + lookup->low, &range))
		return false;
	*vector = (u32)range / VGW_IMAGE_BLOCK_WORDS;
	return true;
}

static __always_inline void search_among(struct lookup *lookup, u32 count)
{
	lookup->low = 0;
	lookup->size = count;
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
static __always_inline bool first_match(void *image, struct lookup *lookup)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_VECTOR_BLOCKS; i++) {
		if (i >= lookup->blocks)
			break;
		if (i < lookup->next_tier)
			continue;
		if (!match_block(image, lookup, i))
			return false;
		if (lookup->bit == VGW_BLOCK_RULES)
			continue;
		if (!image_read(image, lookup->rules + i * VGW_BLOCK_RULES + lookup->bit,
				&lookup->rule))
			return false;
		forget_values();
		if (RULE_ACTION(lookup->rule) != VGW_ACTION_PASS)
			return true;
		lookup->next_tier = RULE_NEXT_TIER(lookup->rule);
		forget_values();
	}
	return false;
}

/* Leads both addresses of the query to their vectors. Returns false for a malformed image. */
static __always_inline bool find_addresses(void *image, const struct image_addresses *tables,
					   const struct policy_query *query,
					   struct lookup *lookup)
{
	search_among(lookup, tables->remote_count);
	if (!search_address(image, lookup, tables->remote, tables->remote_count,
			    VGW_REMOTE_STEPS, &query->remote, &lookup->remote))
		return false;
	search_among(lookup, tables->local_count);
	return search_address(image, lookup, tables->local, tables->local_count, VGW_LOCAL_STEPS,
			      &query->local, &lookup->local);
}

/* As find_addresses, for the service and the source port. */
static __always_inline bool find_values(void *image, const struct image_values *tables,
					const struct policy_query *query, struct lookup *lookup)
{
	search_among(lookup, tables->service_count);
	if (!search_value(image, lookup, tables->service, VGW_SERVICE_STEPS, query->service,
			  &lookup->service))
		return false;
	search_among(lookup, tables->source_count);
	return search_value(image, lookup, tables->source, VGW_SOURCE_STEPS, query->source,
			    &lookup->source);
}

/*
 * Judges work->query by the policy in `slot`; the decision is in the work memory. It is
 * a drop with NO_POLICY where the slot holds no readable policy: without one nothing
 * passes.
 */
static __always_inline void policy_judge(u32 slot, struct scratch *work)
{
	u32 first = IMAGE_FIELDS_BLOCK(work->query.path);
	const struct image_addresses *addresses;
	const struct image_values *values;
	const struct image_block *format;
	const struct image_rules *rules;
	void *image = policies.lookup(&slot);

	decide(work, VGW_VERDICT_DROP, VGW_REASON_NO_POLICY);
	if (!image)
		return;
	format = image_block(image, IMAGE_FORMAT_BLOCK);
	addresses = (const void *)image_block(image, first);
	values = (const void *)image_block(image, first + 1);
	rules = (const void *)image_block(image, first + 2);
	if (!format || !addresses || !values || !rules || format->words[0] != VGW_IMAGE_FORMAT)
		return;
	if (!find_addresses(image, addresses, &work->query, &work->lookup) ||
	    !find_values(image, values, &work->query, &work->lookup))
		return;
	work->lookup.blocks = rules->blocks;
	work->lookup.rules = rules->rules;
	work->lookup.next_tier = 0;
	forget_values();
	if (first_match(image, &work->lookup))
		decide_by(work, work->lookup.rule, VGW_REASON_RULE);
	else if (work->query.ordinary)
		decide_by(work, rules->by_default, VGW_REASON_DEFAULT);
	else
		decide(work, VGW_VERDICT_DROP, VGW_REASON_PROTOCOL);
}

#endif
