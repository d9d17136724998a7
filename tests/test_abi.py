# SPDX-License-Identifier: Apache-2.0
"""vgw/abi.py is bpf/abi.h: compiled static asserts, generated from the mirror, hold against it."""

from __future__ import annotations

import ctypes
import enum
import ipaddress
import itertools
import shutil
from pathlib import Path

import pytest

from vgw import abi, loader
from vgw.errors import CompileError
from vgw.libbpf import ProgType
from vgw.loader.sources import bpf_dir
from vgw.policy import image
from vgw.policy.model import TIERS

CONSTANTS = {
    "VGW_ABI_VERSION": abi.ABI_VERSION,
    "VGW_NO_RULE": abi.NO_RULE,
    "VGW_MAX_ADDRESSES": abi.MAX_ADDRESSES,
    "VGW_MAX_VLANS": abi.MAX_VLANS,
    "VGW_REASON_SLOTS": abi.REASON_SLOTS,
    "VGW_QUEUE_BATCH": abi.QUEUE_BATCH,
    "VGW_FRAGMENTS": abi.FRAGMENTS,
    "VGW_EXPIRY_MARGIN": abi.EXPIRY_MARGIN,
    "VGW_CONFIG_SLOTS": abi.CONFIG_SLOTS,
    "VGW_IMAGE_LINE_WORDS": abi.IMAGE_LINE_WORDS,
    "VGW_CHUNK_LINES": abi.CHUNK_LINES,
    "VGW_MEDIUM_LINES": abi.MEDIUM_LINES,
    "VGW_PART_LINES": abi.PART_LINES,
    "VGW_IMAGE_PARTS": abi.IMAGE_PARTS,
    "VGW_SERVICE_FOREIGN_ICMP": abi.SERVICE_FOREIGN_ICMP,
    "VGW_RULE_LOG": abi.RULE_LOG,
    **{f"VGW_GUARD_{guard.name}": guard.value for guard in abi.Guard},
}


#: The format of compiled policies: image.py writes it, bpf/image.h and its includers read it.
IMAGE_FORMAT = {
    "VGW_IMAGE_NARROW": image.NARROW,
    "VGW_IMAGE_WIDE": image.WIDE,
    "VGW_IMAGE_LARGE": image.LARGE,
    "VGW_IMAGE_MEDIUM": image.MEDIUM,
    "VGW_VECTOR_LINES": image.VECTOR_LINES,
    "VGW_BLOCK_RULES": image.BLOCK_RULES,
    "VGW_ADDRESS_STEPS": image.ADDRESS_STEPS,
    "VGW_VALUE_STEPS": image.VALUE_STEPS,
    "VGW_STEPS": image.PROGRAM_STEPS,
    "DE_BRUIJN_SEQUENCE": image.DE_BRUIJN_SEQUENCE,
    "REF_CLASS": 0,
    "REF_IS_TABLE(0xffffffffU)": 1,
    f"REF_IS_TABLE({image.NODE}U)": 0,
    f"REF_KIND({image.TABLE}U)": 2,
    f"REF_KIND({image.NODE}U)": 1,
    f"REF_NEXT_WORD({image.NEXT_WORD}U)": 1,
    f"REF_INDEX({image.NEXT_WORD}U)": 0,
    "sizeof(struct image_header)": image.HEADER_LINES * image.LINE_BYTES,
    "sizeof(struct image_node)": image.LINE_BYTES,
    "sizeof(((struct image_node *)0)->keys)": 4 * image.NODE_KEYS,
    "__builtin_offsetof(struct image_node, refs)": image.LINE_BYTES - 4 * image.NODE_REFS,
    "sizeof(struct image_table)": len(image.table(0, 0, 0, 0)),
    # A step for each block, one behind each tier, and one that finds the end.
    f"VGW_STAGE_STEPS >= {image.MAX_BLOCKS} + VGW_TIERS + 1": 1,
    "VGW_TIERS": len(TIERS),
}


def layout_asserts(name: str, structure: type[ctypes.Structure]) -> list[str]:
    lines = [
        f'_Static_assert(sizeof(struct {name}) == {ctypes.sizeof(structure)}, "size of {name}");'
    ]
    for field, *_ in structure._fields_:
        descriptor = getattr(structure, field)
        place = f"__builtin_offsetof(struct {name}, {field}) == {descriptor.offset}"
        size = f"sizeof(((struct {name} *)0)->{field}) == {descriptor.size}"
        lines.append(f'_Static_assert({place} && {size}, "{name}.{field}");')
    return lines


def enum_asserts(tag: str, prefix: str, mirror: type[enum.IntEnum]) -> list[str]:
    lines = [
        f'_Static_assert({prefix}{member.name} == {member.value}, "{prefix}{member.name}");'
        for member in mirror
    ]
    return [*lines, f'_Static_assert({prefix}COUNT == {len(mirror)}, "members of {tag}");']


