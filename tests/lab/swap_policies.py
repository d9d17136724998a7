# SPDX-License-Identifier: Apache-2.0
"""Two policies to swap, and the packets that tell by which of them they were judged.

A kind of packet is a service on a path. Each has two rules in both policies, `KIND-a` and `KIND-b`:
in policy a the first matches it and the second nothing that is sent, in policy b it is the other
way round and all numbers are others. So a rule number read by the tables, the names or the
counters of the other policy means a rule that the packet cannot have had.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from vgw import abi
from vgw.policy.frame import build_frame
from vgw.policy.model import DIRECTION_OF_PATH, ICMP, UDP, Direction, PolicyDocument
from vgw.policy.parse import parse_sources


class Vm(NamedTuple):
    """The interface of a VM."""

    name: str
    mac: str
    address: str


VMS: Final = {
    "web01": Vm("tap0", "52:54:00:00:00:11", "10.20.0.11"),
    "web02": Vm("veth0", "52:54:00:00:00:12", "10.20.0.12"),
}
PEER_MAC: Final = "52:54:00:00:00:99"
PEERS: Final = "10.99.0.0/16"
PEER_ADDRESSES: Final = tuple(f"10.99.{n}.{n + 7}" for n in range(4))
POLICIES: Final = "ab"

#: Which policies accept a kind, by the last letter of its name.
_ACCEPTED_BY: Final = {"z": "ab", "x": "a", "y": "b", "w": ""}
#: What is added to a service to get one that is never sent.
_NEVER_SENT: Final = 100
#: Pairs of rules that a wide policy has besides, in each direction: four blocks and more.
_FILLERS: Final = 1600
_SIDE: Final = {Direction.INGRESS: "from", Direction.EGRESS: "to"}


@dataclass(frozen=True, slots=True)
class Kind:
    """Packets of one service on one path; those of UDP are of flows, the others never are."""

    name: str
    path: abi.Path
    protocol: int
    value: int

    @property
    def accepted_by(self) -> str:
        """Return the policies that accept such packets."""
        return _ACCEPTED_BY[self.name[-1]]

    @property
    def has_flows(self) -> bool:
        """Whether an accepted packet opens a flow, so that not every packet is judged by rules."""
        return self.protocol == UDP

    def rule(self, policy: str) -> str:
        """Return the name of the rule that matches such packets in a policy."""
        return f"{self.name}-{policy}"

    def service(self, more: int = 0) -> str:
        """Return the service as policies write it."""
        return f"{'udp' if self.has_flows else 'icmp'}/{self.value + more}"

    def frames(self, vm: Vm) -> Iterator[bytes]:
        """Yield frames of this kind to or from a VM; the last four bytes are payload."""
        own = vm.address, vm.mac
        for number, address in enumerate(PEER_ADDRESSES):
            peer = address, PEER_MAC
            near, far = (own, peer) if self.path is abi.Path.FROM_VM else (peer, own)
            fields = (
                {"sport": 20000 + number, "dport": self.value}
                if self.has_flows
                else {"icmp_type": self.value}
            )
            yield build_frame(
                {"src": near[0], "dst": far[0], "proto": self.protocol, "length": 4, **fields},
                source_mac=mac_bytes(near[1]),
                destination_mac=mac_bytes(far[1]),
            )


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _kinds() -> Iterator[Kind]:
    for path in abi.Path:
        word = str(DIRECTION_OF_PATH[path])
        for number, letter in enumerate(_ACCEPTED_BY):
            yield Kind(f"{word}-{letter}", path, ICMP, 40 + 20 * path + number)
            yield Kind(f"{word}-flow-{letter}", path, UDP, 4000 + 1000 * path + number)


KINDS: Final = tuple(_kinds())
#: By path, protocol, and ICMP type or destination port.
KIND_OF: Final = {(kind.path, kind.protocol, kind.value): kind for kind in KINDS}


def swapped(policy: str, *, wide: bool) -> PolicyDocument:
    """Return policy a or b; a wide one has more than 3,000 rules in each direction."""
    lines = [
        "schema: vgw/v1",
        "vms:",
        *(f"  {name}: {{interfaces: [{_interface(vm)}]}}" for name, vm in VMS.items()),
        f"groups: {{peers: {{cidrs: [{PEERS}]}}}}",
        "defaults: {ingress: drop, egress: drop}",
        "policies:",
        "  - name: swapped",
        "    tier: vm",
        "    applies_to: {all: true}",
    ]
    for direction in Direction:
        lines.append(f"    {direction}:")
        rules = [*(_fillers(policy, direction) if wide else ()), *_rules(policy, direction)]
        lines += [f"      - {rule}" for rule in rules]
    return parse_sources([("policy.yaml", "\n".join(lines))])


def _interface(vm: Vm) -> str:
    return f"{{name: {vm.name}, mac: '{vm.mac}', addresses: [{vm.address}]}}"


def _rules(policy: str, direction: Direction) -> Iterator[str]:
    """Yield the rules of all kinds: in policy b in the other order, and one more of ingress."""
    side = f"{_SIDE[direction]}: [peers]"
    kinds = [kind for kind in KINDS if DIRECTION_OF_PATH[kind.path] is direction]
    for kind in kinds if policy == "a" else reversed(kinds):
        for name in POLICIES:
            accepts = (policy in kind.accepted_by) == (name == policy)
            service = kind.service(0 if name == policy else _NEVER_SENT)
            yield _rule(kind.rule(name), accepts, side, service, ", log: true")
    if policy == "b" and direction is Direction.INGRESS:
        yield _rule("one-more", True, side, "tcp/9", ", log: true")


def _fillers(policy: str, direction: Direction) -> Iterator[str]:
    """Yield rules that match nothing sent, but share an address or a service with all of it.

    So every block has to be looked into. Policy b has some more.
    """
    is_a = policy == "a"
    kinds = [kind for kind in KINDS if DIRECTION_OF_PATH[kind.path] is direction]
    services = ", ".join(kind.service() for kind in kinds)
    side = _SIDE[direction]
    for number in range(_FILLERS + (0 if is_a else 3)):
        network = f"10.{number // 250}.{number % 250}"
        port = number + (1000 if is_a else 3000)
        near = f"{side}: [{network}.0/25, {PEERS}]"
        far = f"{side}: [{network}.128/25]"
        yield _rule(f"{direction}-n{number}", is_a, near, f"tcp/{port}")
        yield _rule(f"{direction}-m{number}", not is_a, far, services)


def _rule(name: str, accepts: bool, peers: str, services: str, more: str = "") -> str:
    action = "accept" if accepts else "drop"
    return f"{{name: {name}, action: {action}, {peers}, services: [{services}]{more}}}"
