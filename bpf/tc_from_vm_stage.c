/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stage of tc_from_vm: goes on where the policy is a large one.
 */
#include "tc.h"

int tc_from_vm_stage(struct __sk_buff *skb)
{
	struct judged judged;

	resume_packet(&judged);
	return tc_finish(skb, &judged, VGW_PATH_FROM_VM);
}
