/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * From a field of a query to its class: a search of bounded depth.
 *
 * The values of a field are one word (IPv4 addresses, services, source ports) or four
 * (IPv6 addresses). A search goes through a word by tables, which take one step however
 * many keys they have, and by nodes of seven keys. Which lines a packet leads to is its
 * own choice; that they are at most so many is the policy's.
 */
#ifndef VGW_SEARCH_H
#define VGW_SEARCH_H

#include "image.h"

#define VGW_ADDRESS_WORDS 4 /* of an IPv6 address */
#define VGW_ADDRESS_STEPS 10 /* lines behind the first table on the way to an address's class, */
#define VGW_VALUE_STEPS 4    /* and to that of a service or a source port */

/* How many of the node's keys are not above the value. */
static __always_inline u64 node_rank(const struct image_node *node, u64 value)
{
	u64 above = 0;

#pragma clang loop unroll(full)
	for (u32 i = 0; i < 7; i++)
		above += is_below(value, node->keys[i]);
	return 7 - above;
}

static __always_inline u64 table_entry(const struct image_table *table, u64 value)
{
	u64 below = is_below(value, table->low);
	u64 entry = (1 - below) * (1 + ((value - table->low) >> (table->shift & 31)));
	u64 beyond = entry - table->last;

	return table->last + top_bit(beyond) * beyond;
}

/*
 * Leaves the class of field `field`, whose values have so many words, in lookup->classes, by the
 * search `root` and at most `steps` lines behind it. Returns false for a malformed image.
 */
static __always_inline bool search_field(const struct image *image, struct lookup *lookup,
					 const struct policy_query *query, u32 field,
					 const struct image_table *root, u32 steps, u32 words)
{
	u64 value = query->fields[field][0], ref;
	const struct image_node *node;

	if (!root->last) {
		lookup->classes[field] = root->entries;
		return true;
	}
	if (!image_ref(image, root->entries + table_entry(root, value), &ref))
		return false;
	lookup->word = 0;
	forget_values();
#pragma clang loop unroll(disable)
	for (u32 step = 0; step < steps; step++) {
		if (REF_KIND(ref) == REF_CLASS)
			break;
		if (words > 1) {
			lookup->word += REF_NEXT_WORD(ref);
			forget_values();
		}
		value = query->fields[field][words > 1 ? lookup->word & 3 : 0];
		node = image_line(image, REF_INDEX(ref));
		if (!node)
			return false;
		if (REF_IS_TABLE(ref)) {
			const struct image_table *table = (const void *)node;

			if (!image_ref(image, table->entries + table_entry(table, value), &ref))
				return false;
		} else {
			ref = node->refs[node_rank(node, value) & 7];
		}
		forget_values();
	}
	lookup->classes[field] = ref;
	forget_values();
	return REF_KIND(ref) == REF_CLASS;
}

#endif
