/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hook entry: packets the VM sends, at XDP of its interface.
 */
#include "xdp.h"

int xdp_from_vm(struct xdp_md *ctx)
{
	struct frame frame = {
		.data = (void *)(long)ctx->data,
		.data_end = (void *)(long)ctx->data_end,
		.length = ctx->data_end - ctx->data,
	};
	struct judged judged;

	if (begin_packet(&judged, &frame, VGW_PATH_FROM_VM))
		xdp_stages.call(ctx, 0);
	return xdp_code(ctx, &judged, finish(ctx, &judged, VGW_PATH_FROM_VM));
}
