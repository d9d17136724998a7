/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Checksum requests: numbers beside a frame by which its sender leaves a checksum to others.
 *
 * The host, a card or the receiving guest follows them behind the hooks: it adds up the frame
 * from one place on and writes the sum to another. Nothing but the request says that this is
 * the place of a checksum. A guest that names its ports or addresses instead, and pads the
 * payload so that the sum comes out as it likes, would have them changed after they were judged.
 */
#ifndef VGW_CHECKSUM_REQUEST_H
#define VGW_CHECKSUM_REQUEST_H

#include "guard.h"
#include "parse_transport.h"

#define TCP_CHECKSUM 16 /* where each header has its checksum */
#define UDP_CHECKSUM 6
#define SCTP_CHECKSUM 8
#define ICMP_CHECKSUM 2 /* ICMPv6 and IGMP as well */
#define NO_CHECKSUM 0
#define ALL_JUDGED 0xffffffff

/* What a request may write to. */
struct checksum_place {
	u32 field;  /* bytes from the upper header to its checksum, or NO_CHECKSUM */
	u32 behind; /* bytes of the frame in front of what nobody judges, or ALL_JUDGED */
};

static __always_inline struct checksum_place place_of_upper(const struct packet *packet)
{
	struct checksum_place all = { NO_CHECKSUM, packet->upper_start };

	switch (packet->protocol) {
	case IPPROTO_TCP:
		return (struct checksum_place){ TCP_CHECKSUM, packet->header_length };
	case IPPROTO_UDP:
		return (struct checksum_place){
			UDP_CHECKSUM,
			is_dhcp_request(packet) ? ALL_JUDGED : packet->header_length,
		};
	case IPPROTO_SCTP:
		return (struct checksum_place){
			SCTP_CHECKSUM,
			packet->upper_start + sizeof(struct sctp_header),
		};
	case IPPROTO_IGMP:
		if (packet->kind != KIND_MEMBERSHIP)
			return all;
		return (struct checksum_place){ ICMP_CHECKSUM, ALL_JUDGED };
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		if (packet->foreign_icmp)
			return all;
		return (struct checksum_place){ ICMP_CHECKSUM, ALL_JUDGED };
	default:
		return all;
	}
}

/*
 * Whether a request is one that an answer of vgw to a rejected UDP packet has from that packet
 * (reject.h). What it writes to has no meaning in such an answer.
 */
static __always_inline bool is_of_rejected_udp(const struct packet *packet)
{
	if (packet->kind != KIND_ICMP_ERROR || packet->checksum_start != packet->upper_start ||
	    packet->checksum_offset != UDP_CHECKSUM)
		return false;
	if (packet->protocol == IPPROTO_ICMP)
		return packet->icmp_type == ICMP_DEST_UNREACH &&
		       packet->icmp_code == ICMP_PROHIBITED;
	return packet->icmp_type == ICMPV6_DEST_UNREACH && packet->icmp_code == ICMPV6_PROHIBITED;
}

/*
 * Judges the request that came with a readable frame, if one did. It may fill in the checksum
 * of the upper header, as every guest with an offload asks for, or one behind all that is
 * judged, as a guest does for what it sends in a tunnel.
 */
static __always_inline enum vgw_reason judge_request(const struct packet *packet)
{
	u32 start = packet->checksum_start;
	struct checksum_place place;

	if (!packet->checksum_asked)
		return VGW_REASON_NONE;
	if (!packet->upper_start)
		return VGW_REASON_CHECKSUM_REQUEST;
	if (packet->kind == KIND_FRAGMENT)
		place = (struct checksum_place){ NO_CHECKSUM, packet->upper_start };
	else
		place = place_of_upper(packet);
	if (start >= place.behind)
		return VGW_REASON_NONE;
	if (place.field && start == packet->upper_start && packet->checksum_offset == place.field)
		return VGW_REASON_NONE;
	if (is_of_rejected_udp(packet))
		return VGW_REASON_NONE;
	return VGW_REASON_CHECKSUM_REQUEST;
}

#endif
