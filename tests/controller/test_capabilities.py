# SPDX-License-Identifier: Apache-2.0
"""What vgw needs of the kernel's privileges: three capabilities, and each of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.controller import observe
from tests.controller.conftest import run
from tests.controller.ordinary_user import CAPABILITIES, UID, OrdinaryUser, ordinary_user
from tests.controller.policies import PEER_ADDRESS, VM_ADDRESS, VM_MAC, from_vm, to_vm
from tests.controller.process import await_ready
from tests.patience import PATIENCE
from vgw import libbpf
from vgw.abi import Mode
from vgw.controller import links_netlink as netlink
from vgw.controller.reconcile import Host
from vgw.errors import VgwError
from vgw.policy.model import Hook
from vgw.policy.parse import parse_sources

pytestmark = pytest.mark.bpf

VM = "web01"
POLICY = f"""
schema: vgw/v1
vms:
  {VM}:
    conntrack: {{timeouts: {{tcp_syn: 1h}}}}  # they live on while many commands start
    interfaces: [{{name: tap0, mac: "{VM_MAC}", addresses: [{VM_ADDRESS}]}}]
policies:
  - name: base
    tier: vm
    applies_to: {{all: true}}
    ingress:
      - {{name: http, action: accept, services: [tcp/80]}}
      - {{name: telnet, action: drop, services: [tcp/23], log: true}}
