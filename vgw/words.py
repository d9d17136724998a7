# SPDX-License-Identifier: Apache-2.0
"""Packets and rules as words for people, as the CLI and the log have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def side_text(address: str, port: int | None) -> str:
    """Return one side of a packet or flow: address and port, if it has one."""
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def packet_text(packet: Mapping[str, Any]) -> str:
    """Return a packet by the keys that log records and packet descriptions share."""
    protocol = str(packet.get("proto", ""))
    parts = [f"protocol {protocol}" if protocol.isdecimal() else protocol]
    if "src" in packet and "dst" in packet:
        source = side_text(packet["src"], packet.get("sport"))
        parts.append(f"{source} > {side_text(packet['dst'], packet.get('dport'))}")
    if "icmp_type" in packet:
        code = f"/{packet['icmp_code']}" if "icmp_code" in packet else ""
        parts.append(f"type {packet['icmp_type']}{code}")
    parts.append(packet.get("tcp_flags") or packet.get("flags") or "")
    return " ".join(part for part in parts if part)


def rule_text(row: Mapping[str, Any]) -> str | None:
    """Return tier, policy and rule as one path; None when no rule decided."""
    if row.get("rule") is None:
        return None
    return f"{row['tier']}/{row['policy']}/{row['rule']}"
