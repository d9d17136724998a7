# SPDX-License-Identifier: Apache-2.0
"""The leases of this host's VMs, kept in the state directory, a file for each VM.

An address belongs to the MAC that it was leased to: a VM that comes back on an interface of another
name has it still. What a server withdraws, or a VM gives back, only runs out: neither message can
be trusted more than the time that was granted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from vgw.controller.learning.lease import INFINITE, Offer
from vgw.controller.learning.lease_time import Clock, Moment, Term, now
from vgw.controller.paths import Paths, unpin_name
from vgw.controller.state_file import read_state, remove_state, write_state
from vgw.policy.model import Address

SCHEMA: Final = "vgw/leases/v1"
#: A renewal that moves the end by less than this many seconds is not worth writing the file.
_WORTH_WRITING: Final = 1.0

_Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Lease:
    """An address of a VM, the MAC and the time that it has it for, and who said so."""

    mac: str
    address: Address
    server: Address
    term: Term


class LeaseBook:
    """Reads and writes the leases; for use by one thread at a time."""

    def __init__(self, paths: Paths, clock: Clock = now) -> None:
        """Keep the leases under `paths`; `clock` says what time it is."""
        self._paths = paths
        self._clock = clock
        self._read: dict[Path, tuple[_Stamp, tuple[Lease, ...]]] = {}

    def leases(self, vm: str) -> list[tuple[Lease, float | None]]:
        """Return the leases of a VM that hold, with the seconds that they still do."""
        moment = self._clock()
        timed = ((lease, lease.term.left(moment)) for lease in self._all(vm))
        return [(lease, left) for lease, left in timed if left != 0]

    def addresses(self, vm: str, mac: str) -> tuple[Address, ...]:
        """Return the addresses that a VM has by the MAC of one of its interfaces, sorted."""
        held = (lease.address for lease, _ in self.leases(vm) if lease.mac == mac)
        return tuple(sorted(held, key=lambda address: (address.version, int(address))))

    def take(self, vm: str, mac: str, offer: Offer) -> bool:
        """Note a lease; return whether the VM did not have the address. Raises VgwError.

        A lease of the same address takes the place of the one before, whether it ends sooner or
        later.
        """
        moment = self._clock()
        seconds = None if offer.seconds == INFINITE else offer.seconds
        lease = Lease(mac, offer.address, offer.server, Term(moment, seconds))
        held = [each for each in self._all(vm) if each.term.left(moment) != 0]
        same = [each for each in held if (each.mac, each.address) == (mac, offer.address)]
        if same and _ends_alike(same[0].term, lease.term, moment):
            return False
        self._write(vm, [*(each for each in held if each not in same), lease])
        return not same

    def expire(self) -> list[tuple[str, Lease]]:
        """Forget the leases that are over and return them with their VMs. Raises VgwError."""
        moment = self._clock()
        over: list[tuple[str, Lease]] = []
        for vm in self.vms():
            held = self._all(vm)
            ended = [lease for lease in held if lease.term.left(moment) == 0]
            if ended:
                over += [(vm, lease) for lease in ended]
                self._write(vm, [lease for lease in held if lease not in ended])
        return over

    def next_end(self) -> float | None:
        """Return in how many seconds the next lease ends, None when none does."""
        ends = (left for vm in self.vms() for _, left in self.leases(vm) if left is not None)
        return min(ends, default=None)

    def forget(self, vm: str) -> None:
        """Forget all leases of a VM."""
        remove_state(self._paths.lease_file(vm))

    def vms(self) -> list[str]:
        """Return the VMs that there are leases of."""
        names = (unpin_name(file.stem) for file in self._paths.leases.glob("*.json"))
        return sorted(name for name in names if name is not None)

    def _all(self, vm: str) -> tuple[Lease, ...]:
        """Return what the file of a VM says; nothing when it has none or it is damaged."""
        file = self._paths.lease_file(vm)
        try:
            status = file.stat()
        except OSError:
            self._read.pop(file, None)
            return ()
        stamp = status.st_ino, status.st_mtime_ns, status.st_size
        known = self._read.get(file)
        if known is None or known[0] != stamp:
            known = self._read[file] = stamp, tuple(_from_json(read_state(file, SCHEMA)))
        return known[1]

    def _write(self, vm: str, leases: Iterable[Lease]) -> None:
        body = [_to_json(lease) for lease in leases]
        if body:
            write_state(self._paths.lease_file(vm), SCHEMA, {"vm": vm, "leases": body})
        else:
            self.forget(vm)


def _ends_alike(one: Term, other: Term, moment: Moment) -> bool:
    ends = one.left(moment), other.left(moment)
    if None in ends:
        return ends[0] is ends[1]
    return abs((ends[0] or 0) - (ends[1] or 0)) < _WORTH_WRITING


def _to_json(lease: Lease) -> dict[str, Any]:
    return {
        "mac": lease.mac,
        "address": str(lease.address),
        "server": str(lease.server),
        "seconds": lease.term.seconds,
        "since": list(lease.term.since),
    }


def _from_json(body: Mapping[str, Any] | None) -> Iterator[Lease]:
    """Yield the leases of a file; a file that is not what vgw writes counts as none."""
    try:
        leases = [_lease(entry) for entry in (body or {"leases": ()})["leases"]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    yield from leases


def _lease(entry: Mapping[str, Any]) -> Lease:
    boot_id, boot, wall = entry["since"]
    seconds = entry["seconds"]
    return Lease(
        str(entry["mac"]),
        ip_address(entry["address"]),
        ip_address(entry["server"]),
        Term(
            Moment(str(boot_id), float(boot), float(wall)),
            None if seconds is None else int(seconds),
        ),
    )
