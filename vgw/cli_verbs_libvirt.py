# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLC0415 - imports inside the verbs keep the start of the command fast
"""The verb that libvirt's hook runs: it protects a VM as it starts, or has it refused.

libvirt waits for its hook, and a hook that asked libvirt anything would wait for it in turn: all
that is known here is the XML that libvirt hands over. At `start` the TAPs exist and the guest does
not run yet, so that is when they are protected; `started` sees to those that came later, and after
`reconnect` a libvirt that was started anew shows what runs already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import click

from vgw.cli_options import Session, example, pass_session
from vgw.cli_output import warn
from vgw.cli_target import AttachOrder, Target
from vgw.errors import VgwError

if TYPE_CHECKING:
    from vgw.controller.finding.domain_xml import Domain
    from vgw.controller.paths import Paths

#: Operations of the hook before which, or after which, a VM has to be protected.
_CHECKING: Final = ("prepare",)
_EARLY: Final = ("start",)
_PROTECTING: Final = ("started", "reconnect", "attach")
_ENDING: Final = ("release",)


@click.command(
    "libvirt-hook",
    epilog=example("vgw libvirt-hook web01 start begin - < web01.xml"),
    hidden=True,  # contrib/libvirt/qemu runs it, people do not
)
@click.argument("domain")
@click.argument("operation")
@click.argument("rest", nargs=-1)
@pass_session
def libvirt_hook(session: Session, domain: str, operation: str, rest: tuple[str, ...]) -> None:
    """Do what libvirt's qemu hook asks for; the domain's XML is on stdin.

    contrib/libvirt/qemu runs it. Exit code 1 makes libvirt refuse to start a VM that is to be
    protected and cannot be. Of VMs that are not to be protected nothing is asked.
    """
    del rest  # suboperation and extra argument, which say nothing more
    if operation in _ENDING:
        session.target().forget_gone()
    elif operation in (*_CHECKING, *_EARLY, *_PROTECTING):
        xml = sys.stdin.buffer.read().decode(errors="replace")
        for each in _answer(session.target(), session.paths(), domain, operation, xml):
            warn(f"{domain}: {each}")


def _answer(target: Target, paths: Paths, name: str, operation: str, xml: str) -> Iterator[str]:
    """Do what an operation asks for, and yield what is not as it should be. Raises VgwError."""
    from vgw.controller import fitness
    from vgw.controller.finding.domain_xml import read_domain

    domain = read_domain(xml)
    if domain.name != name:
        raise VgwError(f"the XML is that of {domain.name}, not of {name}")
    if not target.wants(name):
        return
    if domain.others:
        raise VgwError(
            f"{name} cannot be protected: no interface of the host sees the packets of its "
            f"interface of type {domain.others[0] or '?'}; make it one of type network or bridge"
        )
    if operation in _CHECKING:
        fitness.require_capabilities()
        fitness.require_bpffs(paths.bpffs)
        return
    if operation in _EARLY and not _is_whole(domain):
        return  # the TAPs come later
    if domain.without_name:
        raise VgwError(f"{name} cannot be protected: libvirt does not name all of its interfaces")
    if not domain.interfaces:
        return
    told = [(each.name, each.mac) for each in domain.interfaces]
    done = target.attach(AttachOrder([name], told=told))
    protected = {each for row in done["vms"] for each in row["interfaces"]}
    for interface in domain.interfaces:
        if interface.name not in protected:
            yield f"{interface.name} is not protected: other interfaces of the VM are listed"


def _is_whole(domain: Domain) -> bool:
    from vgw.controller.pinned import present_ifindex

    return not domain.without_name and all(
        present_ifindex(each.name) is not None for each in domain.interfaces
    )
