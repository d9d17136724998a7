# SPDX-License-Identifier: Apache-2.0
"""The parameters of one request to the controller, checked as they are taken out."""

from __future__ import annotations

import base64
import enum
from collections.abc import Mapping
from typing import Any, Final, TypeVar

from vgw.controller.actor import Actor, Peer, peer_process, this_process
from vgw.errors import VgwError

#: Seconds that a time in a request can have: a week.
LONGEST: Final = 7 * 86400

_Choice = TypeVar("_Choice", bound=enum.Enum)


class Parameters:
    """What a client sent with a verb; a parameter that is null counts as not sent.

    Every method raises VgwError naming the parameter when it has the wrong form.
    """

    def __init__(self, values: Mapping[str, Any], peer: Peer | None = None) -> None:
        """Take the members of the request's JSON object; `peer` sent it, None: this process."""
        self.values = values
        self.peer = peer

    def who(self) -> Actor:
        """Return who orders what is requested."""
        via = "controller"
        return this_process(via) if self.peer is None else peer_process(self.peer, via)

    def optional_number(self, name: str) -> int | None:
        """Return a whole number that is not negative, None when it was not sent."""
        found = self.values.get(name)
        if found is not None and (type(found) is not int or found < 0):
            raise VgwError(f"{name} in the request is not a whole number")
        return found

    def seconds(self, name: str) -> float | None:
        """Return a time in seconds, None when it was not sent."""
        found = self.values.get(name)
        if found is not None and (type(found) not in (int, float) or not 0 < found < LONGEST):
            raise VgwError(f"{name} in the request is not a time in seconds of at most {LONGEST}")
        return None if found is None else float(found)

    def text(self, name: str) -> str:
        """Return a text that has to be there."""
        found = self.optional_text(name)
        if found is None:
            raise VgwError(f"the request has no {name}")
        return found

    def optional_text(self, name: str) -> str | None:
        """Return a text, None when it was not sent."""
        found = self.values.get(name)
        if found is not None and not isinstance(found, str):
            raise VgwError(f"{name} in the request is not a text")
        return found

    def number(self, name: str) -> int:
        """Return a whole number that has to be there."""
        found = self.values.get(name)
        if not isinstance(found, int) or isinstance(found, bool):
            raise VgwError(f"{name} in the request is not a whole number")
        return found

    def data(self, name: str) -> bytes:
        """Return bytes, sent in base64, that have to be there."""
        try:
            return base64.b64decode(self.text(name), validate=True)
        except ValueError as error:
            raise VgwError(f"{name} in the request is not base64") from error

    def texts(self, name: str) -> list[str] | None:
        """Return a list of texts, None when it was not sent."""
        found = self.values.get(name)
        if found is None:
            return None
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise VgwError(f"{name} in the request is not a list of texts")
        return found

    def flag(self, name: str) -> bool:
        """Return a truth value, False when it was not sent."""
        found = self.values.get(name)
        if found is not None and not isinstance(found, bool):
            raise VgwError(f"{name} in the request is neither true nor false")
        return bool(found)

    def choice(self, name: str, choices: type[_Choice]) -> _Choice | None:
        """Return the member of an enumeration whose name was sent in lower case, None for none."""
        found = self.optional_text(name)
        if found is None:
            return None
        known = {member.name.lower(): member for member in choices}
        if found not in known:
            raise VgwError(f"{name} {found!r} in the request is none of {', '.join(known)}")
        return known[found]

    def sources(self) -> list[tuple[str, str]] | None:
        """Return the texts of a policy as (name, text), None when none was sent."""
        found = self.values.get("sources")
        if found is None:
            return None
        if not isinstance(found, list) or not all(map(_is_pair_of_texts, found)):
            raise VgwError("sources in the request is not a list of [name, text]")
        return [(name, text) for name, text in found]


def _is_pair_of_texts(value: object) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
    )
