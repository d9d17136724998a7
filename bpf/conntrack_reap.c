/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Entry that is attached nowhere: user space runs it to expire flows of an idle VM.
 *
 * Each run settles one batch of the expiry queue; it returns 1 when there was one.
 */
#include "pipeline.h"

int conntrack_reap(struct __sk_buff *skb)
{
	struct endpoint_config *config;
	struct conntrack_meta *meta;
	struct scratch *work;
	u32 zero = 0, slot;
	bool more;

	config = config_in_force(&slot);
	meta = conntrack_meta.lookup(&zero);
	work = scratch.lookup(&zero);
	if (!config || !meta || !work)
		return 0;
	work->noted = 0;
	more = expire_batch(config, meta, work, 0);
	emit_flows(skb, config, work);
	return more;
}
