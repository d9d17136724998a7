/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the two tc entries share: a frame from a socket buffer, tc's return codes, and
 * answers to rejected packets.
 */
#ifndef VGW_TC_H
#define VGW_TC_H

#include <linux/pkt_cls.h>

#include "floods.h"
#include "lease.h"
#include "pipeline.h"
#include "reject.h"
#include "socket_buffer.h"

/* Bytes made directly readable: link, IPv6 and BOOTP or common neighbour options fit into them. */
#define TC_HEADERS 256

/*
 * Makes the answer of the frame. Returns whether that was possible. Cutting it to the end of
 * the checksum that a card may fill in fails where one would be filled in further behind,
 * over the answer's content: of a packet in a tunnel, or of SCTP.
 */
static __always_inline bool tc_put_answer(struct __sk_buff *skb, struct scratch *work)
{
	struct answer *answer = &work->answer;
	u64 link = answer->link, size = answer->quoted;

	if (!is_size(&link, LINK_MAX) || bpf_skb_load_bytes(skb, 0, link_part(answer), link) ||
	    !is_size(&size, QUOTED_MAX) ||
	    bpf_skb_load_bytes(skb, link, quoted_part(answer), size))
		return false;
	write_answer(work);
	size = answer->length;
	return is_size(&size, ANSWER_MAX) && !bpf_skb_change_tail(skb, answer->checksum, 0) &&
	       !bpf_skb_change_tail(skb, size, 0) &&
	       !bpf_skb_store_bytes(skb, 0, link_part(answer), size, 0);
}

/*
 * Answers a rejected packet if it gets an answer. Toward the VM the answer leaves by the
 * interface, otherwise it comes in as if from the VM; the mark takes it past the other program.
 */
static __always_inline int tc_reject(struct __sk_buff *skb, const struct judged *judged, u32 path)
{
	struct reject_meter *meter = begin_answer(judged, path, skb->vlan_present);

	if (!meter || !count_answer(meter, tc_put_answer(skb, judged->work)))
		return TC_ACT_SHOT;
	skb->mark = judged->config->reply_mark;
	return bpf_redirect(skb->ifindex, path == VGW_PATH_FROM_VM ? 0 : BPF_F_INGRESS);
}

/* UNSPEC hands an accepted packet on to whatever else is attached. */
static __always_inline int tc_finish(struct __sk_buff *skb, struct judged *judged, u32 path)
{
	if (!finish(skb, judged, path)) {
		if (path == VGW_PATH_FROM_VM && judged->config && judged->work)
			report_flood(skb, judged->config, judged->work);
		return tc_reject(skb, judged, path);
	}
	if (path == VGW_PATH_TO_VM)
		report_lease(skb, judged);
	return TC_ACT_UNSPEC;
}

/* Whether the other program of this endpoint sent the frame, as an answer. No guest can mark. */
static __always_inline bool is_own_answer(u32 mark)
{
	const struct endpoint_config *config;
	u32 slot;

	if (!mark)
		return false;
	config = config_in_force(&slot);
	return config && config->reply_mark == mark;
}

/* Says where the part of the frame is that can be read directly. */
static __always_inline void place_frame(struct __sk_buff *skb, struct frame *frame)
{
	frame->data = (void *)(long)skb->data;
	frame->data_end = (void *)(long)skb->data_end;
}

/* Judges a frame. Returns what is to become of it. */
static __always_inline int tc_judge(struct __sk_buff *skb, u32 path)
{
	u32 wanted = skb->len < TC_HEADERS ? skb->len : TC_HEADERS;
	void *data = (void *)(long)skb->data, *data_end = (void *)(long)skb->data_end;
	struct frame frame = {};
	struct judged judged;

	if (is_own_answer(skb->mark)) {
		skb->mark = 0;
		return TC_ACT_UNSPEC;
	}
	/* Only the linear part can be read; a failed pull leaves it short and the parser says so. */
	if (data + wanted > data_end)
		bpf_skb_pull_data(skb, wanted);
	place_frame(skb, &frame);
	frame.length = skb->len;
	frame.segment_size = skb->gso_size;
	frame.gso = frame.segment_size;
	if (frame.gso)
		frame.segments = skb->gso_segs; /* 0 for a frame that a guest handed over */
	frame.tagged = skb->vlan_present;
	frame.tag_protocol = ntohs(skb->vlan_proto);
	frame.tag_control = skb->vlan_tci;
	read_checksum_request(skb, &frame);
	if (!recall_packet(&judged, &frame, path)) {
		place_frame(skb, &frame);
		if (begin_packet(&judged, &frame, path))
			tc_stages.call(skb, path);
	}
	return tc_finish(skb, &judged, path);
}

#endif
