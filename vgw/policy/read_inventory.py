# SPDX-License-Identifier: Apache-2.0
"""The inventory file: what a host says of itself, apart from the policy that many hosts share."""

from __future__ import annotations

from typing import Final

from vgw.policy import values
from vgw.policy.draft import Draft
from vgw.policy.fields import Fields, Keys
from vgw.policy.model import Finder, Inventory
from vgw.policy.read_vms import read_vms
from vgw.policy.yaml_nodes import MapNode

_POLICY_KEYS: Final = ("revision", "host", "groups", "services", "policies", "defaults")
_KEYS: Final = Keys(
    "an inventory",
    ("schema", "protect", "find", "vms"),
    ("schema",),
    {key: f"`{key}` belongs into the policy, not into the inventory" for key in _POLICY_KEYS},
)
#: Word of `protect` -> whether VMs that no file names are protected.
_PROTECT: Final = {"listed": False, "all": True}
_FINDERS: Final = {str(finder): finder for finder in Finder}


def read_inventory(draft: Draft, root: MapNode) -> None:
    """Read an inventory's mapping into the draft; its VMs stand beside those of the policy."""
    found = Fields(draft.report, root, _KEYS)
    draft.inventory = Inventory(
        protect_all=found.scalar("protect", values.choice(_PROTECT), False),
        find=found.unique("find", values.choice(_FINDERS)),
    )
    if draft.inventory.protect_all and not draft.inventory.find:
        message = "`protect: all` protects what is found; write `find` as well"
        draft.report.add(found.key("protect"), message)
    vms = found.value("vms")
    if vms is not None:
        read_vms(draft, vms)
