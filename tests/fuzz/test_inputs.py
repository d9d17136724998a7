# SPDX-License-Identifier: Apache-2.0
"""A minute of hostile input for each reader of the controller, and mistakes that are found soon."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.inputs import hunt as hunting
from tests.fuzz.inputs.__main__ import main
from tests.fuzz.inputs.hunt import hunt
from tests.fuzz.inputs.rows import ROWS, Row
from tests.fuzz.inputs.targets import TARGETS
from vgw import abi
from vgw.controller import event_decoder, parameters, state_file
from vgw.policy import services, values

pytestmark = pytest.mark.bpf

ROOT = Path(__file__).parents[2]
SECONDS = 60
PATIENCE = 120
#: The least inputs of a minute, on a machine that is ten times as slow; and what one may take of
#: the memory of a hunt.
FEWEST = {"policy": 500, "state": 1000, "socket": 1000, "records": 4000}
MOST_MIB = 200
#: Inputs within which a mistake must be found.
SOON = 20_000


@pytest.mark.parametrize("pair", [("policy", "records"), ("state", "socket")], ids="-".join)
def test_catalogue_N17_nothing_escapes_in_a_minute(pair: tuple[str, ...], tmp_path: Path) -> None:
    """Each run looks elsewhere; the seed in the message makes it again."""
    command = [sys.executable, "-P", "-m", "tests.fuzz.inputs", "--seconds", str(SECONDS)]
    runs = {
        target: subprocess.Popen(
            [*command, "--out", str(tmp_path), "--target", target],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": str(ROOT)},
        )
        for target in pair
    }
    try:
        for target, run in runs.items():
            output, errors = run.communicate(timeout=SECONDS + PATIENCE)
            assert run.returncode == 0, f"{output}\n{errors}"
            found = json.loads(output)
            print(output)
            assert found["inputs"] > FEWEST[target]
            assert found["memory_mib"] < MOST_MIB
            assert found["slowest_seconds"] < hunting.MAX_SECONDS
    finally:
        for run in runs.values():
            run.kill()
            run.communicate()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.target}: {row.what}")
def test_catalogue_N17_inputs_that_were_wrong_are_not_any_more(row: Row) -> None:
    target = TARGETS[row.target]()
    with target.running():
        target.give(row.data)


# --- mistakes that must be found ------------------------------------------------------------------


def fail_on(condition: Callable[[Any], bool], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that has a mistake where a result, or else an argument, is special."""

    def wrong(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        if condition(result):
            raise ZeroDivisionError("planted")
        return result

    return wrong


def plant_in_policy(patch: pytest.MonkeyPatch) -> None:
    def boolean(text: str) -> bool:
        if text not in ("true", "false", "~"):
            raise ZeroDivisionError("planted")
        return text == "true"

    patch.setattr(values, "boolean", boolean)


def plant_in_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(state_file, "_body", fail_on(lambda body: body is None, state_file._body))


def plant_in_socket(patch: pytest.MonkeyPatch) -> None:
    wrong = fail_on(lambda texts: texts == [], parameters.Parameters.texts)
    patch.setattr(parameters.Parameters, "texts", wrong)


def plant_in_records(patch: pytest.MonkeyPatch) -> None:
    def is_special(found: object) -> bool:
        return isinstance(found, abi.Event) and found.reason == abi.Reason.CT_BUSY

    wrong = fail_on(is_special, event_decoder.decode)
    patch.setattr("vgw.controller.event_reader.decode", wrong)


PLANTED = {
    "policy": plant_in_policy,
    "state": plant_in_state,
    "socket": plant_in_socket,
    "records": plant_in_records,
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANTED[name](monkeypatch)
    result = hunt(TARGETS[name](), seed=7, inputs=SOON, seconds=PATIENCE)
    (finding,) = result.findings.values()
    assert "planted" in finding.details
    assert result.inputs <= SOON


def test_what_never_ends_or_takes_too_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunting, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(hunting, "MAX_SECONDS", 0.0)

    class Slow:
        words: Sequence[bytes] = (b"x",)
        has_structure = False

        def seeds(self) -> list[bytes]:
            return [b"a"]

        def shape(self, _: object, data: bytes) -> bytes:
            return data

        running = TARGETS["policy"]().running

        def give(self, data: bytes) -> int:
            while len(data) > 1:
                pass
            return 1

    kinds = hunt(Slow(), seed=1, inputs=1000, findings=2).findings
    assert any("HangError" in kind for kind in kinds)
    assert "slow" in kinds


def test_what_takes_too_much_memory_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunting, "MAX_BYTES", 64 << 20)
    wrong = fail_on(lambda _: bool(bytearray(512 << 20)), services.port_range)
    monkeypatch.setattr(services, "port_range", wrong)
    services.service.cache_clear()
    (kind,) = hunt(TARGETS["policy"](), seed=1, inputs=SOON).findings
    assert "MemoryError" in kind


def test_threads_that_live_at_the_same_time_are_not_too_much_memory() -> None:
    """On a busy machine those of earlier requests end while later ones are served."""
    barrier = threading.Barrier(20)

    class Busy:
        words: Sequence[bytes] = (b"x",)
        has_structure = False
        running = TARGETS["policy"]().running

        def seeds(self) -> list[bytes]:
            return [b"a"]

        def shape(self, _: object, data: bytes) -> bytes:
            return data

        def give(self, _: bytes) -> int:
            threads = [threading.Thread(target=barrier.wait) for _ in range(barrier.parties)]
            try:
                for thread in threads:
                    thread.start()
            except BaseException:
                barrier.abort()
                raise
            for thread in threads:
                thread.join()
            return 1

    assert hunt(Busy(), seed=1, inputs=3).findings == {}


def test_a_finding_is_kept_small_and_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant_in_policy(monkeypatch)
    chosen = ["--target", "policy", "--seed", "7", "--inputs", str(SOON), "--out", str(tmp_path)]
    assert main(chosen) == 1
    (file,) = tmp_path.iterdir()
    assert len(file.read_bytes()) < 400
    assert str(file) in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main(["--target", "policy", "--replay", str(file)])
    monkeypatch.undo()
    assert main(["--target", "policy", "--replay", str(file)]) == 0
