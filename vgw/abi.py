# SPDX-License-Identifier: Apache-2.0
"""The map ABI as Python sees it: the mirror of bpf/abi.h and the only module that knows an offset.

tests/test_abi.py compiles static asserts generated from this module against bpf/abi.h, so a
difference in a number, a size or an offset fails there. Fields named in abi.h as wire order hold
the raw bytes; use `be16` for ports and `pack_address`/`unpack_address` for addresses.
"""

from __future__ import annotations

import ctypes
import enum
import ipaddress
import sys
from collections.abc import Iterator
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from typing import Final

ABI_VERSION: Final = 7
NO_RULE: Final = 0xFFFFFFFF
MAX_ADDRESSES: Final = 24
MAX_VLANS: Final = 16
REASON_SLOTS: Final = 64
QUEUE_BATCH: Final = 4
FRAGMENTS: Final = 512
EXPIRY_MARGIN: Final = 16
CONFIG_SLOTS: Final = 2
SERVICE_FOREIGN_ICMP: Final = 0x01000000
IMAGE_LINE_WORDS: Final = 8
CHUNK_LINES: Final = 1024
MEDIUM_LINES: Final = 8192
PART_LINES: Final = 65536
IMAGE_PARTS: Final = 20
RULE_LOG: Final = 1 << 0

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class Path(enum.IntEnum):
    """The packet's path at a hook."""

    TO_VM = 0
    FROM_VM = 1


class Verdict(enum.IntEnum):
    """What a packet gets."""

    ACCEPT = 0
    DROP = 1
    REJECT = 2
    WOULD_DROP = 3


class Reason(enum.IntEnum):
    """Why a packet got its verdict; bpf/README.md says for each what raises it."""

    NONE = 0
    CT_ESTABLISHED = 1
    CT_RELATED = 2
    ARP = 3
    RARP = 4
    ND = 5
    DHCP = 6
    MEMBERSHIP = 7
    RULE = 8
    DEFAULT = 9
    PROTOCOL = 10
    QUARANTINE = 11
    NO_POLICY = 12
    TRUNCATED = 13
    BAD_LENGTH = 14
    BAD_VERSION = 15
    BAD_HEADER = 16
    BAD_ADDRESS = 17
    LLC = 18
    ETHERTYPE = 19
    VLAN = 20
    IP_OPTIONS = 21
    FRAGMENT = 22
    EXTENSION_HEADER = 23
    TCP_FLAGS = 24
    PORT_ZERO = 25
    ICMP_INNER = 26
    BAD_MTU = 27
    CHECKSUM_REQUEST = 28
    ARP_INVALID = 29
    ND_INVALID = 30
    MEMBERSHIP_INVALID = 31
    DHCP_INVALID = 32
    GROUP_MISMATCH = 33
    NOT_FOR_VM = 34
    SPOOF_MAC = 35
    SPOOF_ADDRESS = 36
    SPOOF_ARP = 37
    SPOOF_ND = 38
    DHCP_SERVER = 39
    ROUTER_ADVERTISEMENT = 40
    REDIRECT = 41
    ECHO_TO_GROUP = 42
    MEMBERSHIP_QUERY = 43
    NO_STATE = 44
    ICMP_UNRELATED = 45
    CT_FULL = 46
    CT_HALF_OPEN = 47
    CT_RATE = 48
    CT_BUSY = 49


#: The last of the reasons for which a packet may pass or be rejected; the others only refuse.
LAST_TO_PASS: Final = Reason.PROTOCOL


class Mode(enum.IntEnum):
    """What an endpoint does with its verdicts."""

    ENFORCE = 0
    MONITOR = 1
    QUARANTINE = 2


class FlowState(enum.IntEnum):
    """State of a flow; each has its own timeout in EndpointConfig.timeout_ns."""

    DEAD = 0
    TCP_SYN = 1
    TCP_ESTABLISHED = 2
    TCP_FIN = 3
    TCP_CLOSED = 4
    UDP_SINGLE = 5
    UDP_REPLIED = 6
    ICMP = 7
    OTHER = 8


class Action(enum.IntEnum):
    """What a rule does; PASS goes on with the next tier."""

    ACCEPT = 0
    DROP = 1
    REJECT = 2
    PASS = 3


class EventKind(enum.IntEnum):
    """What a record of the perf buffer is about; the bytes behind a LEASE are a frame."""

    PACKET = 0
    FLOW_START = 1
    FLOW_END = 2
    LEASE = 3
    FLOOD = 4


