/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How far a flow is from its end, as numbers that are below zero behind it: for top_bit and sums
 * of several such questions without branches.
 */
#ifndef VGW_FLOW_AGE_H
#define VGW_FLOW_AGE_H

#include "abi.h"

/* ns until the flow has been idle for longer than its state may be. */
static __always_inline u64 time_left(const struct endpoint_config *config, const struct flow *flow,
				     u64 now)
{
	return flow->last_seen_ns + config->timeout_ns[flow->state & 0xf] - now;
}

/* Below zero for a flow of an epoch before that in force: it was flushed. */
static __always_inline u64 epochs_ahead(const struct endpoint_config *config,
					const struct flow *flow)
{
	return flow->epoch - config->flow_epoch;
}

#endif
