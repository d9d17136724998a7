# SPDX-License-Identifier: Apache-2.0
"""How long tests wait for what has to come: only a failure takes so long."""

from __future__ import annotations

from typing import Final

#: Seconds that anything may take on a slow and busy machine.
PATIENCE: Final = 60.0
