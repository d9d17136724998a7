/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The frame that XDP hands over.
 */
#ifndef VGW_XDP_FRAME_H
#define VGW_XDP_FRAME_H

#include "packet.h"

/* Says where the frame is. */
static __always_inline void place_frame(struct xdp_md *ctx, struct frame *frame)
{
	frame->data = (void *)(long)ctx->data;
	frame->data_end = (void *)(long)ctx->data_end;
}

#endif
