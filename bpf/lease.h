/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Leases: what a DHCP server tells a VM that learns its addresses goes to user space as well.
 *
 * The programs only pass on the beginning of the frame, after it was accepted; user space reads
 * it, and believes what bpf/README.md says. Toward the VM only, where every program is on tc.
 */
#ifndef VGW_LEASE_H
#define VGW_LEASE_H

#include "events.h"
#include "guard.h"
#include "pipeline.h"

/* Bytes of the frame: the 576 of every DHCP message (RFC 2131, 2), link header and tags. */
#define LEASE_BYTES 600

/*
 * Whether the VM asked for this message. The answer to a broadcast passes as housekeeping. That
 * to a renewal is of a flow, which somebody else could have opened: so the VM must have asked by
 * itself as well, and user space lets such an answer only renew.
 */
static __always_inline bool lease_was_asked(u8 reason)
{
	struct conntrack_meta *meta;
	u32 zero = 0;

	if (reason == VGW_REASON_DHCP)
		return true;
	if (reason != VGW_REASON_CT_ESTABLISHED)
		return false;
	meta = conntrack_meta.lookup(&zero);
	return meta && asked_lately(meta->dhcp_renewed_ns);
}

static __always_inline bool lease_due(const struct endpoint_config *config,
				      const struct scratch *work)
{
	return config->learns && work->decision.verdict == VGW_VERDICT_ACCEPT &&
	       is_dhcp_answer(&work->packet) && !work->packet.first_fragment &&
	       lease_was_asked(work->decision.reason);
}

/* Sends the frame of a finished packet toward the VM, if it may be a lease. */
static __always_inline void report_lease(struct __sk_buff *skb, const struct judged *judged)
{
	const struct endpoint_config *config = judged->config;
	struct scratch *work = judged->work;
	u32 captured;
	struct event_meter *meter;
	struct event *event;
	int error;

	if (!config || !work || !lease_due(config, work))
		return;
	meter = admit_event(config);
	if (!meter)
		return;
	captured = skb->len < LEASE_BYTES ? skb->len : LEASE_BYTES;
	event = &work->event;
	fill_event(event, config, &work->packet, VGW_PATH_TO_VM, &work->decision);
	event->kind = VGW_EVENT_LEASE;
	event->rule_path = VGW_PATH_TO_VM;
	stamp_event(config, event);
	/* A statement of its own: BCC writes one in its place. */
	error = events.perf_submit_skb(skb, captured, event, sizeof(*event));
	count_event(meter, error);
}

#endif
