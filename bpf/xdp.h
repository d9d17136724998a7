/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the XDP entries share: XDP's return codes.
 */
#ifndef VGW_XDP_H
#define VGW_XDP_H

#include "pipeline.h"

static __always_inline int xdp_code(bool passes)
{
	return passes ? XDP_PASS : XDP_DROP;
}

#endif
