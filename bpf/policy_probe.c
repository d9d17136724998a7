/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Entry that is attached nowhere: tests and measurements run rule lookup alone by it.
 *
 * Each run answers the next query of probe_queries, from the first again after the last.
 */
#include "policy.h"

#define PROBE_QUERIES 65536 /* template; user space makes as many as it has, a power of two */

struct probe_state {
	u64 next;      /* number of the next query */
	u64 last;      /* number of the last query of the table, a mask */
	u64 look;      /* 0: read the query and no more, to measure what that costs */
	u64 unused;
};

struct probe_answer {
	u32 verdict;
	u32 reason;
	u32 rule;
	u32 flags;
};

BPF_ARRAY(probe_state, struct probe_state, 1);
BPF_ARRAY(probe_queries, struct policy_query, PROBE_QUERIES);
BPF_ARRAY(probe_answers, struct probe_answer, PROBE_QUERIES);

int policy_probe(struct __sk_buff *skb)
{
	struct probe_answer *answer;
	struct policy_query *query;
	struct probe_state *state;
	struct scratch *work;
	u32 zero = 0, number;

	state = probe_state.lookup(&zero);
	work = scratch.lookup(&zero);
	if (!state || !work)
		return 0;
	number = state->next++ & state->last;
	query = probe_queries.lookup(&number);
	answer = probe_answers.lookup(&number);
	if (!query || !answer)
		return 0;
	work->query = *query;
	decide(work, VGW_VERDICT_DROP, VGW_REASON_NONE);
	forget_values();
	if (state->look) {
		policy_judge(0, work);
		forget_values();
		if (work->lookup.unfinished)
			policy_resume(0, work);
	}
	forget_values();
	answer->verdict = work->decision.verdict;
	answer->reason = work->decision.reason;
	answer->rule = work->decision.rule;
	answer->flags = work->decision.flags;
	return 1;
}
