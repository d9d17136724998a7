/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Parsing of ARP, RARP, IPv4 and IPv6 with its extension headers.
 */
#ifndef VGW_PARSE_NETWORK_H
#define VGW_PARSE_NETWORK_H

#include <linux/ip.h>
#include <linux/ipv6.h>

#include "parse_icmp.h"
#include "parse_transport.h"

#define ARP_HARDWARE_ETHERNET 1
#define ARP_REQUEST 1
#define ARP_REPLY 2
#define RARP_REQUEST 3

#define IPV4_WORDS_WITHOUT_OPTIONS 5
#define IPV4_WORDS_WITH_ROUTER_ALERT 6
#define IPV4_ROUTER_ALERT 0x94040000 /* RFC 2113 */

#define FRAGMENT_UNIT 8 /* bytes that offsets count in */
#define DATAGRAM_MAX 65535

/*
 * Hop-by-hop options of an MLD message: router alert (RFC 2711) and two bytes of padding,
 * as one PadN (Linux hosts) or two Pad1 (the Linux bridge's querier), behind or before it.
 */
#define HOP_ALERT_PADN 0x0502000001000000ULL
#define HOP_PADN_ALERT 0x0100050200000000ULL
#define HOP_ALERT_PAD1 0x0502000000000000ULL
#define HOP_PAD1_ALERT 0x0000050200000000ULL
#define HOP_JUMBO 0xc20400000000ULL /* and the length, RFC 2675, 2 */

struct arp_packet {
	__be16 hardware;
	__be16 protocol;
	u8 hardware_length;
	u8 protocol_length;
	__be16 operation;
	u8 sender_mac[6];
	u8 sender_ip[4];
	u8 target_mac[6];
	u8 target_ip[4];
};

struct fragment_header {
	u8 next_header;
	u8 reserved;
	__be16 offset;
	__be32 identification;
};

static __always_inline __be32 load_be32(const u8 *bytes)
{
	const u16 *halves = (const u16 *)bytes;

	return (u32)halves[1] << 16 | halves[0];
}

static __always_inline enum vgw_reason parse_arp(struct cursor *cursor, struct packet *packet)
{
	const struct arp_packet *arp = peek(cursor, sizeof(*arp));
	u16 operation;

	if (!arp)
		return VGW_REASON_TRUNCATED;
	operation = ntohs(arp->operation);
	packet->arp_operation = operation;
	copy_mac(packet->arp_sender_mac, arp->sender_mac);
	copy_mac(packet->arp_target_mac, arp->target_mac);
	map_ipv4(&packet->source, load_be32(arp->sender_ip));
	map_ipv4(&packet->destination, load_be32(arp->target_ip));
	packet->target = packet->destination;
	if (arp->hardware != htons(ARP_HARDWARE_ETHERNET) || arp->protocol != htons(ETH_P_IP) ||
	    arp->hardware_length != 6 || arp->protocol_length != 4)
		return VGW_REASON_ARP_INVALID;
	if (packet->ethertype == ETH_P_RARP) {
		packet->kind = KIND_RARP;
		return operation == RARP_REQUEST ? VGW_REASON_NONE : VGW_REASON_ARP_INVALID;
	}
	packet->kind = KIND_ARP;
	return operation == ARP_REQUEST || operation == ARP_REPLY ? VGW_REASON_NONE :
								    VGW_REASON_ARP_INVALID;
}

static __always_inline enum vgw_reason parse_upper_header(struct cursor *cursor,
							  struct packet *packet)
{
	bool ipv4 = packet->ethertype == ETH_P_IP;

	if (packet->router_alert && packet->protocol != IPPROTO_ICMPV6)
		return VGW_REASON_EXTENSION_HEADER;
	switch (packet->protocol) {
	case IPPROTO_TCP:
		return parse_tcp(cursor, packet);
	case IPPROTO_UDP:
		return parse_udp(cursor, packet);
	case IPPROTO_SCTP:
		return parse_sctp(cursor, packet);
	case IPPROTO_IGMP:
		return ipv4 ? parse_igmp(cursor, packet) : VGW_REASON_NONE;
	case IPPROTO_ICMP:
		packet->foreign_icmp = !ipv4;
		return ipv4 ? parse_icmp(cursor, packet) : VGW_REASON_NONE;
	case IPPROTO_ICMPV6:
		packet->foreign_icmp = ipv4;
		return ipv4 ? VGW_REASON_NONE : parse_icmpv6(cursor, packet);
	default:
		return VGW_REASON_NONE;
	}
}

