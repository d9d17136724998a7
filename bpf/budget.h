/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Budgets of so many a second.
 */
#ifndef VGW_BUDGET_H
#define VGW_BUDGET_H

#include "clock.h"

/*
 * Takes one of `per_second` and returns whether it was there. `window` is the second that
 * `used` counts for. CPUs that begin a second at once may give out a few more.
 */
static __always_inline bool within_budget(u64 *window, u64 *used, u32 per_second, u64 now)
{
	u64 second = now / NS_PER_SECOND;

	if (*window != second) {
		*window = second;
		*used = 0;
	}
	return __sync_fetch_and_add(used, 1) < per_second;
}

#endif
