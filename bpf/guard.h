/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The guards: who the VM may claim to be, and the housekeeping that no rule judges.
 *
 * A guard that lacks its facts has its bit cleared by user space.
 */
#ifndef VGW_GUARD_H
#define VGW_GUARD_H

#include "branchless.h"
#include "clock.h"
#include "maps.h"
#include "parse.h"

#define DHCPV6_CLIENT_PORT 546
#define DHCPV6_SERVER_PORT 547
#define DHCP_ANSWER_NS (60 * NS_PER_SECOND) /* an answer counts as asked for so long */

/* Each guard returns whether it decided; the decision is in the work memory. */

static __always_inline bool pass_as(struct scratch *work, u32 reason)
{
	decide(work, VGW_VERDICT_ACCEPT, reason);
	return true;
}

static __always_inline bool refuse(struct scratch *work, u32 reason)
{
	decide(work, VGW_VERDICT_DROP, reason);
	return true;
}

static __always_inline bool guard_on(const struct endpoint_config *config, u8 guard)
{
	return config->guards & guard;
}

/* Zero where the address lies in the owned network. */
static __always_inline u64 outside(const struct owned_address *owned,
				   const struct vgw_address *address)
{
	return ((address->halves[0] & owned->mask.halves[0]) ^ owned->network.halves[0]) |
	       ((address->halves[1] & owned->mask.halves[1]) ^ owned->network.halves[1]);
}

/* Zero where the address may be used with the MAC. */
static __always_inline u64 wrong_mac(const struct owned_address *owned, u64 mac)
{
	return (*(const u64 *)owned->mac ^ mac) & owned->mac_mask;
}

/* 1 if the address goes with one MAC only, and that is the one. */
static __always_inline u64 names_mac(const struct owned_address *owned, u64 mac)
{
	return is_zero(wrong_mac(owned, mac)) & owned->mac_mask;
}

/* Sets work->owns.mac for a MAC that a frame to the VM is addressed to. */
static __always_inline void find_mac(const struct endpoint_config *config, struct scratch *work,
				     const struct mac *claimed)
{
	u64 mac = claimed->padded;

	work->owns.mac = mac == *(const u64 *)config->mac;
	forget_values();
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_MAX_ADDRESSES; i++) {
		if (work->owns.mac || i >= config->address_count)
			break;
		work->owns.mac |= names_mac(&config->addresses[i], mac);
		forget_values();
	}
}

/*
 * Sets *owned to whether an address goes with the MAC of the packet, and work->owns.mac where it
 * is one of an allowed pair. The walk ends where both are borne out, so most packets pay for the
 * VM's first address only.
 */
static __always_inline void find_owned(const struct endpoint_config *config, struct scratch *work,
				       const struct vgw_address *address, u64 *owned)
{
	u64 mac = work->packet.source_mac.padded;
	const struct owned_address *entry;

	*owned = 0;
	forget_values();
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_MAX_ADDRESSES; i++) {
		if (i >= config->address_count)
			break;
		entry = &config->addresses[i];
		work->owns.mac |= names_mac(entry, mac);
		*owned |= is_zero(wrong_mac(entry, mac) | outside(entry, address));
		forget_values();
		if (work->owns.mac & *owned)
			break;
	}
}

/* Fills work->owns for the claims of a packet from the VM; only ARP and ND have a target. */
static __always_inline void find_ownership(const struct endpoint_config *config,
					   struct scratch *work)
{
	const struct packet *packet = &work->packet;

	work->owns.mac = packet->source_mac.padded == *(const u64 *)config->mac;
	find_owned(config, work, &packet->source, &work->owns.source);
	if (packet->kind == KIND_ARP || packet->kind == KIND_ND)
		find_owned(config, work, &packet->target, &work->owns.target);
}

static __always_inline bool vlan_allowed(const struct endpoint_config *config, u16 vlan)
{
	if (!vlan)
		return true;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_MAX_VLANS; i++) {
		if (i >= config->vlan_count)
			break;
		if (config->vlans[i] == vlan)
			return true;
	}
	return false;
}

static __always_inline bool is_unspecified(const struct vgw_address *address)
{
	return !(address->halves[0] | address->halves[1]);
}

static __always_inline bool is_unspecified_ipv4(const struct vgw_address *address)
{
	return is_mapped_ipv4(address) && !address->words[3];
}

static __always_inline bool is_limited_broadcast(const struct vgw_address *address)
{
	return is_mapped_ipv4(address) && address->words[3] == 0xffffffff;
}

/* ff02::1:2, All_DHCP_Relay_Agents_and_Servers (RFC 8415, 7.1). */
static __always_inline bool is_dhcpv6_servers(const struct vgw_address *address)
{
	return address->words[0] == htonl(0xff020000) && !address->words[1] &&
	       !address->words[2] && address->words[3] == htonl(0x00010002);
}

static __always_inline bool is_udp(const struct packet *packet, u16 ethertype, u16 source,
				   u16 destination)
{
	return packet->ethertype == ethertype && packet->protocol == IPPROTO_UDP &&
	       packet->source_port == htons(source) &&
	       packet->destination_port == htons(destination);
}

