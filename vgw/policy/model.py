# SPDX-License-Identifier: Apache-2.0
"""The policy as data: what a `vgw/v1` file says, and what it means for one VM.

Everything here is immutable and already checked; parse.py makes documents, resolve.py makes
effective policies, compile.py and evaluate.py read those.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from vgw.abi import Action, FlowState, Mode, Path
from vgw.errors import Problem

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: Both families' /0: what `any` means as a peer or as `local`.
ANYWHERE: tuple[Network, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

TCP, UDP, ICMP, ICMPV6, SCTP = 6, 17, 1, 58, 132
PORT_PROTOCOLS = frozenset({TCP, UDP, SCTP})
ICMP_PROTOCOLS = frozenset({ICMP, ICMPV6})
#: Answers to rejected packets that an interface sends in a second, where a VM does not say.
REJECT_PER_SECOND = 100

#: ICMP type of an echo request, by protocol: the only ICMP that `any` and a default speak of.
ECHO_REQUEST = {ICMP: 8, ICMPV6: 128}
ECHO_REPLY = {ICMP: 0, ICMPV6: 129}


@dataclass(frozen=True, slots=True)
class Logging:
    """What a VM leaves in the log besides what its rules ask for, and how much on each interface.

    `flows`: records of connections that begin and end. `per_second`: records of all kinds.
    """

    flows: bool = False
    per_second: int = 1000


class Direction(enum.StrEnum):
    """Direction of traffic from the VM's point of view."""

    INGRESS = "ingress"
    EGRESS = "egress"


#: The one table that converts between the VM's directions and the paths at the hooks.
PATH_OF_DIRECTION: dict[Direction, Path] = {
    Direction.INGRESS: Path.TO_VM,
    Direction.EGRESS: Path.FROM_VM,
}
DIRECTION_OF_PATH: dict[Path, Direction] = {path: d for d, path in PATH_OF_DIRECTION.items()}


class Tier(enum.StrEnum):
    """Bands of policies, in the order in which they are evaluated."""

    ADMIN = "admin"
    GROUP = "group"
    VM = "vm"
    BASELINE = "baseline"


TIERS: tuple[Tier, ...] = tuple(Tier)


class Hook(enum.StrEnum):
    """Where the from_vm program is attached; AUTO chooses by the kind of the device."""

    AUTO = "auto"
    XDP = "xdp"
    TC = "tc"


@dataclass(frozen=True, slots=True)
class Guards:
    """Which guards the policy asks for; one that lacks its facts is off all the same."""

    mac: bool = True
    address: bool = True
    arp: bool = True
    nd: bool = True
    dhcp_server: bool = True
    ra: bool = True


@dataclass(frozen=True, slots=True)
class AllowedPair:
    """An address or range that the VM may use besides its own, with an optional MAC."""

    network: Network
    mac: str | None = None


@dataclass(frozen=True, slots=True)
class Tracking:
    """How the connections of a VM are tracked; the same for all of its interfaces.

    `timeouts_ns` are those that differ from the defaults. Each side of an interface, the VM and the
    network, may have `half_open_max` half-open flows (None: a quarter of `conntrack_max`) and may
    open `new_per_second` (0: any number). `grace_seconds`: how long after an attach TCP connections
    that were open before are taken over.
    """

    timeouts_ns: tuple[tuple[FlowState, int], ...] = ()
    half_open_max: int | None = None
    new_per_second: int = 0
    grace_seconds: int = 60


@dataclass(frozen=True, slots=True)
class Interface:
    """One endpoint as the policy describes it; `mac` is lower case with colons."""

    name: str
    mac: str | None = None
    addresses: tuple[Address, ...] = ()
    allowed_pairs: tuple[AllowedPair, ...] = ()
    vlans: tuple[int, ...] = ()
    guards: Guards = Guards()
    conntrack_max: int = 65536
    hook: Hook = Hook.AUTO
    tracking: Tracking = Tracking()


