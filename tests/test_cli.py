# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: help, its start, usage errors, and how failures are reported."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.patience import PATIENCE
from vgw import __version__, cli_options
from vgw.cli import EXIT_INTERRUPTED, cli
from vgw.cli_output import Progress, Table
from vgw.cli_text import ago, counted, packet_text, side_text, size, span
from vgw.errors import (
    CompileError,
    ControllerUnreachableError,
    ForeignProgramError,
    KernelError,
    PartlyAppliedError,
    PolicyError,
    Problem,
    VerifierError,
    VgwError,
)

VERBS = (
    *("attach", "detach", "status", "vms", "check", "compile", "apply"),
    *("confirm", "rollback", "history"),
    *(
        "simulate",
        "rules",
        "logs",
        "top",
        "conntrack",
        "mode",
        "quarantine",
        "release",
        "controller",
    ),
    "doctor",
)
LEAVES = (
    *(verb for verb in VERBS if verb != "conntrack"),
    *(f"conntrack {verb}" for verb in ("list", "flush", "export", "import")),
)

#: What takes long to import or is of no use for help.
HEAVY = ("yaml", "rich", "pydantic", "pyroute2", "bcc", "prometheus_client", "http.client")


def test_help_names_every_verb() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    listed = result.output.split("Commands:")[1]
    assert [line.split()[0] for line in listed.splitlines()[1 : len(VERBS) + 1]] == list(VERBS)
    assert "..." not in listed, "a verb's first sentence is too long for the list"


