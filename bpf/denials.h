/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the policy has denied just now, so that a flood of it costs no rule lookup each.
 *
 * A denial is what the policy says of a packet without a flow. It holds for the next packet of
 * the same key and path as long as the policy is the same and no flow was made meanwhile: so
 * there is still none. Only a CPU that denies a lot looks here, before it looks for a flow;
 * packets of open flows pay nothing for it. Each CPU has its own few denials, each in a place that
 * its key says, so a sender who fills them gains the lookup that there would be without them.
 */
#ifndef VGW_DENIALS_H
#define VGW_DENIALS_H

#include "conntrack.h"

#define DENIALS_PERSIST 16 /* accepted packets in a row after which a CPU looks here no more */

/* Number of flows that were ever made: while it is the same, no flow was. */
static __always_inline u64 flows_made(void)
{
	struct conntrack_meta *meta;
	u32 zero = 0;

	meta = conntrack_meta.lookup(&zero);
	return meta ? meta->created[0] + meta->created[1] + meta->imported : 0;
}

/* Whether the policy's answer to a packet without a flow depends on its key and path alone. */
static __always_inline bool is_deniable(const struct packet *packet)
{
	return packet->kind == KIND_PLAIN && has_ports(packet->protocol) && may_open_flow(packet);
}

/* The place of work->key on `path`, by the high bits of a product (Knuth, 6.4). */
static __always_inline struct denial *denial_place(const struct scratch *work, u32 path)
{
	const u64 *key = (const u64 *)&work->key;
	u64 mixed = key[0] ^ key[1] ^ key[2] ^ (key[3] << 17 | key[3] >> 47) ^
		    (key[4] << 31 | key[4] >> 33) ^ path;
	struct denial_places *places;
	u32 zero = 0;

	places = denials.lookup(&zero);
	if (!places)
		return NULL;
	return &places->at[mixed * 0x9e3779b97f4a7c15ULL >> (64 - DENIAL_BITS)];
}

static __always_inline bool same_key(const struct flow_key *first, const struct flow_key *second)
{
	const u64 *a = (const u64 *)first, *b = (const u64 *)second;

	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]));
}

/*
 * Decides a packet that was denied before, of which work->key is the key. Returns whether it
 * did; else it leaves what note_denial has to know, which was so before a flow is looked for.
 */
static __always_inline bool recall_denial(const struct endpoint_config *config,
					  struct scratch *work, u32 path)
{
	const struct denial *denial;

	work->denial_known = 0;
	if (!work->denying || !is_deniable(&work->packet))
		return false;
	work->flows_made = flows_made();
	forget_values();
	denial = denial_place(work, path);
	if (!denial || !same_key(&denial->key, &work->key) || denial->path != path ||
	    denial->generation != config->generation || denial->flows_made != work->flows_made)
		return false;
	work->decision = denial->decision;
	work->denial_known = 1;
	return true;
}

/* Remembers what the policy denied, once this CPU denies a lot. */
static __always_inline void note_denial(const struct endpoint_config *config,
					struct scratch *work, u32 path)
{
	bool looked = work->denying;
	struct denial *denial;

	work->denying = DENIALS_PERSIST;
	if (!looked || work->denial_known || !is_deniable(&work->packet) ||
	    work->decision.reason == VGW_REASON_NO_POLICY)
		return;
	denial = denial_place(work, path);
	if (!denial)
		return;
	copy_key(&denial->key, &work->key);
	denial->flows_made = work->flows_made;
	denial->generation = config->generation;
	denial->path = path;
	denial->decision = work->decision;
}

#endif
