/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Parsing of ICMP and ICMPv6: echo, errors with the packet they quote, neighbour
 * discovery with its options, multicast listener discovery.
 */
#ifndef VGW_PARSE_ICMP_H
#define VGW_PARSE_ICMP_H

#include <linux/icmpv6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>

#include "cursor.h"
#include "protocols.h"

/* Not from linux/icmp.h, which wants the C library's headers. */
#define ICMP_ECHOREPLY 0
#define ICMP_FRAG_NEEDED 4 /* code of ICMP_DEST_UNREACH */
/* Codes of "destination unreachable" that say "administratively prohibited". */
#define ICMP_PROHIBITED 13  /* RFC 1812, 5.2.7.1 */
#define ICMPV6_PROHIBITED 1 /* RFC 4443, 3.1 */
#define ICMP_DEST_UNREACH 3
#define ICMP_REDIRECT 5
#define ICMP_ECHO 8
#define ICMP_TIME_EXCEEDED 11
#define ICMP_PARAMETERPROB 12

#define ND_ROUTER_SOLICITATION 133
#define ND_ROUTER_ADVERTISEMENT 134
#define ND_NEIGHBOUR_SOLICITATION 135
#define ND_NEIGHBOUR_ADVERTISEMENT 136
#define ND_REDIRECT 137
#define ND_HOP_LIMIT 255
#define ND_SOURCE_LINK_LAYER 1
#define ND_TARGET_LINK_LAYER 2
#define ND_MAX_OPTIONS 8
#define ND_OPTION_UNIT 8
#define ND_SOLICITATION_LENGTH 8   /* of a router solicitation without its options */
#define ND_ADVERTISEMENT_LENGTH 16 /* of a router advertisement */
#define ND_FIXED_MASK 0x1f         /* no fixed part is longer */

#define MLD_QUERY 130
#define MLD_V1_REPORT 131
#define MLD_V1_DONE 132
#define MLD_V2_REPORT 143
#define MLD_HOP_LIMIT 1
#define MLD_V1_LENGTH 24

#define IPV4_MTU_MIN 68    /* RFC 791 */
#define IPV6_MTU_MIN 1280  /* RFC 8200 */
#define QUOTED_TRANSPORT 8 /* bytes behind the quoted IP header that are read */

struct icmp_header {
	u8 type;
	u8 code;
	__be16 checksum;
	__be16 identifier; /* of an echo */
	__be16 mtu;        /* of the next hop, if fragmentation was needed (RFC 1191) */
};

/* The fixed part of a neighbour solicitation or advertisement (RFC 4861, 4.3 and 4.4). */
struct nd_header {
	struct icmp6hdr icmp;
	struct in6_addr target;
};

/* The option that RFC 4861 section 4.6.1 defines for Ethernet. */
struct nd_option {
	u8 type;
	u8 units; /* length in units of eight bytes */
	u8 mac[6];
};

static __always_inline enum vgw_reason quote_ports(struct packet *packet, const __be16 *ports)
{
	packet->quoted.source_port = ports[0];
	packet->quoted.destination_port = ports[1];
	packet->quoted.tcp_sequence = ntohl(*(const __be32 *)(ports + 2)); /* if it is TCP */
	return VGW_REASON_NONE;
}

