/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Hook entry: packets the VM sends, at tc ingress of its interface.
 */
#include "tc.h"

int tc_from_vm(struct __sk_buff *skb)
{
	return tc_judge(skb, VGW_PATH_FROM_VM);
}
