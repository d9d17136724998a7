# SPDX-License-Identifier: Apache-2.0
"""The demo of scripts/netns-lab.sh: real traffic before and after vgw protects the lab's VMs.

Runs in the lab's namespace `host`, with the VGW_* variables of the lab set. Exits with 1 when
anything happened otherwise than the policy says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from scripts.lab import wire
from scripts.lab.attempts import ATTEMPTS, DEFAULT_ACCEPT, DEFAULT_DROP, GUARDS, Attempt, Nodes

METRICS = "http://127.0.0.1:9477/metrics"
LAST_RECORDS = 12
VGW = str(Path(sys.executable).with_name("vgw"))
SERIES = re.compile(r"(\w+)\{(.*)\} (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')
SHOWN_METRICS = re.compile(
    r"vgw_(packets_total|dropped_packets_total|new_connections_total|conntrack_entries|attached)\{"
)

Counts = Counter[tuple[str, frozenset[tuple[str, str]]]]


def headline(text: str) -> None:
    """Print the title of a part of the demo."""
    print(f"\n--- {text}\n", flush=True)


def vgw(*words: str) -> str:
    """Show and run one vgw command; return what it prints."""
    print(f"$ vgw {' '.join(words)}", flush=True)
    run = subprocess.run([VGW, *words], stdout=subprocess.PIPE, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"vgw {words[0]} failed with exit code {run.returncode}")
    return run.stdout


def scrape() -> str:
    """Return what the controller tells Prometheus."""
    with urllib.request.urlopen(METRICS, timeout=wire.PATIENCE) as answer:
        text: bytes = answer.read()
    return text.decode()


def start_controller(run_dir: Path) -> None:
    """Start the controller in the background and wait until it answers."""
    log = run_dir / "log/controller.log"
    print(f"$ vgw controller --rule-metrics &     (its messages: {log})", flush=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [VGW, "controller", "--rule-metrics"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    run_dir.joinpath("controller.pid").write_text(f"{process.pid}\n")
    while True:
        try:
            scrape()
        except urllib.error.URLError:
            try:
                process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                continue
            sys.exit(f"vgw controller ended:\n{log.read_text()}")
        return


def counts() -> Counts:
    """Return every counter of dropped packets and of rules."""
    found: Counts = Counter()
    for name, labels, value in SERIES.findall(scrape()):
        if name in {"vgw_dropped_packets_total", "vgw_rule_packets_total"}:
            found[name, frozenset(LABEL.findall(labels))] = int(float(value))
    return found


def decided_by(attempt: Attempt, moved: Counts) -> str:
    """Say in words what decided, from the counters that moved on the judging VM."""
    words = set()
    for (name, items), _ in moved.items():
        labels = dict(items)
        if (labels["vm"], labels["direction"]) != (attempt.vm, attempt.direction):
            continue
        if name == "vgw_rule_packets_total":
            words.add(f"{labels['policy']} / {labels['rule']}")
        elif labels["reason"] == "DEFAULT":
            words.add(DEFAULT_DROP)
        elif labels["reason"] != "RULE":
            words.add(GUARDS.get(labels["reason"], labels["reason"]))
    return ", ".join(sorted(words)) or DEFAULT_ACCEPT


def run_attempts(nodes: Nodes, before: list[bool]) -> int:
    """Try everything under vgw's eyes, print the table, return how many rows are wrong."""
    outcome = {True: "passed", False: "stopped"}
    widths = "{:<45} {:<11} {:<8} {:<8} {:<36} {}"
    heads = ("what was tried", "without vgw", "expected", "happened", "decided by", "")
    print(widths.format(*heads))
    print(widths.format(*("-" * len(head) for head in heads)))
    wrong = 0
    for attempt, passed_before in zip(ATTEMPTS, before, strict=True):
        start = counts()
        passed = attempt.run(nodes)
        decision = decided_by(attempt, counts() - start)
        right = passed_before and (passed, decision) == (attempt.passes, attempt.decision)
        wrong += not right
        row = (outcome[passed_before], outcome[attempt.passes], outcome[passed], decision)
        mark = "ok" if right else f"WRONG, should be: {attempt.decision}"
        print(widths.format(attempt.what, *row, mark), flush=True)
    return wrong


def logged(last: str) -> str:
    """Return the end of the log, which comes a moment after the packets, up to a last word."""
    deadline = time.monotonic() + wire.PATIENCE
    log = Path(os.environ["VGW_LOG"])
    while time.monotonic() < deadline and last not in log.read_text():
        time.sleep(0.05)
    return "\n".join(vgw("logs").splitlines()[-LAST_RECORDS:])


def show_outputs() -> None:
    """Show the log, the metrics and the status."""
    headline("Rules that say `log: true` and every stopped forgery leave a record:")
    print(logged("ROUTER_ADVERTISEMENT"))
    headline("What Prometheus reads (a part of it):")
    print(f"$ curl {METRICS}")
    print("\n".join(filter(SHOWN_METRICS.match, scrape().splitlines())))
    headline("What is attached, read back from the kernel:")
    print(vgw("status"), end="")
    print(vgw("rules", "--vm", "web01"), end="")


def main(lab: str) -> int:
    """Run the demo in a lab that is up; return the exit code."""
    nodes = wire.lab_nodes(lab)
    policy = os.environ["VGW_POLICY"]
    headline("Without vgw everything gets through. Trying it, to know that the lab works ...")
    before = [attempt.run(nodes) for attempt in ATTEMPTS]
    print(f"{sum(before)} of {len(before)} attempts got through.")

    headline("Now vgw protects both VMs, by the policy examples/lab.yaml.")
    print(vgw("check", policy), end="")
    print(vgw("attach", "--vm", "web01", "--vm", "db01"), end="")
    start_controller(Path("/run", lab))

    headline("The same attempts again; `decided by` is read from vgw's own counters.")
    wrong = run_attempts(nodes, before)
    show_outputs()

    headline("Look around")
    script = "scripts/netns-lab.sh"
    print(f"  {script} shell host      a shell on the host: try vgw logs -f, vgw compile --vm db01")
    print(f"  {script} shell client    somebody outside: try ping 10.20.0.11")
    print(f"  {script} status          what the lab consists of")
    print(f"  {script} down            remove all of it")
    if wrong:
        print(f"\n{wrong} of {len(ATTEMPTS)} rows are not as the policy says.")
        return 1
    print(f"\nAll {len(ATTEMPTS)} rows are as the policy says.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
