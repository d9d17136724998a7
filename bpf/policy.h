/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Rule lookup: from a query to the verdict of the first rule that matches.
 *
 * search.h finds the class of each field; the rule is the first one in all four classes,
 * as narrow.h or wide.h finds it. The counters of rules are here too.
 */
#ifndef VGW_POLICY_H
#define VGW_POLICY_H

#include "clock.h"
#include "narrow.h"
#include "protocols.h"
#include "search.h"
#include "wide.h"

/* Counts a packet that the rule at `index` of the counters of `slot` decided. */
static __always_inline void count_rule(u32 slot, u32 index, u32 bytes)
{
	struct rule_counter *counter;
	void *counters;

	counters = rule_counters.lookup(&slot);
	if (!counters)
		return;
	counter = bpf_map_lookup_elem(counters, &index);
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
	work->decision.rule = RULE_NUMBER(rule);
	work->decision.flags = RULE_FLAGS(rule);
}

/* Which searches find services and source ports: 0 of TCP, 1 of UDP, 2 of all else. */
static __always_inline u64 service_family(u64 service)
{
	u64 protocol = service >> 16;

	return 2 - 2 * is_zero(protocol ^ IPPROTO_TCP) - is_zero(protocol ^ IPPROTO_UDP);
}

/* Leaves the classes of the query in lookup->classes. Returns false for a malformed image. */
static __always_inline bool find_classes(const struct image *image,
					 const struct image_header *header,
					 const struct policy_query *query, struct lookup *lookup)
{
	const struct image_table *searches = header->searches;
	u64 family = service_family(query->fields[FIELD_SERVICE][0]) & 3;
	u64 ipv6 = query->ipv6 & 1;

	return search_field(image, lookup, query, FIELD_REMOTE, &searches[SEARCH_REMOTE(ipv6)],
			    VGW_ADDRESS_STEPS, VGW_ADDRESS_WORDS) &&
	       search_field(image, lookup, query, FIELD_LOCAL, &searches[SEARCH_LOCAL(ipv6)],
			    VGW_ADDRESS_STEPS, VGW_ADDRESS_WORDS) &&
	       search_field(image, lookup, query, FIELD_SERVICE, &searches[SEARCH_SERVICE(family)],
			    VGW_VALUE_STEPS, 1) &&
	       search_field(image, lookup, query, FIELD_SOURCE, &searches[SEARCH_SOURCE(family)],
			    VGW_VALUE_STEPS, 1);
}

/* Turns what a lookup found into the decision. */
static __always_inline void conclude_lookup(const struct image_header *header,
					    struct scratch *work)
{
	if (work->lookup.best != NO_RULE_WORD)
		decide_by(work, work->lookup.best, VGW_REASON_RULE);
	else if (work->query.ordinary)
		decide_by(work, header->by_default, VGW_REASON_DEFAULT);
	else
		decide(work, VGW_VERDICT_DROP, VGW_REASON_PROTOCOL);
}

/*
 * Judges work->query by the policy in `slot`; the decision is in the work memory. It is
 * a drop with NO_POLICY where the slot holds no readable policy: without one nothing
 * passes. It is the same where lookup.unfinished is left set, for policy_resume to change:
 * a large image is the stage's.
 */
static __always_inline void policy_judge(u32 slot, struct scratch *work)
{
	const struct image_header *header;
	struct image image;

	decide(work, VGW_VERDICT_DROP, VGW_REASON_NO_POLICY);
	work->lookup.unfinished = 0;
	work->lookup.best = NO_RULE_WORD;
	if (!open_image(&image, slot, work->query.path & 1))
		return;
	header = image.start;
	if (header->format == VGW_IMAGE_LARGE) {
		work->lookup.unfinished = has_parts(slot, work->query.path & 1);
		return;
	}
	if (header->format == VGW_IMAGE_MEDIUM) {
		if (!open_medium(&image, slot, work->query.path & 1))
			return;
		header = image.start;
	}
	if (!find_classes(&image, header, &work->query, &work->lookup))
		return;
	if (header->format == VGW_IMAGE_NARROW) {
		if (!narrow_match(&image, header, &work->lookup))
			return;
	} else if (header->format == VGW_IMAGE_WIDE || header->format == VGW_IMAGE_MEDIUM) {
		if (!wide_match(&image, header, &work->lookup, VGW_STEPS) || work->lookup.unfinished)
			return;
	} else {
		return;
	}
	forget_values();
	conclude_lookup(header, work);
}

/* Judges work->query by the large image that policy_judge left to be asked. */
static __always_inline void policy_resume(u32 slot, struct scratch *work)
{
	const struct image_header *header;
	struct image image;

	work->lookup.unfinished = 0;
	if (!open_parts(&image, slot, work->query.path & 1))
		return;
	header = image.start;
	if (header->format != VGW_IMAGE_LARGE ||
	    !find_classes(&image, header, &work->query, &work->lookup))
		return;
	forget_values();
	if (wide_match(&image, header, &work->lookup, VGW_STAGE_STEPS) &&
	    !work->lookup.unfinished)
		conclude_lookup(header, work);
}

#endif
