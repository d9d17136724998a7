# SPDX-License-Identifier: Apache-2.0
"""Random policies and headers: the loaded lookup against every rule asked about every header.

`.venv/bin/python -m tests.bpf.lookup_agreement --pairs 100000000` goes on until so many pairs of
policy and header are judged. A disagreement ends it with exit code 1, made as small as it gets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.policy_probe import QUERY, PolicyProbe, Queries
from tests.policy.brute_force import NO_MATCH, Headers, first_matches, is_foreign_icmp
from tests.policy.random_policies import World
from vgw import abi, loader
from vgw.abi import Action, Reason, Verdict
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.model import EffectivePolicy, EffectiveRule

#: Rules of a policy and headers judged by it, in turn; blocks have 512 rules.
#: How many times the headers of a policy are put together anew, which costs less than new ones.
RECOMBINED = 15
ROUNDS = tuple((size, 1 << 15) for size in (5, 40, 64, 65, 300, 600, 1900))
VERDICTS = {
    Action.ACCEPT: Verdict.ACCEPT,
    Action.DROP: Verdict.DROP,
    Action.REJECT: Verdict.REJECT,
}

Rules = tuple[EffectiveRule, ...]


@dataclass(frozen=True)
class Disagreement:
    """A header that the program judges otherwise than its policy says."""

    seed: int
    rules: Rules
    header: str
    expected: tuple[int, int, int]
    found: tuple[int, int, int]

    def __str__(self) -> str:
        lines = "\n".join(f"  {rule}" for rule in self.rules)
        return (
            f"seed {self.seed}: {self.header}: expected (verdict, reason, rule) {self.expected}, "
            f"found {self.found}, by the rules\n{lines}"
        )


def queries_of(headers: Headers, path: abi.Path) -> Queries:
    """Return headers as the queries that bpf/query.h makes of packets."""
    found = np.zeros(len(headers), QUERY)
    for field, halves in enumerate((headers.remote, headers.local)):
        words = found["fields"][:, field]
        if headers.version == 4:
            words[:, 0] = halves[:, 1]
            continue
        for word in range(4):
            words[:, word] = halves[:, word // 2] >> np.uint64(32 * (1 - word % 2)) & 0xFFFFFFFF
    low = np.where(headers.icmp >= 0, headers.icmp, headers.dport.astype(np.int64))
    protocols = headers.protocol.astype(np.int64)
    foreign = np.array([is_foreign_icmp(headers.version, p) for p in protocols.tolist()])
    service = protocols << 16 | low | np.where(foreign, abi.SERVICE_FOREIGN_ICMP, 0)
    found["fields"][:, 2, 0] = service
    found["fields"][:, 3, 0] = protocols << 16 | headers.sport.astype(np.int64)
    found["path"], found["ipv6"] = path, headers.version == 6
    found["ordinary"] = headers.ordinary()
    return found


def expected_answers(image: PolicyImage, policy: EffectivePolicy, headers: Headers) -> np.ndarray:
    """Return columns verdict, reason and rule of the answers that the rules ask for."""
    numbers = first_matches(image.rules, headers)
    actions = np.array([VERDICTS.get(rule.action, 0) for rule in image.rules] + [0])
    default = VERDICTS[policy.defaults.ingress]
    ordinary, hit = headers.ordinary(), numbers != NO_MATCH
    verdict = np.where(hit, actions[numbers], np.where(ordinary, default, Verdict.DROP))
    reason = np.where(hit, Reason.RULE, np.where(ordinary, Reason.DEFAULT, Reason.PROTOCOL))
    return np.stack([verdict, reason, np.where(hit, numbers, abi.NO_RULE)], axis=1)


def compare(
    probe: PolicyProbe, rules: Rules, headers: Headers, seed: int = 0
) -> Disagreement | None:
    """Judge headers by rules in the kernel, and return the first that gets something else."""
    policy = EffectivePolicy("vm", (*rules,))
    image = compile_policy(policy)[abi.Path.TO_VM]
    probe.set_image(abi.Path.TO_VM, image.data)
    answers = probe.ask(queries_of(headers, abi.Path.TO_VM))
    found = np.stack([answers[name] for name in ("verdict", "reason", "rule")], axis=1)
    wanted = expected_answers(image, policy, headers)
    wrong = np.flatnonzero((found != wanted).any(axis=1))
    if not len(wrong):
        return None
    n = int(wrong[0])
    text = ", ".join(
        f"{name} {getattr(headers, name)[n]}"
        for name in ("remote", "local", "protocol", "sport", "dport", "icmp")
    )
    return Disagreement(
        seed, rules, f"IPv{headers.version} {text}", tuple(wanted[n]), tuple(found[n])
    )


def shrink(probe: PolicyProbe, rules: Rules, headers: Headers, seed: int) -> Disagreement | None:
    """Return a disagreement with as few rules as can be had by leaving parts out."""
    smallest = compare(probe, rules, headers, seed)
    size = len(rules) // 2
    while smallest is not None and size:
        for start in range(0, len(smallest.rules), size):
            fewer = smallest.rules[:start] + smallest.rules[start + size :]
            found = compare(probe, fewer, headers, seed)
            if found is not None:
                smallest = found
                break
        else:
            size //= 2
    return smallest


def disagreements(probe: PolicyProbe, seed: int) -> Iterator[tuple[int, Disagreement | None]]:
    """Yield how many pairs were judged, and what disagreed, policy after policy without end."""
    while True:
        for size, count in ROUNDS:
            world = World(seed, crowded=seed % 2 == 1)
            rules = world.rules(size)
            for version in (4, 6):
                first = world.headers(rules, version, count // (1 + RECOMBINED))
                for headers in (first, first.recombined(RECOMBINED, seed)):
                    found = compare(probe, rules, headers, seed)
                    yield len(headers), found and shrink(probe, rules, headers, seed)
            seed += 1


def run(pairs: int, seed: int, progress: Callable[[str], None]) -> Disagreement | None:
    """Judge at least so many pairs; return the first disagreement."""
    done, told = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as cache:
        artefact = loader.load_artefact(Path(cache), programs=["policy_probe"])
        with PolicyProbe(artefact) as probe:
            for count, found in disagreements(probe, seed):
                done += count
                if found is not None or done >= pairs:
                    progress(f"{done} pairs judged")
                    return found
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    progress(f"{done} of {pairs} pairs judged")
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="how many to judge")
    parser.add_argument("--seed", type=int, default=0, help="number of the first policy")
    options = parser.parse_args()
    found = run(options.pairs, options.seed, lambda text: print(text, file=sys.stderr, flush=True))
    print("no disagreement" if found is None else found)
    return 0 if found is None else 1


if __name__ == "__main__":
    sys.exit(main())
