# SPDX-License-Identifier: Apache-2.0
"""The rows of the verdict tables by the catalogue id that their names begin with."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import chain

from tests.cases import TABLES
from tests.cases.table import Case, Send
from tests.catalogue.ids import CATALOGUE
from tests.program_engine import why_not_run
from vgw.policy.model import Hook

_ID = re.compile(r"([A-N][0-9]+)\b")


def catalogue_id(case: Case) -> str | None:
    """Return the id that a row's name begins with, None if it begins with something else."""
    found = _ID.match(case.name)
    return found and found[1]


def _by_id() -> dict[str, tuple[Case, ...]]:
    rows: dict[str, list[Case]] = defaultdict(list)
    for case in chain(*TABLES.values()):
        identity = catalogue_id(case)
        if identity is not None:
            rows[identity].append(case)
    return {identity: tuple(cases) for identity, cases in rows.items()}


#: Catalogue id -> its rows, in the order of the tables; ids of other groups too.
ROWS: Mapping[str, tuple[Case, ...]] = _by_id()

#: Table -> its rows that test_catalogue does not play, because they have no id of the catalogue.
OTHER_ROWS: Mapping[str, tuple[Case, ...]] = {
    table: others
    for table, cases in TABLES.items()
    if (others := tuple(case for case in cases if catalogue_id(case) not in CATALOGUE))
}


def rows_of_group(group: str) -> Iterator[Case]:
    """Yield the rows of all ids of a group, such as A."""
    for identity, cases in ROWS.items():
        if identity[0] == group:
            yield from cases


def can_run(hook: Hook, case: Case) -> bool:
    """Tell whether a test run on a hook can be given every packet of a row."""
    sends = (step for step in case.steps if isinstance(step, Send))
    return all(why_not_run(hook, send) is None for send in sends)
