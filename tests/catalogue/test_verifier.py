# SPDX-License-Identifier: Apache-2.0
"""What the programs cost the kernel's verifier, and which helpers of the kernel they may call."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest

from vgw import libbpf, loader
from vgw.loader import PROGRAMS, Artefact

pytestmark = pytest.mark.bpf

#: Half of what the kernel allows, so that another kernel's verifier may need twice as much.
MOST_INSTRUCTIONS = 500_000
#: Helpers that put something around a packet or in front of it, as enum bpf_func_id numbers them.
#: Those that change its tail make answers of rejected packets; that packets which pass are as they
#: came is checked with each row (ProgramEngine.judge).
GROWING_HELPERS = {
    18: "skb_vlan_push",
    21: "skb_set_tunnel_key",
    31: "skb_change_proto",
    43: "skb_change_head",
    44: "xdp_adjust_head",
    50: "skb_adjust_room",
    73: "lwt_push_encap",
}
CALL, MAP_LOOKUP = 0x85, 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_catalogue_E22_verifier_cost(
    artefact: Artefact, program: str, record_property: Callable[[str, object], None]
) -> None:
    with loader.instantiate(artefact, [program]) as instance:
        cost = libbpf.prog_info(instance.programs[program]).verified_insns
    print(f"verifier: {program} {cost} instructions")
    record_property("verified_insns", cost)
    assert 0 < cost < MOST_INSTRUCTIONS


def _helpers(insns: bytes) -> Iterator[int]:
    """Yield the numbers of the helpers that a program calls."""
    for code, registers, _, immediate in struct.iter_unpack("=BBhi", insns):
        if code == CALL and registers >> 4 == 0:
            yield immediate


@pytest.mark.parametrize("program", PROGRAMS)
def test_catalogue_K9_programs_cannot_grow_a_packet(artefact: Artefact, program: str) -> None:
    called = set(_helpers(artefact.programs[program].insns))
    assert MAP_LOOKUP in called
    assert {GROWING_HELPERS[helper] for helper in called & GROWING_HELPERS.keys()} == set()


def test_a_helper_that_grows_a_packet_is_found() -> None:
    push = struct.pack("=BBhi", CALL, 0, 0, 18)
    local_call = struct.pack("=BBhi", CALL, 1 << 4, 0, 43)
    assert set(_helpers(push + local_call)) & GROWING_HELPERS.keys() == {18}
