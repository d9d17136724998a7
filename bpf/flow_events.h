/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Records of flows: that one began, and that one ended, with what it was.
 *
 * Whoever opens, replaces or deletes a flow notes it in the work memory, while the claim on
 * the flow makes sure that nobody else does; emit_flows sends what was noted, within the
 * budget that all events share. Nothing is noted where the configuration does not ask for it,
 * and packets of open flows come by none of this.
 */
#ifndef VGW_FLOW_EVENTS_H
#define VGW_FLOW_EVENTS_H

#include "branchless.h"
#include "events.h"
#include "flow_age.h"
#include "maps.h"

/*
 * Why a flow that goes ends. One that is neither refused, flushed, closed nor idle makes room
 * for others. Without branches: the loop over a batch would double with each.
 */
static __always_inline u64 end_of_flow(const struct endpoint_config *config,
				      const struct flow *flow, u64 now)
{
	u8 state = flow->state & 0xf;
	u64 closed = is_zero(state ^ VGW_FLOW_TCP_FIN) | is_zero(state ^ VGW_FLOW_TCP_CLOSED);
	u64 idle = top_bit(time_left(config, flow, now));
	u64 end = choose(idle, VGW_END_TIMEOUT, VGW_END_DISPLACED);

	end = choose(closed, VGW_END_CLOSED, end);
	end = choose(top_bit(epochs_ahead(config, flow)), VGW_END_FLUSHED, end);
	return choose(is_zero(state), VGW_END_REVOKED, end);
}

/* Puts the record of a noted flow together, with the addresses and ports of its first packet. */
static __always_inline void fill_flow_event(struct flow_event *to, const struct flow_note *note)
{
	const struct flow *flow = &note->flow;
	const struct flow_key *key = &note->key;
	const struct vgw_address *addresses = &key->local;
	const __be16 *ports = &key->local_port;
	struct event *event = &to->event;
	u32 remote_opens = (flow->opener ^ VGW_PATH_FROM_VM) & 1;

	__builtin_memset(event, 0, sizeof(*event));
	event->generation = flow->generation;
	event->rule = flow->rule;
	event->source = addresses[remote_opens];
	event->destination = addresses[remote_opens ^ 1];
	event->source_port = ports[remote_opens];
	event->destination_port = ports[remote_opens ^ 1];
	event->vlan = key->vlan;
	event->path = flow->opener;
	event->rule_path = flow->opener;
	event->reason = choose(is_zero(flow->rule ^ VGW_NO_RULE), VGW_REASON_DEFAULT,
			       VGW_REASON_RULE);
	event->protocol = key->protocol;
	event->kind = choose(is_zero(note->end), VGW_EVENT_FLOW_START, VGW_EVENT_FLOW_END);
	event->end = note->end;
	event->state = flow->state;
	to->packets[0] = flow->packets[0];
	to->packets[1] = flow->packets[1];
	to->bytes[0] = flow->bytes[0];
	to->bytes[1] = flow->bytes[1];
	to->created_ns = flow->created_ns;
	to->last_seen_ns = flow->last_seen_ns;
}

/* Notes that a flow began (`end` NONE), or why it ended. */
static __always_inline void note_flow(struct scratch *work, const struct flow_key *key,
				      const struct flow *flow, u64 end)
{
	struct flow_note *note = &work->notes[work->noted & (VGW_FLOW_NOTES - 1)];

	copy_key(&note->key, key);
	note->flow = *flow;
	note->end = end;
	work->noted++; /* a batch, what is replaced and what is opened are fewer than VGW_FLOW_NOTES */
}

static __always_inline void note_start(const struct endpoint_config *config, struct scratch *work,
				       const struct flow_key *key, const struct flow *flow)
{
	if (config->log_flows)
		note_flow(work, key, flow, VGW_END_NONE);
}

/* Notes the end of a flow that the caller has claimed, unless that was an event already. */
static __always_inline void note_end(const struct endpoint_config *config, struct scratch *work,
				     const struct flow_key *key, struct flow *flow, u64 now)
{
	if (!config->log_flows || flow->reported)
		return;
	flow->reported = 1;
	note_flow(work, key, flow, end_of_flow(config, flow, now));
}

/* Sends what was noted for the packet. */
static __always_inline void emit_flows(void *ctx, const struct endpoint_config *config,
				       struct scratch *work)
{
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_FLOW_NOTES; i++) {
		struct event_meter *meter;

		if (i >= work->noted)
			return;
		meter = admit_event(config);
		if (meter) {
			fill_flow_event(&work->flow_event, &work->notes[i]);
			submit_event(ctx, config, meter, &work->flow_event.event,
				     sizeof(work->flow_event));
		}
		forget_values();
	}
}

#endif
