/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hook entry: packets toward the VM, at tc egress of its interface.
 */
#include "tc.h"

int tc_to_vm(struct __sk_buff *skb)
{
	return tc_judge(skb, VGW_PATH_TO_VM);
}
