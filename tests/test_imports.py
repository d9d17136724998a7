# SPDX-License-Identifier: Apache-2.0
"""Imports point one way, and each outside library has one place.

cli -> controller -> {policy, loader, maps} -> libbpf -> abi; errors, steps, files, threads and
words are for all
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Layer of vgw -> the layers it may import besides itself.
ALLOWED_LAYERS: dict[str, set[str]] = {
    "cli": {"controller", "policy", "loader", "maps", "libbpf", "abi"},
    "controller": {"policy", "loader", "maps", "libbpf", "abi"},
    "policy": {"abi"},
    "loader": {"libbpf", "abi"},
    "maps": {"libbpf", "abi"},
    "libbpf": {"abi"},
    "abi": set(),
    "errors": set(),
    "steps": set(),
    "files": set(),
    "threads": set(),
    "words": set(),
}
#: Modules that every layer may import.
COMMON = {"errors", "steps", "files", "threads", "words", "__version__"}

#: Outside library -> the only modules that may import it.
LIBRARY_HOMES: dict[str, tuple[str, ...]] = {
    "bcc": ("vgw.loader",),
    "libvirt": ("vgw.controller.finding.libvirt_domains",),
    "pyroute2": ("vgw.controller.links",),
    "click": ("vgw.cli",),
    "prometheus_client": ("vgw.controller.metrics",),
    "numpy": (
        "vgw.policy.wide",
        *(f"vgw.controller.{part}" for part in ("columns", "flow", "foreign_tables")),
        "vgw.controller.upgrade_tables",
    ),
    "rich": ("vgw.cli_top",),
    "pydantic": ("vgw.policy",),
    "yaml": ("vgw.policy",),
}
#: Libraries too slow to load at the top of a module: only inside the functions that need them.
LAZY_LIBRARIES = {"bcc", "libvirt", "pyroute2"}
#: Modules that are all about such a library, and are themselves loaded only when needed.
LAZY_MODULES = {
    "vgw.policy.wide",
    "vgw.controller.columns",
    *(f"vgw.controller.flow_{part}" for part in ("file", "table", "export", "import")),
    "vgw.controller.foreign_tables",
    "vgw.controller.upgrade_tables",
}


def layer_of(module: str) -> str:
    """Return the layer of a vgw module: its second name part; cli_output belongs to cli."""
    part = [*module.split("."), "__version__"][1]
    for layer in ALLOWED_LAYERS:
        if part == layer or part.startswith(f"{layer}_"):
            return layer
    return part


def is_within(module: str, home: str) -> bool:
    """Return whether `module` is `home`, part of it, or one of its helper modules (home_x)."""
    return module == home or module.startswith((f"{home}.", f"{home}_"))


def imports(tree: ast.AST, module: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (imported name, line, at the top of the module) for every import statement.

    Names that are imported only for annotations (under `if TYPE_CHECKING`) count like any other.
    """
    top_level = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, node in top_level
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: write imports in full"
            base = node.module or ""
            # `from vgw import abi` names a module only together with the name behind it.
            within = {f"{base}.{alias.name}" for alias in node.names}
            names = sorted(within) if base == "vgw" else [base, *within.intersection(LAZY_MODULES)]
            for name in names:
                yield name, node.lineno, node in top_level


def mistakes(module: str, text: str) -> list[str]:
    """Return what is wrong with the imports of one module."""
    found = []
    layer = layer_of(module)
    for name, line, at_top in imports(ast.parse(text), module):
        where = f"{module}:{line}: imports {name}"
        library = name.split(".")[0]
        if library == "vgw":
            wanted = layer_of(name)
            if name in LAZY_MODULES and at_top and module not in LAZY_MODULES:
                found.append(f"{where}: it is slow to load, import it where it is used")
            if wanted not in ALLOWED_LAYERS[layer] | COMMON | {layer}:
                found.append(f"{where}: {layer} must not know {wanted}")
        elif library in LIBRARY_HOMES:
            if not any(is_within(module, home) for home in LIBRARY_HOMES[library]):
                found.append(f"{where}: only {', '.join(LIBRARY_HOMES[library])} may")
            elif library in LAZY_LIBRARIES and at_top:
                found.append(f"{where}: it is slow to load, import it where it is used")
        elif library not in sys.stdlib_module_names:
            found.append(f"{where}: no module of vgw may import this library")
    return found


def modules() -> Iterable[tuple[str, Path]]:
    """Yield every module of the package with its file."""
    for path in sorted(ROOT.glob("vgw/**/*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_imports_point_one_way() -> None:
    found = [text for module, path in modules() for text in mistakes(module, path.read_text())]
    assert not found, "\n".join(found)


def test_every_layer_has_a_module() -> None:
    """Were a layer renamed, the rules about it would check nothing."""
    layers = {layer_of(module) for module, _ in modules() if module != "vgw"}
    assert layers == set(ALLOWED_LAYERS)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vgw.abi", "import vgw.maps"),
        ("vgw.abi", "from vgw import maps"),
        ("vgw.policy.parse", "from vgw.controller.links import attach"),
        ("vgw.policy.parse", "def f():\n    from vgw.libbpf import map_create"),
        ("vgw.maps", "from vgw import abi, loader"),
        ("vgw.controller.daemon", "from vgw.cli import main"),
        ("vgw.controller.daemon", "import click"),
        ("vgw.cli", "def f():\n    import prometheus_client"),
        ("vgw.controller.reconcile", "def f():\n    from pyroute2.netlink import nlmsg"),
        ("vgw.controller.links", "from pyroute2 import IPRoute"),
        ("vgw.loader", "import bcc"),
        ("vgw.maps", "def f():\n    import bcc"),
        ("vgw.cli_output", "import rich"),
        ("vgw.policy.compile", "import numpy"),
        ("vgw.policy.compile", "from vgw.policy import wide"),
        ("vgw.policy.compile", "import vgw.policy.wide"),
        ("vgw.policy.evaluate", "if TYPE_CHECKING:\n    from vgw.maps import EndpointMaps"),
    ],
)
def test_a_wrong_import_is_found(module: str, text: str) -> None:
    assert len(mistakes(module, text)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("vgw.cli_output", "import json\nimport click\nfrom vgw.controller import paths"),
        ("vgw.controller.links", "def f():\n    import pyroute2"),
        ("vgw.loader", "def f():\n    import bcc\nfrom vgw.libbpf import maps"),
        ("vgw.policy.resolve", "from vgw.abi import Action\nfrom vgw.errors import VgwError"),
        ("vgw.policy.compile", "def f():\n    from vgw.policy import wide"),
        ("vgw.policy.wide", "import numpy as np"),
        ("vgw.controller.metrics", "import prometheus_client\nfrom vgw import __version__"),
    ],
)
def test_a_right_import_is_not(module: str, text: str) -> None:
    assert mistakes(module, text) == []
