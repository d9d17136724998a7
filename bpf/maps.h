/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The maps of one endpoint, declared in BCC's notation.
 *
 * Each map is touched only by the header named beside it. What is declared here
 * is a template: user space makes every endpoint its own set, with its own sizes
 * for conntrack and expiry_queue. A map of maps named X has X_inner as template.
 */
#ifndef VGW_MAPS_H
#define VGW_MAPS_H

#include "abi.h"
#include "packet.h"

#define VGW_INNER_MAP 0x1000 /* BPF_F_INNER_MAP: inner maps may differ in max_entries */
#define VGW_NO_PREALLOC 1    /* BPF_F_NO_PREALLOC: an idle table costs its buckets only */

#define VGW_CONNTRACK_TEMPLATE 65536 /* flows; user space sets each endpoint's own limit */
#define VGW_QUEUE_TEMPLATE (VGW_CONNTRACK_TEMPLATE / VGW_QUEUE_BATCH)
#define VGW_STATS_VERDICTS (VGW_PATH_COUNT * VGW_VERDICT_COUNT * VGW_REASON_SLOTS)
#define VGW_STATS_ENTRIES (VGW_STATS_VERDICTS + VGW_FLOOD_DROP_COUNT)

/* pipeline.h: which slot of configs and policies is in force; one store switches both. */
BPF_ARRAY(active, struct active_slot, 1);
BPF_ARRAY(configs, struct endpoint_config, VGW_CONFIG_SLOTS);

/*
 * image.h: the compiled policy of each path, that of `path` in `slot` at number
 * n = slot * VGW_PATH_COUNT + path. A medium one is whole at that number of
 * policies_medium, a large one in parts from number n * VGW_IMAGE_PARTS on. All maps of a kind have
 * one size, so that lookups in them are inlined: those in maps of any size are calls. policy.h: the
 * rules' counters.
 */
BPF_ARRAY(policies_inner, struct image_chunk, 1);
BPF_ARRAY_OF_MAPS(policies, "policies_inner", VGW_CONFIG_SLOTS * VGW_PATH_COUNT);
BPF_ARRAY(policies_medium_inner, struct image_medium, 1);
BPF_ARRAY_OF_MAPS(policies_medium, "policies_medium_inner", VGW_CONFIG_SLOTS * VGW_PATH_COUNT);
BPF_ARRAY(policy_parts_inner, struct image_part, 1);
BPF_ARRAY_OF_MAPS(policy_parts, "policy_parts_inner",
		  VGW_CONFIG_SLOTS * VGW_PATH_COUNT * VGW_IMAGE_PARTS);
BPF_F_TABLE("array", u32, struct rule_counter, rule_counters_inner, 64, VGW_INNER_MAP);
BPF_ARRAY_OF_MAPS(rule_counters, "rule_counters_inner", VGW_CONFIG_SLOTS);

/* The entries' stages, for lookups in large policies; empty where no policy needs them. */
BPF_PROG_ARRAY(xdp_stages, 2);
BPF_PROG_ARRAY(tc_stages, VGW_PATH_COUNT);

/* conntrack.h: the flows and the queue by which the dead ones are found. */
BPF_F_TABLE("hash", struct flow_key, struct flow, conntrack, VGW_CONNTRACK_TEMPLATE,
	    VGW_NO_PREALLOC);
BPF_F_TABLE("hash", u64, struct queue_batch, expiry_queue, VGW_QUEUE_TEMPLATE, VGW_NO_PREALLOC);
BPF_PERCPU_ARRAY(expiry_buffer, struct queue_buffer, 1);
BPF_ARRAY(conntrack_meta, struct conntrack_meta, 1);

/* fragments.h: first fragments whose datagrams may go on; an older one makes room. */
BPF_TABLE("lru_hash", struct fragment_key, struct fragment, fragments, VGW_FRAGMENTS);

/* denials.h: what the policy has denied just now. */
BPF_PERCPU_ARRAY(denials, struct denial_places, 1);

/* stats.h */
BPF_PERCPU_ARRAY(stats, struct packet_counter, VGW_STATS_ENTRIES);

/* events.h: the host's one perf buffer, and this endpoint's budget of it. */
BPF_PERF_OUTPUT(events);
BPF_ARRAY(event_meter, struct event_meter, 1);

/* reject.h: this endpoint's budget of answers. */
BPF_ARRAY(reject_meter, struct reject_meter, 1);

/* pipeline.h: work memory of the packet being judged; too large for the stack. */
BPF_PERCPU_ARRAY(scratch, struct scratch, 1);

#endif
