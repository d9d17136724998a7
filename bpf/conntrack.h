/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Connection tracking: the flow a packet belongs to, and new flows.
 *
 * A flow is named from the VM's side, so one lookup finds it in both directions. An
 * expired flow is a miss. expiry.h says how flows leave the table.
 */
#ifndef VGW_CONNTRACK_H
#define VGW_CONNTRACK_H

#include <linux/errno.h>

#include "expiry.h"
#include "tcp_state.h"

/*
 * All of a key but its addresses, to be stored at once: what several stores have written takes a
 * processor long to read.
 */
union flow_key_tail {
	struct {
		__be16 local_port;
		__be16 remote_port;
		u8 protocol;
		u8 asker;
		u16 vlan;
	};
	u64 word;
};

static __always_inline void fill_key(struct flow_key *key, u32 path,
				     const struct vgw_address *source, __be16 source_port,
				     const struct vgw_address *destination,
				     __be16 destination_port, u8 protocol, u8 asker, u16 vlan)
{
	bool from_vm = path == VGW_PATH_FROM_VM;
	const struct vgw_address *local = from_vm ? source : destination;
	const struct vgw_address *remote = from_vm ? destination : source;
	union flow_key_tail tail = {
		.local_port = from_vm ? source_port : destination_port,
		.remote_port = from_vm ? destination_port : source_port,
		.protocol = protocol,
		.asker = asker,
		.vlan = vlan,
	};

	key->local.halves[0] = local->halves[0];
	key->local.halves[1] = local->halves[1];
	key->remote.halves[0] = remote->halves[0];
	key->remote.halves[1] = remote->halves[1];
	*(u64 *)&key->local_port = tail.word;
}

/* The two directions of ping with one identifier are two flows, told apart by who asks. */
static __always_inline u8 asker_of(u32 path, bool reply)
{
	return 1 + (reply ? other_path(path) : path);
}

/* Key of the flow of a packet on `path`; an ICMP error has the flow of what it quotes. */
static __always_inline void flow_key_of(const struct packet *packet, u32 path,
					struct flow_key *key)
{
	const struct quoted_packet *quoted = &packet->quoted;

	if (packet->kind == KIND_ICMP_ERROR) {
		path = other_path(path);
		fill_key(key, path, &quoted->source, quoted->source_port, &quoted->destination,
			 quoted->destination_port, quoted->protocol,
			 quoted->echo ? asker_of(path, quoted->echo_reply) : 0, packet->vlan);
		return;
	}
	fill_key(key, path, &packet->source, packet->source_port, &packet->destination,
		 packet->destination_port, packet->protocol,
		 packet->kind == KIND_ECHO ? asker_of(path, is_echo_reply(packet)) : 0,
		 packet->vlan);
}

/* Whether the packet opens its ports anew where an old connection is about to be forgotten. */
static __always_inline bool reuses_ports(const struct packet *packet, const struct flow *flow)
{
	return is_tcp(packet) && is_new_tcp(packet) &&
	       (flow->state == VGW_FLOW_TCP_FIN || flow->state == VGW_FLOW_TCP_CLOSED);
}

/* Whether `flow`, found under the packet's key, is one the packet can belong to. */
static __always_inline bool flow_is_live(const struct endpoint_config *config,
					 const struct packet *packet, const struct flow *flow,
					 u64 now)
{
	return !flow_is_dead(config, flow, now) && !reuses_ports(packet, flow);
}

/* Whether a packet without a flow may be the first of one. */
static __always_inline bool may_open_flow(const struct packet *packet)
{
	if (is_tcp(packet))
		return is_new_tcp(packet);
	return packet->kind != KIND_ECHO || !is_echo_reply(packet);
}

static __always_inline u8 first_state(const struct packet *packet)
{
	if (packet->kind == KIND_ECHO)
		return VGW_FLOW_ICMP;
	if (packet->protocol == IPPROTO_TCP)
		return is_new_tcp(packet) ? VGW_FLOW_TCP_SYN : VGW_FLOW_TCP_ESTABLISHED;
	return packet->protocol == IPPROTO_UDP ? VGW_FLOW_UDP_SINGLE : VGW_FLOW_OTHER;
}

/* Fills the flow that the packet on `path` opens for work->opener, but not whether it is half open. */
static __always_inline void fill_flow(struct flow *flow, const struct endpoint_config *config,
				      const struct scratch *work, u32 path)
{
	const struct packet *packet = &work->packet;
	bool from_vm = path == VGW_PATH_FROM_VM;

	flow->last_seen_ns = work->now;
	flow->created_ns = work->now;
	flow->epoch = config->flow_epoch;
	flow->packets[VGW_PATH_TO_VM] = !from_vm;
	flow->packets[VGW_PATH_FROM_VM] = from_vm;
	flow->bytes[VGW_PATH_TO_VM] = from_vm ? 0 : packet->wire_length;
	flow->bytes[VGW_PATH_FROM_VM] = from_vm ? packet->wire_length : 0;
	flow->generation = config->generation;
	flow->rule = work->decision.rule;
	flow->opener = work->opener;
	flow->reported = 0;
	flow->tcp_fins = 0;
	flow->state = first_state(packet);
	if (work->taken)
		tcp_take_over(flow, packet, path);
	else
		tcp_begin(flow, packet, path);
}

