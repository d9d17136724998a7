/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the policy has denied just now, so that a flood of it costs neither parser nor rule lookup.
 *
 * A denial is what the policy says of a packet without a flow. It holds for the next frame with
 * the same head as long as configuration and policy are the same and no flow was made meanwhile,
 * nor lives again because a flush was undone: so there is still none. Only a CPU that denies a
 * lot looks here, before it reads the frame; else packets pay nothing for it. Each CPU has its own
 * few denials, each in a place that its head says, so a sender who fills them gains the lookup
 * that there would be without them.
 */
#ifndef VGW_DENIALS_H
#define VGW_DENIALS_H

#include "conntrack.h"
#include "events.h"
#include "frame_head.h"
#include "guard.h"

#define DENIALS_PERSIST 16 /* accepted packets in a row after which a CPU looks here no more */

/* Number of flows that were ever made: while it is the same, no flow was. */
static __always_inline u64 flows_made(void)
{
	struct conntrack_meta *meta;
	u32 zero = 0;

	meta = conntrack_meta.lookup(&zero);
	return meta ? meta->created[0] + meta->created[1] + meta->imported : 0;
}

/* Whether guards look at more of a packet than its head, or at what was asked before. */
static __always_inline bool is_dhcp(const struct packet *packet)
{
	return is_dhcp_request(packet) || is_dhcpv6_request(packet) || is_dhcp_answer(packet);
}

/* Whether what becomes of a packet without a flow depends on the head of its frame alone. */
static __always_inline bool is_deniable(const struct packet *packet)
{
	u32 upper = packet->ethertype == ETH_P_IP ? HEAD_IPV4_UPPER : HEAD_IPV6_UPPER;

	return packet->kind == KIND_PLAIN && packet->upper_start == upper &&
	       !packet->first_fragment && !is_dhcp(packet) && may_open_flow(packet);
}

/* The place of work->head. */
static __always_inline struct denial *denial_place(const struct scratch *work)
{
	struct denial_places *places;
	u32 zero = 0;

	places = denials.lookup(&zero);
	if (!places)
		return NULL;
	return &places->at[number_of_head(&work->head, DENIAL_BITS)];
}

/*
 * Whether the frame was denied before: work->denied is the decision then. Otherwise it leaves
 * what note_denial has to know, which was so before a flow is looked for.
 */
static __always_inline bool recall_denial(const struct endpoint_config *config,
					  const struct frame *frame, struct scratch *work,
					  u32 path)
{
	const struct denial *denial;

	work->denial_known = 0;
	if (!work->denying)
		return false;
	work->head_known = read_head(frame, path, &work->head);
	if (!work->head_known)
		return false;
	work->flows_made = flows_made();
	forget_values();
	denial = denial_place(work);
	if (!denial || !same_head(&denial->head, &work->head) ||
	    denial->generation != config->generation || denial->epoch != config->flow_epoch ||
	    denial->flows_made != work->flows_made)
		return false;
	work->denied = denial->decision;
	work->denial_known = 1;
	return true;
}

/* Whether more of a packet than its length is needed for what becomes of it. */
static __always_inline bool is_told_of(const struct endpoint_config *config,
				       const struct decision *denied, u32 path)
{
	return denied->verdict == VGW_VERDICT_REJECT || config->mode == VGW_MODE_MONITOR ||
	       event_due(path, denied);
}

/* Decides a packet as it was denied before. */
static __always_inline void deny_again(struct scratch *work, u32 path)
{
	work->decision = work->denied;
	work->query.path = path & 1;
	work->rejudge = 0;
	work->asked = 1;
}

/* Remembers what the policy denied, once this CPU denies a lot. */
static __always_inline void note_denial(const struct endpoint_config *config,
					struct scratch *work)
{
	bool looked = work->denying;
	struct denial *denial;

	work->denying = DENIALS_PERSIST;
	if (!looked || work->denial_known || !work->head_known || !is_deniable(&work->packet) ||
	    work->decision.reason == VGW_REASON_NO_POLICY)
		return;
	denial = denial_place(work);
	if (!denial)
		return;
	denial->head = work->head;
	denial->flows_made = work->flows_made;
	denial->generation = config->generation;
	denial->epoch = config->flow_epoch;
	denial->decision = work->decision;
}

#endif
