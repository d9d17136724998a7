/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a tc program is not told of its socket buffer: whether a checksum is still to be
 * written into the frame, and where.
 *
 * A program's context is the socket buffer itself, so the fields are read behind it. Their
 * places are the running kernel's, by its own description (vgw/loader/socket_buffer.py): the
 * compiler gets them as constants, from SKB_FIRST on, a multiple of eight.
 */
#ifndef VGW_SOCKET_BUFFER_H
#define VGW_SOCKET_BUFFER_H

#include "packet.h"

#if !defined(SKB_FIRST) || !defined(SKB_SIZE)
#error "the layout of the kernel's socket buffers is missing"
#endif

#define CHECKSUM_PARTIAL 3 /* value of ip_summed: a checksum is to be written */
#define IP_SUMMED_MASK 3

/* Puts down what the buffer's bytes from SKB_FIRST on ask for. */
static __always_inline void take_checksum_request(struct frame *frame, const u8 *fields)
{
	u32 start, frame_start;

	frame->checksum_asked = (fields[SKB_IP_SUMMED] >> SKB_IP_SUMMED_SHIFT & IP_SUMMED_MASK) ==
				CHECKSUM_PARTIAL;
	if (!frame->checksum_asked)
		return;
	/* Both places count from the same byte, in front of the frame. */
	start = *(u16 *)(fields + SKB_CSUM_START);
	frame_start = *(u16 *)(fields + SKB_MAC_HEADER);
	if (start > frame_start)
		frame->checksum_start = start - frame_start;
	frame->checksum_offset = *(u16 *)(fields + SKB_CSUM_OFFSET);
}

#ifdef SKB_CAST
/* A function of the kernel and no helper: vgw/loader/compiler.py makes the call one of it. */
static const void *(*bpf_rdonly_cast)(const void *object, u32 type) = (void *)SKB_CAST;

/* Puts down what is asked for. The verifier knows the buffer's type, so it is read directly. */
static __always_inline void read_checksum_request(struct __sk_buff *skb, struct frame *frame)
{
	take_checksum_request(frame, bpf_rdonly_cast(skb, SKB_TYPE) + SKB_FIRST);
}
#else
/*
 * BCC's name for it means the older bpf_probe_read, which tc programs must not call, wherever
 * /proc/kallsyms shows no addresses: to all users without CAP_SYSLOG.
 */
static int (*read_kernel_memory)(void *to, u32 size, const void *from) =
	(void *)BPF_FUNC_probe_read_kernel;

/* Puts down what is asked for. What cannot be read is refused, as a request of no sense. */
static __always_inline void read_checksum_request(struct __sk_buff *skb, struct frame *frame)
{
	u8 fields[SKB_SIZE] __attribute__((aligned(8)));

	frame->checksum_asked = true;
	if (!read_kernel_memory(fields, sizeof(fields), (void *)skb + SKB_FIRST))
		take_checksum_request(frame, fields);
}
#endif

#endif