def all_asserts() -> list[str]:
    lines = [f'_Static_assert({name} == {value}U, "{name}");' for name, value in CONSTANTS.items()]
    for name, structure in abi.STRUCTURES.items():
        lines += layout_asserts(name, structure)
    for tag, (prefix, mirror) in abi.ENUMERATIONS.items():
        lines += enum_asserts(tag, prefix, mirror)
    lines += [
        f"_Static_assert(({code}) == {value}ULL, {code!r});".replace("'", '"')
        for code, value in IMAGE_FORMAT.items()
    ]
    return lines


def compile_asserts(directory: Path, lines: list[str]) -> None:
    source = directory / "bpf"
    shutil.copytree(bpf_dir(), source)
    program = ["#include <linux/types.h>", '#include "policy.h"', *lines]
    program += ["int abi_check(struct __sk_buff *skb) { return skb->len; }", ""]
    (source / "abi_check.c").write_text("\n".join(program))
    tree = loader.SourceTree(source, {"abi_check": ProgType.SCHED_CLS})
    loader.load_artefact(directory / "cache", programs=["abi_check"], source=tree)


@pytest.mark.bpf
def test_mirror_is_the_header(tmp_path: Path) -> None:
    """Every size, offset and number of abi.py holds in C."""
    compile_asserts(tmp_path, all_asserts())


@pytest.mark.bpf
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sizeof(struct flow) == 104", "sizeof(struct flow) == 112"),
        ("VGW_REASON_TRUNCATED == 13", "VGW_REASON_TRUNCATED == 14"),
        ("(VGW_ADDRESS_STEPS) == 10", "(VGW_ADDRESS_STEPS) == 9"),
        (
            "__builtin_offsetof(struct event, path) == 70",
            "__builtin_offsetof(struct event, path) == 71",
        ),
    ],
)
def test_a_difference_is_found(tmp_path: Path, right: str, wrong: str) -> None:
    """Negative control: one number changed in the asserts does not compile."""
    lines = all_asserts()
    changed = [line.replace(right, wrong) for line in lines]
    assert changed != lines
    with pytest.raises(CompileError, match="abi_check"):
        compile_asserts(tmp_path, changed)


@pytest.mark.parametrize("structure", abi.STRUCTURES.values())
def test_sizes_are_multiples_of_eight(structure: type[ctypes.Structure]) -> None:
    """Map values are rounded up to eight bytes per CPU; nothing is lost to that."""
    assert ctypes.sizeof(structure) % 8 == 0


@pytest.mark.parametrize("text", ["10.20.0.11", "2001:db8::1", "::", "fe80::1"])
def test_addresses_survive_packing(text: str) -> None:
    address = ipaddress.ip_address(text)
    assert abi.unpack_address(abi.pack_address(address)) == address


@pytest.mark.parametrize(
    ("network", "mask"),
    [
        ("10.0.0.0/8", "ff" * 13 + "00" * 3),
        ("0.0.0.0/0", "ff" * 12 + "00" * 4),
        ("192.0.2.1/32", "ff" * 16),
        ("2001:db8::/33", "ff" * 4 + "80" + "00" * 11),
        ("::/0", "00" * 16),
    ],
)
def test_masks_cover_the_mapped_prefix(network: str, mask: str) -> None:
    assert bytes(abi.pack_mask(ipaddress.ip_network(network))).hex() == mask


def test_ports_are_in_wire_order() -> None:
    assert ctypes.c_uint16(abi.be16(80)).value.to_bytes(2, "little") == b"\x00\x50"


def test_macs_are_padded() -> None:
    assert bytes(abi.mac_field(abi.pack_mac("52:54:00:00:00:11"))).hex() == "5254000000110000"
    assert bytes(abi.mac_field(None)) == bytes(8)


def test_stats_slots_hold_every_reason() -> None:
    for labels in itertools.product(abi.Path, abi.Verdict, abi.Reason):
        assert abi.stats_labels(abi.stats_index(*labels)) == labels
    indices = {abi.stats_index(p, v, r) for p in abi.Path for v in abi.Verdict for r in abi.Reason}
    assert len(indices) == len(abi.Path) * len(abi.Verdict) * len(abi.Reason)
    assert max(indices) < len(abi.Path) * len(abi.Verdict) * abi.REASON_SLOTS


def test_what_is_read_of_the_stats_is_all_that_can_count() -> None:
    """Whether it is, each packet of the tests of programs shows: they read it this way."""
    read = [n for first, count in abi.stats_parts() for n in range(first, first + count)]
    assert len(read) == len(set(read))
    for path, reason in itertools.product(abi.Path, abi.Reason):
        assert abi.stats_index(path, abi.Verdict.DROP, reason) in read
        assert abi.stats_index(path, abi.Verdict.WOULD_DROP, reason) in read
        for verdict in (abi.Verdict.ACCEPT, abi.Verdict.REJECT):
            assert (abi.stats_index(path, verdict, reason) in read) is (reason <= abi.LAST_TO_PASS)