class FlowEnd(enum.IntEnum):
    """Why a flow ended; bpf/README.md says when."""

    NONE = 0
    TIMEOUT = 1
    CLOSED = 2
    REVOKED = 3
    FLUSHED = 4
    DISPLACED = 5
    DETACHED = 6


class FloodDrop(enum.IntEnum):
    """Where a packet of a flood is dropped: where the `stats` map counts it besides."""

    AT_TC = 0
    """Such as a shield would have dropped."""
    AT_SHIELD = 1


class Guard(enum.IntFlag):
    """Bits of EndpointConfig.guards."""

    MAC = 1 << 0
    ADDRESS = 1 << 1
    ARP = 1 << 2
    ND = 1 << 3
    DHCP_SERVER = 1 << 4
    RA = 1 << 5


class Address(ctypes.Structure):
    """IPv6 address in wire order; IPv4 as ::ffff:a.b.c.d."""

    _fields_ = [("bytes", c_uint8 * 16)]


class OwnedAddress(ctypes.Structure):
    """An address or range the endpoint may use, and with which MAC."""

    _fields_ = [
        ("network", Address),
        ("mask", Address),
        ("mac", c_uint8 * 8),
        ("mac_mask", c_uint64),
    ]


class EndpointConfig(ctypes.Structure):
    """Everything about an endpoint that a program needs besides the rules."""

    _fields_ = [
        ("endpoint", c_uint64),
        ("flow_epoch", c_uint64),
        ("timeout_ns", c_uint64 * 16),
        ("grace_until_ns", c_uint64),
        ("generation", c_uint32),
        ("first_counter", c_uint32 * 2),
        ("log_per_second", c_uint32),
        ("reject_per_second", c_uint32),
        ("reply_mark", c_uint32),
        ("half_open_max", c_uint32),
        ("new_per_second", c_uint32),
        ("address_count", c_uint32),
        ("vlan_count", c_uint32),
        ("vlans", c_uint16 * MAX_VLANS),
        ("mac", c_uint8 * 8),
        ("mode", c_uint8),
        ("guards", c_uint8),
        ("log_flows", c_uint8),
        ("learns", c_uint8),
        ("flood_drops", c_uint32),
        ("addresses", OwnedAddress * MAX_ADDRESSES),
    ]


class ActiveSlot(ctypes.Structure):
    """Which slot of `configs`, `policies` and `rule_counters` is in force."""

    _fields_ = [("slot", c_uint32), ("pad", c_uint32)]


class ImageLine(ctypes.Structure):
    """Words of a compiled policy, which compile.py writes and bpf/policy.h reads."""

    _fields_ = [("words", c_uint64 * IMAGE_LINE_WORDS)]


class ImageChunk(ctypes.Structure):
    """A small compiled policy, which is in one map; of a longer one its beginning."""

    _fields_ = [("lines", ImageLine * CHUNK_LINES)]


class ImageMedium(ctypes.Structure):
    """A medium compiled policy, which is in one map."""

    _fields_ = [("lines", ImageLine * MEDIUM_LINES)]


class ImagePart(ctypes.Structure):
    """What one map holds of a large compiled policy."""

    _fields_ = [("lines", ImageLine * PART_LINES)]


class FlowKey(ctypes.Structure):
    """A flow, named from the endpoint's side, so both directions have one key."""

    _fields_ = [
        ("local", Address),
        ("remote", Address),
        ("local_port", c_uint16),
        ("remote_port", c_uint16),
        ("protocol", c_uint8),
        ("asker", c_uint8),
        ("vlan", c_uint16),
    ]


class Flow(ctypes.Structure):
    """State of a flow."""

    _fields_ = [
        ("last_seen_ns", c_uint64),
        ("created_ns", c_uint64),
        ("epoch", c_uint64),
        ("claim", c_uint64),
        ("packets", c_uint64 * 2),
        ("bytes", c_uint64 * 2),
        ("generation", c_uint32),
        ("rule", c_uint32),
        ("tcp_acked", c_uint32 * 2),
        ("tcp_end", c_uint32 * 2),
        ("half_open", c_uint64),
        ("state", c_uint8),
        ("opener", c_uint8),
        ("tcp_fins", c_uint8),
        ("reported", c_uint8),
        ("pad", c_uint8 * 4),
    ]


class ConntrackMeta(ctypes.Structure):
    """Counters of a conntrack table and positions of its expiry queue."""

    _fields_ = [
        ("head", c_uint64),
        ("tail", c_uint64),
        ("entries", c_uint64),
        ("created", c_uint64 * 2),
        ("half_open", c_uint64 * 2),
        ("window", c_uint64 * 2),
        ("opened", c_uint64 * 2),
        ("pressed", c_uint64),
        ("dhcp_asked_ns", c_uint64 * 2),
        ("dhcp_renewed_ns", c_uint64),
        ("imported", c_uint64),
    ]


