/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Answers to rejected packets: a RST for TCP, else an ICMP or ICMPv6 error that says
 * "administratively prohibited". The rejected frame itself becomes the answer.
 *
 * Here an answer is put together in the work memory; tc.h and xdp.h read what it quotes,
 * put it over the frame and send it. README.md says what is never answered and why.
 *
 * A sender may have left the checksum of the rejected packet to a card, and then some card
 * fills it in later, in the answer, at the same place: it takes the sum of all that is
 * behind the IP header, that field included, and stores its complement there. A program
 * cannot call that off. So the field at this place holds a value
 * that stays as it is: in a correct message it is the sum of the pseudo header.
 */
#ifndef VGW_REJECT_H
#define VGW_REJECT_H

#include <linux/if_ether.h>

#include "budget.h"
#include "pipeline.h"

#define ANSWER_TTL 64
#define ANSWER_MESSAGE 64    /* where in answer.bytes the answer's RST or error begins */
#define ANSWER_START_MASK 31 /* the link header begins between 6 and 30 */
#define ICMP_HEADER 8        /* bytes in front of what is quoted */
#define QUOTED_PAYLOAD 8     /* bytes quoted of what the rejected IP packet carries */
#define QUOTED_MAX (sizeof(struct ipv6hdr) + QUOTED_PAYLOAD)
#define LINK_MAX (sizeof(struct ethhdr) + sizeof(struct vlan_tag))
#define ANSWER_MAX (LINK_MAX + sizeof(struct ipv6hdr) + ICMP_HEADER + QUOTED_MAX)

struct icmp_answer {
	u8 type;
	u8 code;
	__be16 checksum;
	__be16 unused;
	__be16 balance; /* unused too, and where the checksum of UDP is */
	u8 quoted[QUOTED_MAX];
};

/* Whether an address can be one host's: no group, and not what hosts never send to. */
static __always_inline bool is_one_host(const struct vgw_address *address)
{
	u8 first = address->bytes[12];

	if (is_mapped_ipv4(address))
		return first && first != 127 && first < 224;
	/* ::/96 has the unspecified address and the loopback address. */
	return address->bytes[0] != 0xff && (address->halves[0] || address->words[2]);
}

/* A frame that a bridge floods may be meant for another VM, which is not to be cut off. */
static __always_inline bool is_surely_for_vm(const struct endpoint_config *config, u32 path)
{
	return path == VGW_PATH_FROM_VM || guard_on(config, VGW_GUARD_MAC);
}

static __always_inline bool is_answerable(const struct endpoint_config *config,
					  const struct packet *packet, u32 path)
{
	if (is_fragment(packet) || is_group_mac(&packet->source_mac) ||
	    is_group_mac(&packet->destination_mac))
		return false;
	if (!is_one_host(&packet->source) || !is_one_host(&packet->destination) ||
	    same_address(&packet->source, &packet->destination) ||
	    !is_surely_for_vm(config, path))
		return false;
	switch (packet->protocol) {
	case IPPROTO_TCP:
		return !(packet->tcp_flags & TCP_RST);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return packet->kind == KIND_ECHO && !is_echo_reply(packet);
	default:
		return true;
	}
}

/* The meter of an answer that is due and within the budget, else NULL. */
static __always_inline struct reject_meter *open_meter(const struct endpoint_config *config)
{
	struct reject_meter *meter;
	u32 zero = 0;

	meter = reject_meter.lookup(&zero);
	if (!meter)
		return NULL;
	if (within_budget(&meter->window, &meter->used, config->reject_per_second, clock_now()))
		return meter;
	__sync_fetch_and_add(&meter->suppressed, 1);
	return NULL;
}

/* Counts an answer; returns `sent`, whether it goes out. */
static __always_inline bool count_answer(struct reject_meter *meter, bool sent)
{
	__sync_fetch_and_add(sent ? &meter->sent : &meter->failed, 1);
	return sent;
}

