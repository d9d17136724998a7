/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The parser: from a frame to a struct packet, or the reason why it cannot be read.
 *
 * It never decides what a readable packet gets; it refuses what cannot be read to
 * the end of its upper-layer header without guessing.
 */
#ifndef VGW_PARSE_H
#define VGW_PARSE_H

#include "parse_network.h"

#define VLAN_ID_MASK 0x0fff
#define LINK_LENGTH_MASK 0x1f    /* no link header is longer */
#define ETHERTYPE_MINIMUM 0x0600 /* smaller values are IEEE 802.3 lengths */

struct vlan_tag {
	__be16 control;
	__be16 inner_type;
};

static __always_inline bool is_tag_protocol(u16 ethertype)
{
	return ethertype == ETH_P_8021Q || ethertype == ETH_P_8021AD || ethertype == ETH_P_QINQ1;
}

static __always_inline enum vgw_reason take_tag(struct packet *packet, u16 protocol, u16 control)
{
	if (protocol != ETH_P_8021Q || !(control & VLAN_ID_MASK))
		return VGW_REASON_VLAN;
	packet->vlan = control & VLAN_ID_MASK;
	return VGW_REASON_NONE;
}

/* One tag at most, beside the frame or in it; the verdict must not depend on where it is. */
static __always_inline enum vgw_reason parse_tag(struct cursor *cursor, struct packet *packet)
{
	const struct vlan_tag *tag;
	enum vgw_reason reason;

	if (!is_tag_protocol(packet->ethertype))
		return VGW_REASON_NONE;
	if (packet->ethertype != ETH_P_8021Q || packet->vlan)
		return VGW_REASON_VLAN;
	tag = peek(cursor, sizeof(*tag));
	if (!tag)
		return VGW_REASON_TRUNCATED;
	reason = take_tag(packet, packet->ethertype, ntohs(tag->control));
	if (reason)
		return reason;
	packet->ethertype = ntohs(tag->inner_type);
	packet->header_length += sizeof(*tag);
	return is_tag_protocol(packet->ethertype) ? VGW_REASON_VLAN : VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_payload(struct cursor *cursor, struct packet *packet)
{
	switch (packet->ethertype) {
	case ETH_P_IP:
		return parse_ipv4(cursor, packet);
	case ETH_P_IPV6:
		return parse_ipv6(cursor, packet);
	case ETH_P_ARP:
	case ETH_P_RARP:
		return parse_arp(cursor, packet);
	default:
		return VGW_REASON_ETHERTYPE;
	}
}

/* Reads the Ethernet header and the tag; packet->header_length is what lies behind them. */
static __always_inline enum vgw_reason parse_link(const struct frame *frame,
						  struct cursor *cursor, struct packet *packet)
{
	const struct ethhdr *ethernet = peek(cursor, sizeof(*ethernet));
	enum vgw_reason reason;

	if (!ethernet)
		return VGW_REASON_TRUNCATED;
	take_mac(&packet->source_mac, ethernet->h_source);
	take_mac(&packet->destination_mac, ethernet->h_dest);
	packet->ethertype = ntohs(*(const __be16 *)&ethernet->h_proto);
	packet->header_length = sizeof(*ethernet);
	if (frame->tagged) {
		reason = take_tag(packet, frame->tag_protocol, frame->tag_control);
		if (reason)
			return reason;
	}
	advance(cursor, sizeof(*ethernet));
	reason = parse_tag(cursor, packet);
	if (reason)
		return reason;
	return packet->ethertype < ETHERTYPE_MINIMUM ? VGW_REASON_LLC : VGW_REASON_NONE;
}

/* Fills `packet`, which is all zero. Returns NONE, or why the frame cannot be read. */
static __always_inline enum vgw_reason parse_frame(const struct frame *frame,
						   struct packet *packet)
{
	struct cursor cursor = {
		.position = frame->data,
		.end = frame->data_end,
		.left = frame->length,
		.gso = frame->gso,
	};
	enum vgw_reason reason = parse_link(frame, &cursor, packet);

	if (reason)
		return reason;
	cursor.left = frame->length;
	/* By way of memory, so that the verifier does not walk the rest once for each length. */
	forget_values();
	cursor.position = frame->data;
	advance(&cursor, packet->header_length & LINK_LENGTH_MASK);
	return parse_payload(&cursor, packet);
}

#endif
