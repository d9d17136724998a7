# SPDX-License-Identifier: Apache-2.0
"""A pretended host for tests of the command line: canned answers, and what it was asked for."""

from __future__ import annotations

import json
from typing import Any

from vgw.cli_target import ApplyOptions, AttachOrder
from vgw.controller.flow_import import Piece
from vgw.policy.parse import Sources

POLICY = """\
schema: vgw/v1
vms:
  web01:
    interfaces: [{name: tap-web01, mac: "52:54:00:00:00:11", addresses: [10.20.0.11]}]
  db01:
    interfaces: [{name: tap-db01}]
groups:
  office: {cidrs: [192.0.2.0/24]}
policies:
  - name: tier
    tier: group
    applies_to: {vms: [web01]}
    ingress:
      - {name: site, action: accept, services: [tcp/80, tcp/8000-8099, icmp/echo-request]}
      - {name: ops, action: reject, from: [office], services: [tcp/22], log: true,
         local: [10.20.0.11], source_ports: [1024-65535], comment: "ticket 1"}
    egress:
      - {name: gre, action: drop, to: [10.20.0.2, 10.20.0.3, 10.20.0.4, 10.20.0.9],
         services: [proto/47]}
"""

TEN_MISTAKES = """\
schema: vgw/v1
vms:
  web01:
    mode: enforced
    interfaces:
      - {name: tap0, mac: nonsense, addresses: [10.0.0.300], vlans: [5000]}
groups:
  office: {cidrs: [192.0.2.1/24]}
policies:
  - name: p
    tier: groups
    applies_to: {all: true}
    ingress:
      - {name: a, action: allow}
      - {name: b, action: drop, services: [tcp/90-80]}
      - {name: c, action: drop, from: [nobody]}
      - {name: d, action: drop, colour: red}
"""

STATUS: dict[str, Any] = json.loads("""
{"schema": "vgw/v1", "host_policy": null, "vms": [
 {"vm": "web01", "mode": "enforce", "mode_policy": "enforce", "mode_order": null,
  "generation": 3, "interfaces": [
  {"name": "tap-web01", "ifindex": 7, "attached": true,
   "from_vm": {"hook": "xdp", "mode": "native", "link": true, "prog_id": 12},
   "to_vm": {"hook": "tc", "mode": "tcx", "link": true, "prog_id": 13},
   "rules": {"ingress": 3, "egress": 1}, "conntrack": {"entries": 4, "max": 65536},
   "drops": 99, "reason": null, "pending": null, "beside": [],
   "guards_off": {}},
  {"name": "tap-web01b", "ifindex": null, "attached": false, "from_vm": null, "to_vm": null,
   "rules": {"ingress": 3, "egress": 1}, "conntrack": {"entries": 0, "max": 65536},
   "drops": 0, "reason": "interface tap-web01b does not exist", "pending": null, "beside": [],
   "guards_off": {"address": "no addresses", "arp": "no addresses"}}
]}]}
""")

SAMPLE: dict[str, Any] = {"schema": "vgw/v1", "at_ns": 0, "vms": []}
TALKERS: dict[str, Any] = {
    "schema": "vgw/v1", "at_ns": 0, "vm": "web01", "flows": 0, "complete": True, "talkers": [],
}  # fmt: skip

RULES: dict[str, Any] = json.loads("""
{"schema": "vgw/v1", "vm": "web01", "rules": [
  {"direction": "ingress", "tier": "group", "policy": "tier", "rule": "site",
   "action": "accept", "log": false, "packets": 12, "bytes": 2048, "last_hit": 61.0},
  {"direction": "egress", "tier": "group", "policy": "tier", "rule": "gre",
   "action": "drop", "log": false, "packets": 0, "bytes": 0, "last_hit": null}
]}
""")

FLOWS: dict[str, Any] = json.loads("""
{"schema": "vgw/v1", "vm": "web01", "flows": [
  {"interface": "tap-web01", "direction": "ingress", "proto": "tcp", "state": "tcp_established",
   "local": "10.20.0.11", "remote": "2001:db8::9", "local_port": 443, "remote_port": 40000,
   "icmp_id": null, "vlan": null, "packets": {"ingress": 5, "egress": 4},
   "bytes": {"ingress": 500, "egress": 400}, "age": 12.0, "expires_in": 7188.0, "generation": 3,
   "tier": "group", "policy": "tier", "rule": "site"}
]}
""")


