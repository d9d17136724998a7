# SPDX-License-Identifier: Apache-2.0
"""A small process that goes back to the policy before, when nobody confirms the new one in time.

It has a session of its own and depends on nobody: the command that applied the policy and the
controller may end or be killed. It only watches the window's record and loads the rest of vgw when
its time has come. Several may watch the same window: who comes second finds nothing to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from vgw.controller.paths import Paths
from vgw.controller.window import load_window
from vgw.errors import VgwError

#: Seconds between looks at the record, and between attempts to go back.
PERIOD: Final = 1.0
#: Seconds that the process may take to say that it watches.
START_SECONDS: Final = 20.0
_READY: Final = b"watching "
#: Seconds that the controller may take to go back before this process does it itself.
_ANSWER_SECONDS: Final = 30.0


def start_guardian(paths: Paths, window: str) -> int:
    """Start a process that watches a window, by its id, and return the process's id.

    Raises VgwError when it does not begin to watch: nobody would go back then.
    """
    places = json.dumps({name: str(path) for name, path in dataclasses.asdict(paths).items()})
    # Isolated, so that neither the directory nor variables of whoever applies decide what is run.
    command = [sys.executable, "-I", "-m", __name__, places, window]
    null = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=null, stdout=subprocess.PIPE, stderr=null, cwd="/", start_new_session=True
    ) as process:
        pipe = process.stdout
        ready = pipe is not None and select.select([pipe], [], [], START_SECONDS)[0]
        said = pipe.readline() if ready and pipe is not None else b""
        if not said.startswith(_READY):
            process.kill()
            raise VgwError(
                f"the process that would undo the policy did not start ({sys.executable} -m "
                f"{__name__}); nothing was applied"
            )
    return int(said.removeprefix(_READY))


def watch(paths: Paths, window: str) -> None:
    """Wait until a window is settled, and settle it when its time has come."""
    while True:
        found = load_window(paths)
        if found is None or found.id != window:
            return
        remaining = found.remaining_seconds()
        if remaining > 0:
            time.sleep(min(remaining, PERIOD))
            continue
        with contextlib.suppress(VgwError):  # it is tried again as long as the record is there
            _settle(paths)
        if load_window(paths) == found:
            time.sleep(PERIOD)


def _settle(paths: Paths) -> None:
    """Have the controller go back, or do it here when none runs."""
    from vgw.controller.actor import this_process  # noqa: PLC0415 - a small process until now
    from vgw.controller.api_client import Client  # noqa: PLC0415
    from vgw.controller.looking import looking_host  # noqa: PLC0415
    from vgw.controller.policy_keeper import PolicyKeeper, logging_to  # noqa: PLC0415

    try:
        Client(paths.socket, _ANSWER_SECONDS).settle()
    except VgwError:
        keeper = PolicyKeeper(looking_host(paths)[0], logging_to(paths.log_file))
        keeper.settle_overdue(this_process("guardian"))


def main() -> None:
    """Watch the window that the command line names; the entry point of the process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    places, window = sys.argv[1:]
    paths = Paths(**{name: Path(text) for name, text in json.loads(places).items()})
    if os.fork() > 0:
        os._exit(0)  # the one that started this waits for it, and for nothing else
    with contextlib.suppress(OSError):  # whoever started it may be gone
        os.write(sys.stdout.fileno(), _READY + f"{os.getpid()}\n".encode())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    watch(paths, window)


if __name__ == "__main__":
    main()
