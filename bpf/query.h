/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The question that a packet or an open flow puts to the policy: struct policy_query.
 *
 * A flow that an older policy accepted asks what its first packet asked, from the flow's key alone.
 */
#ifndef VGW_QUERY_H
#define VGW_QUERY_H

#include "abi.h"
#include "image.h"
#include "packet.h"
#include "parse_icmp.h"
#include "protocols.h"

/* What `any` as a service and the defaults speak of; the rest needs a rule that names it. */
static __always_inline bool is_ordinary(const struct packet *packet)
{
	if (packet->kind == KIND_ECHO)
		return !is_echo_reply(packet);
	return packet->kind == KIND_PLAIN && has_ports(packet->protocol);
}

/* Puts an address into a query, as words in host order: one of IPv4, four of IPv6. */
static __always_inline void query_address(struct policy_query *query, u32 field,
					  const struct vgw_address *address)
{
	u32 first = query->ipv6 ? 0 : 3;

	query->fields[field][0] = ntohl(address->words[first]);
	query->fields[field][1] = ntohl(address->words[1]);
	query->fields[field][2] = ntohl(address->words[2]);
	query->fields[field][3] = ntohl(address->words[3]);
}

static __always_inline void query_addresses(const struct flow_key *key,
					    struct policy_query *query)
{
	const struct vgw_address *local = &key->local;

	query->ipv6 = local->halves[0] || local->words[2] != htonl(0xffff);
	forget_values();
	query_address(query, FIELD_REMOTE, &key->remote);
	query_address(query, FIELD_LOCAL, local);
}

/* The question that the packet itself poses. */
static __always_inline void query_of_packet(const struct packet *packet, u32 path,
					    const struct flow_key *key, struct policy_query *query)
{
	bool icmp = packet->kind == KIND_ECHO || packet->kind == KIND_ICMP_OTHER;
	u32 protocol = packet->protocol << 16;
	u32 service = protocol | (icmp ? packet->icmp_type << 8 | packet->icmp_code :
					 ntohs(packet->destination_port));

	query->path = path & 1;
	query->ordinary = is_ordinary(packet);
	if (packet->foreign_icmp)
		service |= VGW_SERVICE_FOREIGN_ICMP;
	query->fields[FIELD_SERVICE][0] = service;
	query->fields[FIELD_SOURCE][0] = protocol | (icmp ? 0 : ntohs(packet->source_port));
	query_addresses(key, query);
}

/* The question that the first packet of a flow posed, from what the flow's key says of it. */
static __always_inline void query_of_flow(const struct flow_key *key, u32 opener,
					  struct policy_query *query)
{
	bool from_vm = opener == VGW_PATH_FROM_VM;
	__be16 destination = from_vm ? key->remote_port : key->local_port;
	__be16 source = from_vm ? key->local_port : key->remote_port;
	u32 protocol = key->protocol << 16;
	u32 service = protocol | ntohs(destination), sender = protocol | ntohs(source);

	query->path = opener & 1;
	query->ordinary = key->asker || has_ports(key->protocol);
	if (!key->asker && (key->protocol == IPPROTO_ICMP || key->protocol == IPPROTO_ICMPV6))
		service |= VGW_SERVICE_FOREIGN_ICMP; /* no other ICMP has flows */
	if (key->asker) {
		service = protocol | (key->protocol == IPPROTO_ICMP ? ICMP_ECHO << 8 :
								      ICMPV6_ECHO_REQUEST << 8);
		sender = protocol;
	}
	query->fields[FIELD_SERVICE][0] = service;
	query->fields[FIELD_SOURCE][0] = sender;
	query_addresses(key, query);
}

#endif
