/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hook entry: packets the VM sends, at XDP in front of tc_from_vm, during a flood.
 */
#include "shield.h"

int xdp_shield(struct xdp_md *ctx)
{
	struct frame frame = { .length = ctx->data_end - ctx->data };
	struct judged judged;

	place_frame(ctx, &frame);
	if (!recall_packet(&judged, &frame, VGW_PATH_FROM_VM)) {
		place_frame(ctx, &frame);
		if (begin_as(SHIELD, &judged, &frame, VGW_PATH_FROM_VM))
			xdp_stages.call(ctx, 1);
	}
	return shield_code(ctx, &judged);
}
