/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The cursor with which the parser walks a frame; the only place that sees its end.
 *
 * A cursor knows two ends: that of the memory, which the verifier insists on, and
 * that of the enclosing payload, which the packet's own length fields claim. Bytes
 * between the two are padding and are never read as headers.
 */
#ifndef VGW_CURSOR_H
#define VGW_CURSOR_H

#include "byteorder.h"
#include "packet.h"

struct cursor {
	void *position;
	void *end;  /* of the memory that can be read */
	u64 left;   /* bytes up to the end of the enclosing payload */
	u64 behind; /* bytes of the frame behind that end: padding */
	bool gso;   /* a length field of zero means "up to the end of the frame" */
};

/* Returns the next `size` bytes (a constant) without moving, or NULL where there are fewer. */
static __always_inline void *peek(struct cursor *cursor, u32 size)
{
	if (cursor->left < size || cursor->position + size > cursor->end)
		return NULL;
	return cursor->position;
}

static __always_inline void advance(struct cursor *cursor, u32 size)
{
	cursor->position += size;
	cursor->left -= size;
}

/* Ends the payload `length` bytes from here; the caller has checked that it has as many. */
static __always_inline void enclose(struct cursor *cursor, u32 length)
{
	cursor->behind += cursor->left - length;
	cursor->left = length;
}

/* Why a header of `size` bytes does not fit: a lie about the length, or a cut frame. */
static __always_inline enum vgw_reason shortage(const struct cursor *cursor, u32 size)
{
	if (cursor->left < size && cursor->left + cursor->behind >= size)
		return VGW_REASON_BAD_LENGTH;
	return VGW_REASON_TRUNCATED;
}

#endif
