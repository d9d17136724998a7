/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Protocol numbers and the small questions about them that several stages ask.
 */
#ifndef VGW_PROTOCOLS_H
#define VGW_PROTOCOLS_H

#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>

#include "byteorder.h"
#include "packet.h"

#define ETH_P_QINQ1 0x9100
#define IP_DONT_FRAGMENT 0x4000
#define IP_MORE_FRAGMENTS 0x2000
#define IP_OFFSET_MASK 0x1fff
#define IPV6_MORE_FRAGMENTS 0x0001
#define IPV6_OFFSET_MASK 0xfff8

#define EXT_HOP_BY_HOP 0
#define EXT_ROUTING 43
#define EXT_FRAGMENT 44
#define EXT_NONE 59
#define EXT_DESTINATION 60
#define EXT_MOBILITY 135
#define EXT_HIP 139
#define EXT_SHIM6 140

static __always_inline bool has_ports(u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_SCTP;
}

static __always_inline bool is_extension_header(u8 protocol)
{
	switch (protocol) {
	case EXT_HOP_BY_HOP:
	case EXT_ROUTING:
	case EXT_FRAGMENT:
	case EXT_NONE:
	case EXT_DESTINATION:
	case EXT_MOBILITY:
	case EXT_HIP:
	case EXT_SHIM6:
		return true;
	default:
		return false;
	}
}

static __always_inline void map_ipv4(struct vgw_address *to, __be32 address)
{
	struct vgw_address mapped = { .words = { 0, 0, htonl(0xffff), address } };

	/* In halves, as all read it: what several stores have written takes a processor long to read. */
	to->halves[0] = 0;
	to->halves[1] = mapped.halves[1];
}

/*
 * Whether an address is one that vgw uses for IPv4. It is never on a wire, and in an IPv6
 * header it would be taken for an IPv4 address in rules, guards and flows.
 */
static __always_inline bool is_mapped_ipv4(const struct vgw_address *address)
{
	return !address->halves[0] && address->words[2] == htonl(0xffff);
}

/* Multicast of either family and the limited broadcast. */
static __always_inline bool is_group(const struct vgw_address *address)
{
	if (!is_mapped_ipv4(address))
		return address->bytes[0] == 0xff;
	return (address->bytes[12] & 0xf0) == 0xe0 || address->words[3] == 0xffffffff;
}

static __always_inline void copy_ipv6(struct vgw_address *to, const struct in6_addr *address)
{
	const u64 *halves = (const u64 *)address;

	to->halves[0] = halves[0];
	to->halves[1] = halves[1];
}

#endif
