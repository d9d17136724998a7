// SPDX-License-Identifier: Apache-2.0
//
// A stateful firewall in user space, as a virtual machine that all packets are pulled through: reads
// every frame from one TAP and writes the accepted ones to another.
//
//   slow_path OUTSIDE_FD VM_FD RULES
//
// RULES is a file of lines `VERSION SOURCE/LENGTH DESTINATION/LENGTH PROTOCOL FIRST_PORT LAST_PORT
// accept|drop` for new flows from outside, the first that matches decides, none drops; PROTOCOL 0 is
// any. Flows that the VM opens are accepted. Packets of known flows pass without the rules. Frames are
// moved with their virtio headers, so super-frames stay whole. It is what such a firewall has to do
// per packet at the least: no logs, counters, time-outs or checks of numbers.

#include <arpa/inet.h>
#include <net/ethernet.h>
#include <netinet/in.h>
#include <netinet/ip.h>
#include <netinet/ip6.h>
#include <string.h>

#include "frames.h"

enum {
	OUTSIDE = 0,
	SLOTS = 1 << 20, // of flows; a power of two
	MOST_FLOWS = SLOTS / 2,
};

struct flow {
	uint32_t local[4], remote[4]; // wire
	uint16_t local_port, remote_port;
	uint8_t protocol;
	uint8_t used;
	uint16_t pad;
};

struct rule {
	uint32_t source[4], source_mask[4], destination[4], destination_mask[4]; // wire
	uint16_t first_port, last_port;
	uint8_t version, protocol;
	bool accept;
};

struct packet {
	uint32_t source[4], destination[4];
	uint16_t source_port, destination_port; // wire
	uint8_t version, protocol;
};

static struct flow *flows;
static size_t flow_count;
static struct rule *rules;
static size_t rule_count;

static void set_prefix(uint32_t *address, uint32_t *mask, char *text, int version)
{
	char *slash = strchr(text, '/');
	int length;

	if (!slash)
		refuse(text, "is not a prefix");
	*slash = 0;
	length = atoi(slash + 1);
	if (inet_pton(version == 4 ? AF_INET : AF_INET6, text, address) != 1)
		refuse(text, "is not an address");
	for (int word = 0; word < 4; word++, length -= 32)
		mask[word] = length >= 32 ? 0xffffffff : length > 0 ? htonl(~0U << (32 - length)) : 0;
}

static void read_rules(const char *path)
{
	char source[64], destination[64], verdict[8];
	unsigned version, protocol, first, last;
	FILE *file = fopen(path, "r");
	size_t room = 0;

	if (!file)
		die(path);
	while (fscanf(file, "%u %63s %63s %u %u %u %7s", &version, source, destination, &protocol,
		      &first, &last, verdict) == 7) {
		struct rule *rule;

		if (rule_count == room) {
			room = room ? 2 * room : 64;
			rules = realloc(rules, room * sizeof(*rules));
			if (!rules)
				die("realloc");
		}
		rule = &rules[rule_count++];
		memset(rule, 0, sizeof(*rule));
		rule->version = version;
		rule->protocol = protocol;
		rule->first_port = first;
		rule->last_port = last;
		rule->accept = !strcmp(verdict, "accept");
		set_prefix(rule->source, rule->source_mask, source, version);
		set_prefix(rule->destination, rule->destination_mask, destination, version);
	}
	if (!feof(file)) {
		fprintf(stderr, "%s: line %zu is not a rule\n", path, rule_count + 1);
		exit(2);
	}
	fclose(file);
}