class QueueBatch(ctypes.Structure):
    """Keys of flows in order of creation, a batch an element."""

    _fields_ = [("keys", FlowKey * QUEUE_BATCH)]


class QueueBuffer(ctypes.Structure):
    """The batch a CPU is filling before it goes to expiry_queue."""

    _fields_ = [("count", c_uint64), ("batch", QueueBatch)]


class FragmentKey(ctypes.Structure):
    """The datagram that a fragment is part of, on one path."""

    _fields_ = [
        ("source", Address),
        ("destination", Address),
        ("identification", c_uint32),
        ("vlan", c_uint16),
        ("protocol", c_uint8),
        ("path", c_uint8),
    ]


class Fragment(ctypes.Structure):
    """What is remembered of the first fragment of a datagram, after it was accepted."""

    _fields_ = [
        ("flow", FlowKey),
        ("seen_ns", c_uint64),
        ("end", c_uint32),
        ("pad", c_uint32),
    ]


class PacketCounter(ctypes.Structure):
    """Packets and wire bytes."""

    _fields_ = [("packets", c_uint64), ("bytes", c_uint64)]


class RuleCounter(ctypes.Structure):
    """Packets that a rule decided, not those of the flows it opened."""

    _fields_ = [("packets", c_uint64), ("bytes", c_uint64), ("last_hit_ns", c_uint64)]


class EventMeter(ctypes.Structure):
    """Events of one endpoint: due = sent + suppressed + lost."""

    _fields_ = [
        ("window", c_uint64),
        ("used", c_uint64),
        ("sent", c_uint64),
        ("suppressed", c_uint64),
        ("lost", c_uint64),
    ]


class RejectMeter(ctypes.Structure):
    """Answers to rejected packets of one endpoint: due = sent + suppressed + failed."""

    _fields_ = [
        ("window", c_uint64),
        ("used", c_uint64),
        ("sent", c_uint64),
        ("suppressed", c_uint64),
        ("failed", c_uint64),
    ]


class Event(ctypes.Structure):
    """One record of the perf buffer: all of a PACKET, the beginning of the other kinds."""

    _fields_ = [
        ("time_ns", c_uint64),
        ("endpoint", c_uint64),
        ("generation", c_uint32),
        ("rule", c_uint32),
        ("length", c_uint32),
        ("abi", c_uint16),
        ("ethertype", c_uint16),
        ("source", Address),
        ("destination", Address),
        ("source_port", c_uint16),
        ("destination_port", c_uint16),
        ("vlan", c_uint16),
        ("path", c_uint8),
        ("verdict", c_uint8),
        ("reason", c_uint8),
        ("protocol", c_uint8),
        ("tcp_flags", c_uint8),
        ("icmp_type", c_uint8),
        ("icmp_code", c_uint8),
        ("source_mac", c_uint8 * 6),
        ("destination_mac", c_uint8 * 6),
        ("rule_path", c_uint8),
        ("kind", c_uint8),
        ("end", c_uint8),
        ("state", c_uint8),
        ("pad", c_uint8 * 3),
    ]


class FlowEvent(ctypes.Structure):
    """The record of a flow: FLOW_START, FLOW_END."""

    _fields_ = [
        ("event", Event),
        ("packets", c_uint64 * 2),
        ("bytes", c_uint64 * 2),
        ("created_ns", c_uint64),
        ("last_seen_ns", c_uint64),
    ]


#: Structure in abi.h -> its mirror, for the layout test and for size checks before an attach.
STRUCTURES: Final[dict[str, type[ctypes.Structure]]] = {
    "vgw_address": Address,
    "owned_address": OwnedAddress,
    "endpoint_config": EndpointConfig,
    "active_slot": ActiveSlot,
    "image_line": ImageLine,
    "image_chunk": ImageChunk,
    "image_medium": ImageMedium,
    "image_part": ImagePart,
    "flow_key": FlowKey,
    "flow": Flow,
    "conntrack_meta": ConntrackMeta,
    "queue_batch": QueueBatch,
    "queue_buffer": QueueBuffer,
    "fragment_key": FragmentKey,
    "fragment": Fragment,
    "packet_counter": PacketCounter,
    "rule_counter": RuleCounter,
    "event_meter": EventMeter,
    "reject_meter": RejectMeter,
    "event": Event,
    "flow_event": FlowEvent,
}

