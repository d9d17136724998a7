/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Floods: where a CPU drops a lot of what the VM sends, user space is told.
 *
 * It may then have xdp_shield meet the flood in front of tc, where dropping costs least. So only
 * what that would drop is counted. What is counted here is of one CPU, so nothing is shared, and
 * user space is told once a window by each.
 */
#ifndef VGW_FLOODS_H
#define VGW_FLOODS_H

#include "clock.h"
#include "events.h"
#include "stats.h"

#define FLOOD_WINDOW_BITS 30 /* of the ns in a window, which is about a second */

/*
 * Whether a shield may drop a packet that was decided. The lengths in headers of a frame that the
 * kernel vouches for may differ, and only tc is told that it does, as of a checksum that is asked
 * for; that there is no room for a flow turns out when it is opened, behind the shield. What names
 * the flow may be on its way to tc: of a fragment the first one, and of a reset the segment by
 * which its connection is taken over, for some time after an attach.
 */
static __always_inline bool may_be_met_early(const struct endpoint_config *config,
					     const struct scratch *work)
{
	switch (work->decision.reason) {
	case VGW_REASON_NO_STATE:
		return work->now >= config->grace_until_ns;
	case VGW_REASON_BAD_LENGTH:
	case VGW_REASON_CHECKSUM_REQUEST:
	case VGW_REASON_CT_FULL:
	case VGW_REASON_CT_RATE:
	case VGW_REASON_CT_HALF_OPEN:
	case VGW_REASON_CT_BUSY:
		return false;
	default:
		return !is_fragment(&work->packet);
	}
}

/* Counts a dropped packet. Returns whether a flood has just been noticed. */
static __always_inline bool flood_noticed(const struct endpoint_config *config,
					  struct scratch *work)
{
	u64 window = clock_now() >> FLOOD_WINDOW_BITS;

	if (work->flood_window != window) {
		work->flood_window = window;
		work->flood_dropped = 0;
	}
	work->flood_dropped++;
	return work->flood_dropped == config->flood_drops;
}

/*
 * Takes a packet that tc has dropped, or rejected, into account. Tells user space of a flood, and
 * why its last packet was dropped. It is nothing for the log, so it is not in the account of
 * events, and their budget is not asked: a flood that is logged has used it up.
 */
static __always_inline void report_flood(void *ctx, const struct endpoint_config *config,
					 struct scratch *work)
{
	int unread;

	if (!config->flood_drops || work->decision.verdict != VGW_VERDICT_DROP ||
	    !may_be_met_early(config, work))
		return;
	count_flood_drop(VGW_FLOOD_DROP_AT_TC, work->packet.wire_length);
	if (!flood_noticed(config, work))
		return;
	__builtin_memset(&work->event, 0, sizeof(work->event));
	work->event.kind = VGW_EVENT_FLOOD;
	work->event.generation = config->generation;
	work->event.path = VGW_PATH_FROM_VM;
	work->event.verdict = work->decision.verdict;
	work->event.reason = work->decision.reason;
	work->event.rule = VGW_NO_RULE;
	stamp_event(config, &work->event);
	/* A statement of its own: BCC writes one in its place. Unread, it is told again soon. */
	unread = events.perf_submit(ctx, &work->event, sizeof(work->event));
	(void)unread;
}

#endif
