#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs what the checks need and runs them all: style, types, tests.
# Arguments go to one pytest, in place of the two for everything.
# With CI=true or VGW_CI=1 a skipped bpf or lab test is a failure.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

check() {
  printf '\n== %s\n' "$*"
  "$root/.venv/bin/$1" "${@:2}"
}

scripts/setup.sh --dev
check ruff check .
check ruff format --check .
check mypy
if (($#)); then
  check pytest "$@"
  exit
fi
# Files wait for the kernel much of their time, so they run side by side. Those that send traffic
# through a lab want the processors for themselves.
status=0
check pytest -m "not lab" -n "$(nproc)" --dist loadfile || status=$?
check pytest -m lab || status=$?
exit "$status"
