# SPDX-License-Identifier: Apache-2.0
"""A policy while its files are being read: what was found so far, and where."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from vgw.policy.fields import read_scalar
from vgw.policy.model import Defaults, Group, Interface, Policy, Rule, Service, Vm
from vgw.policy.report import Report
from vgw.policy.yaml_nodes import Node, Scalar, show


class Kind(enum.StrEnum):
    """What can be defined and referred to by name."""

    VM = "VM"
    GROUP = "group"
    SERVICE = "service"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Reference:
    """A name used at a place; `owner` is the group when a group refers to a group."""

    kind: Kind
    name: str
    node: Node
    owner: str = ""


@dataclass(frozen=True, slots=True)
class InterfacePlace:
    """An interface of a VM and where its parts stand; `mac` is None without a MAC."""

    vm: str
    interface: Interface
    node: Node
    name: Node
    mac: Node | None


@dataclass(slots=True)
class Draft:
    """Everything read so far, not yet checked against each other."""

    report: Report
    vms: dict[str, Vm] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    services: dict[str, tuple[Service, ...]] = field(default_factory=dict)
    policies: list[Policy] = field(default_factory=list)
    defaults: Defaults | None = None
    #: Sections that can be given once in all files, where they were.
    single: dict[str, Node] = field(default_factory=dict)
    revision: int | None = None
    hosts: tuple[str, ...] = ()
    #: Where each name is defined, also of what turned out to be wrong.
    places: dict[Kind, dict[str, Node]] = field(default_factory=lambda: {kind: {} for kind in Kind})
    references: list[Reference] = field(default_factory=list)
    interfaces: list[InterfacePlace] = field(default_factory=list)
    #: Rules with `source_ports`, which need to know their services; with that key's node.
    port_rules: list[tuple[Node, Rule]] = field(default_factory=list)

    def define(self, kind: Kind, node: Node, convert: Callable[[str], str]) -> str:
        """Note that a name is defined at a node and return it.

        A name that is wrong or taken is reported; the rest of its definition can still be read.
        """
        places = self.places[kind]
        name = read_scalar(self.report, node, convert)
        if name is None:
            # Known all the same, or every use of it would be reported, too.
            if isinstance(node, Scalar):
                places.setdefault(node.text, node)
            return ""
        first = places.setdefault(name, node)
        if first is not node:
            where = f"it is defined at {first.place}"
            self.report.add(node, f"the {kind} {show(name)} is defined twice; {where}")
        return name

    def define_once(self, section: str, key: Node) -> None:
        """Note that a section is given at a key; a second time in all files is a mistake."""
        first = self.single.setdefault(section, key)
        if first is not key:
            message = f"`{section}` can be given once in all files; it is at {first.place}"
            self.report.add(key, message)

    def refer(self, kind: Kind, name: str, node: Node, owner: str = "") -> None:
        """Note that a name is used at a node."""
        self.references.append(Reference(kind, name, node, owner))
