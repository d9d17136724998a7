/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the two tc entries share: a frame from a socket buffer, tc's return codes.
 */
#ifndef VGW_TC_H
#define VGW_TC_H

#include <linux/pkt_cls.h>

#include "pipeline.h"

/* Bytes made directly readable: link, IPv6 and BOOTP or common neighbour options fit into them. */
#define TC_HEADERS 256

/* Judges a frame. Returns whether it passes. */
static __always_inline bool tc_judge(struct __sk_buff *skb, u32 path)
{
	u32 wanted = skb->len < TC_HEADERS ? skb->len : TC_HEADERS;
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct frame frame = {};
	struct judged judged;

	/* Only the linear part can be read; a failed pull leaves it short and the parser says so. */
	if (data + wanted > data_end)
		bpf_skb_pull_data(skb, wanted);
	frame.data = (void *)(long)skb->data;
	frame.data_end = (void *)(long)skb->data_end;
	frame.length = skb->len;
	frame.gso = skb->gso_size;
	frame.segments = skb->gso_segs; /* 0 for a frame that a guest handed over */
	frame.segment_size = skb->gso_size;
	frame.tagged = skb->vlan_present;
	frame.tag_protocol = ntohs(skb->vlan_proto);
	frame.tag_control = skb->vlan_tci;
	if (begin_packet(&judged, &frame, path))
		tc_stages.call(skb, path);
	return finish(skb, &judged, path);
}

/* UNSPEC hands an accepted packet on to whatever else is attached. */
static __always_inline int tc_code(bool passes)
{
	return passes ? TC_ACT_UNSPEC : TC_ACT_SHOT;
}

#endif