"""
CHANGED = POLICY.replace("tcp/80]", "tcp/80, tcp/443]")
PORT = 9477


@pytest.fixture(scope="module")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """What doctor finds as that user, and the programs that it has compiled."""
    with ordinary_user() as user:
        checks = documents(user, "doctor")["checks"]
        compiled = tmp_path_factory.mktemp("compiled")
        shutil.copytree(user.paths.cache_dir, compiled, dirs_exist_ok=True)
    return checks, compiled


@pytest.fixture
def user(netns: None, examined: tuple[list[Any], Path]) -> Iterator[OrdinaryUser]:  # noqa: ARG001
    run("ip", "link", "set", "lo", "up")
    with ordinary_user(examined[1]) as made:
        made.paths.policy.write_text(POLICY)
        yield made


def documents(user: OrdinaryUser, *verb: str) -> Any:
    return json.loads(user.vgw(*verb, "-o", "json"))


def passes(vm: int, **fields: object) -> bool:
    return observe.passes(vm, to_vm(**fields))


def everything_works(user: OrdinaryUser, vm: int) -> None:
    """Use every verb that changes or reads what is in the kernel."""
    user.paths.policy.write_text(POLICY)
    user.vgw("attach", "--vm", VM)
    assert [passes(vm, dport=port) for port in (80, 443, 23)] == [True, False, False]
    user.paths.policy.write_text(CHANGED)
    user.vgw("apply")
    assert passes(vm, dport=443)
    user.vgw("mode", "--vm", VM, "quarantine")
    assert not passes(vm, dport=443)
    user.vgw("mode", "--vm", VM, "enforce")
    assert passes(vm, dport=443)
    user.vgw("attach", "--vm", VM, "--hook", "xdp")
    os.write(vm, from_vm())
    (status,) = documents(user, "status")["vms"]
    assert status["interfaces"][0]["attached"]
    assert status["interfaces"][0]["from_vm"]["hook"] == "xdp"
    user.vgw("attach", "--vm", VM, "--hook", "tc")
    packets = {row["rule"]: row["packets"] for row in documents(user, "rules", "--vm", VM)["rules"]}
    assert packets == {"http": 2, "telnet": 1}
    flows = documents(user, "conntrack", "list", "--vm", VM)["flows"]
    assert len(flows) == 3
    for planned in ((), ("--policy", str(user.paths.policy))):
        packet = ["--direction", "ingress", "--proto", "tcp", "--src", PEER_ADDRESS]
        packet += ["--dst", VM_ADDRESS, "--sport", "40000", "--dport", "23"]
        done = user.vgw(*planned, "simulate", "--vm", VM, *packet, "-o", "json")
        assert '"telnet"' in done
    user.vgw("conntrack", "flush", "--vm", VM)


def test_doctor_is_content_and_compiles(examined: tuple[list[Any], Path]) -> None:
    checks, compiled = examined
    assert [row for row in checks if not row["ok"]] == []
    assert any(compiled.iterdir())


def test_three_capabilities_are_enough(user: OrdinaryUser, tap: Callable[[str], int]) -> None:
    vm = tap("tap0")

    everything_works(user, vm)

    user.vgw("detach", "--vm", VM)
    assert passes(vm, dport=23)


def test_three_capabilities_are_enough_for_the_controller(
    user: OrdinaryUser, tap: Callable[[str], int]
) -> None:
    vm = tap("tap0")
    with running_controller(user) as controller:
        everything_works(user, vm)
        assert not passes(vm, dport=23)
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics", timeout=PATIENCE) as answer:
            metrics = answer.read().decode()
        assert (
            'vgw_rule_packets_total{direction="ingress",interface="tap0",policy="base"' in metrics
        )
        assert f'vgw_attached{{hook="tc",interface="tap0",mode="tcx",vm="{VM}"}} 1.0' in metrics
        user.vgw("detach", "--all")
        controller.send_signal(signal.SIGTERM)
        assert controller.wait(PATIENCE) == 0
    records = [json.loads(line) for line in user.paths.log_file.read_text().splitlines()]
    assert "telnet" in {record.get("rule") for record in records}
    assert passes(vm, dport=23)


class running_controller:  # noqa: N801 - reads like a function
    """A controller that is ready, killed at the end if it still runs."""

    def __init__(self, user: OrdinaryUser) -> None:
        address = user.paths.run_dir / "notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(str(address))
            address.chmod(0o777)
            ready.settimeout(PATIENCE)
            self.process = subprocess.Popen(
                user.command("controller", "--rule-metrics"),
                env={**user.environment(), "NOTIFY_SOCKET": str(address)},
                cwd="/",
            )
            try:
                await_ready(ready)
            except BaseException:
                self.__exit__()
                raise

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self.process

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_root_goes_on_where_the_user_stopped(user: OrdinaryUser, tap: Callable[[str], int]) -> None:
    """Root may use the pins, the state and the compiled programs of whom the bpffs belongs to."""
    vm = tap("tap0")
    user.vgw("attach", "--vm", VM)
    host = Host(user.paths)
    host.set_mode(VM, Mode.QUARANTINE)
    assert not passes(vm)
    host.attach(parse_sources([("policy.yaml", CHANGED)]), VM, hook=Hook.XDP)
    host.set_mode(VM, Mode.ENFORCE)
    assert passes(vm, dport=443)

    os.chown(user.paths.cache_dir, UID + 1, -1)
    with pytest.raises(VgwError, match="open to other users"):
        Host(user.paths).artefact(["tc_to_vm"])
    host.detach_all()


@pytest.mark.parametrize("missing", CAPABILITIES)
def test_each_is_needed_and_said_in_one_line(
    user: OrdinaryUser, tap: Callable[[str], int], missing: str
) -> None:
    """The negative control of the above."""
    vm = tap("tap0")
    poorer = user.without(missing)

    for verb in (("attach", "--vm", VM), ("controller",)):
        done = poorer.try_vgw(*verb)
        assert done.returncode == 1
        assert done.stderr == (
            f"vgw: no permission to load and attach BPF programs: {missing} is missing; run vgw as "
            "root, or with CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF\n"
        )
    done = poorer.try_vgw("doctor", "-o", "json")
    assert done.returncode == 1
    (row,) = (row for row in json.loads(done.stdout)["checks"] if row["check"] == "capabilities")
    assert (row["ok"], row["detail"]) == (False, f"missing {missing}")
    assert passes(vm, dport=23)


@pytest.mark.parametrize("missing", CAPABILITIES)
def test_each_is_what_the_kernel_asks_for(
    user: OrdinaryUser, tap: Callable[[str], int], missing: str
) -> None:
    """Were the check wrong, the kernel would still refuse: no capability is asked for in vain."""
    tap("tap0")
    believing = "import vgw.controller.fitness as f; f.NEEDED_CAPABILITIES.clear()\n"
    poorer = user.without(missing)
    command = poorer.command("attach", "--vm", VM)
    place = command.index("-c") + 1
    command[place] = believing + command[place]

    done = subprocess.run(
        command, env=poorer.environment(), cwd="/", capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "Operation not permitted" in done.stderr or "Permission denied" in done.stderr
    assert not any(entry.is_dir() for entry in Path(user.paths.bpffs).rglob("tap0"))


def test_a_foreign_program_is_not_replaced_without_more(
    user: OrdinaryUser, tap: Callable[[str], int]
) -> None:
    tap("tap0")
    foreign = libbpf.prog_load(
        libbpf.ProgType.XDP, "foreign", bytes.fromhex("b7000000020000009500000000000000")
    )
    try:
        netlink.set_xdp(socket.if_nametoindex("tap0"), foreign, libbpf.XDP_NATIVE)
        prog_id = libbpf.prog_info(foreign).id

        done = user.try_vgw("attach", "--vm", VM, "--hook", "xdp", "--force")

        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert (
            f"replacing the XDP program {prog_id} of interface tap0 needs CAP_SYS_ADMIN"
            in done.stderr
        )
        assert libbpf.xdp_program(socket.if_nametoindex("tap0")) == (prog_id, "native")
    finally:
        os.close(foreign)