/*
 * A first fragment must have what rules and state need, or a later one could bring it
 * unseen (RFC 1858, RFC 7112). A later one has nothing to read.
 */
static __always_inline enum vgw_reason parse_upper(struct cursor *cursor, struct packet *packet)
{
	enum vgw_reason reason;

	packet->upper_start = packet->header_length;
	if (packet->kind == KIND_FRAGMENT)
		return VGW_REASON_NONE;
	reason = parse_upper_header(cursor, packet);
	if (!packet->first_fragment)
		return reason;
	packet->tcp_payload = DATAGRAM_MAX;
	switch (reason) {
	case VGW_REASON_TRUNCATED:
	case VGW_REASON_BAD_LENGTH:
	case VGW_REASON_BAD_HEADER:
		return VGW_REASON_FRAGMENT;
	default:
		return packet->kind == KIND_ICMP_ERROR ? VGW_REASON_FRAGMENT : reason;
	}
}

/*
 * Takes down which part of which datagram the payload at the cursor is. Refuses what no
 * host sends and what could not be put together (ping of death, tear drop).
 */
static __always_inline enum vgw_reason take_fragment(struct cursor *cursor, struct packet *packet,
						     __be32 id, u32 offset, bool more)
{
	u32 length = cursor->left;

	packet->fragment_id = id;
	packet->fragment_offset = offset;
	packet->fragment_length = length;
	packet->fragment_protocol = packet->protocol;
	packet->first_fragment = !offset;
	if (offset)
		packet->kind = KIND_FRAGMENT;
	if (!length || offset + length > DATAGRAM_MAX || (more && length % FRAGMENT_UNIT))
		return VGW_REASON_FRAGMENT;
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_ipv4_fragment(struct cursor *cursor,
							   struct packet *packet, __be16 id,
							   u16 flags)
{
	bool more = flags & IP_MORE_FRAGMENTS;
	u32 offset = (flags & IP_OFFSET_MASK) * FRAGMENT_UNIT;

	if (!(flags & (IP_MORE_FRAGMENTS | IP_OFFSET_MASK)))
		return VGW_REASON_NONE;
	if (more && flags & IP_DONT_FRAGMENT)
		return VGW_REASON_FRAGMENT;
	return take_fragment(cursor, packet, htonl(ntohs(id)), offset, more);
}

/* Only IGMP carries an option that has a use here, the router alert. */
static __always_inline enum vgw_reason parse_ipv4_options(struct cursor *cursor,
							  const struct packet *packet, u32 words)
{
	const u8 *options;

	if (words == IPV4_WORDS_WITHOUT_OPTIONS)
		return VGW_REASON_NONE;
	if (words != IPV4_WORDS_WITH_ROUTER_ALERT || packet->protocol != IPPROTO_IGMP)
		return VGW_REASON_IP_OPTIONS;
	options = peek(cursor, sizeof(u32));
	if (!options)
		return VGW_REASON_TRUNCATED;
	if (load_be32(options) != htonl(IPV4_ROUTER_ALERT))
		return VGW_REASON_IP_OPTIONS;
	advance(cursor, sizeof(u32));
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_ipv4(struct cursor *cursor, struct packet *packet)
{
	const struct iphdr *ip = peek(cursor, sizeof(*ip));
	enum vgw_reason reason;
	u32 total, header;

	if (!ip)
		return VGW_REASON_TRUNCATED;
	if (ip->version != 4)
		return VGW_REASON_BAD_VERSION;
	if (ip->ihl < IPV4_WORDS_WITHOUT_OPTIONS)
		return VGW_REASON_BAD_HEADER;
	header = ip->ihl * 4;
	map_ipv4(&packet->source, ip->saddr);
	map_ipv4(&packet->destination, ip->daddr);
	packet->protocol = ip->protocol;
	if (header > cursor->left)
		return VGW_REASON_TRUNCATED;
	total = ntohs(ip->tot_len);
	if (!total && cursor->gso)
		total = cursor->left;
	if (total < header || total > cursor->left)
		return VGW_REASON_BAD_LENGTH;
	enclose(cursor, total);
	packet->ip_length = total;
	advance(cursor, sizeof(*ip));
	reason = parse_ipv4_options(cursor, packet, header / 4);
	if (reason)
		return reason;
	reason = parse_ipv4_fragment(cursor, packet, ip->id, ntohs(ip->frag_off));
	if (reason)
		return reason;
	packet->header_length += header;
	return parse_upper(cursor, packet);
}

static __always_inline bool is_router_alert(u64 options)
{
	switch (options) {
	case HOP_ALERT_PADN:
	case HOP_PADN_ALERT:
	case HOP_ALERT_PAD1:
	case HOP_PAD1_ALERT:
		return true;
	default:
		return false;
	}
}

/*
 * The hop-by-hop headers that are read on, both of eight bytes: a router alert, and in a
 * super-frame of the kernel the length of a payload above 64 KiB (RFC 2675, BIG TCP).
 */
static __always_inline enum vgw_reason parse_hop_by_hop(struct cursor *cursor,
							struct packet *packet, bool jumbo)
{
	const u8 *header = peek(cursor, 8);
	u64 options;

	if (!header)
		return VGW_REASON_TRUNCATED;
	options = (u64)ntohl(load_be32(header + 2)) << 32 |
		  (u64)ntohs(*(const __be16 *)(header + 6)) << 16;
	if (header[1] != 0)
		return VGW_REASON_EXTENSION_HEADER;
	if (is_router_alert(options))
		packet->router_alert = true;
	else if (!jumbo || options >> 16 != (HOP_JUMBO | cursor->left))
		return VGW_REASON_EXTENSION_HEADER;
	packet->protocol = header[0];
	packet->header_length += 8;
	advance(cursor, 8);
	return VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_fragment_header(struct cursor *cursor,
							     struct packet *packet)
{
	const struct fragment_header *fragment = peek(cursor, sizeof(*fragment));
	u16 position;

	if (!fragment)
		return VGW_REASON_TRUNCATED;
	position = ntohs(fragment->offset);
	packet->fragment_header = true;
	packet->protocol = fragment->next_header;
	packet->header_length += sizeof(*fragment);
	advance(cursor, sizeof(*fragment));
	if (!(position & (IPV6_MORE_FRAGMENTS | IPV6_OFFSET_MASK)))
		return VGW_REASON_NONE; /* atomic (RFC 6946): a whole packet */
	return take_fragment(cursor, packet, fragment->identification,
			     position & IPV6_OFFSET_MASK, position & IPV6_MORE_FRAGMENTS);
}

/* Leaves the upper protocol in packet->protocol; an extension header still there is refused. */
static __always_inline enum vgw_reason parse_extension_headers(struct cursor *cursor,
							       struct packet *packet, bool jumbo)
{
	enum vgw_reason reason = VGW_REASON_NONE;

	if (packet->protocol == EXT_HOP_BY_HOP)
		reason = parse_hop_by_hop(cursor, packet, jumbo);
	else if (packet->protocol == EXT_FRAGMENT)
		reason = parse_fragment_header(cursor, packet);
	if (reason || packet->kind == KIND_FRAGMENT)
		return reason;
	return is_extension_header(packet->protocol) ? VGW_REASON_EXTENSION_HEADER :
						       VGW_REASON_NONE;
}

static __always_inline enum vgw_reason parse_ipv6(struct cursor *cursor, struct packet *packet)
{
	const struct ipv6hdr *ip = peek(cursor, sizeof(*ip));
	enum vgw_reason reason;
	u32 length;

	if (!ip)
		return VGW_REASON_TRUNCATED;
	if (ip->version != 6)
		return VGW_REASON_BAD_VERSION;
	copy_ipv6(&packet->source, &ip->saddr);
	copy_ipv6(&packet->destination, &ip->daddr);
	packet->protocol = ip->nexthdr;
	packet->hop_limit = ip->hop_limit;
	if (is_mapped_ipv4(&packet->source) || is_mapped_ipv4(&packet->destination))
		return VGW_REASON_BAD_ADDRESS;
	length = ntohs(ip->payload_len);
	advance(cursor, sizeof(*ip));
	if (!length && cursor->gso)
		length = cursor->left;
	if (!length || length > cursor->left)
		return VGW_REASON_BAD_LENGTH;
	enclose(cursor, length);
	packet->ip_length = sizeof(*ip) + length;
	reason = parse_extension_headers(cursor, packet, !ip->payload_len);
	if (reason)
		return reason;
	packet->header_length += sizeof(*ip);
	return parse_upper(cursor, packet);
}

#endif
