/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * How dead flows leave the table without help from user space.
 *
 * Every flow in the table has its key exactly once in a queue ordered by age. Each
 * CPU collects the keys of new flows in a buffer and appends it as one batch when
 * it is full. Creating flows pays for expiry: every other time the creator takes first
 * the oldest batch, deletes the dead flows and appends the live ones again, like the
 * hand of a clock. It looks at two keys for each new flow, so at most half of the
 * table is dead flows, and work per packet is bounded.
 *
 * A flow with a key in the queue is deleted here only. One that ends earlier is marked
 * dead and stays, and a new flow with the same key takes its place.
 */
#ifndef VGW_EXPIRY_H
#define VGW_EXPIRY_H

#include "branchless.h"
#include "clock.h"
#include "flow_age.h"
#include "flow_events.h"
#include "flow_limits.h"
#include "maps.h"

#define EXPIRY_HOLE 1024 /* batches behind a position that nobody will fill any more */
#define EXPIRY_INTERVAL 2 /* new flows for each batch looked at, where there is room */

/* A flow of an earlier epoch, marked dead, or idle for longer than its timeout. */
static __always_inline bool flow_is_dead(const struct endpoint_config *config,
					 const struct flow *flow, u64 now)
{
	u64 marked = (u64)(flow->state & 0xf) - 1;

	/* One of them is below zero. */
	return top_bit(marked | epochs_ahead(config, flow) | time_left(config, flow, now));
}

/*
 * Takes the right to reset or delete a dead flow, which only one CPU may have.
 * Whoever resets gives it back; whoever deletes keeps it, for those who still
 * hold a pointer to the flow.
 */
static __always_inline bool flow_claim(struct flow *flow)
{
	return !__sync_lock_test_and_set(&flow->claim, 1);
}

/* Appends a key to the queue. Returns false where there is no memory for it. */
static __always_inline bool queue_append(struct conntrack_meta *meta, const struct flow_key *key)
{
	struct queue_buffer *buffer;
	u32 zero = 0;
	u64 position;

	buffer = expiry_buffer.lookup(&zero);
	if (!buffer)
		return false;
	if (buffer->count >= VGW_QUEUE_BATCH) {
		position = __sync_fetch_and_add(&meta->tail, 1);
		if (expiry_queue.update(&position, &buffer->batch))
			return false;
		buffer->count = 0;
	}
	copy_key(&buffer->batch.keys[buffer->count & (VGW_QUEUE_BATCH - 1)], key);
	buffer->count++;
	return true;
}

static __always_inline void flow_delete(struct conntrack_meta *meta, struct flow_key *key,
					struct flow *flow)
{
	half_open_leave(meta, flow);
	if (!conntrack.delete(key))
		__sync_fetch_and_add(&meta->entries, -1);
}

/* Whether a flow is past its time, or a half-open one that makes room for those of its side. */
static __always_inline bool flow_may_go(const struct endpoint_config *config,
					const struct flow *flow, u64 now, u32 crowded)
{
	return flow_is_dead(config, flow, now) ||
	       (flow->half_open && flow->opener + 1 == crowded &&
		flow->state != VGW_FLOW_TCP_ESTABLISHED);
}

/* Whether the flow of a key could go and is deleted now, or was not there. */
static __always_inline bool flow_expire(const struct endpoint_config *config,
					struct conntrack_meta *meta, struct scratch *work,
					struct flow_key *key, u64 now, u32 crowded)
{
	struct flow *flow = conntrack.lookup(key);

	if (!flow)
		return true;
	if (!flow_may_go(config, flow, now, crowded) || !flow_claim(flow))
		return false;
	if (!flow_may_go(config, flow, now, crowded)) {
		flow->claim = 0;
		return false;
	}
	note_end(config, work, key, flow, now);
	flow_delete(meta, key, flow);
	return true;
}

/*
 * Takes the oldest batch out of the queue and into *batch. Returns whether there was one
 * to take. It leaves the queue before its live flows are appended again, so that the
 * queue never needs room for more flows than the table.
 */
static __always_inline bool queue_take(struct conntrack_meta *meta, struct queue_batch *batch)
{
	u64 position = meta->head;
	struct queue_batch *oldest;

	/*
	 * A CPU may have reserved a position and not yet filled it, and whoever took that
	 * position would lose its keys: the newest ones stay, and an older one is waited for
	 * until it can only be one for which there was no memory.
	 */
	if (meta->tail - position <= VGW_EXPIRY_MARGIN || meta->tail < position)
		return false;
	oldest = expiry_queue.lookup(&position);
	if (!oldest && meta->tail - position <= EXPIRY_HOLE)
		return false;
	if (__sync_val_compare_and_swap(&meta->head, position, position + 1) != position)
		return false;
	if (!oldest)
		return false;
	*batch = *oldest;
	expiry_queue.delete(&position);
	return true;
}

/* Whether opening a flow pays for a batch; where there is no room, each attempt looks for some. */
static __always_inline bool expiry_is_due(const struct conntrack_meta *meta, u32 opener)
{
	return meta->pressed || meta->created[opener & 1] % EXPIRY_INTERVAL == 0;
}

/*
 * Deletes the dead flows of the oldest batch. Returns whether there was one to look at.
 * `crowded` is 1 + enum vgw_path of a side that has as many half-open flows as it may:
 * those of the batch make room too. Else it is 0.
 */
static __always_inline bool expire_batch(const struct endpoint_config *config,
					 struct conntrack_meta *meta, struct scratch *work,
					 u32 crowded)
{
	struct queue_batch *batch = &work->batch;
	u64 now = clock_now();

	if (!queue_take(meta, batch))
		return false;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < VGW_QUEUE_BATCH; i++) {
		if (!flow_expire(config, meta, work, &batch->keys[i], now, crowded))
			queue_append(meta, &batch->keys[i]);
		forget_values();
	}
	return true;
}

#endif
