# SPDX-License-Identifier: Apache-2.0
"""From the C sources to an endpoint's own programs: compile once, cache, clone.

load_artefact() returns the compiled programs, instantiate() loads a set of them with maps of
their own. Only the process that vgw.loader.compiler describes imports bcc.
"""

from vgw.loader.artefact import Artefact, MapSpec, ProgramSpec
from vgw.loader.cache import load_artefact, packet_build
from vgw.loader.clone import Instance, instantiate, new_inner
from vgw.loader.socket_buffer import reads_directly, socket_buffer_options
from vgw.loader.sources import PROGRAMS, SourceTree, bpf_dir

__all__ = [
    "PROGRAMS",
    "Artefact",
    "Instance",
    "MapSpec",
    "ProgramSpec",
    "SourceTree",
    "bpf_dir",
    "instantiate",
    "load_artefact",
    "new_inner",
    "packet_build",
    "reads_directly",
    "socket_buffer_options",
]