static __always_inline void count_opened(const struct endpoint_config *config,
					 struct conntrack_meta *meta, struct scratch *work,
					 const struct flow *flow)
{
	__sync_fetch_and_add(&meta->created[flow->opener & 1], 1);
	note_start(config, work, &work->key, flow);
}

/*
 * Puts a flow into the table and its key into the queue. Returns 0, -EEXIST where one of the
 * key is there already, or what the kernel says where there is no room.
 */
static __always_inline int flow_put(struct conntrack_meta *meta, struct flow_key *key,
				    struct flow *flow)
{
	int error = conntrack.insert(key, flow);

	if (error) {
		half_open_leave(meta, flow); /* of this copy: the one in the table is another's */
		return error;
	}
	__sync_fetch_and_add(&meta->entries, 1);
	if (queue_append(meta, key))
		return 0;
	flow_delete(meta, key, flow);
	return -ENOMEM;
}

/* Puts work->flow into the table and counts it. Returns NONE, or why it is not there. */
static __always_inline enum vgw_reason flow_insert(const struct endpoint_config *config,
						   struct conntrack_meta *meta,
						   struct scratch *work)
{
	int error = flow_put(meta, &work->key, &work->flow);

	if (error == -EEXIST) /* another CPU was first; the policy accepts this packet too */
		return VGW_REASON_NONE;
	if (error)
		return VGW_REASON_CT_FULL;
	count_opened(config, meta, work, &work->flow);
	return VGW_REASON_NONE;
}

/* Whether one more flow is within the limits of the side that opens it. Returns NONE, or why not. */
static __always_inline enum vgw_reason flow_admit(const struct endpoint_config *config,
						  struct conntrack_meta *meta,
						  const struct scratch *work)
{
	if (!within_rate(config, meta, work->opener, work->now))
		return VGW_REASON_CT_RATE;
	if (!work->taken && !half_open_enter(config, meta, work->opener))
		return VGW_REASON_CT_HALF_OPEN;
	return VGW_REASON_NONE;
}

/*
 * Opens the flow of the packet that work->decision accepts. Where there is one of the
 * same key that is over, the new one takes its place and its key in the queue. Where
 * there can be no flow, the packet is dropped after all, because its answers would be.
 */
static __always_inline void flow_open(const struct endpoint_config *config,
				      struct conntrack_meta *meta, struct scratch *work, u32 path)
{
	struct flow *old = NULL, *flow;
	enum vgw_reason reason;

	if (!work->vacant)
		old = conntrack.lookup(&work->key);
	flow = old ? old : &work->flow;
	if (old && !flow_claim(old)) {
		decide(work, VGW_VERDICT_DROP, VGW_REASON_CT_BUSY);
		return;
	}
	if (old && flow_is_live(config, &work->packet, old, work->now)) {
		old->claim = 0; /* another CPU has just replaced it, for a packet like this one */
		return;
	}
	reason = flow_admit(config, meta, work);
	if (reason) {
		if (old)
			old->claim = 0;
		decide(work, VGW_VERDICT_DROP, reason);
		return;
	}
	if (old) {
		half_open_leave(meta, old);
		note_end(config, work, &work->key, old, work->now);
	}
	fill_flow(flow, config, work, path);
	flow->half_open = !work->taken;
	flow->claim = 0;
	if (old) {
		count_opened(config, meta, work, flow);
		return;
	}
	reason = flow_insert(config, meta, work);
	if (reason)
		decide(work, VGW_VERDICT_DROP, reason);
}

/* What an answer, or the end of a handshake, means for the limit of half-open flows. */
static __always_inline void flow_answered(struct flow *flow, u32 path)
{
	struct conntrack_meta *meta;
	u32 zero = 0;

	if (!flow->half_open || (flow->opener == path && flow->state != VGW_FLOW_TCP_ESTABLISHED) ||
	    flow->state == VGW_FLOW_TCP_SYN || flow->state == VGW_FLOW_TCP_CLOSED)
		return;
	meta = conntrack_meta.lookup(&zero);
	if (meta)
		half_open_leave(meta, flow);
}

/* Counts an accepted packet of a live flow and moves the flow's state on. */
static __always_inline void flow_track(const struct packet *packet, u32 path, struct flow *flow,
				       u64 now)
{
	if (is_tcp(packet)) {
		if (!track_tcp(packet, path, flow))
			return;
	} else if (flow->state == VGW_FLOW_TCP_CLOSED) {
		return; /* a fragment: nothing keeps a closed connection */
	} else if (flow->state == VGW_FLOW_UDP_SINGLE && path != flow->opener) {
		flow->state = VGW_FLOW_UDP_REPLIED;
	}
	flow_answered(flow, path);
	flow->last_seen_ns = now;
	flow->packets[path & 1]++;
	flow->bytes[path & 1] += packet->wire_length;
}

#endif
