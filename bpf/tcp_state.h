/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * TCP state of a flow: what a segment of it changes, and which segments may change it.
 *
 * The receiver has the last word about a segment, so each one of a live flow passes. But what
 * might be forged by somebody who does not see the connection must not open, close or blind
 * it: sequence and acknowledgement numbers have to fit what was seen. Windows are not
 * followed; numbers may be as far ahead as the widest window (RFC 7323) lets them be.
 */
#ifndef VGW_TCP_STATE_H
#define VGW_TCP_STATE_H

#include "packet.h"
#include "parse.h"

#define TCP_WINDOW_MAX (1U << 30)  /* RFC 7323, 2.3 */
#define TCP_ACK_SLACK (1U << 20)   /* how far an acknowledgement may be overtaken by others */
#define TCP_QUOTE_SLACK (1U << 16) /* how late an ICMP error may quote what was acknowledged */

static __always_inline u32 other_path(u32 path)
{
	return path == VGW_PATH_FROM_VM ? VGW_PATH_TO_VM : VGW_PATH_FROM_VM;
}

static __always_inline bool is_tcp(const struct packet *packet)
{
	return packet->kind == KIND_PLAIN && packet->protocol == IPPROTO_TCP;
}

static __always_inline bool is_new_tcp(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

/* Number behind the last byte of a segment. */
static __always_inline u32 tcp_end_of(const struct packet *packet)
{
	u32 flags = packet->tcp_flags;

	return packet->tcp_sequence + packet->tcp_payload + !!(flags & TCP_SYN) + (flags & TCP_FIN);
}

/* Whether `number` is at or behind `from` and not behind `to`, which is not far from it. */
static __always_inline bool in_range(u32 number, u32 from, u32 to)
{
	return number - from <= to - from;
}

/* The first numbers of a flow, from the SYN of its opener. */
static __always_inline void tcp_begin(struct flow *flow, const struct packet *packet, u32 opener)
{
	u32 other = other_path(opener);

	/* As if the other side had acknowledged the SYN: what a RST on either side must match. */
	flow->tcp_acked[other & 1] = packet->tcp_sequence + 1;
	flow->tcp_acked[opener & 1] = 0;
	flow->tcp_end[opener & 1] = tcp_end_of(packet);
	flow->tcp_end[other & 1] = 0;
}

/* The numbers of a connection that was open before its first segment was seen. */
static __always_inline void tcp_take_over(struct flow *flow, const struct packet *packet, u32 path)
{
	u32 other = other_path(path);

	flow->tcp_acked[path & 1] = packet->tcp_acknowledged;
	flow->tcp_end[path & 1] = tcp_end_of(packet);
	flow->tcp_acked[other & 1] = packet->tcp_sequence;
	flow->tcp_end[other & 1] = packet->tcp_acknowledged;
	flow->tcp_fins = packet->tcp_flags & TCP_FIN ? 1 << (path & 1) : 0;
}

/* Whether a segment acknowledges the SYN of the flow, with all of its data, a part or none. */
static __always_inline bool answers_syn(const struct packet *packet, u32 path,
					const struct flow *flow)
{
	return in_range(packet->tcp_acknowledged, flow->tcp_acked[path & 1],
			flow->tcp_end[other_path(path) & 1]);
}

/*
 * Whether a RST is one that its receiver heeds: at the sequence that was acknowledged last
 * (RFC 5961), or, in answer to a SYN, with the acknowledgement of it (RFC 9293, 3.10.7.3).
 */
static __always_inline bool reset_is_exact(const struct packet *packet, u32 path,
					   const struct flow *flow)
{
	u32 other = other_path(path);

	if (flow->state != VGW_FLOW_TCP_SYN)
		return packet->tcp_sequence == flow->tcp_acked[other & 1];
	if (path == flow->opener)
		return in_range(packet->tcp_sequence, flow->tcp_acked[other & 1],
				flow->tcp_end[path & 1]);
	return packet->tcp_flags & TCP_ACK && answers_syn(packet, path, flow);
}

/* Whether the other side has sent what a segment acknowledges, and not long ago. */
static __always_inline bool ack_is_plausible(const struct packet *packet, u32 path,
					     const struct flow *flow)
{
	u32 end = flow->tcp_end[other_path(path) & 1];

	return in_range(packet->tcp_acknowledged, flow->tcp_acked[path & 1] - TCP_ACK_SLACK, end);
}

/* Whether a segment brings something that its receiver has not acknowledged and may take. */
static __always_inline bool end_is_ahead(u32 end, u32 acked)
{
	return end - acked - 1 < TCP_WINDOW_MAX;
}

/* A segment with SYN of a flow that is not yet open. Returns whether it counts. */
static __always_inline bool track_syn(const struct packet *packet, u32 path, struct flow *flow)
{
	u32 other = other_path(path);

	if (path == flow->opener) {
		/* A host that begins anew within the lifetime of its last attempt has a new number. */
		if (is_new_tcp(packet) && packet->tcp_sequence + 1 != flow->tcp_acked[other & 1])
			tcp_begin(flow, packet, path);
		return true;
	}
	if (packet->tcp_flags & TCP_ACK && !answers_syn(packet, path, flow))
		return false;
	flow->tcp_end[path & 1] = tcp_end_of(packet);
	flow->tcp_acked[other & 1] = packet->tcp_sequence + 1;
	return true;
}

/* Any other segment of a flow that is not yet open. Returns whether it counts. */
static __always_inline bool track_handshake(const struct packet *packet, u32 path,
					    struct flow *flow)
{
	bool answered = flow->packets[other_path(path) & 1];

	if (path != flow->opener)
		return answers_syn(packet, path, flow);
	/* From the opener it is the same question about the SYN of the other side. */
	if (!answered || !answers_syn(packet, path, flow))
		return false;
	flow->state = VGW_FLOW_TCP_ESTABLISHED;
	return true;
}

/* Moves the numbers of an open flow on, and its state where a FIN says so. */
static __always_inline void track_open(const struct packet *packet, u32 path, struct flow *flow)
{
	u32 other = other_path(path), end = tcp_end_of(packet);
	u32 acked = flow->tcp_acked[other & 1];
	bool ahead = end_is_ahead(end, acked), plausible = ack_is_plausible(packet, path, flow);

	if (ahead && end_is_ahead(end, flow->tcp_end[path & 1]))
		flow->tcp_end[path & 1] = end;
	if (plausible && (s32)(packet->tcp_acknowledged - flow->tcp_acked[path & 1]) > 0)
		flow->tcp_acked[path & 1] = packet->tcp_acknowledged;
	if (packet->tcp_flags & TCP_FIN && ahead && plausible) {
		flow->tcp_fins |= 1 << (path & 1);
		if (flow->tcp_fins == 3)
			flow->state = VGW_FLOW_TCP_FIN;
	}
}

/*
 * TCP state after an accepted segment. Returns false for one that must not keep the flow
 * alive, because it may be forged: a RST that is not exact, an answer to a SYN that was not
 * sent, a SYN within an open connection (RFC 5961, 4), anything after the close.
 */
static __always_inline bool track_tcp(const struct packet *packet, u32 path, struct flow *flow)
{
	if (flow->state == VGW_FLOW_TCP_CLOSED)
		return false;
	if (packet->tcp_flags & TCP_RST) {
		if (!reset_is_exact(packet, path, flow))
			return false;
		flow->state = VGW_FLOW_TCP_CLOSED;
		return true;
	}
	if (flow->state == VGW_FLOW_TCP_SYN) {
		if (packet->tcp_flags & TCP_SYN)
			return track_syn(packet, path, flow);
		if (!track_handshake(packet, path, flow))
			return false;
		if (flow->state == VGW_FLOW_TCP_SYN)
			return true;
	}
	if (is_new_tcp(packet))
		return false;
	track_open(packet, path, flow);
	return true;
}

/* Whether an ICMP error on `path` quotes a segment that may still be on its way (RFC 5927). */
static __always_inline bool quote_is_in_flight(const struct quoted_packet *quoted, u32 path,
					       const struct flow *flow)
{
	u32 end = flow->tcp_end[other_path(path) & 1];

	return in_range(quoted->tcp_sequence, flow->tcp_acked[path & 1] - TCP_QUOTE_SLACK, end);
}

#endif