@dataclass(frozen=True, slots=True)
class Vm:
    """A VM and what the policy says of it; `reject_per_second` answers to rejected packets."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    mode: Mode = Mode.ENFORCE
    interfaces: tuple[Interface, ...] = ()
    reject_per_second: int = REJECT_PER_SECOND
    log: Logging = Logging()


@dataclass(frozen=True, slots=True)
class Group:
    """A set of addresses: the union of its VMs by label, its CIDRs, its VMs and other groups."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    cidrs: tuple[Network, ...] = ()
    vms: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Service:
    """One alternative of a service.

    `protocol` None is `any`: ordinary traffic, which is TCP, UDP and SCTP with every port and ICMP
    and ICMPv6 echo requests. `ports` is an inclusive range of destination ports (None: all).
    `icmp_type` None is every type, `icmp_code` None every code.
    """

    protocol: int | None = None
    ports: tuple[int, int] | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None


ANY_SERVICE = Service()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as written. Peers are group names, networks, or empty for `any`."""

    name: str
    action: Action
    peers: tuple[str | Network, ...] = ()
    local: tuple[Network, ...] = ()
    services: tuple[str | Service, ...] = ()
    source_ports: tuple[tuple[int, int], ...] = ()
    log: bool = False
    enabled: bool = True
    comment: str = ""
    file: str = ""
    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class AppliesTo:
    """Which VMs a policy is for: all, those with every label, or those named."""

    all: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    vms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """A named, ordered list of rules for each direction; `path` is its place in its file."""

    name: str
    tier: Tier
    applies_to: AppliesTo
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    path: str = ""

    def rules(self, direction: Direction) -> tuple[Rule, ...]:
        """Return the rules of one direction in file order."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class Defaults:
    """What happens to ordinary traffic that no rule decided; never PASS."""

    ingress: Action = Action.DROP
    egress: Action = Action.ACCEPT
    log: bool = False

    def action(self, direction: Direction) -> Action:
        """Return the default of one direction."""
        return self.ingress if direction is Direction.INGRESS else self.egress


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    """A whole valid policy, merged from its files. `digest` identifies its text.

    `revision` counts up where its authors number it; `hosts` are those that it is for (empty: any).
    """

    vms: Mapping[str, Vm] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    services: Mapping[str, tuple[Service, ...]] = field(default_factory=dict)
    policies: tuple[Policy, ...] = ()
    defaults: Defaults = Defaults()
    warnings: tuple[Problem, ...] = ()
    digest: str = ""
    revision: int | None = None
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EffectiveRule:
    """A rule as it holds for one VM, every name resolved.

    Empty `peers` or `local` match nothing (a group without members); `any` is ANYWHERE. Empty
    `source_ports` are all ports. Networks are collapsed and sorted. `key` is the rule's identity
    over policy changes: what its counters and logs go by.
    """

    direction: Direction
    tier: Tier
    policy: str
    name: str
    action: Action
    peers: tuple[Network, ...] = ANYWHERE
    local: tuple[Network, ...] = ANYWHERE
    services: tuple[Service, ...] = (ANY_SERVICE,)
    source_ports: tuple[tuple[int, int], ...] = ()
    log: bool = False
    comment: str = ""
    file: str = ""
    line: int = 0
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Made once: counters, manifests and images ask for it again and again.
        key = f"{self.direction}/{self.tier}/{self.policy}/{self.name}"
        object.__setattr__(self, "key", key)


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """Everything that decides about one VM, in the order of evaluation."""

    vm: str
    ingress: tuple[EffectiveRule, ...] = ()
    egress: tuple[EffectiveRule, ...] = ()
    defaults: Defaults = Defaults()

    def rules(self, direction: Direction) -> tuple[EffectiveRule, ...]:
        """Return the rules of one direction in the order of evaluation."""
        return self.ingress if direction is Direction.INGRESS else self.egress