#: Enumeration in abi.h -> (prefix of its constants there, its mirror).
ENUMERATIONS: Final[dict[str, tuple[str, type[enum.IntEnum]]]] = {
    "vgw_path": ("VGW_PATH_", Path),
    "vgw_verdict": ("VGW_VERDICT_", Verdict),
    "vgw_reason": ("VGW_REASON_", Reason),
    "vgw_mode": ("VGW_MODE_", Mode),
    "vgw_flow_state": ("VGW_FLOW_", FlowState),
    "vgw_action": ("VGW_ACTION_", Action),
    "vgw_event_kind": ("VGW_EVENT_", EventKind),
    "vgw_flow_end": ("VGW_END_", FlowEnd),
    "vgw_flood_drop": ("VGW_FLOOD_DROP_", FloodDrop),
}


def be16(value: int) -> int:
    """Convert a port between host order and the wire order of the ABI's __be16 fields."""
    return value if sys.byteorder == "big" else ((value & 0xFF) << 8) | (value >> 8)


def address_bytes(address: IPAddress) -> bytes:
    """Return the 16 wire bytes of an address, IPv4 as ::ffff:a.b.c.d."""
    if isinstance(address, ipaddress.IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def pack_address(address: IPAddress) -> Address:
    """Return an address as the ABI's structure."""
    return Address.from_buffer_copy(address_bytes(address))


def unpack_address(address: Address) -> IPAddress:
    """Return the address held by the ABI's structure, IPv4 when it is IPv4-mapped."""
    value = ipaddress.IPv6Address(bytes(address))
    return value.ipv4_mapped or value


def pack_mask(network: IPNetwork) -> Address:
    """Return the mask of a network over the 16 bytes of an address."""
    length = network.prefixlen + (96 if network.version == 4 else 0)
    return Address.from_buffer_copy(((1 << 128) - (1 << (128 - length))).to_bytes(16, "big"))


def fill_owned(entry: OwnedAddress, network: IPNetwork, mac: bytes | None) -> None:
    """Write an address or range into a configuration; `mac` None: it goes with any MAC."""
    entry.network = pack_address(network.network_address)
    entry.mask = pack_mask(network)
    entry.mac = mac_field(mac)
    entry.mac_mask = 0 if mac is None else (1 << 64) - 1


def pack_mac(mac: str) -> bytes:
    """Return the six bytes of a MAC address written as aa:bb:cc:dd:ee:ff."""
    return bytes.fromhex(mac.replace(":", ""))


def mac_field(mac: bytes | None) -> ctypes.Array[c_uint8]:
    """Return the eight bytes of the ABI's configured MACs; None is all zero."""
    return (c_uint8 * 8).from_buffer_copy((mac or b"").ljust(8, b"\0"))


def policy_place(slot: int, path: Path) -> int:
    """Return where the policy of a path is in `policies` and `policies_medium`, by its slot."""
    return slot * len(Path) + path


def first_part(place: int) -> int:
    """Return where the parts of a large policy begin in the `policy_parts` map, by its place."""
    return place * IMAGE_PARTS


def queue_batches(conntrack_max: int) -> int:
    """Return the entries of `expiry_queue` that a limit of flows needs: each has its key in one."""
    return -(-conntrack_max // QUEUE_BATCH)


def stats_index(path: Path, verdict: Verdict, reason: Reason) -> int:
    """Return the index of a packet counter in the `stats` map."""
    return (path * len(Verdict) + verdict) * REASON_SLOTS + reason


#: Where the counters of FloodDrop begin in the `stats` map, behind those of verdicts.
FIRST_FLOOD_DROP: Final = len(Path) * len(Verdict) * REASON_SLOTS


def stats_parts() -> Iterator[tuple[int, int]]:
    """Yield first index and number of the packet counters that can count; others stay zero.

    Packets pass, and are rejected, for the reasons up to LAST_TO_PASS alone, and there is room for
    reasons that do not exist.
    """
    for path in Path:
        yield stats_index(path, Verdict.ACCEPT, Reason.NONE), LAST_TO_PASS + 1
        drop = stats_index(path, Verdict.DROP, Reason.NONE)
        # One question for two that are nearly side by side.
        yield drop, stats_index(path, Verdict.REJECT, LAST_TO_PASS) + 1 - drop
        yield stats_index(path, Verdict.WOULD_DROP, Reason.NONE), len(Reason)


def stats_labels(index: int) -> tuple[Path, Verdict, Reason]:
    """Return what the packet counter at an index of the `stats` map counts."""
    place, reason = divmod(index, REASON_SLOTS)
    path, verdict = divmod(place, len(Verdict))
    return Path(path), Verdict(verdict), Reason(reason)
