# SPDX-License-Identifier: Apache-2.0
"""An endpoint's program for packets from the VM goes to another hook; tables and flows stay."""

from __future__ import annotations

from vgw import abi, loader
from vgw.controller import endpoint as endpoints
from vgw.controller.endpoint import OpenEndpoint
from vgw.controller.replacement import Placing
from vgw.controller.stages import load_stages, with_stages
from vgw.controller.tools import Tools
from vgw.policy.model import Hook


def move_hook(  # noqa: PLR0913
    tools: Tools,
    endpoint: OpenEndpoint,
    ifindex: int,
    hook: Hook,
    *,
    staged: bool,
    force: bool = False,
) -> Placing:
    """Attach the from_vm program at another hook with the same maps.

    The caller ends the move by finish(), which removes the old one, or undo() of what is returned;
    until then both judge every packet. `staged`: the policy in force needs the program's stage. On
    failure the old one stays, alone; ForeignProgramError when somebody else's program is in the way
    and not `force`.
    """
    path, name = abi.Path.FROM_VM, endpoints.FROM_VM_PROGRAM[hook]
    artefact = tools.artefact(with_stages([name]) if staged else [name])
    events_fd = tools.events_fd()
    placing = Placing(endpoint.directory, ifindex)
    reuse = {**endpoint.fds, "events": events_fd}
    with loader.instantiate(artefact, (name,), reuse=reuse) as instance:
        try:
            placing.make_room()
            endpoints.pin_parts(placing.place, instance.maps, instance.programs, {path: name})
            if staged:
                fds = {**endpoint.fds, **instance.maps}
                load_stages(artefact, (name,), fds, events_fd)
            placing.attach(instance.programs[name], path, hook, force=force)
        except BaseException:
            placing.undo()
            raise
    return placing
