# SPDX-License-Identifier: Apache-2.0
"""The programs call nothing that makes a packet grow, moves it or wraps it; answers aside (K9).

A program that grows packets has to care for GSO, for headroom and for who pays; only the answers
that tc.h and xdp.h send may, and they are packets of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from vgw import loader
from vgw.loader import bpf_dir

pytestmark = pytest.mark.bpf

#: Helpers of linux/bpf.h by number: they change a packet's length or tags, wrap it, or send it on.
CHANGING = {
    13: "bpf_clone_redirect",
    18: "bpf_skb_vlan_push",
    19: "bpf_skb_vlan_pop",
    21: "bpf_skb_set_tunnel_key",
    23: "bpf_redirect",
    30: "bpf_skb_set_tunnel_opt",
    31: "bpf_skb_change_proto",
    38: "bpf_skb_change_tail",
    43: "bpf_skb_change_head",
    44: "bpf_xdp_adjust_head",
    50: "bpf_skb_adjust_room",
    51: "bpf_redirect_map",
    54: "bpf_xdp_adjust_meta",
    65: "bpf_xdp_adjust_tail",
    73: "bpf_lwt_push_encap",
    74: "bpf_lwt_seg6_store_bytes",
    75: "bpf_lwt_seg6_adjust_srh",
    76: "bpf_lwt_seg6_action",
    152: "bpf_redirect_neigh",
    155: "bpf_redirect_peer",
}
#: The places that may, to make and to send answers to rejected packets, and what they use.
ANSWERS = {
    "tc.h": {"bpf_skb_change_tail", "bpf_redirect"},
    "xdp.h": {"bpf_xdp_adjust_head", "bpf_xdp_adjust_tail"},
}
CALL = 0x85


def helpers_called(code: bytes) -> Iterator[int]:
    """Yield the number of each helper that bytecode calls."""
    for start in range(0, len(code), 8):
        opcode, registers = code[start], code[start + 1]
        if opcode == CALL and registers >> 4 == 0:
            yield int.from_bytes(code[start + 4 : start + 8], "little")


def names_in(text: str) -> set[str]:
    """Return the changing helpers that a source names, comments aside."""
    code = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return {name for name in CHANGING.values() if re.search(rf"\b{name}\b", code)}


def test_catalogue_K9_only_answers_name_a_helper_that_changes_a_packet() -> None:
    sources = [path for path in bpf_dir().iterdir() if path.suffix in {".c", ".h"}]
    found = {path.name: names_in(path.read_text()) for path in sources}

    assert {name: names for name, names in found.items() if names} == ANSWERS
    assert len(sources) > 10


def test_catalogue_K9_programs_call_no_other_helper_that_changes_a_packet(
    artefact: loader.Artefact,
) -> None:
    called: dict[str, set[int]] = {}

    for name, program in artefact.programs.items():
        called[name] = set(helpers_called(program.insns))

    changing = {CHANGING[n] for numbers in called.values() for n in numbers & CHANGING.keys()}
    assert changing == set().union(*ANSWERS.values())
    # The control: helpers are seen at all, such as the lookup (1) that every packet needs.
    assert all(1 in called[name] for name in ("xdp_from_vm", "tc_from_vm", "tc_to_vm"))


def test_a_call_and_a_name_are_noticed() -> None:
    """The control: bytecode and source that do change packets are found."""
    code = bytes([0xB7, 0, 0, 0, 1, 0, 0, 0]) + bytes([CALL, 0, 0, 0, 50, 0, 0, 0])
    assert CHANGING[next(helpers_called(code))] == "bpf_skb_adjust_room"
    assert names_in("a = bpf_xdp_adjust_head(ctx, -14);") == {"bpf_xdp_adjust_head"}
    assert names_in("/* no bpf_xdp_adjust_head here */") == set()
