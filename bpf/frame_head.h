/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The head of a frame: all bytes that its treatment depends on, of a datagram or segment that
 * opens nothing but what its addresses and ports say.
 *
 * Two frames with one head are read alike by the parser and judged alike by guards and policy.
 * Left out is what may differ: the identification and checksums, which the parser does not
 * look at, and the numbers in a SYN. There are heads of TCP and UDP right behind a plain IP header.
 */
#ifndef VGW_FRAME_HEAD_H
#define VGW_FRAME_HEAD_H

#include <linux/if_ether.h>
#include <linux/in.h>

#include "byteorder.h"
#include "packet.h"

#define HEAD_IPV4_START 0x45 /* version 4, no options */
#define HEAD_IPV4_UPPER 34   /* bytes of the frame in front of TCP or UDP */
#define HEAD_IPV6_UPPER 54
#define HEAD_TCP_FLAGS 12    /* bytes of TCP in front of its length and flags */

/* Of the eight bytes from 16, 24, 32 and 40 on, in an IPv4 frame: all but what may differ. */
#define HEAD_BUT_IDENTIFICATION htonll(0xffff0000ffffffffULL)
#define HEAD_BUT_IP_CHECKSUM htonll(0x0000ffffffffffffULL)
#define HEAD_BUT_SEQUENCE htonll(0xffffffffffff0000ULL)
#define HEAD_BUT_NUMBERS htonll(0x000000000000ffffULL)

static __always_inline bool is_readable(const struct frame *frame, u32 bytes)
{
	return frame->data + bytes <= frame->data_end;
}

static __always_inline bool read_ipv4_head(const struct frame *frame, struct frame_head *head)
{
	const u64 *words = frame->data;
	const u8 *bytes = frame->data;

	if (!is_readable(frame, 5 * sizeof(u64)) || bytes[ETH_HLEN] != HEAD_IPV4_START)
		return false;
	head->words[0] = words[0];
	head->words[1] = words[1];
	head->words[2] = words[2] & HEAD_BUT_IDENTIFICATION;
	head->words[3] = words[3] & HEAD_BUT_IP_CHECKSUM;
	head->words[6] = 0;
	head->words[7] = 0;
	switch (bytes[23]) {
	case IPPROTO_UDP:
		head->words[4] = words[4];
		head->words[5] = 0;
		return true;
	case IPPROTO_TCP:
		if (!is_readable(frame, 6 * sizeof(u64)))
			return false;
		head->words[4] = words[4] & HEAD_BUT_SEQUENCE;
		head->words[5] = words[5] & HEAD_BUT_NUMBERS;
		return true;
	default:
		return false;
	}
}

static __always_inline bool read_ipv6_head(const struct frame *frame, struct frame_head *head)
{
	const u64 *words = frame->data;
	const u32 *ports = frame->data + HEAD_IPV6_UPPER;
	const u8 *bytes = frame->data;
	const u16 *flags = frame->data + HEAD_IPV6_UPPER + HEAD_TCP_FLAGS;

	if (!is_readable(frame, HEAD_IPV6_UPPER + 6))
		return false;
	head->words[0] = words[0];
	head->words[1] = words[1];
	head->words[2] = words[2];
	head->words[3] = words[3];
	head->words[4] = words[4];
	head->words[5] = words[5];
	head->words[6] = words[6];
	switch (bytes[20]) {
	case IPPROTO_UDP:
		head->words[7] = ports[0] | (u64)((const u16 *)ports)[2] << 32;
		return true;
	case IPPROTO_TCP:
		if (!is_readable(frame, HEAD_IPV6_UPPER + HEAD_TCP_FLAGS + 2))
			return false;
		head->words[7] = ports[0] | (u64)flags[0] << 32;
		return true;
	default:
		return false;
	}
}

/* Reads the head of a frame on `path`. Returns false if it has none. */
static __always_inline bool read_head(const struct frame *frame, u32 path,
				      struct frame_head *head)
{
	const u8 *bytes = frame->data;

	if (frame->gso || frame->tagged || !is_readable(frame, ETH_HLEN))
		return false;
	head->beside[0] = (u64)frame->length << 32 | path << 1 | frame->checksum_asked;
	head->beside[1] = frame->checksum_asked ?
				  (u64)frame->checksum_start << 32 | frame->checksum_offset :
				  0;
	switch (*(const __be16 *)(bytes + 2 * ETH_ALEN)) {
	case VGW_SWAP(16, ETH_P_IP):
		return read_ipv4_head(frame, head);
	case VGW_SWAP(16, ETH_P_IPV6):
		return read_ipv6_head(frame, head);
	default:
		return false;
	}
}

/* Whether two heads are the same. */
static __always_inline bool same_head(const struct frame_head *first,
				      const struct frame_head *second)
{
	const u64 *a = first->words, *b = second->words;

	return !((a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5]) | (a[6] ^ b[6]) | (a[7] ^ b[7]) |
		 (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) |
		 (first->beside[0] ^ second->beside[0]) | (first->beside[1] ^ second->beside[1]));
}

/* A number of so many bits of the addresses and ports in a head (Knuth, 6.4). */
static __always_inline u32 number_of_head(const struct frame_head *head, u32 bits)
{
	const u64 *words = head->words;
	u64 mixed = words[3] * 0x2545f491 + words[4] * 0x4f6cdd1d + words[5] * 0x1d4a4a27 +
		    words[6] * 0x6b43a9b5 + words[7] * 0x3c6ef373;

	return mixed * 0x9e3779b97f4a7c15ULL >> (64 - bits);
}

#endif
