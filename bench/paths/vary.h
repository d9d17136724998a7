/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the two entries share that stand in front of a measured program: a test run gives it the
 * same frame again and again, and they write other numbers into it before each run.
 *
 * User space says how frames differ, and which program a tail call hands them to. Checksums
 * stay as they are: nobody behind verifies them.
 */
#ifndef VGW_BENCH_VARY_H
#define VGW_BENCH_VARY_H

#include "byteorder.h"

#define VARY_TARGETS 1024
#define VARY_PLACE 0xff /* no place lies further behind in a frame */

/* How frames differ: each run has a value below `values`, and the next one `step` more of them. */
struct variation {
	u64 value;       /* of the next run: what it writes waits for no arithmetic */
	u64 step;        /* less than values */
	u64 values;
	u64 target;      /* program of the value 0 */
	u64 target_mask; /* which bits of the value count on from there */
	u64 word_at;     /* where `word` and the value's upper bits go, four bytes */
	u64 word;        /* host order */
	u64 shift;       /* bits of the value that do not count there */
	u64 half_at;     /* where `half` and some bits of the value go, two bytes */
	u64 half;        /* host order */
	u64 half_mask;   /* those bits */
	u64 number_at;   /* where `number` and the whole value go, two bytes */
	u64 number;      /* host order */
};

BPF_ARRAY(variations, struct variation, 1);

/* Writes the next run's numbers. Returns the program to go on with; negative: there is none. */
static __always_inline long vary(u8 *data, u8 *data_end)
{
	u8 *word, *half, *number;
	struct variation *how;
	u32 zero = 0;
	u64 value, next;

	how = variations.lookup(&zero);
	if (!how)
		return -1;
	word = data + (how->word_at & VARY_PLACE);
	half = data + (how->half_at & VARY_PLACE);
	number = data + (how->number_at & VARY_PLACE);
	if (word + sizeof(u32) > data_end || half + sizeof(u16) > data_end ||
	    number + sizeof(u16) > data_end)
		return -1;
	value = how->value;
	next = value + how->step;
	how->value = next < how->values ? next : next - how->values;
	*(__be32 *)word = htonl(how->word + (value >> (how->shift & 63)));
	*(__be16 *)half = htons(how->half + (value & how->half_mask));
	*(__be16 *)number = htons(how->number + value);
	return (how->target + (value & how->target_mask)) & (VARY_TARGETS - 1);
}

#endif
