/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Events: records for the log, within the endpoint's budget; here those of single packets.
 *
 * Losing one never affects a packet. Each event that is due is counted as sent,
 * suppressed (over the budget) or lost (nobody reads, or the buffer is full).
 */
#ifndef VGW_EVENTS_H
#define VGW_EVENTS_H

#include "budget.h"
#include "maps.h"

/* Refusals by the parser and the guards of what the VM sends are worth a line by themselves. */
static __always_inline bool is_offence(u32 path, const struct decision *decision)
{
	return path == VGW_PATH_FROM_VM && decision->verdict != VGW_VERDICT_ACCEPT &&
	       decision->reason >= VGW_REASON_TRUNCATED &&
	       decision->reason <= VGW_REASON_MEMBERSHIP_QUERY;
}

/* In monitor mode each drop is an event that was not one: that is what the mode is for. */
static __always_inline bool event_due(u32 path, const struct decision *decision)
{
	return decision->flags & VGW_RULE_LOG || decision->reason == VGW_REASON_CT_FULL ||
	       decision->verdict == VGW_VERDICT_WOULD_DROP || is_offence(path, decision);
}

static __always_inline void fill_event(struct event *event, const struct endpoint_config *config,
				       const struct packet *packet, u32 path,
				       const struct decision *decision)
{
	event->generation = config->generation;
	event->rule = decision->rule;
	event->length = packet->wire_length;
	event->ethertype = packet->ethertype;
	event->source = packet->source;
	event->destination = packet->destination;
	event->source_port = packet->source_port;
	event->destination_port = packet->destination_port;
	event->vlan = packet->vlan;
	event->path = path;
	event->verdict = decision->verdict;
	event->reason = decision->reason;
	event->protocol = packet->protocol;
	event->tcp_flags = packet->tcp_flags;
	event->icmp_type = packet->icmp_type;
	event->icmp_code = packet->icmp_code;
	copy_mac(event->source_mac, packet->source_mac.bytes);
	copy_mac(event->destination_mac, packet->destination_mac.bytes);
	event->kind = VGW_EVENT_PACKET;
	event->end = VGW_END_NONE;
	event->state = VGW_FLOW_DEAD;
	__builtin_memset(event->pad, 0, sizeof(event->pad));
}

/* Takes one event of the budget. Returns where it is to be counted; NULL: there is none left. */
static __always_inline struct event_meter *admit_event(const struct endpoint_config *config)
{
	struct event_meter *meter;
	u32 zero = 0;

	meter = event_meter.lookup(&zero);
	if (!meter)
		return NULL;
	if (within_budget(&meter->window, &meter->used, config->log_per_second, clock_now()))
		return meter;
	__sync_fetch_and_add(&meter->suppressed, 1);
	return NULL;
}

/* Fills in what is the same for events of all kinds: when and of which endpoint it is. */
static __always_inline void stamp_event(const struct endpoint_config *config, struct event *event)
{
	event->abi = VGW_ABI_VERSION;
	event->endpoint = config->endpoint;
	event->time_ns = bpf_ktime_get_ns();
}

static __always_inline void count_event(struct event_meter *meter, int error)
{
	if (error)
		__sync_fetch_and_add(&meter->lost, 1);
	else
		__sync_fetch_and_add(&meter->sent, 1);
}

/* Sends an admitted event that is filled in but for its stamp. */
static __always_inline void submit_event(void *ctx, const struct endpoint_config *config,
					 struct event_meter *meter, struct event *event, u32 size)
{
	int error;

	stamp_event(config, event);
	/* A statement of its own: BCC writes one in its place. */
	error = events.perf_submit(ctx, event, size);
	count_event(meter, error);
}

static __always_inline void emit_event(void *ctx, const struct endpoint_config *config,
				       struct scratch *work, u32 path)
{
	struct event_meter *meter = admit_event(config);

	if (!meter)
		return;
	fill_event(&work->event, config, &work->packet, path, &work->decision);
	work->event.rule_path = work->decision.rule == VGW_NO_RULE ? path : work->query.path;
	submit_event(ctx, config, meter, &work->event, sizeof(work->event));
}

#endif