@pytest.mark.parametrize("verb", LEAVES)
def test_help_of_a_verb_ends_with_an_example(verb: str) -> None:
    result = CliRunner().invoke(cli, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example:\n  vgw {verb}" in result.output.replace("\n    ", "\n  ")


@pytest.mark.parametrize("verb", LEAVES)
def test_every_verb_but_the_controller_prints_in_three_formats(verb: str) -> None:
    text = CliRunner().invoke(cli, [*verb.split(), "--help"]).output
    assert ("[table|json|jsonl]" in text) == (verb != "controller")


@pytest.mark.parametrize("arguments", ["--help", "--version", "attach --help", "simulate --help"])
def test_help_imports_nothing_heavy(arguments: str) -> None:
    """What makes the start slow is imports; the wall clock of a busy machine proves nothing."""
    script = (
        "import sys\nfrom vgw.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments.split()],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stderr.split())
    assert "click" in loaded
    assert not loaded & set(HEAVY)
    ours = {name for name in loaded if name.startswith("vgw.")}
    light = {"vgw.errors", "vgw.words"}
    assert all(name in light or name.startswith("vgw.cli") for name in ours), ours


def test_version() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert result.output == f"vgw {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("frobnicate", "No such command 'frobnicate' (see 'vgw --help')"),
        ("--nope status", "No such option"),
        ("attach", "give either --vm NAME, once or more, or --all (see 'vgw attach --help')"),
        ("attach --all --vm web01", "give either --vm"),
        ("attach --vm ../x", "'--vm': '../x' is not a name; names are 1 to 63 of A-Z a-z 0-9"),
        ("attach --all --interface tap0", "--interface goes with a single --vm"),
        ("attach --vm a --vm b --interface tap0", "--interface goes with a single --vm"),
        ("attach --vm a --hook ebpf", "'ebpf' is not one of"),
        ("detach", "give either --vm NAME or --all"),
        ("detach --all --vm a", "give either --vm NAME or --all"),
        ("status -o xml", "'xml' is not one of"),
        ("compile", "Missing option '--vm'"),
        ("mode --vm a off", "'off' is not one of"),
        ("logs -f -o json", "a JSON document has an end"),
        ("logs -n -1", "-1 is not in the range"),
        ("controller --listen 9477", "'9477' is not HOST:PORT"),
        ("controller --listen localhost:http", "is not HOST:PORT"),
        ("controller --listen :9477", "is not HOST:PORT"),
        ("controller --listen localhost:99999", "is not HOST:PORT"),
        ("simulate --vm a --direction up", "'up' is not one of"),
        ("simulate --vm a --direction egress", "give a packet"),
        ("simulate --vm a --direction egress --proto tcp", "a packet needs --src, --dst too"),
        ("simulate --vm a --direction egress --proto tcp --packets /dev/null", "give a packet"),
        ("simulate --vm a --direction egress --packets /nowhere/file", "does not exist"),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(arguments: str, said: str) -> None:
    result = CliRunner().invoke(cli, arguments.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("vgw: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["conntrack"]])
def test_no_verb_shows_the_help(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have every verb that changes or reads the host raise an error."""

    def connect(*_: object) -> None:
        raise error

    monkeypatch.setattr(cli_options, "connect", connect)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (VgwError("VM x is not attached"), 1, "vgw: VM x is not attached\n"),
        (KernelError("cannot make a map: no memory", 12), 1, "vgw: cannot make a map: no memory\n"),
        (ForeignProgramError("program 7 is there"), 1, "vgw: program 7 is there\n"),
        (ControllerUnreachableError("nobody answers"), 4, "vgw: nobody answers\n"),
        (
            PartlyAppliedError({"b": "no room", "a": "no interface"}),
            5,
            "vgw: failed for 2 VM(s): a: no interface; b: no room\n",
        ),
        (
            CompileError("guard.h:7: no such field\n  x->y\n"),
            1,
            "vgw: guard.h:7: no such field; x->y\n",
        ),
        (
            VerifierError("the kernel refused tc_to_vm", 13, "R1 invalid\nprocessed 9 insns\n"),
            1,
            "vgw: the kernel refused tc_to_vm\nR1 invalid\nprocessed 9 insns\n",
        ),
        (
            PolicyError(
                [Problem("p.yaml", 2, 3, "vms.a", "no"), Problem("p.yaml", 4, 1, "x", "y")]
            ),
            3,
            (
                "p.yaml:2:3: vms.a: no\np.yaml:4:1: x: y\n"
                "vgw: 2 problems in the policy, nothing was changed\n"
            ),
        ),
        (
            PermissionError(13, "Permission denied", "/run/vgw"),
            1,
            "vgw: /run/vgw: Permission denied; run vgw as root\n",
        ),
        (OSError(28, "No space left on device"), 1, "vgw: No space left on device\n"),
        (
            KeyError("rules"),
            1,
            "vgw: this is a bug: KeyError: 'rules'; please report it with what VGW_DEBUG=1 shows\n",
        ),
    ],
)
def test_a_failure_is_said_and_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    monkeypatch.delenv("VGW_DEBUG", raising=False)
    fail_with(monkeypatch, error)
    result = CliRunner().invoke(cli, ["status"])
    assert (result.exit_code, result.stderr, result.stdout) == (code, said, "")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGW_DEBUG", "1")
    fail_with(monkeypatch, KeyError("rules"))
    result = CliRunner().invoke(cli, ["status"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "in connect" in result.stderr


def test_ctrl_c_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    result = CliRunner().invoke(cli, ["status"])
    assert result.exit_code == EXIT_INTERRUPTED
    assert result.output.strip() == ""


def test_a_reader_that_goes_away_is_no_failure_to_report(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    log.write_text('{"ts":"2026-01-01T00:00:00.000000Z","event":"start"}\n' * 20000)
    with subprocess.Popen(
        [sys.executable, "-c", "from vgw.cli import main; main()", "--log", log, "logs"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as vgw:
        assert vgw.stdout is not None
        assert vgw.stderr is not None
        vgw.stdout.readline()
        vgw.stdout.close()
        assert vgw.stderr.read() == b""
        assert vgw.wait(timeout=PATIENCE) == 1


def test_errors_can_be_caught_by_a_program_that_embeds_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_with(monkeypatch, VgwError("no"))
    with pytest.raises(VgwError, match="no"):
        cli.main(["status"], standalone_mode=False)


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    table = Table("NAME", "COUNT", right=("COUNT",))
    table.add("web01", 7)
    table.add("db", None)
    assert table.lines() == ["NAME   COUNT", "web01      7", "db         -"]
    with pytest.raises(ValueError, match="1 cells under 2 headers"):
        table.add("alone")


class Terminal(io.StringIO):
    """A stderr that says that somebody is looking."""

    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(stderr: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress() as progress:
            progress.say("compiling")
        return stderr.getvalue()

    assert shown(io.StringIO()) == ""
    seen = click.unstyle(shown(Terminal()))
    assert "compiling" in seen
    assert seen.endswith("\r"), "the line is taken away at the end"


def test_words() -> None:
    assert [size(value) for value in (0, 1023, 1024, 5 << 30)] == [
        *("0 B", "1023 B", "1.0 KiB", "5.0 GiB")
    ]
    assert [span(value) for value in (0.25, 1.9, 60, 7200, 200000)] == [
        *("250 ms", "1 s", "1 min", "2 h", "2 d")
    ]
    assert (ago(None), ago(3)) == ("never", "3 s ago")
    assert (counted(1, "policy"), counted(2, "policy"), counted(0, "VM")) == (
        *("1 policy", "2 policies", "0 VMs"),
    )
    assert side_text("2001:db8::1", 443) == "[2001:db8::1]:443"
    assert side_text("10.0.0.1", None) == "10.0.0.1"
    assert packet_text({"proto": 47}) == "protocol 47"
    ping = {"proto": "icmp", "src": "10.0.0.1", "dst": "10.0.0.2", "icmp_type": 8, "icmp_code": 0}
    assert packet_text(ping) == "icmp 10.0.0.1 > 10.0.0.2 type 8/0"
