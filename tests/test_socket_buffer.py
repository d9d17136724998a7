# SPDX-License-Identifier: Apache-2.0
"""Where this kernel keeps what tc programs read: found in its own description, or nothing runs."""

from __future__ import annotations

import ctypes
import errno
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from vgw import libbpf
from vgw.errors import KernelError, VgwError
from vgw.libbpf import Member, TypeKind, kernel_types
from vgw.loader import cache, socket_buffer
from vgw.loader.compiler import KERNEL_FUNCTION
from vgw.loader.socket_buffer import reads_directly, socket_buffer_options

#: Bits of the places on some kernel, in no order.
PLACES = {
    "mac_header": Member(182 * 8, 0),
    "ip_summed": Member(129 * 8 + 5, 2),
    "csum_start": Member(136 * 8, 0),
    "csum_offset": Member(138 * 8, 0),
}


@pytest.fixture(autouse=True)
def _not_remembered() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    socket_buffer_options.cache_clear()
    socket_buffer._cast.cache_clear()


def describe(
    monkeypatch: pytest.MonkeyPatch, members: dict[str, Member], numbers: Mapping[str, int] = {}
) -> None:
    def struct_members(structure: str, names: Collection[str]) -> dict[str, Member]:
        assert structure == "sk_buff"
        return {name: members[name] for name in names if name in members}

    monkeypatch.setattr(socket_buffer, "struct_members", struct_members)
    monkeypatch.setattr(socket_buffer, "type_numbers", lambda _: dict(numbers))


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
    forget()
    describe(monkeypatch, PLACES | {"mac_header": Member(190 * 8, 0)})
    assert socket_buffer_options() != here


@pytest.mark.bpf
def test_this_kernel_lets_programs_read_directly() -> None:
    numbers = libbpf.type_numbers(
        {"sk_buff": TypeKind.STRUCT, "bpf_rdonly_cast": TypeKind.FUNCTION, "no": TypeKind.STRUCT}
    )
    assert set(numbers) == {"sk_buff", "bpf_rdonly_cast"}
    assert reads_directly()
    options = socket_buffer_options()
    assert f"-DSKB_TYPE={numbers['sk_buff']}" in options
    assert f"-DSKB_CAST={KERNEL_FUNCTION + numbers['bpf_rdonly_cast']}" in options


@pytest.mark.bpf
def test_what_the_kernel_refuses_to_load_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    describe(monkeypatch, PLACES, {"sk_buff": 1, "bpf_rdonly_cast": (1 << 29) + 1})
    assert not reads_directly()
    assert not any("SKB_CAST" in option for option in socket_buffer_options())


def test_without_the_right_to_load_programs_nothing_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> int:
        raise KernelError("cannot load a program", errno.EPERM)

    describe(monkeypatch, PLACES, {"sk_buff": 1, "bpf_rdonly_cast": 2})
    monkeypatch.setattr(socket_buffer, "prog_load", refuse)
    with pytest.raises(KernelError, match="cannot load"):
        socket_buffer_options()
