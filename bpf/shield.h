/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The shield: at XDP, in front of tc_from_vm, it drops what that would drop.
 *
 * User space attaches it for as long as a VM floods (floods.h). It judges as xdp_from_vm does, by
 * the same tables, and drops and counts what is surely to be dropped. Everything else it leaves
 * as if it had not been there, and the packet is judged at tc: what passes, what gets an answer,
 * and what XDP does not see enough of. So no packet passes on its word, and none is counted twice.
 *
 * Packets may wait between the two (Receive Packet Steering), so what they do at tc may be missing
 * here. A new flow that one opens matters to what the VM sends next only after an answer: what the
 * policy accepts it accepts again, and no TCP sends more before it (RFC 9293, 3.5). What waits for
 * no answer is left to tc, see may_be_met_early.
 */
#ifndef VGW_SHIELD_H
#define VGW_SHIELD_H

#include "floods.h"
#include "pipeline.h"
#include "xdp_frame.h"

/* Whether tc, too, would drop the packet. In monitor mode nothing is dropped. */
static __always_inline bool is_surely_dropped(const struct judged *judged)
{
	const struct endpoint_config *config = judged->config;
	const struct scratch *work = judged->work;

	return config && work && config->mode != VGW_MODE_MONITOR && !work->lookup.unfinished &&
	       work->decision.verdict == VGW_VERDICT_DROP && may_be_met_early(config, work);
}

/* The code for a packet that was judged, of which nothing is settled yet. */
static __always_inline int shield_code(struct xdp_md *ctx, struct judged *judged)
{
	if (!is_surely_dropped(judged))
		return XDP_PASS;
	finish(ctx, judged, VGW_PATH_FROM_VM);
	count_flood_drop(VGW_FLOOD_DROP_AT_SHIELD, judged->work->packet.wire_length);
	return XDP_DROP;
}

#endif
