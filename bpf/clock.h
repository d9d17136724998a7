/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The clock of flows and counters: the kernel's ticks, as nanoseconds. Reading it is one load;
 * CLOCK_MONOTONIC_COARSE, which goes as far at a time, takes a call and a lock. User space reads
 * it by times(2), see vgw/controller/clock.py.
 */
#ifndef VGW_CLOCK_H
#define VGW_CLOCK_H

#ifndef TICK_NS
#error "the length of the kernel's ticks is missing"
#endif

#define NS_PER_SECOND 1000000000ULL

static __always_inline u64 clock_now(void)
{
	return bpf_jiffies64() * TICK_NS;
}

#endif