VMS: dict[str, Any] = json.loads("""
{"protect": "listed", "find": ["libvirt"], "problems": {"libvirt": "libvirt is away"}, "vms": [
 {"vm": "app", "source": "qemu", "running": true, "matches": null, "policies": [],
  "reason": "no file names it", "interfaces": [
   {"name": "vnet1", "mac": null, "protected": false, "reason": "nothing asks for it",
    "learned": null, "refused": null}]},
 {"vm": "db01", "source": null, "running": null, "matches": "written", "policies": [],
  "reason": "no interface of it is known", "interfaces": []},
 {"vm": "web01", "source": "libvirt", "running": true, "matches": "written", "policies": ["tier"],
  "reason": null, "interfaces": [
   {"name": "vnet0", "mac": "52:54:00:00:00:11", "protected": true, "reason": null,
    "learned": [{"address": "10.20.0.50", "server": "10.20.0.1", "seconds": 7200},
                {"address": "2001:db8::5", "server": "fe80::1", "seconds": null}], "refused": 1}]}
]}
""")


class FakeTarget:
    """Remembers what it was asked for and answers as a host with two VMs would."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def attach(self, order: AttachOrder) -> dict[str, Any]:
        self.asked.append(("attach", order))
        return {"vms": [result(vm) for vm in order.vms], "waiting": {}}

    def detach(self, vm: str) -> list[str]:
        self.asked.append(("detach", vm))
        return [vm]

    def detach_all(self) -> list[str]:
        self.asked.append(("detach", None))
        return ["db01", "web01"]

    def apply(self, sources: Sources, options: ApplyOptions) -> dict[str, Any]:
        self.asked.append(("apply", sources) if options == ApplyOptions() else ("apply", options))
        return {
            "vms": [result("web01"), result("db01", changed=False)],
            "waiting": {"web01": ["tap-new"]},
            "seconds": 0.1,
        }

    def status(self, vm: str | None) -> dict[str, Any]:
        self.asked.append(("status", vm))
        return STATUS

    def vms(self) -> dict[str, Any]:
        self.asked.append(("vms", None))
        return VMS

    def wants(self, vm: str) -> bool:
        return vm == "web01"

    def forget_gone(self) -> None:
        self.asked.append(("forget_gone", None))

    def rules(self, vm: str) -> dict[str, Any]:
        self.asked.append(("rules", vm))
        return RULES

    def sample(self) -> dict[str, Any]:
        self.asked.append(("sample", None))
        return SAMPLE

    def talkers(self, vm: str) -> dict[str, Any]:
        self.asked.append(("talkers", vm))
        return TALKERS

    def conntrack(self, vm: str) -> dict[str, Any]:
        self.asked.append(("conntrack", vm))
        return FLOWS

    def flush(self, vm: str) -> int:
        self.asked.append(("flush", vm))
        return 4

    def put_flows(self, piece: Piece) -> dict[str, int]:
        self.asked.append(("put_flows", piece))
        return {}

    def rollback(self, number: int | None) -> dict[str, Any]:
        self.asked.append(("rollback", number))
        return {"policy": 9, "back": number or 7, "vms": [result("web01")], "waiting": {}}

    def confirm(self) -> int:
        self.asked.append(("confirm", None))
        return 8

    def set_mode(self, vm: str, mode: str | None, reason: str) -> str:
        self.asked.append(("mode", (vm, mode, reason) if reason else (vm, mode)))
        return mode or "enforce"


def result(vm: str, *, changed: bool = True, **fields: Any) -> dict[str, Any]:
    """Return an AttachResult as JSON; `fields` replace those of a VM with nothing special."""
    return {
        "vm": vm,
        "interfaces": [f"tap-{vm}"],
        "generation": 2,
        "changed": changed,
        "compiled": False,
        "seconds": 0.01,
        "named": True,
        "pending": [],
        "kept": False,
        **fields,
    }
