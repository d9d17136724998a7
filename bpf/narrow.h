/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The first rule in all classes of a narrow image: one AND of words, and the lowest bit.
 */
#ifndef VGW_NARROW_H
#define VGW_NARROW_H

#include "image.h"

#define VGW_TIERS 4 /* a lookup begins once, and again behind each tier that it passes but the last */

/* Leaves in lookup->left the rules that all classes admit. Returns false for a malformed image. */
static __always_inline bool narrow_matches(const struct image *image, const struct image_header *header,
					   struct lookup *lookup)
{
	u64 admitted;

	lookup->left = header->used;
#pragma clang loop unroll(full)
	for (u32 field = 0; field < FIELDS; field++) {
		if (!image_word(image, lookup->classes[field], &admitted))
			return false;
		lookup->left &= admitted;
	}
	forget_values();
	return true;
}

/* Leaves the word of the first match that is not PASS in lookup->best, or NO_RULE_WORD. */
static __always_inline bool narrow_match(const struct image *image, const struct image_header *header,
					 struct lookup *lookup)
{
	u64 matches;

	if (!narrow_matches(image, header, lookup))
		return false;
#pragma clang loop unroll(disable)
	for (u32 tier = 0; tier < VGW_TIERS; tier++) {
		matches = lookup->left;
		if (!matches)
			break;
		if (!image_word(image, (u64)header->rules + lowest_bit(header, matches), &lookup->best))
			return false;
		forget_values();
		if (RULE_ACTION(lookup->best) != VGW_ACTION_PASS)
			return true;
		lookup->left &= bits_from(RULE_NEXT_TIER(lookup->best));
		lookup->best = NO_RULE_WORD;
		forget_values();
	}
	return true;
}

#endif
