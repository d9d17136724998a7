# SPDX-License-Identifier: Apache-2.0
"""What the programs remember of denials: when it decides, and when it must not."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_network
from itertools import product
from pathlib import Path as File
from typing import Protocol

import numpy as np
import pytest

from tests.cases.fixtures import ALL_ACCEPTED, GUARDED, egress, ingress, policy, ports
from tests.cases.table import Expected
from tests.catalogue.mutant import Mutant
from tests.catalogue.test_mutants import build
from tests.engines import Outcome
from tests.frames import IN, OUT, PEER4, PEER6, TCP, UDP, Wire, bootp, tcp, udp
from tests.fuzz.compare import pinned
from tests.program_engine import ProgramEngine
from vgw import libbpf, loader
from vgw.abi import Action, Mode, Path, Reason, Verdict
from vgw.controller.flow_table import RECORD, put_flows
from vgw.loader.artefact import merge
from vgw.policy.guards import endpoint_facts
from vgw.policy.model import TCP as TCP_NUMBER
from vgw.policy.model import UDP as UDP_NUMBER
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

PEERS = ip_network(f"{PEER4}/32"), ip_network(f"{PEER6}/128")
DENY = policy(
    ingress(
        "in", Action.DROP, peers=PEERS, services=(ports(UDP_NUMBER, 53), ports(TCP_NUMBER, 443))
    ),
    ingress("other", Action.REJECT, services=(ports(UDP_NUMBER, 54),)),
    egress(
        "out", Action.DROP, peers=PEERS, services=(ports(UDP_NUMBER, 53), ports(TCP_NUMBER, 443))
    ),
    ingress=Action.ACCEPT,
    egress=Action.ACCEPT,
)
#: The same rules with the other answer.
ACCEPT = replace(DENY, ingress=tuple(replace(r, action=Action.ACCEPT) for r in DENY.ingress))
#: Where the reason of what was decided is in struct denial: behind head, number, generation, epoch.
REASON_AT = 10 * 8 + 8 + 8 + 8 + 4
SIZE = REASON_AT + 3 * 4
KNOWN = 3  # a CPU notes the second denial, so it knows it from the third on


def sent(path: Path) -> bytes:
    """Return a datagram to port 53 that is denied."""
    wire = OUT if path is Path.FROM_VM else IN
    return wire.wrap4(udp(4000, 53), UDP)


@pytest.fixture(params=(Hook.XDP, Hook.TC), ids=str)
def engine(artefact: loader.Artefact, request: pytest.FixtureRequest) -> Iterator[ProgramEngine]:
    made = ProgramEngine(artefact, request.param, endpoint_facts(GUARDED, Mode.ENFORCE), DENY)
    with pinned():
        yield made
    made.close()


def deny(engine: ProgramEngine, path: Path, frame: bytes, times: int = KNOWN) -> None:
    for _ in range(times):
        assert engine.judge(path, frame).reason is Reason.RULE


def denials(engine: ProgramEngine) -> bytearray:
    """Return all denials that are remembered by all CPUs, one after the other."""
    size = libbpf.map_info(engine.fd("denials")).value_size
    value = libbpf.map_lookup(engine.fd("denials"), bytes(4), size * libbpf.possible_cpus())
    assert value is not None
    return bytearray(value)


def known(engine: ProgramEngine) -> list[int]:
    """Return where in that there are some."""
    found = denials(engine)
    return [at for at in range(0, len(found), SIZE) if any(found[at : at + SIZE])]


@pytest.mark.parametrize("path", Path, ids=lambda path: path.name.lower())
def test_what_is_denied_again_is_decided_from_memory(engine: ProgramEngine, path: Path) -> None:
    frame = sent(path)
    deny(engine, path, frame, 1)
    assert known(engine) == [], "a single one is not noted"
    deny(engine, path, frame, 4)
    (at,) = known(engine)
    changed = denials(engine)
    struct.pack_into("=I", changed, at + REASON_AT, Reason.DEFAULT)
    libbpf.map_update(engine.fd("denials"), bytes(4), bytes(changed))

    assert engine.judge(path, frame).reason is Reason.DEFAULT, "the lookup was not asked"


def test_each_is_counted_by_its_rule(engine: ProgramEngine) -> None:
    frame = sent(Path.TO_VM)
    for _ in range(10):
        outcome = engine.judge(Path.TO_VM, frame)
        assert outcome.matches(Expected(Verdict.DROP, Reason.RULE, "in"))


@dataclass(frozen=True)
class Change:
    """What happens after a denial of `frame` is known, and what `then` gets afterwards."""

    name: str
    frame: bytes
    happens: Callable[[ProgramEngine], object]
    then: bytes
    reason: Reason
    verdict: Verdict = Verdict.DROP


def mode(wanted: Mode) -> Callable[[ProgramEngine], object]:
    return lambda engine: engine.set_facts(endpoint_facts(GUARDED, wanted))


def take_in(engine: ProgramEngine) -> None:
    """Put the flow that was denied into the table, as one that comes from another host."""
    other = ProgramEngine(
        engine._artefact, Hook.TC, endpoint_facts(GUARDED, Mode.ENFORCE), ALL_ACCEPTED
    )
    other.judge(Path.TO_VM, sent(Path.TO_VM))
    ((key, flow),) = other.maps.flows()
    other.close()
    flow.generation = engine.maps.config().generation
    records = np.frombuffer(bytes(key) + bytes(flow), RECORD)
    filled = put_flows(lambda _: engine._artefact, engine._instance.maps, records)
    assert filled.added == 1


DENIED = sent(Path.TO_VM)
ANSWER = OUT.wrap4(udp(53, 4000), UDP)
STRANGE_MAC = bytes.fromhex("525400000099")

CHANGES = (
    Change("nothing", DENIED, lambda _: None, DENIED, Reason.RULE),
    Change(
        "the VM opens the flow",
        DENIED,
        lambda engine: engine.judge(Path.FROM_VM, ANSWER),
        DENIED,
        Reason.CT_ESTABLISHED,
        Verdict.ACCEPT,
    ),
    Change("it is imported", DENIED, take_in, DENIED, Reason.CT_ESTABLISHED, Verdict.ACCEPT),
    Change(
        "another policy",
        DENIED,
        lambda engine: engine.set_policy(ACCEPT),
        DENIED,
        Reason.RULE,
        Verdict.ACCEPT,
    ),
    Change("quarantine", DENIED, mode(Mode.QUARANTINE), DENIED, Reason.QUARANTINE),
    Change("monitor", DENIED, mode(Mode.MONITOR), DENIED, Reason.RULE, Verdict.WOULD_DROP),
    Change(
        "another MAC",
        DENIED,
        lambda _: None,
        STRANGE_MAC + DENIED[6:],
        Reason.NOT_FOR_VM,
    ),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_what_is_remembered_holds_only_as_long_as_it_is_true(
    engine: ProgramEngine, change: Change
) -> None:
    deny(engine, Path.TO_VM, change.frame)
    assert known(engine)
    change.happens(engine)
    outcome = engine.judge(Path.TO_VM, change.then)
    assert (outcome.verdict, outcome.reason) == (change.verdict, change.reason)


def test_another_flow_in_the_same_place_is_looked_up(engine: ProgramEngine) -> None:
    deny(engine, Path.TO_VM, DENIED)
    assert all(is_rejected(engine, port) for port in OTHERS)


OTHERS = range(5000, 5300)  # more than there are places


def is_rejected(engine: ProgramEngine, port: int) -> bool:
    return engine.judge(Path.TO_VM, IN.wrap4(udp(port, 54), UDP)).verdict is Verdict.REJECT


# --- what is in a head ----------------------------------------------------------------------------

HEADS: dict[str, Callable[[Wire], bytes]] = {
    "udp4": lambda wire: wire.wrap4(udp(4000, 53, b"payload"), UDP),
    "tcp4": lambda wire: wire.wrap4(tcp(4000, 443), TCP),
    "udp6": lambda wire: wire.wrap6(udp(4000, 53, b"payload"), UDP),
    "tcp6": lambda wire: wire.wrap6(tcp(4000, 443), TCP),
}
#: Where the identification, checksums and numbers are that a head leaves out, by what it is of.
LEFT_OUT = {
    "udp4": (*range(18, 20), *range(24, 26), *range(40, 49)),
    "tcp4": (*range(18, 20), *range(24, 26), *range(38, 46), *range(48, 54)),
    "udp6": (*range(60, 69),),
    "tcp6": (*range(58, 66), *range(68, 74)),
}


def forget(engine: ProgramEngine) -> None:
    libbpf.map_update(engine.fd("denials"), bytes(4), bytes(len(denials(engine))))


def changed_at(frame: bytes, at: int, bits: int) -> bytes:
    return frame[:at] + bytes([frame[at] ^ bits]) + frame[at + 1 :]


def outcomes_of_changed(
    engine: ProgramEngine, path: Path, frame: bytes, at: int, bits: int
) -> tuple[Outcome, Outcome]:
    """Return what a frame with other bits gets when the frame was just denied, and by itself."""
    deny(engine, path, frame)
    other = changed_at(frame, at, bits)
    remembering = engine.judge(path, other)
    engine.reset()
    forget(engine)
    alone = engine.judge(path, other)
    engine.reset()
    return remembering, alone


def differences(engine: ProgramEngine, path: Path, frame: bytes) -> list[tuple[int, int]]:
    """Return which bits change what a frame gets only if it was not denied just before."""
    found = []
    for at, bits in product(range(len(frame)), (0x01, 0x20, 0xFF)):
        remembering, alone = outcomes_of_changed(engine, path, frame, at, bits)
        if remembering != alone:
            found.append((at, bits))
    return found


@pytest.mark.parametrize("path", Path, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("name", HEADS)
def test_any_other_frame_is_judged_by_itself(engine: ProgramEngine, path: Path, name: str) -> None:
    frame = HEADS[name](OUT if path is Path.FROM_VM else IN)
    assert differences(engine, path, frame) == []


@pytest.mark.parametrize("path", Path, ids=lambda path: path.name.lower())
@pytest.mark.parametrize("name", HEADS)
def test_what_a_flood_changes_from_frame_to_frame_is_left_out(
    engine: ProgramEngine, path: Path, name: str
) -> None:
    frame = HEADS[name](OUT if path is Path.FROM_VM else IN)
    deny(engine, path, frame)
    (at,) = known(engine)
    for each in LEFT_OUT[name]:
        deny(engine, path, changed_at(frame, each, 0xFF), 1)
        assert known(engine) == [at]


def test_a_longer_frame_has_another_head(engine: ProgramEngine) -> None:
    deny(engine, Path.TO_VM, DENIED)
    deny(engine, Path.TO_VM, DENIED + bytes(4))  # padding, as Ethernet has it
    assert len(known(engine)) == 1, "it has the place of the first one"
    size = len(DENIED) << 32
    assert struct.unpack_from("=Q", denials(engine), known(engine)[0] + 64)[0] >> 32 << 32 != size


# --- what is not remembered -----------------------------------------------------------------------

RENEWAL = OUT.wrap4(udp(68, 67, bootp()), UDP)
BROKEN_RENEWAL = OUT.wrap4(udp(68, 67, bootp(2)), UDP)
NO_RENEWALS = policy(
    egress("dhcp", Action.DROP, services=(ports(UDP_NUMBER, 67),)),
    ingress=Action.ACCEPT,
    egress=Action.ACCEPT,
)
FIRST_FRAGMENT = IN.wrap4(udp(4000, 53, bytes(64), length=200), UDP, fragment=0x2000)


def test_what_guards_read_further_is_not_remembered(engine: ProgramEngine) -> None:
    engine.set_policy(NO_RENEWALS)
    deny(engine, Path.FROM_VM, RENEWAL, 5)
    assert engine.judge(Path.FROM_VM, BROKEN_RENEWAL).reason is Reason.DHCP_INVALID


def test_first_fragments_are_not_remembered(engine: ProgramEngine) -> None:
    deny(engine, Path.TO_VM, FIRST_FRAGMENT, 5)
    assert known(engine) == []


def test_an_open_connection_may_be_taken_over_only_for_a_while(engine: ProgramEngine) -> None:
    segment = IN.wrap4(tcp(4000, 443, "A"), TCP)
    engine.set_grace(60)
    deny(engine, Path.TO_VM, segment, 5)
    engine.set_grace(0)
    assert engine.judge(Path.TO_VM, segment).reason is Reason.NO_STATE


def after_an_undone_flush(engine: ProgramEngine) -> Outcome:
    """Return what a packet gets that a flush had denied, once its flow lives again."""
    engine.judge(Path.FROM_VM, ANSWER)
    assert engine.judge(Path.TO_VM, DENIED).reason is Reason.CT_ESTABLISHED
    engine.flush()
    deny(engine, Path.TO_VM, DENIED)
    engine.undo_flush()
    return engine.judge(Path.TO_VM, DENIED)


def test_a_flush_that_is_undone_ends_denials(engine: ProgramEngine) -> None:
    assert after_an_undone_flush(engine).reason is Reason.CT_ESTABLISHED


# --- builds that are wrong ------------------------------------------------------------------------


class MakeWrong(Protocol):
    """Build a program of a header in which one text is another."""

    def __call__(self, old: str, new: str, header: str = ...) -> ProgramEngine: ...


WRONG = (
    ("denial->flows_made != work->flows_made", "the VM opens the flow"),
    ("denial->flows_made != work->flows_made", "it is imported"),
    ("denial->generation != config->generation", "another policy"),
)


@pytest.fixture
def wrong(artefact: loader.Artefact, tmp_path: File) -> Iterator[MakeWrong]:
    """Make an engine whose program toward the VM was built of a changed header."""
    made: list[ProgramEngine] = []

    def make(old: str, new: str, header: str = "denials.h") -> ProgramEngine:
        built = build(Mutant("", "", header, old, new, "tc_to_vm"), tmp_path)
        facts = endpoint_facts(GUARDED, Mode.ENFORCE)
        made.append(ProgramEngine(merge([artefact, built]), Hook.TC, facts, DENY))
        return made[-1]

    with pinned():
        yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize(("condition", "name"), WRONG)
def test_a_denial_that_holds_too_long_is_noticed(
    wrong: MakeWrong, condition: str, name: str
) -> None:
    engine = wrong(condition, "0")
    (change,) = (each for each in CHANGES if each.name == name)
    deny(engine, Path.TO_VM, change.frame)
    change.happens(engine)
    assert engine.judge(Path.TO_VM, change.then).verdict is Verdict.DROP


def test_a_denial_of_another_flow_is_noticed(
    wrong: MakeWrong,
) -> None:
    engine = wrong("!same_head(&denial->head, &work->head)", "0")
    deny(engine, Path.TO_VM, DENIED)
    assert not all(is_rejected(engine, port) for port in OTHERS)


def test_a_denial_for_packets_that_open_nothing_is_noticed(
    wrong: MakeWrong,
) -> None:
    engine = wrong(" && may_open_flow(packet)", "")
    segment = IN.wrap4(tcp(4000, 443, "A"), TCP)
    engine.set_grace(60)
    deny(engine, Path.TO_VM, segment, 5)
    engine.set_grace(0)
    assert engine.judge(Path.TO_VM, segment).reason is Reason.RULE


def test_a_head_that_leaves_out_too_much_is_noticed(
    wrong: MakeWrong,
) -> None:
    engine = wrong("words[4] & HEAD_BUT_SEQUENCE", "0", "frame_head.h")
    assert differences(engine, Path.TO_VM, HEADS["tcp4"](IN))


def test_a_denial_that_outlives_an_undone_flush_is_noticed(wrong: MakeWrong) -> None:
    engine = wrong("denial->epoch != config->flow_epoch", "0")
    assert after_an_undone_flush(engine).reason is Reason.RULE
