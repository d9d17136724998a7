/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Parsing of TCP, UDP with BOOTP, SCTP and IGMP.
 */
#ifndef VGW_PARSE_TRANSPORT_H
#define VGW_PARSE_TRANSPORT_H

#include <linux/tcp.h>
#include <linux/udp.h>

#include "cursor.h"

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10
#define TCP_FLAGS_OFFSET 13
#define TCP_MIN_WORDS 5

#define DHCP_CLIENT_PORT 68
#define DHCP_SERVER_PORT 67
#define BOOTP_REQUEST 1
#define BOOTP_ETHERNET 1
#define BOOTP_ETHERNET_LENGTH 6

#define IGMP_QUERY 0x11
#define IGMP_V1_REPORT 0x12
#define IGMP_V2_REPORT 0x16
#define IGMP_V2_LEAVE 0x17
#define IGMP_V3_REPORT 0x22

struct sctp_header {
	__be16 source;
	__be16 destination;
	__be32 verification_tag;
	__be32 checksum;
};

/* The first bytes of a BOOTP message, up to the client's hardware address (RFC 951). */
struct bootp_header {
	u8 operation;
	u8 hardware_type;
	u8 hardware_length;
	u8 hops;
	__be32 transaction;
	__be16 seconds;
	__be16 flags;
	__be32 addresses[3]; /* ciaddr, yiaddr, siaddr */
	__be32 relay;        /* giaddr */
	u8 client[16];       /* chaddr */
};

struct igmp_header {
	u8 type;
	u8 code;
	__be16 checksum;
	__be32 group;
};

/* The combinations that real stacks send (netfilter's tcp_valid_flags); the rest are scans. */
static __always_inline bool tcp_flags_valid(u8 flags)
{
	switch (flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK)) {
	case TCP_SYN:
	case TCP_SYN | TCP_ACK:
	case TCP_RST:
	case TCP_RST | TCP_ACK:
	case TCP_ACK:
	case TCP_FIN | TCP_ACK:
		return true;
	default:
		return false;
	}
}

static __always_inline enum vgw_reason take_ports(struct packet *packet, __be16 source,
						  __be16 destination)
{
	packet->source_port = source;
	packet->destination_port = destination;
	return source && destination ? VGW_REASON_NONE : VGW_REASON_PORT_ZERO;
}

static __always_inline enum vgw_reason parse_tcp(struct cursor *cursor, struct packet *packet)
{
	const struct tcphdr *tcp = peek(cursor, sizeof(*tcp));
	u32 header;

	if (!tcp)
		return shortage(cursor, sizeof(*tcp));
	header = tcp->doff * 4;
	if (tcp->doff < TCP_MIN_WORDS || header > cursor->left)
		return VGW_REASON_BAD_HEADER;
	packet->tcp_flags = ((const u8 *)tcp)[TCP_FLAGS_OFFSET];
	packet->tcp_sequence = ntohl(tcp->seq);
	packet->tcp_acknowledged = ntohl(tcp->ack_seq);
	packet->tcp_payload = cursor->left - header;
	packet->header_length += header;
	if (!tcp_flags_valid(packet->tcp_flags))
		return VGW_REASON_TCP_FLAGS;
	return take_ports(packet, tcp->source, tcp->dest);
}

static __always_inline enum vgw_reason parse_bootp(struct cursor *cursor, struct packet *packet)
{
	const struct bootp_header *bootp = peek(cursor, sizeof(*bootp));

	if (!bootp || packet->first_fragment)
		return VGW_REASON_DHCP_INVALID;
	packet->dhcp_well_formed = bootp->operation == BOOTP_REQUEST &&
				   bootp->hardware_type == BOOTP_ETHERNET &&
				   bootp->hardware_length == BOOTP_ETHERNET_LENGTH &&
				   bootp->relay == 0;
	copy_mac(packet->dhcp_client_mac, bootp->client);
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_udp(struct cursor *cursor, struct packet *packet)
{
	const struct udphdr *udp = peek(cursor, sizeof(*udp));
	enum vgw_reason reason;
	u32 length;

	if (!udp)
		return shortage(cursor, sizeof(*udp));
	length = ntohs(udp->len);
	if (length == 0 && cursor->gso)
		length = cursor->left;
	/* The length is the datagram's, so a first fragment never has all of it. */
	if (length < sizeof(*udp) || (length > cursor->left) != packet->first_fragment)
		return VGW_REASON_BAD_LENGTH;
	reason = take_ports(packet, udp->source, udp->dest);
	if (reason)
		return reason;
	packet->header_length += sizeof(*udp);
	if (packet->ethertype == ETH_P_IP && udp->source == htons(DHCP_CLIENT_PORT) &&
	    udp->dest == htons(DHCP_SERVER_PORT)) {
		if (!packet->first_fragment)
			enclose(cursor, length);
		advance(cursor, sizeof(*udp));
		return parse_bootp(cursor, packet);
	}
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_sctp(struct cursor *cursor, struct packet *packet)
{
	const struct sctp_header *sctp = peek(cursor, sizeof(*sctp));

	if (!sctp)
		return shortage(cursor, sizeof(*sctp));
	return take_ports(packet, sctp->source, sctp->destination);
}

static __always_inline enum vgw_reason parse_igmp(struct cursor *cursor, struct packet *packet)
{
	const struct igmp_header *igmp = peek(cursor, sizeof(*igmp));

	if (!igmp)
		return shortage(cursor, sizeof(*igmp));
	packet->kind = KIND_MEMBERSHIP;
	packet->icmp_type = igmp->type;
	/* To a group, not to a host to talk to; and no message is that long. */
	if ((packet->destination.bytes[12] & 0xf0) != 0xe0 || packet->first_fragment)
		return VGW_REASON_MEMBERSHIP_INVALID;
	switch (igmp->type) {
	case IGMP_QUERY:
	case IGMP_V1_REPORT:
	case IGMP_V2_REPORT:
	case IGMP_V2_LEAVE:
	case IGMP_V3_REPORT:
		return VGW_REASON_NONE;
	default:
		return VGW_REASON_MEMBERSHIP_INVALID;
	}
}

#endif
