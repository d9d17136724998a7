/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Comparisons without branches, for loops: each branch there doubles the paths that
 * the verifier walks.
 */
#ifndef VGW_BRANCHLESS_H
#define VGW_BRANCHLESS_H

#include <linux/types.h>

/*
 * 1 if the top bit is set. Both steps are hidden from the compiler: it would make a branch
 * of the first, and a mask of a product with the second, and for each mask of 0 or -1 the
 * verifier (6.16 and later) walks both cases.
 */
static __always_inline u64 top_bit(u64 value)
{
	asm volatile("" : "+r"(value));
	value >>= 63;
	asm volatile("" : "+r"(value));
	return value;
}

/* 1 if a < b, for values below 2^63. */
static __always_inline u64 is_below(u64 a, u64 b)
{
	return top_bit(a - b);
}

static __always_inline u64 is_nonzero(u64 value)
{
	return top_bit(value | -value);
}

static __always_inline u64 is_zero(u64 value)
{
	return 1 - is_nonzero(value);
}

/* `yes` if the condition is 1, `no` if it is 0. */
static __always_inline u64 choose(u64 condition, u64 yes, u64 no)
{
	return condition * yes + (1 - condition) * no;
}

#endif
