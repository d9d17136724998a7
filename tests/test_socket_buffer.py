# SPDX-License-Identifier: Apache-2.0
"""Where this kernel keeps what tc programs read: found in its own description, or nothing runs."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from vgw import libbpf
from vgw.errors import KernelError, VgwError
from vgw.libbpf import Member, kernel_types
from vgw.loader import cache, socket_buffer
from vgw.loader.socket_buffer import socket_buffer_options

#: Bits of the places on some kernel, in no order.
PLACES = {
    "mac_header": Member(182 * 8, 0),
    "ip_summed": Member(129 * 8 + 5, 2),
    "csum_start": Member(136 * 8, 0),
    "csum_offset": Member(138 * 8, 0),
}


@pytest.fixture(autouse=True)
def _not_remembered() -> Iterator[None]:
    socket_buffer_options.cache_clear()
    yield
    socket_buffer_options.cache_clear()


def describe(monkeypatch: pytest.MonkeyPatch, members: dict[str, Member]) -> None:
    def struct_members(structure: str, names: Collection[str]) -> dict[str, Member]:
        assert structure == "sk_buff"
        return {name: members[name] for name in names if name in members}

    monkeypatch.setattr(socket_buffer, "struct_members", struct_members)


@pytest.mark.bpf
def test_the_kernel_says_where_members_are() -> None:
    found = libbpf.struct_members("sk_buff", ("next", "ip_summed", "csum_start", "nonsense"))
    assert found["next"] == Member(0, 0)
    assert found["ip_summed"].bits == 2
    assert found["csum_start"].first_bit % 16 == 0
    assert "nonsense" not in found
    assert libbpf.struct_members("no_such_structure", ("next",)) == {}


@pytest.mark.bpf
def test_members_of_nameless_structures_count_from_the_outer_one() -> None:
    found = libbpf.struct_members("sk_buff", ("csum", "csum_start", "csum_offset"))
    assert found["csum_start"] == found["csum"]
    assert found["csum_offset"].first_bit == found["csum"].first_bit + 16


def test_places_become_constants_within_one_row_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, PLACES)
    monkeypatch.setattr(sys, "byteorder", "little")
    assert set(socket_buffer_options()) == {
        "-DSKB_FIRST=128",
        "-DSKB_SIZE=56",
        "-DSKB_IP_SUMMED=1",
        "-DSKB_IP_SUMMED_SHIFT=5",
        "-DSKB_CSUM_START=8",
        "-DSKB_CSUM_OFFSET=10",
        "-DSKB_MAC_HEADER=54",
    }


def test_bit_fields_count_from_the_other_end_on_big_endian(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    describe(monkeypatch, PLACES)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert "-DSKB_IP_SUMMED_SHIFT=1" in socket_buffer_options()


@pytest.mark.parametrize("missing", PLACES)
def test_nothing_is_compiled_where_a_member_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    describe(monkeypatch, {name: place for name, place in PLACES.items() if name != missing})
    with pytest.raises(VgwError, match=f"socket buffers have no {missing}.*; use a kernel"):
        cache.load_artefact(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_compiled_without_a_description(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class NoDescription:
        def btf__load_vmlinux_btf(self) -> None:
            ctypes.set_errno(2)

    monkeypatch.setattr(kernel_types, "_calls", NoDescription)
    with pytest.raises(KernelError, match=r"cannot learn the layout of the kernel: .*BTF"):
        cache.load_artefact(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_layout_has_another_name_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, PLACES)
    here = socket_buffer_options()
    socket_buffer_options.cache_clear()
    describe(monkeypatch, PLACES | {"mac_header": Member(190 * 8, 0)})
    assert socket_buffer_options() != here
