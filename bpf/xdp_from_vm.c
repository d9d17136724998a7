/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hook entry: packets the VM sends, at XDP of its interface.
 */
#include "pipeline.h"

int xdp_from_vm(struct xdp_md *ctx)
{
	struct frame frame = {
		.data = (void *)(long)ctx->data,
		.data_end = (void *)(long)ctx->data_end,
		.length = ctx->data_end - ctx->data,
	};

	return process_packet(ctx, &frame, VGW_PATH_FROM_VM) ? XDP_PASS : XDP_DROP;
}
