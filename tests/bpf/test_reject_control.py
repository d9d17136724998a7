# SPDX-License-Identifier: Apache-2.0
"""The control of the tests of answers: programs that are wrong on purpose do not pass them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.bpf.answers import Answer, Rejecter, check_error, check_reset, facts_of, run_revoked
from tests.bpf.unanswered import NEVER, NEVER_OF_FLOW, in_frame
from tests.cases.fixtures import UNGUARDED
from tests.frames import OUT, TCP, UDP, tcp, udp
from vgw import loader
from vgw.abi import Path
from vgw.loader.sources import SourceTree, bpf_dir
from vgw.policy.model import Hook

pytestmark = pytest.mark.bpf

#: File, a text in it, and what stands there instead in the wrong programs.
MISTAKES = (
    ("reject.h", "tcp->window = ~fold(message_sum(answer) + pseudo);", "tcp->window = 1;"),
    ("reject.h", "icmp->balance = pseudo;", "icmp->balance = 0;"),
    ("reject.h", "return !(packet->tcp_flags & TCP_RST);", "return true;"),
    ("reject.h", "return packet->kind == KIND_ECHO && !is_echo_reply(packet);", "return true;"),
    (
        "reject.h",
        "if (is_fragment(packet) || is_group_mac(&packet->source_mac) ||",
        "if (false &&",
    ),
    ("reject.h", "return first && first != 127 && first < 224;", "return first != 1;"),
    ("reject.h", "return path == VGW_PATH_FROM_VM ||", "return true ||"),
    ("reject.h", "same_address(&packet->source, &packet->destination)", "false"),
    ("budget.h", " < per_second;", " < 1000000;"),
)
#: Frames that get an answer by these mistakes.
NOW_ANSWERED = (
    "ICMP timestamp, from_vm",
    "ICMPv6 in IPv4, to_vm",
    "atomic fragment, from_vm",
    "fragment, from_vm",
    "from nobody",
    "from loopback",
    "from a group MAC",
    "from itself, IPv6",
)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> loader.Artefact:
    """Programs with all the mistakes."""
    directory = tmp_path_factory.mktemp("wrong")
    shutil.copytree(bpf_dir(), directory, dirs_exist_ok=True)
    for name, right, mistake in MISTAKES:
        text = (directory / name).read_text()
        assert text.count(right) == 1, f"{name} has changed: {right}"
        (directory / name).write_text(text.replace(right, mistake))
    return loader.load_artefact(
        tmp_path_factory.mktemp("cache"),
        programs=("xdp_from_vm", "tc_to_vm"),
        source=SourceTree(directory),
    )


@pytest.fixture
def rejecter(wrong: loader.Artefact) -> Iterator[Rejecter]:
    made = Rejecter(wrong, Hook.XDP, facts=facts_of(UNGUARDED), per_second=1)
    yield made
    made.engine.close()


def test_catalogue_H12_a_wrong_checksum_of_tcp_is_noticed(rejecter: Rejecter) -> None:
    segment = tcp(flags="S", seq=1000)
    answer = Answer.of(rejecter.answer(Path.FROM_VM, OUT.wrap4(segment, TCP)))
    with pytest.raises(AssertionError):
        check_reset(answer, segment, (0, 1001, 0x14))


def test_catalogue_H12_a_checksum_that_a_card_spoils_is_noticed(rejecter: Rejecter) -> None:
    frame = OUT.wrap6(udp(), UDP)
    answer = Answer.of(rejecter.answer(Path.FROM_VM, frame))
    assert answer.checksum(answer.message) == 0
    with pytest.raises(AssertionError):
        check_error(answer, frame[14:], is_udp=True)


@pytest.mark.parametrize("name", NOW_ANSWERED)
def test_catalogue_H12_an_answer_that_must_not_be_is_noticed(rejecter: Rejecter, name: str) -> None:
    assert rejecter.run(*NEVER[name]) is not None


@pytest.mark.parametrize("name", NEVER_OF_FLOW)
def test_catalogue_H12_an_answer_to_an_answer_is_noticed(wrong: loader.Artefact, name: str) -> None:
    answer, _, answers = run_revoked(wrong, *NEVER_OF_FLOW[name])
    assert answer is not None
    assert answers.sent == 1


def test_catalogue_L14_a_budget_that_does_not_hold_is_noticed(rejecter: Rejecter) -> None:
    for _ in range(20):
        rejecter.answer(Path.TO_VM, in_frame("192.0.2.10"))
