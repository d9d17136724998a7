/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hook entry: packets the VM sends, at XDP of its interface.
 */
#include "xdp.h"

int xdp_from_vm(struct xdp_md *ctx)
{
	struct frame frame = { .length = ctx->data_end - ctx->data };
	struct judged judged;

	place_frame(ctx, &frame);
	if (!recall_packet(&judged, &frame, VGW_PATH_FROM_VM)) {
		place_frame(ctx, &frame);
		if (begin_packet(&judged, &frame, VGW_PATH_FROM_VM))
			xdp_stages.call(ctx, 0);
	}
	return xdp_code(ctx, &judged, finish(ctx, &judged, VGW_PATH_FROM_VM));
}
