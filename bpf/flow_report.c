/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Entry that is attached nowhere: user space runs it to have the end of a dead flow recorded
 * that expiry does not come to, because the newest keys stay in the queue and its buffers.
 *
 * The frame of the run holds the flow's key. The flow stays in the table, and is not recorded
 * again when it is deleted. Returns 1 if there is nothing left to record of it: it was dead,
 * or is not there.
 */
#include "pipeline.h"

#define KEY_OFFSET 16 /* in the frame; behind what the kernel takes for a link header */

int flow_report(struct __sk_buff *skb)
{
	struct endpoint_config *config;
	struct scratch *work;
	struct flow *flow;
	u32 zero = 0, slot;
	u64 now = clock_now();

	config = config_in_force(&slot);
	work = scratch.lookup(&zero);
	if (!config || !work || bpf_skb_load_bytes(skb, KEY_OFFSET, &work->key, sizeof(work->key)))
		return 0;
	flow = conntrack.lookup(&work->key);
	if (!flow)
		return 1;
	if (!flow_is_dead(config, flow, now) || !flow_claim(flow))
		return 0;
	work->noted = 0;
	if (flow_is_dead(config, flow, now))
		note_end(config, work, &work->key, flow, now);
	flow->claim = 0;
	emit_flows(skb, config, work);
	return 1;
}
