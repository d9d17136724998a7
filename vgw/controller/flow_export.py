# SPDX-License-Identifier: Apache-2.0
"""A VM's flows written for another host: all of them, or what has changed since they were.

Exporting changes nothing, so it needs neither the writer's lock nor the controller. The token that
an export ends with names what it has told; an export since that token tells the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any, Final

from vgw import __version__
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.flow_file import FlowWriter, Section, own_head
from vgw.controller.flow_table import are_live, read_flows
from vgw.controller.machine import boot_id
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

#: A packet's time is taken before its flow is written: what is this old may not have been told.
_SLACK_NS: Final = SECOND_NS


@dataclass(frozen=True, slots=True)
class Token:
    """What was told up to an export: the stream and number of it, and when on which clock."""

    stream: str
    sequence: int
    time_ns: int
    origin: str

    def __str__(self) -> str:
        return f"{self.stream}.{self.sequence}.{self.time_ns}.{self.origin}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Return the token of a text. Raises VgwError."""
        try:
            stream, sequence, time_ns, origin = text.split(".")
            return cls(stream, int(sequence), int(time_ns), origin)
        except ValueError as error:
            raise VgwError(f"{text[:80]!r} is no token of an export") from error


def export_flows(host: Host, vm: str, out: IO[bytes], since: Token | None = None) -> dict[str, Any]:
    """Write a VM's live flows, or with `since` those that are new or changed since that export.

    A delta names those too that are as they were; the others have ended. Return what was written as
    JSON: {"vm", "kind", "token", "bytes", "interfaces": [{"interface", "flows", "unchanged"}]}.
    Raises VgwError, also when `since` is of another boot or of endpoints that are gone.
    """
    macs = {name: entry.interface.mac for name, entry in host.manifest(vm).endpoints.items()}
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(each) for each in host.open_endpoints(vm)]
        if not opened:
            raise VgwError(f"nothing of VM {vm} is whole; attach it again to repair it")
        token = _next_token(opened, since)
        head = own_head(vm, socket.gethostname(), __version__, token.stream, token.sequence)
        writer = FlowWriter(out, head)
        rows: list[dict[str, Any]] = []
        for endpoint in opened:
            section = _section(endpoint, macs.get(endpoint.interface), since)
            writer.add(section)
            rows.append(
                {
                    "interface": endpoint.interface,
                    "flows": len(section.records),
                    "unchanged": len(section.unchanged),
                }
            )
        writer.close()
    return {
        "vm": vm,
        "kind": "full" if since is None else "delta",
        "token": str(token),
        "bytes": writer.bytes,
        "interfaces": rows,
    }


def _next_token(opened: Sequence[OpenEndpoint], since: Token | None) -> Token:
    """Return the token of an export that begins now."""
    numbers = sorted(endpoint.maps.config().endpoint for endpoint in opened)
    text = f"{boot_id()} {numbers}"
    origin = hashlib.sha256(text.encode()).hexdigest()[:16]
    now = coarse_now_ns()
    if since is None:
        return Token(secrets.token_hex(8), 0, now, origin)
    if since.origin != origin or since.time_ns > now:
        raise VgwError(
            "the token is of another host, of a boot before this one, or of an attachment that is "
            "gone: export all flows"
        )
    return Token(since.stream, since.sequence + 1, now, origin)


def _section(endpoint: OpenEndpoint, mac: str | None, since: Token | None) -> Section:
    config = endpoint.maps.config()
    records = read_flows(endpoint)
    now = coarse_now_ns()
    records = records[are_live(records["flow"], config, now)]
    changed = slice(None)
    unchanged = records[:0]
    if since is not None:
        changed = records["flow"]["last_seen_ns"] >= max(since.time_ns - _SLACK_NS, 0)
        unchanged = records[~changed]
    told = records[changed].copy()
    for field in ("last_seen_ns", "created_ns"):
        times = told["flow"][field]
        told["flow"][field] = now - times.clip(max=now)
    return Section(endpoint.interface, mac, told, unchanged)
