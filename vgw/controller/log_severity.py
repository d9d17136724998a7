# SPDX-License-Identifier: Apache-2.0
"""How important a log record is, by syslog's scale, which the journal has too."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, Final


class Severity(enum.IntEnum):
    """Severities of RFC 5424, 6.2.1, that are used here."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6


_BY_EVENT: Final = {
    "error": Severity.ERROR,
    "alarm": Severity.WARNING,
    "lost": Severity.WARNING,
    "accept": Severity.INFO,
    "flow_start": Severity.INFO,
    "flow_end": Severity.INFO,
}


def severity(record: Mapping[str, Any]) -> Severity:
    """Return how important a record is: drops and what the controller did are worth a notice."""
    return _BY_EVENT.get(str(record.get("event")), Severity.NOTICE)
