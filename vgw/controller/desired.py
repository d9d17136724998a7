# SPDX-License-Identifier: Apache-2.0
"""What a VM shall have: by the policy, by the user's orders, and by what is remembered of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vgw import abi
from vgw.controller import pinned
from vgw.controller.manifest import load_manifest
from vgw.controller.paths import Paths
from vgw.controller.renames import with_renamed
from vgw.errors import VgwError
from vgw.policy.guards import endpoint_facts, possible_sources
from vgw.policy.model import (
    REJECT_PER_SECOND,
    EffectivePolicy,
    Hook,
    Interface,
    Logging,
    Network,
    PolicyDocument,
)
from vgw.policy.resolve import effective_policy


@dataclass(frozen=True, slots=True)
class Order:
    """What the user orders besides the policy: more interfaces, a hook for all, no scruples."""

    interfaces: Sequence[str] = ()
    hook: Hook | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Desired:
    """What one VM shall have.

    `interfaces` are those to protect, which exist; `missing` are names of others. `extra` are
    names, among both, of interfaces that the policy does not list; `hooks` are orders of the user
    for some (AUTO: as the policy says). `sources` are all addresses that the guards let the VM
    send from, None when they let any. `named`: the policy has the VM. `kept`: it is an earlier
    policy, for the one that is asked for has not.
    """

    vm: str
    effective: EffectivePolicy
    mode: abi.Mode
    policy: str
    named: bool
    interfaces: Mapping[str, Interface]
    sources: tuple[Network, ...] | None = None
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    hooks: Mapping[str, Hook] = field(default_factory=dict)
    force: bool = False
    reject_per_second: int = REJECT_PER_SECOND
    log: Logging = field(default_factory=Logging)
    kept: bool = False


def desired_state(
    paths: Paths,
    document: PolicyDocument,
    vm: str,
    order: Order,
    owners: Mapping[str, Sequence[str]],
) -> Desired:
    """Return what a VM shall have under a document.

    A VM that the document does not name keeps its interfaces, with the facts that are remembered
    of them. `owners` is pinned.owners(). Raises VgwError when another VM has an interface.
    """
    known = document.vms.get(vm)
    wanted, extra = desired_interfaces(paths, document, vm, order)
    present = {name: wanted[name] for name in wanted if pinned.present_ifindex(name) is not None}
    missing = tuple(name for name in wanted if name not in present)
    _refuse_moved(paths, vm, missing)
    _refuse_owned(paths, vm, present, owners)
    return Desired(
        vm=vm,
        effective=effective_policy(document, vm),
        mode=abi.Mode.ENFORCE if known is None else known.mode,
        policy=document.digest,
        named=known is not None,
        interfaces=present,
        sources=sources_of(wanted.values()),
        missing=missing,
        extra=extra,
        hooks={} if order.hook is None else dict.fromkeys(present, order.hook),
        force=order.force,
        reject_per_second=REJECT_PER_SECOND if known is None else known.reject_per_second,
        log=Logging() if known is None else known.log,
    )


def desired_interfaces(
    paths: Paths, document: PolicyDocument, vm: str, order: Order
) -> tuple[dict[str, Interface], tuple[str, ...]]:
    """Return a VM's interfaces, existing or not, and names of those not in the document.

    The first are by the names that they have now, the others by those that were ordered.
    """
    known = document.vms.get(vm)
    listed = {} if known is None else {each.name: each for each in known.interfaces}
    old = load_manifest(paths.manifest(vm))
    attached = set(pinned.interfaces_of(paths, vm))
    extra = set(order.interfaces)
    if known is None:
        extra |= attached
    if old is not None:
        extra |= {
            name
            for name in old.extra
            if name in attached or not _is_of_another(paths, document, vm, name)
        }
    extra -= set(listed)
    remembered = {} if old is None else old.endpoints
    added = {
        name: replace(remembered[name].interface, name=name)
        if name in remembered
        else Interface(name)
        for name in sorted(extra)
    }
    return with_renamed(paths, vm, listed | added, old), tuple(added)


def sources_of(interfaces: Iterable[Interface]) -> tuple[Network, ...] | None:
    """Return all addresses that the guards let a VM send from, None when they let any.

    Raises VgwError when an interface has more addresses than an endpoint's configuration holds.
    """
    return possible_sources(endpoint_facts(each, abi.Mode.ENFORCE) for each in interfaces)


def _is_of_another(paths: Paths, document: PolicyDocument, vm: str, interface: str) -> bool:
    """Tell whether an interface that was away has become another VM's."""
    others = (other for name, other in document.vms.items() if name != vm)
    if any(each.name == interface for other in others for each in other.interfaces):
        return True
    return any(owner != vm for owner in pinned.owners(paths).get(interface, ()))


def _refuse_moved(paths: Paths, vm: str, missing: Sequence[str]) -> None:
    """Raise VgwError rather than take the programs off an interface that is elsewhere now."""
    for name in set(missing).intersection(pinned.interfaces_of(paths, vm)):
        if not pinned.is_gone(paths, vm, name):
            raise VgwError(
                f"interface {name} of VM {vm} was moved to another network namespace and keeps "
                f"what it has; move it back, or detach {vm}"
            )


def _refuse_owned(
    paths: Paths, vm: str, interfaces: Mapping[str, object], owners: Mapping[str, Sequence[str]]
) -> None:
    for name in interfaces:
        for other in owners.get(name, ()):
            if other != vm and pinned.is_attached(paths, other, name):
                raise VgwError(
                    f"interface {name} of VM {vm} is protected as VM {other}'s; detach {other} "
                    "first, or correct the policy"
                )


def nothing_to_attach(desired: Desired) -> VgwError:
    """Return the error for a VM without a single interface to protect."""
    vm = desired.vm
    if desired.missing:
        return VgwError(
            f"interface {desired.missing[0]} of VM {vm} does not exist in this network namespace; "
            "create it first, or correct its name in the policy"
        )
    if desired.named:
        return VgwError(
            f"the policy lists no interfaces of VM {vm}; add them, or name them by --interface"
        )
    return VgwError(
        f"the policy does not name VM {vm}; add it there, or name its interfaces by --interface"
    )