/* An error may quote an echo, whose identifier is its port, but no other ICMP. */
static __always_inline enum vgw_reason quote_echo(struct packet *packet, const u8 *icmp,
						  u8 request, u8 reply)
{
	__be16 identifier = ((const __be16 *)icmp)[2];

	if (icmp[0] != request && icmp[0] != reply)
		return VGW_REASON_ICMP_INNER;
	packet->quoted.echo = true;
	packet->quoted.echo_reply = icmp[0] == reply;
	packet->quoted.source_port = identifier;
	packet->quoted.destination_port = identifier;
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_quoted_transport(struct cursor *cursor,
							      struct packet *packet, bool ipv4)
{
	const void *header = peek(cursor, QUOTED_TRANSPORT);
	u8 protocol = packet->quoted.protocol;

	if (!header)
		return VGW_REASON_ICMP_INNER;
	if (has_ports(protocol))
		return quote_ports(packet, header);
	if (ipv4 && protocol == IPPROTO_ICMP)
		return quote_echo(packet, header, ICMP_ECHO, ICMP_ECHOREPLY);
	if (!ipv4 && protocol == IPPROTO_ICMPV6)
		return quote_echo(packet, header, ICMPV6_ECHO_REQUEST, ICMPV6_ECHO_REPLY);
	if (!ipv4 && is_extension_header(protocol))
		return VGW_REASON_ICMP_INNER;
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_quoted_ipv4(struct cursor *cursor,
							 struct packet *packet)
{
	const struct iphdr *ip = peek(cursor, sizeof(*ip));
	u32 header;

	if (!ip || ip->version != 4 || ip->ihl < 5 || ip->frag_off & htons(IP_OFFSET_MASK))
		return VGW_REASON_ICMP_INNER;
	header = ip->ihl * 4;
	map_ipv4(&packet->quoted.source, ip->saddr);
	map_ipv4(&packet->quoted.destination, ip->daddr);
	packet->quoted.protocol = ip->protocol;
	if (header > cursor->left)
		return VGW_REASON_ICMP_INNER;
	advance(cursor, header);
	return parse_quoted_transport(cursor, packet, true);
}

static __always_inline enum vgw_reason parse_quoted_ipv6(struct cursor *cursor,
							 struct packet *packet)
{
	const struct ipv6hdr *ip = peek(cursor, sizeof(*ip));

	if (!ip || ip->version != 6)
		return VGW_REASON_ICMP_INNER;
	copy_ipv6(&packet->quoted.source, &ip->saddr);
	copy_ipv6(&packet->quoted.destination, &ip->daddr);
	if (is_mapped_ipv4(&packet->quoted.source) || is_mapped_ipv4(&packet->quoted.destination))
		return VGW_REASON_ICMP_INNER;
	packet->quoted.protocol = ip->nexthdr;
	advance(cursor, sizeof(*ip));
	return parse_quoted_transport(cursor, packet, false);
}

/* Whether an error announces a path that no link has, to make its receiver send tiny packets. */
static __always_inline bool mtu_is_absurd(const struct icmp_header *icmp)
{
	u16 mtu = ntohs(icmp->mtu);

	return icmp->type == ICMP_DEST_UNREACH && icmp->code == ICMP_FRAG_NEEDED && mtu &&
	       mtu < IPV4_MTU_MIN; /* 0: a router older than RFC 1191 */
}

static __always_inline bool is_echo_reply(const struct packet *packet)
{
	return packet->icmp_type == ICMP_ECHOREPLY || packet->icmp_type == ICMPV6_ECHO_REPLY;
}

static __always_inline void take_echo(struct packet *packet, __be16 identifier)
{
	packet->kind = KIND_ECHO;
	packet->source_port = identifier;
	packet->destination_port = identifier;
}

static __always_inline enum vgw_reason parse_icmp(struct cursor *cursor, struct packet *packet)
{
	const struct icmp_header *icmp = peek(cursor, sizeof(*icmp));

	if (!icmp)
		return shortage(cursor, sizeof(*icmp));
	packet->icmp_type = icmp->type;
	packet->icmp_code = icmp->code;
	switch (icmp->type) {
	case ICMP_ECHO:
	case ICMP_ECHOREPLY:
		take_echo(packet, icmp->identifier);
		return VGW_REASON_NONE;
	case ICMP_REDIRECT:
		return VGW_REASON_REDIRECT;
	case ICMP_DEST_UNREACH:
	case ICMP_TIME_EXCEEDED:
	case ICMP_PARAMETERPROB:
		packet->kind = KIND_ICMP_ERROR;
		if (mtu_is_absurd(icmp))
			return VGW_REASON_BAD_MTU;
		advance(cursor, sizeof(*icmp));
		__builtin_memset(&packet->quoted, 0, sizeof(packet->quoted));
		return parse_quoted_ipv4(cursor, packet);
	default:
		packet->kind = KIND_ICMP_OTHER;
		return VGW_REASON_NONE;
	}
}

/* Reads the link-layer address option, once at most, among all options. */
static __always_inline enum vgw_reason parse_nd_options(struct cursor *cursor,
							struct packet *packet)
{
	const struct nd_option *option;
	u32 length;

	packet->nd_has_link_layer = false;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < ND_MAX_OPTIONS; i++) {
		if (!cursor->left)
			return VGW_REASON_NONE;
		option = peek(cursor, ND_OPTION_UNIT);
		if (!option)
			return VGW_REASON_ND_INVALID;
		length = option->units * ND_OPTION_UNIT;
		if (!length || length > cursor->left)
			return VGW_REASON_ND_INVALID;
		if (option->type == packet->nd_option) {
			if (option->units != 1 || packet->nd_has_link_layer)
				return VGW_REASON_ND_INVALID;
			packet->nd_has_link_layer = true;
			copy_mac(packet->nd_link_layer, option->mac);
		}
		advance(cursor, length);
		forget_values();
	}
	return cursor->left ? VGW_REASON_ND_INVALID : VGW_REASON_NONE;
}

/* Reads the fixed part of a message, and the type of the link-layer option behind it. */
static __always_inline enum vgw_reason parse_nd_fixed(struct cursor *cursor,
						      struct packet *packet)
{
	const struct nd_header *nd;

	packet->nd_option = ND_SOURCE_LINK_LAYER;
	switch (packet->icmp_type) {
	case ND_ROUTER_SOLICITATION:
		packet->nd_fixed = ND_SOLICITATION_LENGTH;
		return VGW_REASON_NONE;
	case ND_ROUTER_ADVERTISEMENT:
		packet->nd_fixed = ND_ADVERTISEMENT_LENGTH;
		return cursor->left < ND_ADVERTISEMENT_LENGTH ?
			       shortage(cursor, ND_ADVERTISEMENT_LENGTH) : VGW_REASON_NONE;
	case ND_NEIGHBOUR_ADVERTISEMENT:
		packet->nd_option = ND_TARGET_LINK_LAYER;
	}
	packet->nd_fixed = sizeof(*nd);
	nd = peek(cursor, sizeof(*nd));
	if (!nd)
		return shortage(cursor, sizeof(*nd));
	copy_ipv6(&packet->target, &nd->target);
	return is_mapped_ipv4(&packet->target) ? VGW_REASON_ND_INVALID : VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_nd(struct cursor *cursor, struct packet *packet)
{
	enum vgw_reason reason;

	packet->kind = KIND_ND;
	if (packet->hop_limit != ND_HOP_LIMIT || packet->icmp_code || packet->fragment_header)
		return VGW_REASON_ND_INVALID;
	reason = parse_nd_fixed(cursor, packet);
	if (reason || packet->icmp_type == ND_ROUTER_ADVERTISEMENT)
		return reason;
	forget_values();
	advance(cursor, packet->nd_fixed & ND_FIXED_MASK);
	return parse_nd_options(cursor, packet);
}

static __always_inline enum vgw_reason parse_mld(struct cursor *cursor, struct packet *packet)
{
	packet->kind = KIND_MEMBERSHIP;
	if (!packet->router_alert || packet->hop_limit != MLD_HOP_LIMIT ||
	    packet->fragment_header || packet->destination.bytes[0] != 0xff)
		return VGW_REASON_MEMBERSHIP_INVALID;
	if (packet->icmp_type != MLD_V2_REPORT && cursor->left < MLD_V1_LENGTH)
		return shortage(cursor, MLD_V1_LENGTH);
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_icmpv6(struct cursor *cursor, struct packet *packet)
{
	const struct icmp6hdr *icmp = peek(cursor, sizeof(*icmp));

	if (!icmp)
		return shortage(cursor, sizeof(*icmp));
	packet->icmp_type = icmp->icmp6_type;
	packet->icmp_code = icmp->icmp6_code;
	switch (icmp->icmp6_type) {
	case MLD_QUERY:
	case MLD_V1_REPORT:
	case MLD_V1_DONE:
	case MLD_V2_REPORT:
		return parse_mld(cursor, packet);
	case ND_REDIRECT:
		return VGW_REASON_REDIRECT;
	}
	if (packet->router_alert)
		return VGW_REASON_EXTENSION_HEADER;
	switch (icmp->icmp6_type) {
	case ICMPV6_ECHO_REQUEST:
	case ICMPV6_ECHO_REPLY:
		take_echo(packet, icmp->icmp6_identifier);
		return VGW_REASON_NONE;
	case ND_ROUTER_SOLICITATION ... ND_NEIGHBOUR_ADVERTISEMENT:
		return parse_nd(cursor, packet);
	case ICMPV6_DEST_UNREACH ... ICMPV6_PARAMPROB:
		packet->kind = KIND_ICMP_ERROR;
		if (icmp->icmp6_type == ICMPV6_PKT_TOOBIG && ntohl(icmp->icmp6_mtu) < IPV6_MTU_MIN)
			return VGW_REASON_BAD_MTU;
		advance(cursor, sizeof(*icmp));
		__builtin_memset(&packet->quoted, 0, sizeof(packet->quoted));
		return parse_quoted_ipv6(cursor, packet);
	default:
		packet->kind = KIND_ICMP_OTHER;
		return VGW_REASON_NONE;
	}
}

#endif
