# SPDX-License-Identifier: Apache-2.0
"""Policies for the tests of the controller, and frames that they decide about."""

from __future__ import annotations

from collections.abc import Mapping

from vgw.policy.frame import build_frame
from vgw.policy.model import PolicyDocument
from vgw.policy.parse import parse_sources

VM_MAC = "52:54:00:00:00:11"
VM_ADDRESS = "10.20.0.11"
PEER_MAC = "52:54:00:00:00:99"
PEER_ADDRESS = "192.0.2.7"


def document(
    rules: str = "[{name: http, action: accept, services: [tcp/80]}]",
    *,
    vms: Mapping[str, str] | None = None,
    extra: str = "",
    defaults: str = "{ingress: drop, egress: accept}",
) -> PolicyDocument:
    """Return a policy: ingress rules for all VMs, and VMs by name with their interface's YAML.

    The default VM is web01 on tap0.
    """
    if vms is None:
        vms = {"web01": interface("tap0")}
    lines = "\n".join(f"  {name}: {text}" for name, text in vms.items())
    text = f"""
schema: vgw/v1
vms:
{lines or "  {}"}
policies:
  - name: base
    tier: vm
    applies_to: {{all: true}}
    ingress: {rules}
{extra}
defaults: {defaults}
"""
    return parse_sources([("policy.yaml", text)])


def interface(name: str, more: str = "", vm: str = "") -> str:
    """Return the YAML of a VM with one interface that has the VM's usual addresses."""
    address = f"mac: '{VM_MAC}', addresses: [{VM_ADDRESS}]"
    return f"{{{vm} interfaces: [{{name: {name}, {address} {more}}}]}}"


def to_vm(**fields: object) -> bytes:
    """Return a frame towards the VM, by default a TCP SYN to port 80."""
    kind = fields if "proto" in fields else {"proto": "tcp", "dport": 80} | fields
    description = {"src": PEER_ADDRESS, "dst": VM_ADDRESS} | kind
    return build_frame(description, source_mac=_mac(PEER_MAC), destination_mac=_mac(VM_MAC))


def from_vm(**fields: object) -> bytes:
    """Return a frame that the VM sends, by default a TCP SYN to port 443."""
    kind = fields if "proto" in fields else {"proto": "tcp", "dport": 443} | fields
    description = {"src": VM_ADDRESS, "dst": PEER_ADDRESS} | kind
    return build_frame(description, source_mac=_mac(VM_MAC), destination_mac=_mac(PEER_MAC))


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
