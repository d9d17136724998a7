# SPDX-License-Identifier: Apache-2.0
"""What there is to know by name: the policy on disk, and what the ids in events stand for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vgw.controller.events import RuleName
from vgw.controller.manifest import Manifest, load_manifest
from vgw.controller.paths import Paths
from vgw.errors import VgwError
from vgw.policy.model import PolicyDocument

#: Larger files are no policies: what is read into memory has to have a bound.
MAX_POLICY_BYTES: Final = 64 << 20

#: Seconds between two looks at the manifests for an id that nobody knows.
_REFRESH_SECONDS: Final = 1.0


def read_sources(path: Path) -> list[tuple[str, str]]:
    """Return (name, text) of a policy file, or of each `*.yaml` of a directory in order of names.

    Raises VgwError when it cannot be read or is no policy by its size or encoding.
    """
    try:
        files = _yaml_files(path) if path.is_dir() else [path]
        if not files:
            raise VgwError(f"policy {path} has no *.yaml files; write one or name another path")
        return [(str(file), _read_text(file)) for file in files]
    except OSError as error:
        advice = "run vgw as root" if isinstance(error, PermissionError) else "write it"
        raise VgwError(
            f"policy {error.filename or path} cannot be read: {error.strerror}; {advice}, or name "
            "another path by --policy or VGW_POLICY"
        ) from error


def read_policy(path: Path) -> PolicyDocument:
    """Return the policy of a file or directory.

    Raises VgwError when it cannot be read and PolicyError when it is invalid.
    """
    from vgw.policy.parse import parse_sources  # noqa: PLC0415 - pydantic takes long to load

    return parse_sources(read_sources(path))


def _yaml_files(directory: Path) -> list[Path]:
    # glob() takes a directory that it may not read for an empty one.
    return sorted(file for file in directory.iterdir() if file.suffix == ".yaml")


def _read_text(file: Path) -> str:
    with file.open("rb") as stream:
        data = stream.read(MAX_POLICY_BYTES + 1)
    if len(data) > MAX_POLICY_BYTES:
        raise VgwError(f"policy {file} is larger than {MAX_POLICY_BYTES >> 20} MiB; split it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise VgwError(f"policy {file} line {line} is not UTF-8 text; save it as UTF-8") from None


def manifests(paths: Paths) -> list[Manifest]:
    """Return what is remembered of every VM; damaged files are left out."""
    found = (load_manifest(file) for file in sorted(paths.manifests.glob("*.json")))
    return [manifest for manifest in found if manifest is not None]


class EndpointNames:
    """What endpoint identities and rule ids in events stand for; answers events.Names.

    Reads the manifests when it does not know one, at most once a second. Safe to use from several
    threads.
    """

    def __init__(self, paths: Paths, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the manifests under `paths`; `clock` gives seconds."""
        self._paths = paths
        self._clock = clock
        self._lock = threading.Lock()
        self._read()

    def endpoint(self, endpoint: int) -> tuple[str, str] | None:
        """Return the VM and the interface of an endpoint's identity."""
        with self._lock:
            if endpoint not in self._endpoints:
                self._refresh()
            return self._endpoints.get(endpoint)

    def rule(self, endpoint: int, rule: int) -> RuleName | None:
        """Return the name of a rule id of an endpoint."""
        with self._lock:
            if (endpoint, rule) not in self._rules:
                self._refresh()
            return self._rules.get((endpoint, rule))

    def _refresh(self) -> None:
        if self._clock() - self._read_at >= _REFRESH_SECONDS:
            self._read()

    def _read(self) -> None:
        self._read_at = self._clock()
        endpoints: dict[int, tuple[str, str]] = {}
        rules: dict[tuple[int, int], RuleName] = {}
        for manifest in manifests(self._paths):
            for name, entry in manifest.endpoints.items():
                endpoints[entry.endpoint] = manifest.vm, name
                for rule in manifest.rules.values():
                    names = RuleName(rule.policy, rule.tier, rule.name)
                    rules[entry.endpoint, rule.id] = names
        self._endpoints, self._rules = endpoints, rules


def endpoint_names(paths: Paths) -> EndpointNames:
    """Return what the ids in events of this host stand for."""
    return EndpointNames(paths)
