/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The counters of an endpoint: one per path, verdict and reason, per CPU, and behind them
 * those of floods.
 */
#ifndef VGW_STATS_H
#define VGW_STATS_H

#include "maps.h"

static __always_inline void count_at(u32 index, u32 bytes)
{
	struct packet_counter *counter = stats.lookup(&index);

	if (!counter)
		return;
	counter->packets++;
	counter->bytes += bytes;
}

static __always_inline void count_packet(u32 path, u32 verdict, u32 reason, u32 bytes)
{
	count_at((path * VGW_VERDICT_COUNT + verdict) * VGW_REASON_SLOTS + reason, bytes);
}

static __always_inline void count_flood_drop(enum vgw_flood_drop where, u32 bytes)
{
	count_at(VGW_STATS_VERDICTS + where, bytes);
}

#endif
