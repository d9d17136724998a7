/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The packet path, the same at every hook:
 *
 *   recall_denial -> parse_frame -> judge_request -> guard -> conntrack -> policy_judge (a miss or
 *   an old generation) -> flow_open -> settle_first_fragment -> finish
 *
 * A hook's entry file fills a struct frame, calls recall_packet, begin_packet and finish, and
 * turns what they say into its own return code. Between the last two the hook's stage takes over by
 * a tail call where the policy is a large one; stage and program share their maps.
 */
#ifndef VGW_PIPELINE_H
#define VGW_PIPELINE_H

#include "checksum_request.h"
#include "conntrack.h"
#include "denials.h"
#include "events.h"
#include "fragments.h"
#include "guard.h"
#include "maps.h"
#include "policy.h"
#include "query.h"
#include "stats.h"

/* Who judges a packet. */
enum judge {
	JUDGE,  /* the program on whose word the packet passes */
	SHIELD, /* one that stands before it: the judge sees what it does not drop */
};

/* A packet on its way through the program. */
struct judged {
	struct endpoint_config *config;
	struct scratch *work;
};

/*
 * For some time after an attach, connections that were open before are taken over by their
 * next segment: the policy is asked about the SYN that nobody saw.
 */
static __always_inline bool may_take_over(const struct endpoint_config *config,
					  const struct scratch *work)
{
	const struct packet *packet = &work->packet;

	return is_tcp(packet) && !(packet->tcp_flags & (TCP_SYN | TCP_RST)) &&
	       work->now < config->grace_until_ns;
}

/* Who opened a connection that is taken over: servers have the lower port, as a rule. */
static __always_inline u32 likely_opener(const struct packet *packet, u32 path)
{
	return ntohs(packet->source_port) < ntohs(packet->destination_port) ? other_path(path) :
									      path;
}

/* Why conntrack alone refuses a packet that has no live flow, or NONE. */
static __always_inline enum vgw_reason refuse_without_flow(const struct packet *packet)
{
	if (packet->kind == KIND_ICMP_ERROR)
		return VGW_REASON_ICMP_UNRELATED;
	if (packet->kind == KIND_FRAGMENT)
		return VGW_REASON_FRAGMENT;
	return may_open_flow(packet) ? VGW_REASON_NONE : VGW_REASON_NO_STATE;
}

/*
 * An error concerns a flow only if it goes to whoever sent the packet it quotes. About a
 * packet to a group there is none (RFC 1122, 3.2.2; RFC 4443, 2.4).
 */
static __always_inline bool misdirected_error(const struct packet *packet)
{
	return packet->kind == KIND_ICMP_ERROR &&
	       (!same_address(&packet->destination, &packet->quoted.source) ||
		is_group(&packet->quoted.destination));
}

/* Whether an error quotes a TCP segment that its flow cannot have on its way: a guess. */
static __always_inline bool misquoting_error(const struct packet *packet, u32 path,
					     const struct flow *flow)
{
	return packet->kind == KIND_ICMP_ERROR && packet->quoted.protocol == IPPROTO_TCP &&
	       !quote_is_in_flight(&packet->quoted, path, flow);
}

/* Leaves the key of the packet's flow in work->key. Returns false if there can be none. */
static __always_inline bool find_key(struct scratch *work, u32 path)
{
	const struct packet *packet = &work->packet;

	if (packet->kind == KIND_FRAGMENT)
		return recall_fragment(work, path);
	flow_key_of(packet, path, &work->key);
	return packet->kind != KIND_ICMP_OTHER && !misdirected_error(packet);
}

/* The live flow under work->key that the packet belongs to, or NULL. */
static __always_inline struct flow *find_flow(const struct endpoint_config *config,
					      struct scratch *work, u32 path)
{
	const struct packet *packet = &work->packet;
	struct flow *flow;

	flow = conntrack.lookup(&work->key);
	work->vacant = !flow;
	if (flow && (!flow_is_live(config, packet, flow, work->now) ||
		     misquoting_error(packet, path, flow)))
		return NULL;
	return flow;
}

static __always_inline void follow_flow(struct scratch *work, u32 path, struct flow *flow)
{
	if (work->packet.kind == KIND_ICMP_ERROR) {
		decide(work, VGW_VERDICT_ACCEPT, VGW_REASON_CT_RELATED);
		return;
	}
	flow_track(&work->packet, path, flow, work->now);
	decide(work, VGW_VERDICT_ACCEPT, VGW_REASON_CT_ESTABLISHED);
}

/*
 * Ends a flow that the policy refuses now, and has that recorded, unless somebody else has
 * claimed the flow at this moment, who sees to it.
 */
static __always_inline void end_old_flow(const struct endpoint_config *config,
					 struct scratch *work, struct flow *flow)
{
	bool claimed = flow_claim(flow);

	flow->state = VGW_FLOW_DEAD;
	if (!claimed)
		return;
	note_end(config, work, &work->key, flow, work->now);
	flow->claim = 0;
}

