# SPDX-License-Identifier: Apache-2.0
"""Makes the sequences: what number n of a seed is follows from the two alone.

A sequence is a conversation or a few frames, changed as a whole (packets lost, doubled, swapped,
answered, cut into fragments, quoted by errors) and packet by packet.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate
from typing import Final

from tests.cases.table import Apply, Wait
from tests.frames import ICMP, ICMPV6, IPV4, TCP, fragment6, icmp_error
from tests.fuzz import values
from tests.fuzz.conversations import make_stories, table_frames
from tests.fuzz.layout import FRAGMENT, layout_of
from tests.fuzz.mutate import Mutator, fix_ip_length, fix_lengths
from tests.fuzz.seeds import make_seeds
from tests.fuzz.trial import SCENES, Scene, Shot, Step, Trial
from vgw.policy.flows import other

LONGEST: Final = 40
#: How likely each packet of a sequence is changed.
_SHARES: Final = (0.0, 0.1, 0.3, 0.3, 0.6, 1.0)
_POLICY_SHARE: Final = 0.03
_WAIT_SHARE: Final = 0.06
_GSO_SHARE: Final = 0.01
_WEIGHTS: Final = tuple(accumulate(scene.weight for scene in SCENES))


class Sequences:
    """The sequences of a seed."""

    def __init__(self, seed: int) -> None:
        """Make what they start from; takes a few seconds."""
        self._seed = seed
        self._stories = make_stories()
        seeds = [*(Shot(*each) for each in make_seeds()), *table_frames()]
        self._frames = tuple(dict.fromkeys(shot for shot in seeds if len(shot.frame) >= 14))
        self._donors = tuple(shot.frame for shot in self._frames)

    def trial(self, number: int) -> Trial:
        """Return sequence `number`."""
        generator = random.Random(self._seed << 40 | number)
        name = f"{self._seed}/{number}"
        return _Making(generator, self._stories, self._frames, self._donors).trial(name)


class _Making:
    """The making of one sequence."""

    def __init__(
        self,
        generator: random.Random,
        stories: tuple[tuple[Shot | Wait, ...], ...],
        frames: tuple[Shot, ...],
        donors: tuple[bytes, ...],
    ) -> None:
        self._random = generator
        self._stories = stories
        self._frames = frames
        self._mutator = Mutator(generator, donors)

    def trial(self, name: str) -> Trial:
        scene = self._random.choices(SCENES, cum_weights=_WEIGHTS)[0]
        steps = self._many_openings() if scene.is_small else self._start()
        self._mutator.numbers = [number for step in steps for number in _tcp_numbers(step)]
        for _ in range(self._random.choice((0, 1, 1, 2, 3, 6))):
            self._random.choice(_REARRANGEMENTS)(self, steps)
        share = self._random.choice(_SHARES)
        changed = [self._changed(step, share) for step in steps[:LONGEST]]
        if self._random.random() < _GSO_SHARE:
            changed = [
                step._replace(gso=True) if isinstance(step, Shot) else step for step in changed
            ]
        steps = self._with_time_and_policies(changed, scene)
        return Trial(name, scene, tuple(steps))

    def _start(self) -> list[Step]:
        choice = self._random.random()
        if choice < 0.6:
            return list(self._random.choice(self._stories))
        if choice < 0.7:  # two conversations, one within the other
            outer, inner = self._random.choices(self._stories, k=2)
            place = self._random.randrange(len(outer))
            return [*outer[:place], *inner, *outer[place:]]
        return list(self._random.choices(self._frames, k=self._random.randrange(1, 12)))

    def _many_openings(self) -> list[Step]:
        stories = self._random.choices(self._stories, k=8)
        return [step for story in stories for step in story[: self._random.randrange(1, 5)]]

    def _changed(self, step: Step, share: float) -> Step:
        if not isinstance(step, Shot) or self._random.random() >= share:
            return step
        return step._replace(frame=self._mutator.change(step.frame))

    def _with_time_and_policies(self, steps: list[Step], scene: Scene) -> list[Step]:
        if scene.is_small:
            return [step for step in steps if isinstance(step, Shot)]
        if self._random.random() < _WAIT_SHARE:
            for _ in range(self._random.choice((1, 1, 2, 3))):
                wait = Wait(self._random.choice(values.WAITS))
                steps.insert(self._random.randrange(len(steps) + 1), wait)
        if self._random.random() < _POLICY_SHARE:
            places = self._random.choices(range(len(steps) + 1), k=self._random.choice((1, 1, 2)))
            policies = scene.other, scene.fixture.policy
            for place, policy in zip(sorted(places), policies, strict=False):
                steps.insert(place, Apply(policy))
        return [_off_timeouts(step) for step in steps]

    # Rearrangements

    def _lose(self, steps: list[Step]) -> None:
        if len(steps) > 1:
            del steps[self._random.randrange(len(steps))]

    def _double(self, steps: list[Step]) -> None:
        steps.insert(self._place(steps), self._random.choice(steps))

    def _swap(self, steps: list[Step]) -> None:
        one, two = (self._random.randrange(len(steps)) for _ in range(2))
        steps[one], steps[two] = steps[two], steps[one]

    def _insert(self, steps: list[Step]) -> None:
        steps.insert(self._place(steps), self._random.choice(self._frames))

    def _place(self, steps: list[Step]) -> int:
        return self._random.randrange(len(steps) + 1)

    def _answer(self, steps: list[Step]) -> None:
        """Let somebody send a packet back with all its addresses turned round."""
        place, shot = self._some_shot(steps)
        if shot is not None:
            steps.insert(place + 1, Shot(other(shot.path), turned(shot.frame)))

    def _cross(self, steps: list[Step]) -> None:
        """Send a packet along the other path as it is."""
        place, shot = self._some_shot(steps)
        if shot is not None:
            steps[place] = shot._replace(path=other(shot.path))

    def _cut(self, steps: list[Step]) -> None:
        """Cut a packet into fragments."""
        place, shot = self._some_shot(steps)
        if shot is None:
            return
        size = 8 * self._random.choice((1, 2, 3, 5, 8, 20))
        pieces = fragments(shot.frame, size, self._random.choice((7, 7, 8)))[:8]
        if self._random.random() < 0.3:
            self._random.shuffle(pieces)
        steps[place : place + 1] = [shot._replace(frame=piece) for piece in pieces]

    def _complain(self, steps: list[Step]) -> None:
        """Let an ICMP error quote a packet."""
        place, shot = self._some_shot(steps)
        if shot is not None:
            error = self._error_about(shot.frame)
            if error is not None:
                later = self._random.randrange(place, len(steps)) + 1
                steps.insert(later, Shot(other(shot.path), error))

    def _error_about(self, frame: bytes) -> bytes | None:
        layout = layout_of(frame)
        if not layout.upper:
            return None
        is_ipv4 = layout.version == 4
        kinds = (3, 3, 11, 12) if is_ipv4 else (1, 2, 3, 4)
        kind = self._random.choice(kinds)
        code = self._random.choice((0, 1, 3, 4, 4)) if is_ipv4 else 0
        rest = self._random.choice((0, 68, 67, 576, 1279, 1280, 1400))
        quoted = frame[layout.network :][: self._random.choice((28, 48, 56, 200))]
        body = icmp_error(kind, quoted, code, rest)
        back = bytearray(turned(frame)[: layout.network + (20 if is_ipv4 else 40)])
        back[layout.network + (9 if is_ipv4 else 6)] = ICMP if is_ipv4 else ICMPV6
        if is_ipv4:
            back[layout.network] = 0x45
            back[layout.network + 6 : layout.network + 8] = bytes(2)
        back += body
        fix_lengths(back)
        return bytes(back)

    def _some_shot(self, steps: list[Step]) -> tuple[int, Shot | None]:
        place = self._random.randrange(len(steps))
        step = steps[place]
        return place, step if isinstance(step, Shot) else None


_REARRANGEMENTS: Final[tuple[Callable[[_Making, list[Step]], None], ...]] = (
    _Making._lose,
    _Making._double,
    _Making._swap,
    _Making._insert,
    _Making._insert,
    _Making._answer,
    _Making._cross,
    _Making._cut,
    _Making._cut,
    _Making._complain,
    _Making._complain,
)


def _off_timeouts(step: Step) -> Step:
    return Wait(int(step.seconds) + values.OVER_SECOND) if isinstance(step, Wait) else step


def _tcp_numbers(step: Step) -> tuple[int, ...]:
    if not isinstance(step, Shot):
        return ()
    layout = layout_of(step.frame)
    if layout.protocol != TCP or len(step.frame) < layout.upper + 12:
        return ()
    places = (layout.upper + 4, layout.upper + 8)
    return tuple(int.from_bytes(step.frame[place : place + 4], "big") for place in places)


def turned(frame: bytes) -> bytes:
    """Return a frame with its MACs, IP addresses and the first two words behind IP swapped."""
    data = bytearray(frame)
    data[0:12] = frame[6:12] + frame[0:6]
    layout = layout_of(frame)
    if layout.upper:
        size = 4 if layout.version == 4 else 16
        start = layout.network + (12 if layout.version == 4 else 8)
        middle, end = start + size, start + 2 * size
        data[start:end] = frame[middle:end] + frame[start:middle]
        if layout.protocol not in {ICMP, ICMPV6} and len(frame) >= layout.upper + 4:
            ports = frame[layout.upper : layout.upper + 4]
            data[layout.upper : layout.upper + 4] = ports[2:] + ports[:2]
    return bytes(data)


def fragments(frame: bytes, size: int, identifier: int) -> list[bytes]:
    """Return the fragments of an IP packet with `size` bytes in each; the frame if it is none."""
    layout = layout_of(frame)
    start = layout.network + (20 if layout.kind == IPV4 else 40)
    content = frame[start:]
    if not layout.upper or not content:
        return [frame]
    made = []
    for offset in range(0, len(content), size):
        more = offset + size < len(content)
        piece = bytearray(frame[:start])
        if layout.version == 4:
            piece[layout.network + 4 : layout.network + 6] = identifier.to_bytes(2, "big")
            field = offset // 8 | (0x2000 if more else 0)
            piece[layout.network + 6 : layout.network + 8] = field.to_bytes(2, "big")
        else:
            header = bytearray(fragment6(piece[layout.network + 6], offset // 8, more=more))
            header[7] = identifier
            piece[layout.network + 6] = FRAGMENT
            piece += header
        piece += content[offset : offset + size]
        fix_ip_length(piece, layout)
        made.append(bytes(piece))
    return made