/* Bytes of the IP header that the rejected packet has and its answer gets: no options. */
static __always_inline u32 ip_header_size(const struct packet *packet)
{
	return packet->ethertype == ETH_P_IP ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* Leaves in the work memory where what of frame and answer is. */
static __always_inline void lay_out(struct answer *answer, const struct packet *packet, bool tagged)
{
	u32 header = ip_header_size(packet), most = header + QUOTED_PAYLOAD;

	answer->link = sizeof(struct ethhdr);
	if (packet->vlan && !tagged)
		answer->link += sizeof(struct vlan_tag);
	answer->start = ANSWER_MESSAGE - header - answer->link;
	answer->quoted = packet->ip_length < most ? packet->ip_length : most;
	answer->length = answer->link + header + ICMP_HEADER + answer->quoted;
	answer->checksum = answer->link + header;
	if (packet->protocol == IPPROTO_TCP) {
		answer->length = answer->checksum + sizeof(struct tcphdr);
		answer->checksum += __builtin_offsetof(struct tcphdr, check) + sizeof(__sum16);
	} else if (packet->protocol == IPPROTO_UDP) {
		answer->checksum += __builtin_offsetof(struct udphdr, check) + sizeof(__sum16);
	}
	__builtin_memset(&answer->bytes[ANSWER_MESSAGE], 0, ICMP_HEADER + QUOTED_MAX);
}

/*
 * Returns the meter to count the answer to a rejected packet in, NULL if it gets none.
 * `tagged`: the frame's tag is held beside it. The caller reads answer.link bytes of the
 * frame to link_part() and answer.quoted bytes behind them to quoted_part().
 */
static __always_inline struct reject_meter *begin_answer(const struct judged *judged, u32 path,
							 bool tagged)
{
	const struct endpoint_config *config = judged->config;
	struct scratch *work = judged->work;
	struct reject_meter *meter;

	if (!config || !work || work->decision.verdict != VGW_VERDICT_REJECT ||
	    !config->reject_per_second || !is_answerable(config, &work->packet, path))
		return NULL;
	meter = open_meter(config);
	if (!meter)
		return NULL;
	lay_out(&work->answer, &work->packet, tagged);
	forget_values();
	return meter;
}

/*
 * Whether a size is of 1 to `most` bytes, in two comparisons that the compiler must not make
 * one of: the verifier would learn nothing from it.
 */
static __always_inline bool is_size(u64 *size, u64 most)
{
	if (*size > most)
		return false;
	asm volatile("" : "+r"(*size));
	return *size;
}

static __always_inline void *link_part(struct answer *answer)
{
	return &answer->bytes[answer->start & ANSWER_START_MASK];
}

static __always_inline void *quoted_part(struct answer *answer)
{
	return &answer->bytes[ANSWER_MESSAGE + ICMP_HEADER];
}

static __always_inline u16 fold(u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

/* Folded one's complement sum of `size` bytes, a constant and a multiple of four. */
static __always_inline u16 sum_of(void *bytes, u32 size)
{
	return fold(bpf_csum_diff(NULL, 0, bytes, size, 0));
}

/*
 * Sum of the pseudo header of the answer. Both addresses lie in a row, and as IPv6 ones,
 * which makes no difference: ::ffff: adds 0xffff, which is zero in this arithmetic.
 */
static __always_inline u16 pseudo_sum(struct packet *packet, u8 protocol, u32 length)
{
	return fold(sum_of(&packet->source, 2 * sizeof(packet->source)) + htons(protocol) +
		    htons(length));
}

static __always_inline u16 message_sum(struct answer *answer)
{
	return sum_of(&answer->bytes[ANSWER_MESSAGE], ICMP_HEADER + QUOTED_MAX);
}

/*
 * RFC 9293, 3.10.7.1. The checksum is `pseudo` whoever computes it, and the window, which
 * means nothing in a RST, makes that right: 0 = message + window + checksum + pseudo.
 */
static __always_inline void write_reset(struct answer *answer, const struct packet *packet,
					u16 pseudo)
{
	struct tcphdr *tcp = (void *)&answer->bytes[ANSWER_MESSAGE];
	u32 payload = answer->link + packet->ip_length - packet->header_length;
	u8 flags = packet->tcp_flags;

	__builtin_memset(tcp, 0, ICMP_HEADER + QUOTED_MAX); /* a RST quotes nothing */
	tcp->source = packet->destination_port;
	tcp->dest = packet->source_port;
	tcp->doff = TCP_MIN_WORDS;
	tcp->rst = 1;
	if (flags & TCP_ACK) {
		tcp->seq = htonl(packet->tcp_acknowledged);
	} else {
		tcp->ack = 1;
		tcp->ack_seq = htonl(packet->tcp_sequence + payload + !!(flags & TCP_SYN) +
				     !!(flags & TCP_FIN));
	}
	forget_values();
	tcp->check = pseudo;
	tcp->window = ~fold(message_sum(answer) + pseudo);
}

/* `balance` takes what a card would leave where the checksum of UDP is. */
static __always_inline void write_error(struct answer *answer, const struct packet *packet,
					u16 pseudo)
{
	struct icmp_answer *icmp = (void *)&answer->bytes[ANSWER_MESSAGE];

	if (packet->ethertype == ETH_P_IP) {
		icmp->type = ICMP_DEST_UNREACH;
		icmp->code = ICMP_PROHIBITED;
		pseudo = 0;
	} else {
		icmp->type = ICMPV6_DEST_UNREACH;
		icmp->code = ICMPV6_PROHIBITED;
		if (packet->protocol == IPPROTO_UDP)
			icmp->balance = pseudo;
	}
	forget_values();
	icmp->checksum = ~fold(message_sum(answer) + pseudo);
}

static __always_inline void write_ipv4(struct answer *answer, const struct packet *packet,
				       u8 protocol, u32 length)
{
	struct iphdr *ip = (void *)&answer->bytes[ANSWER_MESSAGE - sizeof(*ip)];

	__builtin_memset(ip, 0, sizeof(*ip));
	ip->version = 4;
	ip->ihl = IPV4_WORDS_WITHOUT_OPTIONS;
	ip->tot_len = htons(sizeof(*ip) + length);
	ip->frag_off = htons(IP_DONT_FRAGMENT);
	ip->ttl = ANSWER_TTL;
	ip->protocol = protocol;
	ip->saddr = packet->destination.words[3];
	ip->daddr = packet->source.words[3];
	forget_values();
	ip->check = ~sum_of(ip, sizeof(*ip));
}

static __always_inline void write_ipv6(struct answer *answer, const struct packet *packet,
				       u8 protocol, u32 length)
{
	struct ipv6hdr *ip = (void *)&answer->bytes[ANSWER_MESSAGE - sizeof(*ip)];

	__builtin_memset(ip, 0, 8);
	ip->version = 6;
	ip->payload_len = htons(length);
	ip->nexthdr = protocol;
	ip->hop_limit = ANSWER_TTL;
	__builtin_memcpy(&ip->saddr, &packet->destination, sizeof(ip->saddr));
	__builtin_memcpy(&ip->daddr, &packet->source, sizeof(ip->daddr));
}

/* Turns the link header around. */
static __always_inline void write_link(struct answer *answer, const struct packet *packet)
{
	u8 *link = link_part(answer);

	copy_mac(link, packet->source_mac.bytes);
	copy_mac(link + ETH_ALEN, packet->destination_mac.bytes);
}

/* Writes the answer around the parts of the rejected frame that have been read. */
static __always_inline void write_answer(struct scratch *work)
{
	struct packet *packet = &work->packet;
	struct answer *answer = &work->answer;
	u32 length = answer->length - answer->link - ip_header_size(packet);
	bool ipv4 = packet->ethertype == ETH_P_IP, tcp = packet->protocol == IPPROTO_TCP;
	u8 protocol = tcp ? IPPROTO_TCP : ipv4 ? IPPROTO_ICMP : IPPROTO_ICMPV6;
	u16 pseudo = pseudo_sum(packet, protocol, length);

	if (tcp)
		write_reset(answer, packet, pseudo);
	else
		write_error(answer, packet, pseudo);
	forget_values();
	if (ipv4)
		write_ipv4(answer, packet, protocol, length);
	else
		write_ipv6(answer, packet, protocol, length);
	write_link(answer, packet);
	forget_values();
}

#endif
