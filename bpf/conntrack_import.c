/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Entry that is attached nowhere: user space runs it to put flows of another table into this one.
 *
 * Only a program can do that beside packets: a flow has its place in the queue and in the counters
 * too, which programs change without asking. The frame holds IMPORT_HEADER bytes that mean nothing,
 * then up to IMPORT_RECORDS flows, each a struct flow_key and a struct flow with the times of this
 * host's clock. flow.claim says what becomes of a live flow of the same key: 0, it stays unless it
 * was imported too and no packet of it has come since; 1, it is replaced. A flow that is DEAD ends
 * such a one.
 *
 * Returns how many flows had which result, a byte for each of enum import_result.
 */
#include "pipeline.h"

#define IMPORT_HEADER 16 /* the kernel runs nothing on less than a link header */
#define IMPORT_RECORDS 16

enum import_result {
	IMPORT_ADDED,
	IMPORT_REPLACED,
	IMPORT_KEPT, /* the flow that was there stays as it was */
	IMPORT_FULL, /* no room */
};

/* Imported flows have generation 0 until the policy has judged them. */
static __always_inline bool may_replace(const struct endpoint_config *config,
					const struct flow *old, const struct flow *flow)
{
	return flow->claim || !old->generation || flow_is_dead(config, old, clock_now());
}

static __always_inline void import_half_open(struct conntrack_meta *meta, struct flow *flow)
{
	flow->half_open = !!flow->half_open;
	if (flow->half_open)
		__sync_fetch_and_add(&meta->half_open[flow->opener & 1], 1);
}

static __always_inline enum import_result import_new(struct conntrack_meta *meta,
						     struct scratch *work)
{
	int error;

	if (work->flow.state == VGW_FLOW_DEAD)
		return IMPORT_KEPT;
	work->flow.claim = 0;
	import_half_open(meta, &work->flow);
	error = flow_put(meta, &work->key, &work->flow);
	if (!error)
		return IMPORT_ADDED;
	return error == -EEXIST ? IMPORT_KEPT : IMPORT_FULL;
}

/* Puts the flow in work->flow into the table. Returns what became of it. */
static __always_inline enum import_result flow_import(const struct endpoint_config *config,
						      struct conntrack_meta *meta,
						      struct scratch *work)
{
	struct flow *old = conntrack.lookup(&work->key), *flow = &work->flow;

	flow->epoch = config->flow_epoch;
	flow->opener &= 1;
	flow->reported = 0;
	if (!old)
		return import_new(meta, work);
	if (!flow_claim(old))
		return IMPORT_KEPT;
	if (!may_replace(config, old, flow)) {
		old->claim = 0;
		return IMPORT_KEPT;
	}
	half_open_leave(meta, old);
	flow->claim = 1; /* as long as it is not whole */
	import_half_open(meta, flow);
	*old = *flow;
	old->claim = 0;
	return IMPORT_REPLACED;
}

int conntrack_import(struct __sk_buff *skb)
{
	u32 zero = 0, slot, offset = IMPORT_HEADER, results = 0;
	struct endpoint_config *config;
	struct conntrack_meta *meta;
	struct scratch *work;

	config = config_in_force(&slot);
	meta = conntrack_meta.lookup(&zero);
	work = scratch.lookup(&zero);
	if (!config || !meta || !work)
		return 0;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < IMPORT_RECORDS; i++) {
		if (bpf_skb_load_bytes(skb, offset, &work->key, sizeof(work->key)))
			break;
		offset += sizeof(work->key);
		if (bpf_skb_load_bytes(skb, offset, &work->flow, sizeof(work->flow)))
			break;
		offset += sizeof(work->flow);
		results += 1 << (8 * flow_import(config, meta, work));
		__sync_fetch_and_add(&meta->imported, 1);
		forget_values();
	}
	return results;
}
