# SPDX-License-Identifier: Apache-2.0
"""libvirt's XML of a domain: its name, and the interfaces that the host has of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

from vgw.controller.finding.found import FoundInterface, clean_interface
from vgw.errors import VgwError

#: A domain's XML is some kilobytes; what is larger is none.
MAX_CHARACTERS: Final = 4 << 20
#: Types of interfaces that are a TAP of the host, which sees all that the guest sends.
_TAP_TYPES: Final = frozenset({"network", "bridge", "ethernet"})


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain as libvirt describes it.

    `interfaces` are TAPs of the host, `without_name` the number of those that do not exist yet.
    `others` are the types of those that vgw cannot protect: no packet of theirs meets an
    interface of the host.
    """

    name: str
    interfaces: tuple[FoundInterface, ...]
    without_name: int = 0
    others: tuple[str, ...] = ()


def read_domain(text: str) -> Domain:
    """Return what a domain's XML says. Raises VgwError when it is none."""
    if len(text) > MAX_CHARACTERS:
        raise VgwError(f"the domain's XML has more than {MAX_CHARACTERS} characters")
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise VgwError("the domain's XML defines entities, which libvirt never does")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 (nothing is expanded without entities)
    except ElementTree.ParseError as error:
        raise VgwError(f"the domain's XML cannot be read: {error}") from error
    name = (root.findtext("name") or "").strip()
    if root.tag != "domain" or not name:
        raise VgwError("the XML is not that of a domain with a name")
    found: list[FoundInterface] = []
    others: list[str] = []
    without_name = 0
    for element in root.iterfind("devices/interface"):
        kind = _actual_type(element)
        if kind not in _TAP_TYPES:
            others.append(kind)
            continue
        interface = clean_interface(_attribute(element, "target", "dev"), _mac(element))
        if interface is None:
            without_name += 1
        else:
            found.append(interface)
    return Domain(name, tuple(found), without_name, tuple(others))


def _actual_type(element: ElementTree.Element) -> str:
    """Return what an interface really is: a network may stand for a device of another type."""
    actual = element.find("actual")
    return (element if actual is None else actual).get("type", "")


def _mac(element: ElementTree.Element) -> str | None:
    return _attribute(element, "mac", "address")


def _attribute(element: ElementTree.Element, child: str, name: str) -> str | None:
    found = element.find(child)
    return None if found is None else found.get(name)
