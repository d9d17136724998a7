/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The counters of an endpoint: one per path, verdict and reason, per CPU.
 */
#ifndef VGW_STATS_H
#define VGW_STATS_H

#include "maps.h"

static __always_inline void count_packet(u32 path, u32 verdict, u32 reason, u32 bytes)
{
	u32 index = (path * VGW_VERDICT_COUNT + verdict) * VGW_REASON_SLOTS + reason;
	struct packet_counter *counter = stats.lookup(&index);

	if (!counter)
		return;
	counter->packets++;
	counter->bytes += bytes;
}

#endif
