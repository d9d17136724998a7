# SPDX-License-Identifier: Apache-2.0
"""What a run of the fuzzer says of itself: as tables for people, as one document for programs."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import asdict
from typing import Any, Final

from tests.fuzz.run import Result
from vgw.abi import Reason, Verdict
from vgw.cli_output import Table

SCHEMA: Final = "vgw-fuzz/v1"
#: Share of the packets that an engine may be unable to be given.
MOST_SKIPPED: Final = 0.1
_FIGURES: Final = (
    "seed",
    "jobs",
    "seconds",
    "sequences",
    "packets",
    "packets_per_second",
    "packets_per_cpu_second",
    "accepted_share",
)
#: NONE is no reason, and two CPUs are needed for CT_BUSY.
OUT_OF_REACH: Final = frozenset({Reason.NONE, Reason.CT_BUSY})


def reasons_seen(result: Result) -> Tally[Reason]:
    """Return how many packets got each reason."""
    seen: Tally[Reason] = Tally()
    for (_, _, reason), count in result.counts.outcomes.items():
        seen[reason] += count
    return seen


def reasons_missing(result: Result) -> list[Reason]:
    """Return the reasons within reach that no packet got."""
    seen = reasons_seen(result)
    return [reason for reason in Reason if reason not in seen and reason not in OUT_OF_REACH]


def accepted_share(result: Result) -> float:
    """Return the share of packets that were accepted."""
    accepted = sum(n for (_, v, _), n in result.counts.outcomes.items() if v is Verdict.ACCEPT)
    return accepted / max(result.counts.packets, 1)


def problems(result: Result) -> list[str]:
    """Return why a run has failed, nothing if it has not."""
    found = [f"disagreement: {finding.kind}" for finding in result.findings]
    found += [f"sequence {name} gave different answers twice" for name in result.counts.unstable]
    packets = max(result.counts.packets, 1)
    for name, skipped in result.counts.skipped.items():
        if skipped > MOST_SKIPPED * packets:
            found.append(f"{name} could not be given {skipped} of {packets} packets")
    return found if result.counts.packets else [*found, "no packet was judged"]


def document(result: Result) -> dict[str, Any]:
    """Return the result as plain values."""
    settings, counts = result.settings, result.counts
    verdicts: Tally[str] = Tally()
    for (_, verdict, _), count in counts.outcomes.items():
        verdicts[verdict.name.lower()] += count
    return {
        "schema": SCHEMA,
        "seed": settings.seed,
        "hooks": [str(hook) for hook in settings.hooks],
        "jobs": settings.jobs,
        "seconds": round(result.seconds, 1),
        "packets": counts.packets,
        "sequences": counts.trials,
        "packets_per_second": _rate(counts.packets, result.seconds),
        # What others do on the machine hardly shows in this one.
        "packets_per_cpu_second": _rate(counts.packets, result.cpu_seconds),
        "engines": {
            name: {
                "packets_per_second": _rate(counts.timed, seconds),
                "skipped": counts.skipped[name],
            }
            for name, seconds in counts.seconds.items()
        },
        "accepted_share": round(accepted_share(result), 3),
        "verdicts": dict(verdicts),
        "reasons": {reason.name: count for reason, count in reasons_seen(result).most_common()},
        "reasons_missing": [reason.name for reason in reasons_missing(result)],
        "disagreements": [asdict(finding) for finding in result.findings],
        "unstable": counts.unstable,
        "problems": problems(result),
    }


def text(result: Result) -> str:
    """Return the result as tables, with a row to paste for each disagreement."""
    facts = document(result)
    figures = Table("what", "value")
    for key in _FIGURES:
        figures.add(key.replace("_", " "), facts[key])
    figures.add("reasons not seen", " ".join(facts["reasons_missing"]) or "none")
    engines = Table("engine", "packets/s", "skipped", right=("packets/s", "skipped"))
    for name, engine in facts["engines"].items():
        engines.add(name, engine["packets_per_second"], engine["skipped"])
    reasons = Table("reason", "packets", right=("packets",))
    for name, count in facts["reasons"].items():
        reasons.add(name, count)
    lines = [*figures.lines(), "", *engines.lines(), "", *reasons.lines()]
    for finding in result.findings:
        lines += ["", f"Disagreement in sequence {finding.name}, {finding.steps_before} steps:"]
        lines += [finding.row]
        lines += [
            f"    # by the counters, {hook}: {said}" for hook, said in finding.counters.items()
        ]
    lines += ["", *(facts["problems"] or ["no disagreement"])]
    return "\n".join(lines)


def progress(result: Result) -> str:
    """Return the line that is shown while a run goes on."""
    counts = result.counts
    return (
        f"{counts.packets:,} packets in {result.seconds:.0f} s, "
        f"{_rate(counts.packets, result.seconds):,} a second, "
        f"{len(reasons_seen(result))} reasons, {len(result.findings)} disagreements"
    )


def _rate(count: int, seconds: float) -> int:
    return round(count / seconds) if seconds else 0
