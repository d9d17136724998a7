/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The clock of flows and counters: CLOCK_MONOTONIC_COARSE, which user space can read too.
 */
#ifndef VGW_CLOCK_H
#define VGW_CLOCK_H

#define NS_PER_SECOND 1000000000ULL

static __always_inline u64 clock_now(void)
{
	return bpf_ktime_get_coarse_ns();
}

#endif
