/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the XDP entries share: XDP's return codes, and answers to rejected packets.
 */
#ifndef VGW_XDP_H
#define VGW_XDP_H

#include "pipeline.h"
#include "reject.h"
#include "xdp_frame.h"

/* The kernel keeps what it knows of a super-frame's segments beside it, wrong for an answer. */
#define XDP_LONGEST_ANSWERED 2048

/* A frame that has no room behind it, as a small one on a TAP, grows at the front. */
static __always_inline bool xdp_resize(struct xdp_md *ctx, int longer)
{
	return !bpf_xdp_adjust_tail(ctx, longer) ||
	       (longer > 0 && !bpf_xdp_adjust_head(ctx, -longer));
}

/* Makes the answer of the frame. Returns whether that was possible. */
static __always_inline bool xdp_put_answer(struct xdp_md *ctx, struct scratch *work)
{
	struct answer *answer = &work->answer;
	u64 length = ctx->data_end - ctx->data;
	u64 link = answer->link, size = answer->quoted;

	if (length > XDP_LONGEST_ANSWERED || !is_size(&link, LINK_MAX) ||
	    bpf_xdp_load_bytes(ctx, 0, link_part(answer), link) ||
	    !is_size(&size, QUOTED_MAX) ||
	    bpf_xdp_load_bytes(ctx, link, quoted_part(answer), size))
		return false;
	write_answer(work);
	size = answer->length;
	return is_size(&size, ANSWER_MAX) && xdp_resize(ctx, (int)(size - length)) &&
	       !bpf_xdp_store_bytes(ctx, 0, link_part(answer), size);
}

/* The code for a packet of which finish said whether it passes. */
static __always_inline int xdp_code(struct xdp_md *ctx, const struct judged *judged, bool passes)
{
	struct reject_meter *meter;

	if (passes)
		return XDP_PASS;
	meter = begin_answer(judged, VGW_PATH_FROM_VM, false);
	if (!meter)
		return XDP_DROP;
	return count_answer(meter, xdp_put_answer(ctx, judged->work)) ? XDP_TX : XDP_DROP;
}

#endif
