#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Prepares a Debian 12 host to run vgw: system packages, the BPF file system and .venv.
# Runs from any directory, as often as you like; a second run only looks.

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

# What vgw itself needs. BCC has no package on PyPI: Debian's is the only one.
packages=(
  python3 python3-venv    # the interpreter Debian's BCC is built for
  python3-bpfcc           # BCC, the compiler of the packet programs
  libbpf1                 # loading, pinning and attaching them
  linux-libc-dev          # the kernel's user-space headers; no headers of the running kernel
  iproute2 util-linux     # namespaces and links of the lab
  iputils-ping            # the demo
  ca-certificates         # pip's downloads
)
# What the tests and measurements need besides.
dev_packages=(
  busybox                 # a DHCP client and a DHCP server
  prometheus              # scrapes the exporter; promtool checks its output
  nftables iptables       # what vgw is measured against
  gcc libc6-dev           # the programs that measurements send traffic with
  python3-libvirt         # libvirt's own test driver; hosts with libvirt need it to find its VMs
  openssl                 # certificates
  logrotate               # reads the configuration in contrib/
  systemd                 # looks the unit in contrib/ over
  libseccomp2             # its filter of system calls
)

usage() {
  cat <<'USAGE'
Usage: scripts/setup.sh [--dev]

Installs the Debian packages that vgw needs, mounts the BPF file system and makes .venv with the
vgw command in it. With --dev also what the tests and checks need. Only what is missing is done;
that needs root.
USAGE
}

say() { printf 'setup: %s\n' "$*"; }

die() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

# Print those of the given packages that are not installed.
missing_packages() {
  local installed package
  installed=$(dpkg-query --show --showformat='${db:Status-Abbrev} ${Package}\n' "$@" 2>/dev/null |
    sed -n 's/^[hi]i *//p') || true
  for package in "$@"; do
    grep -qxF -- "$package" <<<"$installed" || printf '%s\n' "$package"
  done
}

# Install packages; prometheus must not start the service it brings.
install_packages() {
  local policy=/usr/sbin/policy-rc.d made_policy=''
  [[ $EUID -eq 0 ]] || die "installing packages needs root: sudo $root/scripts/setup.sh ${dev:+--dev}"
  say "installing Debian packages: $*"
  if [[ " $* " == *" prometheus "* && ! -e $policy ]]; then
    made_policy=yes
    trap 'rm -f -- /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "$@" >/dev/null
  if [[ -n $made_policy ]]; then
    rm -f -- "$policy"
    trap - EXIT
  fi
  if [[ " $* " == *" prometheus "* ]]; then
    # The tests start their own; nobody asked for one at boot.
    update-rc.d prometheus disable >/dev/null 2>&1 || true
    say "prometheus is for the tests only: its service is neither started nor enabled"
  fi
}

setup_packages() {
  local missing
  if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
    die "this host has no apt; vgw is set up on Debian 12 or newer"
  fi
  mapfile -t missing < <(missing_packages "$@")
  if [[ ${#missing[@]} -gt 0 ]]; then
    install_packages "${missing[@]}"
  fi
}

setup_bpffs() {
  local type
  type=$(stat --file-system --format=%T /sys/fs/bpf 2>/dev/null) || type=absent
  [[ $type != bpf_fs ]] || return 0
  if [[ $EUID -eq 0 ]] && mount -t bpf -o mode=700 bpf /sys/fs/bpf 2>/dev/null; then
    say "mounted the BPF file system at /sys/fs/bpf"
  else
    say "warning: /sys/fs/bpf is not a BPF file system and could not be mounted;" \
      "vgw keeps its programs there, see vgw doctor"
  fi
}

# Whether .venv runs and sees the system's packages, BCC among them.
venv_works() {
  grep -qx 'include-system-site-packages = true' "$venv/pyvenv.cfg" 2>/dev/null &&
    [[ $("$venv/bin/python" -c 'import sys; print(sys.base_prefix)' 2>/dev/null) == /usr ]]
}

setup_venv() {
  local python=/usr/bin/python3 stamp=$venv/.vgw-setup project
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is older than 3.11; vgw needs Debian 12 or newer"
  project="$root $(sha256sum <"$root/pyproject.toml")"
  if venv_works; then
    # An environment with the development tools does for running vgw as well.
    if [[ -n $dev ]]; then
      grep -qxF -- "dev $project" "$stamp" 2>/dev/null && return
    else
      grep -qF -- "$project" "$stamp" 2>/dev/null && return
    fi
  else
    say "making .venv"
    rm -rf -- "$venv"
    "$python" -m venv --system-site-packages "$venv"
  fi
  say "installing vgw and its Python packages into .venv"
  if [[ -n $dev ]]; then
    # Dependency groups came with pip 25.1; Debian 12's is older.
    pip_install --upgrade 'pip>=25.1'
    pip_install --editable "$root" --group "$root/pyproject.toml:dev"
  else
    pip_install --editable "$root"
  fi
  printf '%s %s\n' "${dev:-user}" "$project" >"$stamp"
}

pip_install() {
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

dev=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --dev)
      dev=dev
      packages+=("${dev_packages[@]}")
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done

setup_packages "${packages[@]}"
setup_bpffs
setup_venv
say "ready: $venv/bin/vgw"
