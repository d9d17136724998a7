/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stage of xdp_from_vm: goes on where the policy is a large one.
 */
#include "xdp.h"

int xdp_from_vm_stage(struct xdp_md *ctx)
{
	struct judged judged;

	resume_packet(&judged);
	return xdp_code(ctx, &judged, finish(ctx, &judged, VGW_PATH_FROM_VM));
}