/* Stamps a flow that the new policy accepts too; one that it does not ends here. */
static __always_inline void settle_old_flow(const struct endpoint_config *config,
					    struct scratch *work, u32 path)
{
	struct flow *flow = conntrack.lookup(&work->key);

	if (!flow) {
		decide(work, VGW_VERDICT_DROP, VGW_REASON_NO_STATE);
	} else if (work->decision.verdict == VGW_VERDICT_ACCEPT) {
		flow->generation = config->generation;
		flow->rule = work->decision.rule;
		follow_flow(work, path, flow);
	} else if (config->mode != VGW_MODE_MONITOR) {
		end_old_flow(config, work, flow);
	}
}

/* Expires old flows now and then, and opens the flow of an accepted packet. */
static __always_inline void settle_new_flow(const struct endpoint_config *config,
					    struct scratch *work, u32 path)
{
	struct conntrack_meta *meta;
	u32 zero = 0, crowded;

	if (work->decision.verdict != VGW_VERDICT_ACCEPT) {
		note_denial(config, work);
		return;
	}
	if (work->packet.kind == KIND_ICMP_OTHER)
		return;
	meta = conntrack_meta.lookup(&zero);
	if (!meta) {
		decide(work, VGW_VERDICT_DROP, VGW_REASON_CT_FULL);
		return;
	}
	crowded = half_open_crowd(config, meta, work->opener);
	if (crowded || expiry_is_due(meta, work->opener))
		expire_batch(config, meta, work, crowded);
	forget_values();
	flow_open(config, meta, work, path);
	meta->pressed = work->decision.verdict != VGW_VERDICT_ACCEPT;
}

/* Does what the policy's answer to work->query asks for, about an old flow or a new one. */
static __always_inline void settle(void *ctx, const struct endpoint_config *config,
				   struct scratch *work, u32 path)
{
	work->noted = 0;
	if (work->decision.reason == VGW_REASON_RULE)
		count_rule(work->slot, config->first_counter[work->query.path & 1] + work->decision.rule,
			   work->packet.wire_length);
	forget_values();
	if (work->rejudge)
		settle_old_flow(config, work, path);
	else
		settle_new_flow(config, work, path);
	forget_values();
	if (config->log_flows)
		emit_flows(ctx, config, work);
}

/*
 * Follows the live flow of the packet, or leaves in work->query what the policy has to
 * say first. Returns whether it does. A shield leaves the following to the judge.
 */
static __always_inline bool ask_conntrack(const struct endpoint_config *config,
					  struct scratch *work, u32 path, enum judge who)
{
	struct flow *flow = NULL;
	enum vgw_reason reason;

	work->now = clock_now();
	if (find_key(work, path)) {
		forget_values();
		flow = find_flow(config, work, path);
	}
	/* A CPU that still has the configuration before must not harm the flows of the next. */
	if (flow && (s32)(flow->generation - config->generation) >= 0) {
		if (who == SHIELD)
			decide(work, VGW_VERDICT_ACCEPT, VGW_REASON_CT_ESTABLISHED);
		else
			follow_flow(work, path, flow);
		return false;
	}
	work->rejudge = flow != NULL;
	if (flow) {
		query_of_flow(&work->key, flow->opener, &work->query);
		return true;
	}
	reason = refuse_without_flow(&work->packet);
	work->opener = path;
	work->taken = reason == VGW_REASON_NO_STATE && may_take_over(config, work);
	if (work->taken) {
		work->opener = likely_opener(&work->packet, path);
		query_of_flow(&work->key, work->opener, &work->query);
		return true;
	}
	decide(work, VGW_VERDICT_DROP, reason);
	query_of_packet(&work->packet, path, &work->key, &work->query);
	return !reason;
}

/* Adds the headers that the segments of a GSO frame have on the wire. */
static __always_inline void count_segments(struct packet *packet)
{
	u32 segments = packet->segments, payload = packet->wire_length - packet->header_length;

	if (!packet->segment_size)
		return;
	if (!segments)
		segments = (payload + packet->segment_size - 1) / packet->segment_size;
	packet->wire_length += (segments - 1) * packet->header_length;
}

/*
 * Decides about a packet by all that is known of it, but for what the policy says where a rule
 * lookup is left unfinished. A shield leaves fragments to the judge: the one that they go with
 * may still be on its way there.
 */
static __always_inline void judge(const struct endpoint_config *config,
				  const struct frame *frame, struct scratch *work, u32 path,
				  enum judge who)
{
	if (config->mode == VGW_MODE_QUARANTINE) {
		decide(work, VGW_VERDICT_DROP, VGW_REASON_QUARANTINE);
		return;
	}
	if (!config->generation) {
		decide(work, VGW_VERDICT_DROP, VGW_REASON_NO_POLICY);
		return;
	}
	decide(work, VGW_VERDICT_DROP, VGW_REASON_NONE);
	work->decision.reason = parse_frame(frame, &work->packet);
	forget_values();
	count_segments(&work->packet);
	forget_values();
	if (who == SHIELD && is_fragment(&work->packet)) {
		decide(work, VGW_VERDICT_ACCEPT, VGW_REASON_NONE);
		return;
	}
	if (work->denial_known) {
		deny_again(work, path);
		return;
	}
	if (!work->decision.reason)
		work->decision.reason = judge_request(&work->packet);
	forget_values();
	if (work->decision.reason || guard(config, work, path))
		return;
	forget_values();
	if (!ask_conntrack(config, work, path, who))
		return;
	work->asked = 1;
	forget_values();
	policy_judge(work->slot & 1, work);
}

