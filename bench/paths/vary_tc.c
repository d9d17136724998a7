/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Stands in front of a measured tc program; it is attached nowhere.
 */
#include <linux/pkt_cls.h>

#include "vary.h"

BPF_PROG_ARRAY(tc_targets, VARY_TARGETS);

int vary_tc(struct __sk_buff *skb)
{
	long target = vary((u8 *)(long)skb->data, (u8 *)(long)skb->data_end);

	if (target >= 0)
		tc_targets.call(skb, target);
	return TC_ACT_SHOT;
}
