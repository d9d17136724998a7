# SPDX-License-Identifier: Apache-2.0
"""The command on a real kernel: a VM's life from attach to detach, and hosts that are not fit.

Each test has a network namespace, a bpffs and all of vgw's places to itself. The programs are
compiled once for all of them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.controller.process import await_ready
from tests.patience import PATIENCE
from vgw.policy.compile import MAX_RULES

pytestmark = pytest.mark.bpf

POLICY = """\
schema: vgw/v1
vms:
  web01:
    interfaces: [{name: web0, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}]
  away:
    interfaces: [{name: nosuch0, mac: "52:54:00:00:00:12", addresses: [10.20.0.12]}]
policies:
  - name: tier
    tier: group
    applies_to: {all: true}
    ingress:
      - {name: site, action: accept, services: [tcp/80]}
"""
CHANGED_POLICY = POLICY.replace("tcp/80", "tcp/443") + "      - {name: more, action: drop}\n"
PACKET = "--proto tcp --src 192.0.2.7 --dst 10.20.0.11 --dport 80"
#: Runs a command as root without any capability, as a service without rights would be.
NO_RIGHTS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all")


@dataclass(frozen=True)
class Vgw:
    """Runs the command in the test's network namespace, with the test's places."""

    netns: str
    root: Path
    environment: Mapping[str, str]

    def command(self, arguments: str, prefix: Sequence[str] = ()) -> list[str]:
        """Return what runs a command line, with `prefix` before it."""
        start = ("nsenter", f"--net=/run/netns/{self.netns}", *prefix, sys.executable, "-c")
        return [*start, "from vgw.cli import main; main()", *arguments.split()]

    def start(self, arguments: str, ready: socket.socket) -> subprocess.Popen[bytes]:
        """Start a command line and wait until it says on a socket that it is ready."""
        ready.settimeout(PATIENCE)
        ready.bind(str(self.root / "notify"))
        environment = {**self.environment, "NOTIFY_SOCKET": ready.getsockname()}
        process = subprocess.Popen(self.command(arguments), env=environment, cwd=self.root)
        try:
            await_ready(ready)
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process

    def run(
        self, arguments: str, *, prefix: Sequence[str] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command line; `variables` replace those of the test."""
        return subprocess.run(
            self.command(arguments, prefix),
            capture_output=True,
            text=True,
            check=False,
            env={**self.environment, **variables},
            cwd=self.root,
        )

    def ok(self, arguments: str) -> str:
        """Run a command line that succeeds and return what it printed."""
        done = self.run(arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def json(self, arguments: str) -> dict[str, Any]:
        """Run a command line that succeeds and return its JSON document."""
        return dict(json.loads(self.ok(f"{arguments} -o json")))

    def traces(self) -> list[str]:
        """Return what vgw has left: pins and state, but for the lock and the history."""
        places = (self.root / "bpffs" / "vgw", self.root / "state")
        history = self.root / "state" / "history"
        found = [path for place in places for path in place.rglob("*") if path.is_file()]
        return [str(path) for path in found if history not in path.parents]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgw-cache")
    path.chmod(0o700)
    return path


@pytest.fixture
def vgw(tmp_path: Path, cache: Path) -> Iterator[Vgw]:
    """A host with the interface web0 and a policy for it; nothing is attached."""
    netns = f"vgwcli{os.getpid()}"
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    bpffs = tmp_path / "bpffs"
    bpffs.mkdir()
    environment = {
        **os.environ,
        "VGW_POLICY": str(policy),
        "VGW_RUN_DIR": str(tmp_path / "run"),
        "VGW_STATE_DIR": str(tmp_path / "state"),
        "VGW_BPFFS": str(bpffs / "vgw"),
        "VGW_CACHE_DIR": str(cache),
        "VGW_LOG": str(tmp_path / "events.jsonl"),
    }
    subprocess.run(["ip", "netns", "add", netns], check=True)
    try:
        subprocess.run(["mount", "-t", "bpf", "bpf", bpffs], check=True)
        try:
            pair = ("link", "add", "web0", "type", "veth", "peer", "name", "web0-p")
            subprocess.run(["ip", "-n", netns, *pair], check=True)
            subprocess.run(["ip", "-n", netns, "link", "set", "lo", "up"], check=True)
            yield Vgw(netns, tmp_path, environment)
        finally:
            subprocess.run(["umount", "-l", bpffs], check=True)
    finally:
        subprocess.run(["ip", "netns", "del", netns], check=True)


def assert_refused(vgw: Vgw, done: subprocess.CompletedProcess[str], said: str) -> None:
    """One line says what to do, the exit code is 1, and nothing was changed."""
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("vgw: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert vgw.traces() == []


def test_the_life_of_a_vm(vgw: Vgw) -> None:
    assert vgw.json("attach --vm web01")["vms"][0]["changed"] is True
    assert vgw.json("attach --vm web01")["vms"][0]["changed"] is False
    [vm] = vgw.json("status")["vms"]
    [interface] = vm["interfaces"]
    assert (vm["vm"], vm["mode"], vm["generation"]) == ("web01", "enforce", 1)
    assert interface["name"] == "web0"
    assert interface["attached"] is True
    assert {"hook", "mode", "link", "prog_id"} <= set(interface["from_vm"])
    assert interface["rules"] == {"ingress": 1, "egress": 0}
    assert interface["conntrack"] == {"entries": 0, "max": 65536}
    [rule] = vgw.json("rules --vm web01")["rules"]
    assert (rule["rule"], rule["packets"], rule["last_hit"]) == ("site", 0, None)
    assert vgw.json("conntrack list --vm web01")["flows"] == []
    assert vgw.json("conntrack flush --vm web01")["vms"] == [{"vm": "web01", "entries": 0}]
    assert vgw.ok("mode --vm web01 monitor")
    assert vgw.json("status --vm web01")["vms"][0]["mode"] == "monitor"
    assert vgw.json("detach --vm web01")["detached"] == [{"vm": "web01"}]
    assert vgw.ok("status") == "no VM is attached\n"
    assert vgw.traces() == []


def test_a_dry_run_says_what_apply_then_does(vgw: Vgw) -> None:
    vgw.ok("attach --vm web01")
    new = vgw.root / "new.yaml"
    new.write_text(CHANGED_POLICY)
    before = vgw.json("status")
    [row] = vgw.json(f"apply {new} --dry-run")["vms"]
    assert (row["changed"], row["generation"]) == (True, 2)
    assert [each["rule"] for each in row["added"]] == ["ingress/group/tier/more"]
    assert [each["rule"] for each in row["modified"]] == ["ingress/group/tier/site"]
    assert row["removed"] == []
    assert "1 rule added, 1 rule changed" in vgw.ok(f"apply {new} --dry-run")
    assert vgw.json("status") == before
    [row] = vgw.json(f"apply {new}")["vms"]
    assert (row["changed"], row["generation"]) == (True, 2)
    assert vgw.ok(f"apply {new} --dry-run") == "web01: nothing would change\n"
    new.write_text("schema: vgw/v1\n")
    for arguments in (f"apply {new} --dry-run", f"apply {new}"):
        done = vgw.run(arguments)
        assert done.returncode == 0
        assert "web01: not in this policy any more: it keeps its last one" in done.stderr


def test_a_policy_with_a_mistake_changes_nothing(vgw: Vgw) -> None:
    vgw.ok("attach --vm web01")
    before = vgw.json("status")
    wrong = vgw.root / "wrong.yaml"
    wrong.write_text(POLICY.replace("accept", "allow").replace("tcp/80", "tcp/0"))
    for verb in ("apply", "apply --dry-run", "attach --vm web01 --policy"):
        done = vgw.run(f"{verb} {wrong}")
        assert done.returncode == 3
        assert len(done.stderr.splitlines()) == 3
    assert vgw.json("status") == before


@pytest.mark.parametrize("hook", ["xdp", "tc"])
def test_a_packet_is_simulated_on_both_hooks_with_and_without_a_vm(vgw: Vgw, hook: str) -> None:
    simulate = f"simulate --vm web01 --direction ingress --hook {hook} {PACKET}"
    policy = vgw.environment["VGW_POLICY"]
    for arguments in (f"{simulate} --policy {policy}", simulate):
        [row] = vgw.json(arguments)["results"]
        assert (row["verdict"], row["reason"], row["model"]) == ("accept", "RULE", "accept")
        assert (row["tier"], row["policy"], row["rule"]) == ("group", "tier", "site")
        vgw.ok(f"attach --vm web01 --hook {hook}")
    spoofed = "--proto udp --src 10.9.9.9 --dst 192.0.2.7 --dport 53"
    said = vgw.ok(f"simulate --vm web01 --direction egress --hook {hook} {spoofed}")
    assert said.endswith("drop, reason SPOOF_ADDRESS; the model agrees\n")


def test_an_unknown_vm(vgw: Vgw) -> None:
    assert_refused(vgw, vgw.run("attach --vm web02"), "the policy does not name VM web02")
    for verb in ("detach", "status", "rules", "conntrack list", "conntrack flush"):
        assert_refused(vgw, vgw.run(f"{verb} --vm web02"), "VM web02 is not attached")
    assert_refused(vgw, vgw.run("mode --vm web02 monitor"), "VM web02 is not attached")
    assert "vgw attach" not in vgw.run("detach --vm web02").stderr


def test_a_missing_interface(vgw: Vgw) -> None:
    assert_refused(vgw, vgw.run("attach --vm away"), "interface nosuch0")
    assert_refused(vgw, vgw.run("attach --vm new --interface nosuch1"), "interface nosuch1")


def test_one_missing_interface_among_many_vms_is_partly_applied(vgw: Vgw) -> None:
    done = vgw.run("attach --all")
    assert done.returncode == 5
    assert "away: interface nosuch0" in done.stderr
    assert done.stdout.splitlines()[1].startswith("web01  protected")
    assert [vm["vm"] for vm in vgw.json("status")["vms"]] == ["web01"]


def test_catalogue_N11_no_rights(vgw: Vgw) -> None:
    assert_refused(vgw, vgw.run("attach --vm web01", prefix=NO_RIGHTS), "run vgw as root")
    done = vgw.run("doctor -o json", prefix=NO_RIGHTS)
    assert done.returncode == 1
    failed = {row["check"]: row for row in json.loads(done.stdout)["checks"] if not row["ok"]}
    assert failed["capabilities"]["detail"].startswith("missing CAP_NET_ADMIN")
    assert failed["bpf"]["detail"].endswith("Operation not permitted")
    assert all(row["fix"].startswith("run vgw as root") for row in failed.values())


def test_a_policy_that_may_not_be_read(vgw: Vgw) -> None:
    policy = vgw.root / "policy.yaml"
    directory = vgw.root / "policy.d"
    directory.mkdir()
    for path in (policy, directory):
        path.chmod(0)
        done = vgw.run(f"check {path}", prefix=NO_RIGHTS)
        assert_refused(vgw, done, f"policy {path} cannot be read: Permission denied; run vgw as ro")


def test_a_state_directory_that_cannot_be(vgw: Vgw) -> None:
    (vgw.root / "file").write_text("")
    done = vgw.run("attach --vm web01", VGW_STATE_DIR=str(vgw.root / "file" / "state"))
    assert_refused(vgw, done, "Not a directory; choose another directory by VGW_STATE_DIR")


def test_catalogue_L15_a_policy_that_does_not_fit_is_invalid_for_every_verb(vgw: Vgw) -> None:
    vgw.ok("attach --vm web01")
    before = vgw.json("status")
    rules = "".join(f"      - {{name: r{n}, action: drop}}\n" for n in range(MAX_RULES))
    large = vgw.root / "large.yaml"
    large.write_text(POLICY.partition("  away:")[0] + "policies:" + POLICY.split("policies:")[1])
    large.write_text(large.read_text() + rules)
    packet = f"simulate --vm web01 --direction ingress {PACKET} --policy"
    for verb in ("check", "apply", "attach --vm web01 --policy", packet):
        done = vgw.run(f"{verb} {large}")
        assert done.returncode == 3, (verb, done.stderr)
        assert f"VM web01, ingress: {MAX_RULES + 1} rules, the limit is {MAX_RULES}" in done.stderr
        assert "rule 'r49999' of policy" in done.stderr
    assert vgw.json("status") == before


def test_no_bpffs(vgw: Vgw) -> None:
    plain = vgw.root / "plain" / "vgw"
    done = vgw.run("attach --vm web01", VGW_BPFFS=str(plain))
    advice = f"run `mkdir -p {plain} && mount -t bpf bpf {plain}`"
    assert_refused(vgw, done, f"{plain} is not in a bpffs: {advice}")
    assert not plain.exists()


def test_the_wrong_bcc(vgw: Vgw) -> None:
    """PyPI has an unrelated package of that name."""
    wrong = vgw.root / "site" / "bcc"
    wrong.mkdir(parents=True)
    (wrong / "__init__.py").write_text("")
    cache = vgw.root / "cache"
    done = vgw.run("attach --vm web01", PYTHONPATH=str(wrong.parent), VGW_CACHE_DIR=str(cache))
    assert_refused(vgw, done, "apt install python3-bpfcc")


def test_a_running_controller_does_the_work(vgw: Vgw) -> None:
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ready, vgw.start("controller --listen 127.0.0.1:0", ready) as controller:
        try:
            assert vgw.run("attach --all").returncode == 5, "the interface of one VM is missing"
            assert vgw.ok("mode --vm web01 quarantine")
            assert vgw.json("status")["vms"][0]["mode"] == "quarantine"
            assert [row["changed"] for row in vgw.json("apply")["vms"]] == [False]
            assert [row["rule"] for row in vgw.json("rules --vm web01")["rules"]] == ["site"]
            assert vgw.json("conntrack list --vm web01")["flows"] == []
            assert vgw.json("conntrack flush --vm web01")["vms"] == [{"vm": "web01", "entries": 0}]
            assert vgw.run("status --vm web02").returncode == 1
            vgw.ok("detach --all")
        finally:
            controller.terminate()
        assert controller.wait(timeout=PATIENCE) == 0
    events = [json.loads(line)["event"] for line in vgw.ok("logs -o jsonl").splitlines()]
    assert events[0] == "start"
    assert {"mode", "detach"} <= set(events)
    assert events[-1] == "stop"
    assert vgw.traces() == []


def test_connections_go_to_a_file_and_back(vgw: Vgw) -> None:
    vgw.ok("attach --vm web01")
    told = vgw.json("conntrack export --vm web01 web01.flows")
    assert [row["interface"] for row in told["interfaces"]] == ["web0"]
    [row] = vgw.json("conntrack import --vm web01 web01.flows")["interfaces"]
    assert (row["flows"], row["full"]) == (0, 0)
    delta = vgw.json(f"conntrack export --vm web01 --delta-since {told['token']} delta.flows")
    assert delta["kind"] == "delta"
    assert vgw.ok("conntrack import --vm web01 delta.flows").splitlines()[1].split()[1] == "web0"

    flows = vgw.root / "web01.flows"
    assert flows.stat().st_mode & 0o077 == 0, "addresses of a VM's peers are not for all to read"
    flows.write_bytes(flows.read_bytes()[:-1])
    refused = vgw.run("conntrack import --vm web01 web01.flows")
    assert refused.returncode == 1
    assert refused.stderr == "vgw: the flows are cut off or damaged: export them again\n"
    stream = vgw.run("conntrack export --vm web01")
    assert stream.stdout.startswith('{"schema":"vgw/flows/v1"')
    assert "token: " in stream.stderr
    both = vgw.run("conntrack export --vm web01 --full --delta-since x")
    assert both.returncode == 2
    vgw.ok("detach --vm web01")
    assert vgw.traces() == []
