/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stands in front of a measured XDP program; it is attached nowhere.
 */
#include "vary.h"

BPF_PROG_ARRAY(xdp_targets, VARY_TARGETS);

int vary_xdp(struct xdp_md *ctx)
{
	long target = vary((u8 *)(long)ctx->data, (u8 *)(long)ctx->data_end);

	if (target >= 0)
		xdp_targets.call(ctx, target);
	return XDP_ABORTED;
}
