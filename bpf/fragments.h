/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Fragments: the later ones of a datagram belong to the flow of its first one.
 *
 * Only the first fragment has the ports that rules speak of. It must have all of its upper
 * header and is judged like a packet; if it passes, its flow is remembered under the
 * datagram's identification. Nothing is put together here, so a later fragment passes only
 * behind the first one and only where it cannot overwrite any of it (RFC 1858, RFC 5722).
 */
#ifndef VGW_FRAGMENTS_H
#define VGW_FRAGMENTS_H

#include "clock.h"
#include "maps.h"

#define FRAGMENT_NS (30 * NS_PER_SECOND) /* for which hosts wait for the rest, as Linux does */

static __always_inline void fragment_key_of(const struct packet *packet, u32 path,
					    struct fragment_key *key)
{
	key->source = packet->source;
	key->destination = packet->destination;
	key->identification = packet->fragment_id;
	key->vlan = packet->vlan;
	key->protocol = packet->fragment_protocol;
	key->path = path;
}

/*
 * Finds the flow of a later fragment and leaves its key in work->key. Returns false for a
 * fragment without a first one; one that overlaps it ends the whole datagram.
 */
static __always_inline bool recall_fragment(struct scratch *work, u32 path)
{
	struct fragment *first;

	fragment_key_of(&work->packet, path, &work->fragment_key);
	first = fragments.lookup(&work->fragment_key);
	if (!first || work->now - first->seen_ns > FRAGMENT_NS)
		return false;
	if (work->packet.fragment_offset < first->end) {
		fragments.delete(&work->fragment_key);
		return false;
	}
	work->key = first->flow;
	return true;
}

/* Remembers the flow of an accepted first fragment; one that is dropped takes the rest along. */
static __always_inline void settle_first_fragment(struct scratch *work, u32 path)
{
	fragment_key_of(&work->packet, path, &work->fragment_key);
	if (work->decision.verdict != VGW_VERDICT_ACCEPT) {
		fragments.delete(&work->fragment_key);
		return;
	}
	work->fragment.flow = work->key;
	work->fragment.seen_ns = work->now;
	work->fragment.end = work->packet.fragment_length;
	work->fragment.pad = 0;
	fragments.update(&work->fragment_key, &work->fragment);
}

#endif
