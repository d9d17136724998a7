# SPDX-License-Identifier: Apache-2.0
"""What the packet programs took for leases, judged one by one: believed and kept, or refused.

Any machine on the VM's network may send such messages, so a lease has to be to the guest's own
MAC, of an address that no other VM has, and there may be only a few for each interface.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Final

from vgw import abi
from vgw.controller.alarms import Alarms
from vgw.controller.event_names import EventNames
from vgw.controller.events import LogWriter, control_record
from vgw.controller.learning.book import LeaseBook
from vgw.controller.learning.lease import NotALeaseError, Offer
from vgw.controller.learning.read import read_lease
from vgw.controller.paths import Paths
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import Address, Interface, PolicyDocument

#: Addresses that an interface may have learned at a time.
MAX_LEARNED: Final = 8
#: Messages of one endpoint that may wait to be judged: a flood of one takes no room of others.
_MAX_WAITING: Final = 64
FULL, TAKEN = "leases_full", "lease_conflict"


class Learner:
    """Judges leases; `heard` is for the thread that reads events, the rest for one other."""

    def __init__(
        self,
        paths: Paths,
        book: LeaseBook,
        log: LogWriter,
        alarms: Alarms,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep leases in `book`; `wake` is called when there is something to judge."""
        self._names = EventNames(paths)
        self._book = book
        self._log = log
        self._alarms = alarms
        self._wake = wake
        self._lock = threading.Lock()
        #: Endpoint -> its messages, and how many more there were than may wait.
        self._waiting: dict[int, list[tuple[abi.Event, bytes]]] = {}
        self._overrun: Counter[int] = Counter()
        #: (VM, interface) -> how many messages taught nothing.
        self.refused: Counter[tuple[str, str]] = Counter()

    def heard(self, event: abi.Event, frame: bytes) -> None:
        """Take an event of the kind LEASE; of one endpoint only so many wait."""
        with self._lock:
            waiting = self._waiting.setdefault(event.endpoint, [])
            if len(waiting) < _MAX_WAITING:
                waiting.append((event, frame))
            else:
                self._overrun[event.endpoint] += 1
        self._wake()

    def judge(self, laid: Callable[[], PolicyDocument]) -> None:
        """Judge all that wait; `laid` gives the document with what is leased by now.

        What is learned is in the book then, and has a record. Raises VgwError.
        """
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            overrun, self._overrun = self._overrun, Counter()
        document = laid()
        for endpoint, messages in waiting.items():
            names = self._names.endpoint(endpoint)
            if names is None:
                continue
            if overrun[endpoint]:
                self.refused[names] += overrun[endpoint]
            for event, frame in messages:
                if self._judge(document, names, event, frame):
                    document = laid()

    def expire(self) -> set[str]:
        """Forget what is over, and return the VMs that it was of. Raises VgwError."""
        over = self._book.expire()
        for vm, lease in over:
            address = str(lease.address)
            self._log.add(control_record("lease_end", vm=vm, mac=lease.mac, address=address))
        vms = {vm for vm, _ in over}
        for alarm in self._alarms.current():
            if alarm.alarm == FULL and alarm.vm in vms:
                self._alarms.clear(FULL, vm=alarm.vm, interface=alarm.interface)
        return vms

    def _judge(
        self, document: PolicyDocument, names: tuple[str, str], event: abi.Event, frame: bytes
    ) -> bool:
        """Judge one message; return whether it taught an address."""
        interface = _learning_interface(document, *names)
        if interface is None or interface.mac is None:
            return False
        try:
            offers, destination = read_lease(frame, abi.pack_mac(interface.mac))
            if destination.version == 6 and not _owns(interface, destination):
                raise NotALeaseError(f"{destination} is not its link-local address")
        except NotALeaseError:
            self.refused[names] += 1
            return False
        # The answer to a request that went to one server only renews: see bpf/lease.h.
        may_teach = event.reason == abi.Reason.DHCP
        taken = [self._take(document, names[0], interface, each, may_teach) for each in offers]
        return any(taken)

    def _take(
        self, document: PolicyDocument, vm: str, interface: Interface, offer: Offer, may_teach: bool
    ) -> bool:
        """Keep a lease if it may be believed; return whether its address is new."""
        mac = interface.mac or ""
        held = self._book.addresses(vm, mac)
        if offer.address not in held:
            problem = _problem(document, vm, interface, offer, len(held))
            if problem is not None:
                self._raise(*problem, vm, interface.name)
            if problem is not None or not may_teach:
                self.refused[vm, interface.name] += 1
                return False
        if not self._book.take(vm, mac, offer):
            return False
        for alarm in (FULL, TAKEN):
            self._alarms.clear(alarm, vm=vm, interface=interface.name)
        learned = {
            "address": str(offer.address),
            "server": str(offer.server),
            "seconds": offer.seconds,
        }
        self._log.add(control_record("lease", vm=vm, interface=interface.name, **learned))
        return True

    def _raise(self, alarm: str, text: str, vm: str, interface: str) -> None:
        """Raise an alarm unless it stands: another text for each message would fill the log."""
        standing = {(each.alarm, each.vm, each.interface) for each in self._alarms.current()}
        if (alarm, vm, interface) not in standing:
            self._alarms.set(alarm, text, vm=vm, interface=interface)


def _learning_interface(document: PolicyDocument, vm: str, name: str) -> Interface | None:
    known = document.vms.get(vm)
    interfaces = () if known is None else known.interfaces
    return next((each for each in interfaces if each.name == name and each.learns), None)


def learned_max(interface: Interface) -> int:
    """Return how many addresses an interface may learn: what its configuration has room for."""
    return min(MAX_LEARNED, abi.MAX_ADDRESSES - 1 - len(interface.allowed_pairs))


def _problem(
    document: PolicyDocument, vm: str, interface: Interface, offer: Offer, held: int
) -> tuple[str, str] | None:
    """Return why a VM may not have an address that it is leased: an alarm and its text."""
    for other in document.vms.values():
        if other.name != vm and any(offer.address in each.addresses for each in other.interfaces):
            text = f"{offer.server} leases it {offer.address}, which VM {other.name} has; not taken"
            return TAKEN, text
    limit = learned_max(interface)
    if held >= limit:
        text = f"it has learned {held} addresses, of {limit} at most; {offer.address} is not taken"
        return FULL, text
    return None


def _owns(interface: Interface, address: Address) -> bool:
    mac = abi.pack_mac(interface.mac or "")
    return endpoint_facts(interface, abi.Mode.ENFORCE).owns(address, mac)
