# SPDX-License-Identifier: Apache-2.0
"""Endpoints without an interface: programs, maps and a policy of their own, for test runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vgw import abi, loader
from vgw.controller.endpoint import build_config, conntrack_sizes
from vgw.controller.images import private_images
from vgw.controller.stages import load_stages, with_stages
from vgw.maps import EndpointMaps, place_counters
from vgw.policy.compile import PolicyImage, compile_policy
from vgw.policy.model import EffectivePolicy, Interface

#: What an endpoint can have attached -> the path that it judges.
PROGRAMS: Final = {
    "xdp_from_vm": abi.Path.FROM_VM,
    "tc_from_vm": abi.Path.FROM_VM,
    "tc_to_vm": abi.Path.TO_VM,
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Programs by name, the maps that they share, and the policy that is in force in them."""

    programs: Mapping[str, int]
    maps: EndpointMaps
    images: Mapping[abi.Path, PolicyImage]


def compile_endpoint(
    directory: Path, programs: Sequence[str], *, stages: bool = True
) -> loader.Artefact:
    """Compile programs, and the stages that they go on in, in a directory. Raises VgwError.

    Where VGW_CACHE_DIR has compiled ones already, they are taken from there.
    """
    cache = Path(os.environ.get("VGW_CACHE_DIR", directory))
    return loader.load_artefact(cache, programs=with_stages(programs) if stages else programs)


def make_endpoint(
    artefact: loader.Artefact,
    programs: Sequence[str],
    policy: EffectivePolicy,
    interface: Interface,
    stack: ExitStack,
) -> Endpoint:
    """Load programs with maps of their own and put a policy in force, until `stack` ends.

    Nothing is logged: the budget of events is 0. Raises VgwError.
    """
    images = compile_policy(policy)
    sizes = conntrack_sizes(interface.conntrack_max)
    instance = stack.enter_context(loader.instantiate(artefact, programs, max_entries=sizes))
    maps = EndpointMaps({name: os.dup(fd) for name, fd in instance.maps.items()})
    stack.callback(maps.close)
    config = build_config(interface, abi.Mode.ENFORCE, 1, 1, 0)
    size = place_counters(config, {path: len(image.rules) for path, image in images.items()})
    counters = loader.new_inner(artefact, "rule_counters", size)
    stack.callback(os.close, counters)
    slot = maps.stage(config, private_images(artefact, images), counters)
    if any(image.staged for image in images.values()):
        load_stages(artefact, programs, instance.maps, instance.maps["events"])
    maps.switch(slot)
    return Endpoint({name: instance.programs[name] for name in programs}, maps, images)