static __always_inline bool is_dhcp_request(const struct packet *packet)
{
	return is_udp(packet, ETH_P_IP, DHCP_CLIENT_PORT, DHCP_SERVER_PORT);
}

static __always_inline bool is_dhcpv6_request(const struct packet *packet)
{
	return is_udp(packet, ETH_P_IPV6, DHCPV6_CLIENT_PORT, DHCPV6_SERVER_PORT) &&
	       is_dhcpv6_servers(&packet->destination);
}

static __always_inline bool is_dhcp_answer(const struct packet *packet)
{
	return is_udp(packet, ETH_P_IP, DHCP_SERVER_PORT, DHCP_CLIENT_PORT) ||
	       is_udp(packet, ETH_P_IPV6, DHCPV6_SERVER_PORT, DHCPV6_CLIENT_PORT);
}

/* Index of conntrack_meta.dhcp_asked_ns for a DHCP packet. */
static __always_inline u32 dhcp_family(const struct packet *packet)
{
	return packet->ethertype == ETH_P_IPV6;
}

/* Whether an answer to what was asked at `asked_ns` (0: never) still counts as asked for. */
static __always_inline bool asked_lately(u64 asked_ns)
{
	return asked_ns && clock_now() - asked_ns <= DHCP_ANSWER_NS;
}

static __always_inline bool dhcp_was_asked(u32 family)
{
	struct conntrack_meta *meta;
	u32 zero = 0;

	meta = conntrack_meta.lookup(&zero);
	return meta && asked_lately(meta->dhcp_asked_ns[family & 1]);
}

/*
 * Whether the VM may ask if anybody has the address: its own, or one that it was just
 * offered, which it has to ask about before anybody knows that it took it (RFC 5227, 2.1).
 */
static __always_inline bool may_probe(const struct endpoint_config *config,
				      const struct scratch *work)
{
	return work->owns.target || (config->learns && dhcp_was_asked(0));
}

static __always_inline bool guard_arp(const struct endpoint_config *config, struct scratch *work)
{
	const struct packet *packet = &work->packet;
	bool probe = packet->arp_operation == ARP_REQUEST &&
		     is_unspecified_ipv4(&packet->source) && may_probe(config, work);

	if (!guard_on(config, VGW_GUARD_ARP))
		return pass_as(work, VGW_REASON_ARP);
	if (!same_mac(packet->arp_sender_mac, packet->source_mac.bytes))
		return refuse(work, VGW_REASON_SPOOF_ARP);
	if (!work->owns.source && !probe)
		return refuse(work, VGW_REASON_SPOOF_ARP);
	return pass_as(work, VGW_REASON_ARP);
}

/* What QEMU sends for a guest that has just been migrated. */
static __always_inline bool guard_rarp(struct scratch *work)
{
	const struct packet *packet = &work->packet;

	if (!same_mac(packet->arp_sender_mac, packet->source_mac.bytes) ||
	    !same_mac(packet->arp_target_mac, packet->source_mac.bytes))
		return refuse(work, VGW_REASON_SPOOF_ARP);
	return pass_as(work, VGW_REASON_RARP);
}

static __always_inline bool nd_claims_valid(const struct scratch *work)
{
	const struct packet *packet = &work->packet;
	bool unspecified = is_unspecified(&packet->source);

	if (packet->nd_has_link_layer && !same_mac(packet->nd_link_layer, packet->source_mac.bytes))
		return false;
	switch (packet->icmp_type) {
	case ND_ROUTER_SOLICITATION:
		return work->owns.source || unspecified;
	case ND_NEIGHBOUR_SOLICITATION:
		if (unspecified) /* duplicate address detection */
			return work->owns.target && !packet->nd_has_link_layer;
		return work->owns.source;
	default:
		return work->owns.source && work->owns.target;
	}
}

static __always_inline bool guard_nd(const struct endpoint_config *config, struct scratch *work)
{
	const struct packet *packet = &work->packet;

	if (packet->icmp_type == ND_ROUTER_ADVERTISEMENT) {
		if (guard_on(config, VGW_GUARD_RA))
			return refuse(work, VGW_REASON_ROUTER_ADVERTISEMENT);
	} else if (guard_on(config, VGW_GUARD_ND)) {
		if (!nd_claims_valid(work))
			return refuse(work, VGW_REASON_SPOOF_ND);
	} else if (guard_on(config, VGW_GUARD_ADDRESS)) {
		if (!work->owns.source && !is_unspecified(&packet->source))
			return refuse(work, VGW_REASON_SPOOF_ADDRESS);
	}
	return pass_as(work, VGW_REASON_ND);
}

/* Sources that a host uses before it has an address. */
static __always_inline bool may_lack_address(const struct packet *packet)
{
	if (packet->kind == KIND_MEMBERSHIP)
		return packet->ethertype == ETH_P_IPV6 && is_unspecified(&packet->source);
	return is_dhcp_request(packet) && is_unspecified_ipv4(&packet->source) &&
	       is_limited_broadcast(&packet->destination);
}

/*
 * A request to all servers needs no rule, and its answer none either. One to a single
 * host, such as a renewal, is ordinary traffic once it is well formed: as housekeeping it
 * would be a way out to any host.
 */
