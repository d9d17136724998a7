# SPDX-License-Identifier: Apache-2.0
"""VMs by libvirt: its domains, their TAPs and MACs, and its events of their life.

The library is Debian's python3-libvirt, loaded when a host looks there. Its calls may wait for a
daemon that hangs, so only the thread that follows this source makes them; keepalives end a
connection whose other side is dead, and the next scan opens another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from vgw.controller.finding.domain_xml import read_domain
from vgw.controller.finding.found import FoundVm, SourceError
from vgw.errors import VgwError
from vgw.policy.model import Finder

URI: Final = "qemu:///system"
#: Seconds between two signs of life, and how many may be missing.
_KEEPALIVE: Final = (5, 3)

#: Its event loop is one for the process, and can be neither stopped nor started anew.
_loop_started = False
_loop_lock = threading.Lock()


def load_library() -> Any:
    """Return the library with its event loop running. Raises SourceError when there is none."""
    global _loop_started  # noqa: PLW0603 (the library has one event loop for the process)
    try:
        import libvirt  # noqa: PLC0415 (only hosts that look there have it)
    except ImportError as error:
        raise SourceError(
            "libvirt cannot be asked: the Debian package python3-libvirt is not installed"
        ) from error
    with _loop_lock:
        if not _loop_started:
            libvirt.registerErrorHandler(lambda *_: None, None)  # it would print to stderr
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(
                target=_run_events, args=(libvirt,), name="libvirt", daemon=True
            ).start()
            _loop_started = True
    return libvirt


def _run_events(libvirt: Any) -> None:
    # A timer makes each round end: what is registered by another thread is seen by the next.
    libvirt.virEventAddTimeout(1000, lambda *_: None, None)
    while True:
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


class LibvirtDomains:
    """The domains of one libvirt; a source of VMs."""

    finder = Finder.LIBVIRT

    def __init__(self, uri: str = URI) -> None:
        """Ask the libvirt at `uri`, from the first scan on."""
        self._uri = uri
        self._connection: Any = None
        self._alive = threading.Event()
        self._changed: Callable[[], None] = lambda: None

    def watch(self, changed: Callable[[], None]) -> None:
        """Have `changed` called when a domain or one of its devices comes or goes."""
        self._changed = changed

    def scan(self) -> Sequence[FoundVm]:
        """Return all domains; those that do not run without interfaces. Raises SourceError."""
        libvirt = load_library()
        try:
            if self._connection is None or not self._alive.is_set():
                self._connect(libvirt)
            return [
                vm
                for domain in self._connection.listAllDomains()
                if (vm := self._read(libvirt, domain)) is not None
            ]
        except libvirt.libvirtError as error:
            self.close()
            raise SourceError(f"libvirt at {self._uri} gives no answer: {error}") from error

    def close(self) -> None:
        """End the connection; the next scan opens another."""
        connection, self._connection = self._connection, None
        self._alive.clear()
        if connection is not None:
            with contextlib.suppress(Exception):  # it may be dead already
                connection.close()

    def _connect(self, libvirt: Any) -> None:
        self.close()
        connection = libvirt.openReadOnly(self._uri)
        self._connection = connection
        with contextlib.suppress(libvirt.libvirtError):  # local drivers have none
            connection.setKeepAlive(*_KEEPALIVE)
        connection.registerCloseCallback(self._closed, None)
        for event in (
            libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
            libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
        ):
            with contextlib.suppress(libvirt.libvirtError):  # not every driver has each
                connection.domainEventRegisterAny(None, event, self._event, None)
        self._alive.set()

    def _closed(self, connection: Any, *_: object) -> None:
        if connection is self._connection or self._connection is None:
            self._alive.clear()
            self._changed()

    def _event(self, *_: object) -> None:
        self._changed()

    def _read(self, libvirt: Any, domain: Any) -> FoundVm | None:
        """Return a domain as it is now, None when it went meanwhile."""
        try:
            running = bool(domain.isActive())
            name = domain.name()
            if not running:
                return FoundVm(name, str(self.finder), running=False)
            interfaces = read_domain(domain.XMLDesc()).interfaces
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise
        except VgwError as error:
            raise SourceError(f"libvirt at {self._uri}: {error}") from error
        return FoundVm(name, str(self.finder), True, interfaces)
