/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Limits of new flows: how many may be half open, and how many may be opened in a second.
 *
 * Both count for each side that opens flows by itself, so that a flood from the network does
 * not keep the VM from opening connections, nor the other way round. A flow is half open until
 * the other side has answered; a TCP connection, until its handshake is complete. It stays
 * counted when it ends before that: a forged end must not make room. What makes room is the
 * next flow of that side: the oldest half-open ones give way, so that a flood ends its own
 * flows, and who completes a handshake meanwhile gets in.
 */
#ifndef VGW_FLOW_LIMITS_H
#define VGW_FLOW_LIMITS_H

#include "budget.h"
#include "maps.h"

/* Counts a flow that `opener` opens as half open. Returns false where there are too many. */
static __always_inline bool half_open_enter(const struct endpoint_config *config,
					    struct conntrack_meta *meta, u32 opener)
{
	if (__sync_fetch_and_add(&meta->half_open[opener & 1], 1) < config->half_open_max)
		return true;
	__sync_fetch_and_add(&meta->half_open[opener & 1], -1);
	return false;
}

/* 1 + `opener` if it has as many half-open flows as it may have, else 0. */
static __always_inline u32 half_open_crowd(const struct endpoint_config *config,
					   const struct conntrack_meta *meta, u32 opener)
{
	return meta->half_open[opener & 1] >= config->half_open_max ? 1 + opener : 0;
}

/* Ends that, once: a flow may be answered and deleted at the same time. */
static __always_inline void half_open_leave(struct conntrack_meta *meta, struct flow *flow)
{
	if (flow->half_open && __sync_lock_test_and_set(&flow->half_open, 0))
		__sync_fetch_and_add(&meta->half_open[flow->opener & 1], -1);
}

/* Whether `opener` may open one more flow in this second. */
static __always_inline bool within_rate(const struct endpoint_config *config,
					struct conntrack_meta *meta, u32 opener, u64 now)
{
	return !config->new_per_second ||
	       within_budget(&meta->window[opener & 1], &meta->opened[opener & 1],
			     config->new_per_second, now);
}

#endif