static __always_inline bool guard_dhcp_request(struct scratch *work)
{
	const struct packet *packet = &work->packet;
	struct conntrack_meta *meta;
	u32 zero = 0;

	if (packet->first_fragment)
		return refuse(work, VGW_REASON_DHCP_INVALID);
	if (is_dhcp_request(packet) &&
	    (!packet->dhcp_well_formed ||
	     !same_mac(packet->dhcp_client_mac, packet->source_mac.bytes)))
		return refuse(work, VGW_REASON_DHCP_INVALID);
	meta = conntrack_meta.lookup(&zero);
	if (is_dhcp_request(packet) && !is_limited_broadcast(&packet->destination)) {
		if (meta)
			meta->dhcp_renewed_ns = clock_now();
		return false;
	}
	if (meta)
		meta->dhcp_asked_ns[dhcp_family(packet)] = clock_now();
	return pass_as(work, VGW_REASON_DHCP);
}

static __always_inline bool guard_membership(struct scratch *work)
{
	u8 type = work->packet.icmp_type;

	if (type == IGMP_QUERY || type == MLD_QUERY)
		return refuse(work, VGW_REASON_MEMBERSHIP_QUERY);
	return pass_as(work, VGW_REASON_MEMBERSHIP);
}

static __always_inline bool guard_ip(const struct endpoint_config *config, struct scratch *work)
{
	const struct packet *packet = &work->packet;

	if (guard_on(config, VGW_GUARD_ADDRESS) && !work->owns.source &&
	    !may_lack_address(packet))
		return refuse(work, VGW_REASON_SPOOF_ADDRESS);
	if (guard_on(config, VGW_GUARD_DHCP_SERVER) && is_dhcp_answer(packet))
		return refuse(work, VGW_REASON_DHCP_SERVER);
	if (is_dhcp_request(packet) || is_dhcpv6_request(packet))
		return guard_dhcp_request(work);
	if (packet->kind == KIND_MEMBERSHIP)
		return guard_membership(work);
	if (packet->kind == KIND_ECHO && !is_echo_reply(packet) && is_group(&packet->destination))
		return refuse(work, VGW_REASON_ECHO_TO_GROUP);
	return false;
}

static __always_inline bool guard_from_vm(const struct endpoint_config *config,
					  struct scratch *work)
{
	const struct packet *packet = &work->packet;

	find_ownership(config, work);
	if (guard_on(config, VGW_GUARD_MAC) && !work->owns.mac)
		return refuse(work, VGW_REASON_SPOOF_MAC);
	switch (packet->kind) {
	case KIND_ARP:
		return guard_arp(config, work);
	case KIND_RARP:
		return guard_rarp(work);
	case KIND_ND:
		return guard_nd(config, work);
	default:
		return guard_ip(config, work);
	}
}

/* Unicast frames that a bridge floods must not show one VM the traffic of another. */
static __always_inline bool is_for_vm(const struct endpoint_config *config, struct scratch *work)
{
	const struct packet *packet = &work->packet;

	if (!guard_on(config, VGW_GUARD_MAC) || is_group_mac(&packet->destination_mac))
		return true;
	find_mac(config, work, &packet->destination_mac);
	return work->owns.mac;
}

static __always_inline bool guard_to_vm(const struct endpoint_config *config, struct scratch *work)
{
	const struct packet *packet = &work->packet;

	if (!is_for_vm(config, work))
		return refuse(work, VGW_REASON_NOT_FOR_VM);
	switch (packet->kind) {
	case KIND_ARP:
		return pass_as(work, VGW_REASON_ARP);
	case KIND_RARP:
		return refuse(work, VGW_REASON_ETHERTYPE);
	case KIND_ND:
		return pass_as(work, VGW_REASON_ND);
	case KIND_MEMBERSHIP:
		return pass_as(work, VGW_REASON_MEMBERSHIP);
	}
	if (is_dhcp_answer(packet) && !packet->first_fragment &&
	    dhcp_was_asked(dhcp_family(packet)))
		return pass_as(work, VGW_REASON_DHCP);
	return false;
}

/*
 * Whether only one of frame and packet goes to a group: a packet for one host that all get,
 * or one for all that is slipped to one host past what the bridge knows of groups.
 */
static __always_inline bool groups_differ(const struct packet *packet)
{
	bool group = is_group_mac(&packet->destination_mac);

	if (packet->ethertype != ETH_P_IP && packet->ethertype != ETH_P_IPV6)
		return false;
	return group != is_group(&packet->destination);
}

/* Returns whether the guards decided; the rest is for connection tracking and policy. */
static __always_inline bool guard(const struct endpoint_config *config, struct scratch *work,
				  u32 path)
{
	if (!vlan_allowed(config, work->packet.vlan))
		return refuse(work, VGW_REASON_VLAN);
	if (groups_differ(&work->packet))
		return refuse(work, VGW_REASON_GROUP_MISMATCH);
	return path == VGW_PATH_FROM_VM ? guard_from_vm(config, work) : guard_to_vm(config, work);
}

#endif
