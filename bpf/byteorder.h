/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Conversion between the wire's byte order and the host's.
 */
#ifndef VGW_BYTEORDER_H
#define VGW_BYTEORDER_H

#include <linux/types.h>

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define VGW_SWAP(bits, value) __builtin_bswap##bits(value)
#else
#define VGW_SWAP(bits, value) (value)
#endif

static __always_inline u16 ntohs(__be16 value)
{
	return VGW_SWAP(16, value);
}

static __always_inline u32 ntohl(__be32 value)
{
	return VGW_SWAP(32, value);
}

static __always_inline __be16 htons(u16 value)
{
	return VGW_SWAP(16, value);
}

static __always_inline __be32 htonl(u32 value)
{
	return VGW_SWAP(32, value);
}

static __always_inline __be64 htonll(u64 value)
{
	return VGW_SWAP(64, value);
}

#endif
