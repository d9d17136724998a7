/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stage of xdp_shield: goes on where the policy is a large one.
 */
#include "shield.h"

int xdp_shield_stage(struct xdp_md *ctx)
{
	struct judged judged;

	resume_packet(&judged);
	return shield_code(ctx, &judged);
}