/* Begins `packet` with what the hook says of the frame. */
static __always_inline void take_frame(const struct frame *frame, struct packet *packet)
{
	__builtin_memset(packet, 0, PACKET_CLEARED);
	packet->wire_length = frame->length + frame->tagged * sizeof(struct vlan_tag);
	packet->segment_size = frame->segment_size;
	if (packet->segment_size)
		packet->segments = frame->segments;
	packet->checksum_asked = frame->checksum_asked;
	if (packet->checksum_asked) {
		packet->checksum_start = frame->checksum_start;
		packet->checksum_offset = frame->checksum_offset;
	}
}

/* The configuration in force and its slot, read once for a packet; NULL: there is none. */
static __always_inline struct endpoint_config *config_in_force(u32 *slot)
{
	struct active_slot *chosen;
	u32 zero = 0;

	chosen = active.lookup(&zero);
	if (!chosen)
		return NULL;
	*slot = chosen->slot;
	return configs.lookup(slot);
}

/*
 * Looks for the configuration, and whether the frame was denied just now. Returns whether that
 * decides it. Without configuration judged->config is NULL, and nothing passes. What follows has
 * to read the place of the frame anew: the verifier knows how far it was read here, differently
 * for each kind of frame, and would walk the rest of the program for each of them.
 */
static __always_inline bool recall_packet(struct judged *judged, const struct frame *frame,
					  u32 path)
{
	struct scratch *work;
	u32 zero = 0;

	judged->config = NULL;
	judged->work = work = scratch.lookup(&zero);
	if (!work)
		return false;
	judged->config = config_in_force(&work->slot);
	if (!judged->config)
		return false;
	work->asked = 0;
	work->lookup.unfinished = 0;
	if (judged->config->mode == VGW_MODE_QUARANTINE ||
	    !recall_denial(judged->config, frame, work, path) ||
	    is_told_of(judged->config, &work->denied, path))
		return false;
	work->packet.wire_length = frame->length;
	work->packet.kind = KIND_PLAIN;
	work->packet.fragment_header = false;
	work->packet.first_fragment = false;
	deny_again(work, path);
	return true;
}

/*
 * Judges a frame on its path that recall_packet did not decide. Returns whether its rule lookup
 * is unfinished: it is in a large policy, and the hook's stage does it.
 */
static __always_inline bool begin_as(enum judge who, struct judged *judged,
				     const struct frame *frame, u32 path)
{
	struct scratch *work = judged->work;

	if (!judged->config || !work)
		return false;
	forget_values();
	take_frame(frame, &work->packet);
	forget_values();
	judge(judged->config, frame, work, path, who);
	forget_values();
	return work->lookup.unfinished;
}

static __always_inline bool begin_packet(struct judged *judged, const struct frame *frame, u32 path)
{
	return begin_as(JUDGE, judged, frame, path);
}

/* Does the rule lookup that begin_packet left unfinished, in a stage. */
static __always_inline void resume_packet(struct judged *judged)
{
	struct scratch *work;
	u32 zero = 0;

	judged->config = NULL;
	judged->work = work = scratch.lookup(&zero);
	if (!work)
		return;
	judged->config = configs.lookup(&work->slot);
	policy_resume(work->slot & 1, work);
	forget_values();
}

/*
 * The single exit: one counter, one event if one is due. Returns whether the packet passes. Where
 * the verdict is REJECT then, it is due an answer, see reject.h.
 */
static __always_inline bool finish(void *ctx, struct judged *judged, u32 path)
{
	struct endpoint_config *config = judged->config;
	struct scratch *work = judged->work;
	struct decision *decision;

	if (!config || !work)
		return false;
	if (work->asked)
		settle(ctx, config, work, path);
	forget_values();
	if (work->packet.first_fragment)
		settle_first_fragment(work, path);
	forget_values();
	decision = &work->decision;
	if (work->denying && decision->verdict == VGW_VERDICT_ACCEPT)
		work->denying--;
	if (config->mode == VGW_MODE_MONITOR && decision->verdict != VGW_VERDICT_ACCEPT)
		decision->verdict = VGW_VERDICT_WOULD_DROP;
	count_packet(path, decision->verdict, decision->reason, work->packet.wire_length);
	if (event_due(path, decision))
		emit_event(ctx, config, work, path);
	return decision->verdict == VGW_VERDICT_ACCEPT ||
	       decision->verdict == VGW_VERDICT_WOULD_DROP;
}

#endif