static bool has_ports(uint8_t protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

// Reads a packet whose headers are plain; false for others.
static bool parse(const uint8_t *frame, size_t length, struct packet *packet)
{
	uint16_t type;
	size_t at = ETH_HLEN;

	memset(packet, 0, sizeof(*packet));
	if (length < ETH_HLEN)
		return false;
	memcpy(&type, frame + 12, sizeof(type));
	if (type == htons(ETHERTYPE_IP)) {
		const struct ip *ip = (const void *)(frame + at);

		if (length < at + sizeof(*ip) || ip->ip_hl < 5 || ip->ip_off & htons(0x3fff))
			return false;
		packet->version = 4;
		packet->protocol = ip->ip_p;
		memcpy(packet->source, &ip->ip_src, 4);
		memcpy(packet->destination, &ip->ip_dst, 4);
		at += ip->ip_hl * 4;
	} else if (type == htons(ETHERTYPE_IPV6)) {
		const struct ip6_hdr *ip = (const void *)(frame + at);

		if (length < at + sizeof(*ip))
			return false;
		packet->version = 6;
		packet->protocol = ip->ip6_nxt;
		memcpy(packet->source, &ip->ip6_src, 16);
		memcpy(packet->destination, &ip->ip6_dst, 16);
		at += sizeof(*ip);
	} else {
		return false;
	}
	if (!has_ports(packet->protocol))
		return true;
	if (length < at + 8)
		return false;
	memcpy(&packet->source_port, frame + at, 2);
	memcpy(&packet->destination_port, frame + at + 2, 2);
	return true;
}

static struct flow flow_of(const struct packet *packet, int from)
{
	bool inwards = from == OUTSIDE;
	struct flow flow = { .used = 1, .protocol = packet->protocol };

	memcpy(flow.local, inwards ? packet->destination : packet->source, 16);
	memcpy(flow.remote, inwards ? packet->source : packet->destination, 16);
	flow.local_port = inwards ? packet->destination_port : packet->source_port;
	flow.remote_port = inwards ? packet->source_port : packet->destination_port;
	return flow;
}

// The slot of a flow, or the free one where it would go.
static struct flow *slot_of(const struct flow *flow)
{
	const uint64_t *words = (const void *)flow;
	uint64_t hash = 0;

	for (size_t i = 0; i < sizeof(*flow) / sizeof(*words); i++)
		hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ULL, hash ^= hash >> 32;
	for (size_t at = hash;; at++) {
		struct flow *slot = &flows[at & (SLOTS - 1)];

		if (!slot->used || !memcmp(slot, flow, sizeof(*flow)))
			return slot;
	}
}

static bool in_prefix(const uint32_t *address, const uint32_t *prefix, const uint32_t *mask)
{
	uint32_t differs = 0;

	for (int word = 0; word < 4; word++)
		differs |= (address[word] & mask[word]) ^ prefix[word];
	return !differs;
}

static bool rules_accept(const struct packet *packet)
{
	uint16_t port = ntohs(packet->destination_port);

	for (size_t i = 0; i < rule_count; i++) {
		const struct rule *rule = &rules[i];

		if (rule->version == packet->version &&
		    (!rule->protocol || rule->protocol == packet->protocol) &&
		    port >= rule->first_port && port <= rule->last_port &&
		    in_prefix(packet->source, rule->source, rule->source_mask) &&
		    in_prefix(packet->destination, rule->destination, rule->destination_mask))
			return rule->accept;
	}
	return false;
}

static bool accepts(const uint8_t *frame, size_t length, int from)
{
	struct packet packet;
	struct flow flow, *slot;
	uint16_t type = 0;

	if (!parse(frame, length, &packet)) {
		if (length >= ETH_HLEN)
			memcpy(&type, frame + 12, sizeof(type));
		return type == htons(ETHERTYPE_ARP);
	}
	flow = flow_of(&packet, from);
	slot = slot_of(&flow);
	if (slot->used)
		return true;
	if (from == OUTSIDE && !rules_accept(&packet))
		return false;
	if (flow_count == MOST_FLOWS)
		return false;
	flow_count++;
	*slot = flow;
	return true;
}

int main(int count, char **words)
{
	int fds[2];

	if (count != 4) {
		fputs("slow_path OUTSIDE_FD VM_FD RULES\n", stderr);
		return 2;
	}
	fds[0] = descriptor(words[1]);
	fds[1] = descriptor(words[2]);
	flows = calloc(SLOTS, sizeof(*flows));
	if (!flows)
		die("calloc");
	read_rules(words[3]);
	move_frames(fds, accepts);
}
