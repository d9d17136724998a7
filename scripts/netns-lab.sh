#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# A small data centre in network namespaces to try vgw on. Nothing outside the namespaces, the
# directory /run/vgw-lab and the BPF file system mounted in it is touched.
#
#   namespace   plays                 interface   on the host behind     addresses
#   host        the hypervisor        br0         -                      -
#   web01       a VM                  eth0        TAP  tap-web01         10.20.0.11 2001:db8:20::11
#   db01        a VM                  eth0        veth veth-db01         10.20.0.12 2001:db8:20::12
#   client      somebody outside      eth0        veth veth-client       10.20.0.2  2001:db8:20::2
#                                                                        192.0.2.10 2001:db8:1::10
#
# VGW_LAB=NAME (default vgw-lab) names another lab: its namespaces are NAME-host and so on, its
# directory is /run/NAME. The tests build theirs that way. With VGW_LAB_OFFLOAD=1 web01 leaves
# checksums and segmentation to others, as a guest with a virtio card does.

# Single-quoted programs below are for another shell, inside a namespace.
# shellcheck disable=SC2016

set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
lab=${VGW_LAB:-vgw-lab}
dir=/run/$lab
nodes=(host web01 db01 client)

usage() {
  cat <<USAGE
Usage: scripts/netns-lab.sh up | down | status | shell NAME | exec NAME COMMAND... | demo

  up       build the lab
  down     remove all of it, also what a killed run left behind
  status   what is there
  shell    a shell in NAME (${nodes[*]}); in host, vgw is set up for the lab
  exec     one command in NAME
  demo     set up what is missing, build the lab, protect both VMs, send traffic, show the outcome
USAGE
}

die() {
  printf 'netns-lab: %s\n' "$*" >&2
  exit 1
}

need_root() {
  [[ $EUID -eq 0 ]] || die "network namespaces need root; run: sudo $0 $*"
}

check_name() {
  [[ $lab =~ ^[a-z][a-z0-9-]{0,30}$ ]] ||
    die "VGW_LAB=$lab is no name for a lab; use lower-case letters, digits and '-'"
}

exists() { [[ -e /run/netns/$lab-$1 ]]; }

# Run a command inside a node. Only the network changes, so the BPF file system stays in sight.
inside() {
  local node=$1
  shift
  nsenter --net="/run/netns/$lab-$node" -- "$@"
}

# --- up ------------------------------------------------------------------------------------------

make_node() {
  ip netns add "$lab-$1"
  ip -n "$lab-$1" link set lo up
  # No duplicate address detection, no router solicitations: addresses are fixed and work at once.
  inside "$1" sh -c '
    for scope in all default; do
      conf=/proc/sys/net/ipv6/conf/$scope
      [ -d "$conf" ] || continue
      echo 0 >"$conf/accept_dad"
      echo 0 >"$conf/router_solicitations"
      echo 0 >"$conf/accept_ra"
    done'
}

# make_veth NODE MAC: NODE's eth0 with its other end, veth-NODE, on the bridge.
make_veth() {
  ip -n "$lab-host" link add "veth-$1" type veth peer name eth0 address "$2" netns "$lab-$1"
  ip -n "$lab-host" link set "veth-$1" master br0 up
  ip -n "$lab-$1" link set eth0 up
}

# add_addresses NODE ADDRESS...
add_addresses() {
  local node=$1 address
  shift
  for address in "$@"; do
    if [[ $address == *:* ]]; then
      ip -n "$lab-$node" addr add "$address" dev eth0 nodad
    else
      ip -n "$lab-$node" addr add "$address" dev eth0
    fi
  done
}

write_environment() {
  mkdir -p "$dir/policy.d" "$dir/run" "$dir/state" "$dir/cache" "$dir/log"
  cat >"$dir/env" <<ENV
export VGW_POLICY=$dir/policy.d
export VGW_INVENTORY=$dir/inventory.yaml
export VGW_RUN_DIR=$dir/run
export VGW_STATE_DIR=$dir/state
export VGW_BPFFS=$dir/bpf
export VGW_CACHE_DIR=$dir/cache
export VGW_LOG=$dir/log/events.jsonl
ENV
  cp -- "$root/examples/lab.yaml" "$dir/policy.d/"
  printf 'export PATH=%q:$PATH\n' "$root/.venv/bin" >>"$dir/env"
}

# Build the lab, anew if there is one.
up() {
  need_root up
  command -v ip >/dev/null || die "the command ip is missing; run: $root/scripts/setup.sh"
  [[ -c /dev/net/tun ]] || die "/dev/net/tun is missing; load it with: modprobe tun"
  down_quietly
  mkdir -p "$dir/bpf"
  mount -t bpf -o mode=700 bpf "$dir/bpf"
  write_environment

  local node
  for node in "${nodes[@]}"; do make_node "$node"; done
  ip -n "$lab-host" link add br0 type bridge mcast_snooping 0
  # The hypervisor only forwards here; an address of its own would add noise to every capture.
  inside host sh -c 'for name in default br0; do
    echo 1 >"/proc/sys/net/ipv6/conf/$name/disable_ipv6"; done'
  ip -n "$lab-host" link set br0 up
  make_veth db01 52:54:00:00:00:12
  make_veth client 52:54:00:00:00:02
  /usr/bin/python3 "$root/scripts/lab/tap_guest.py" --host "$lab-host" tap-web01 \
    --guest "$lab-web01" eth0 --mac 52:54:00:00:00:11 --bridge br0 --pid-file "$dir/web01.pid" \
    ${VGW_LAB_OFFLOAD:+--offload}

  add_addresses web01 10.20.0.11/24 2001:db8:20::11/64
  add_addresses db01 10.20.0.12/24 2001:db8:20::12/64
  add_addresses client 10.20.0.2/24 2001:db8:20::2/64 192.0.2.10/32 2001:db8:1::10/128
  for node in web01 db01; do
    ip -n "$lab-$node" route add default via 10.20.0.2
    ip -n "$lab-$node" -6 route add default via 2001:db8:20::2
  done
  touch "$dir/ready"
}

# Whether everything that `up` makes is there and alive.
is_whole() {
  local node
  for node in "${nodes[@]}"; do exists "$node" || return 1; done
  mountpoint -q "$dir/bpf" && ip -n "$lab-host" link show tap-web01 >/dev/null 2>&1
}

# --- down ----------------------------------------------------------------------------------------

# Stop every process whose network is one of the lab's namespaces.
stop_processes() {
  local node signal attempt pids
  for signal in TERM KILL; do
    for attempt in {1..40}; do
      pids=$(for node in "${nodes[@]}"; do
        if exists "$node"; then ip netns pids "$lab-$node"; fi
      done)
      [[ -n $pids ]] || return 0
      # shellcheck disable=SC2086 # one word per process
      if [[ $attempt -eq 1 ]]; then kill -s "$signal" $pids 2>/dev/null || true; fi
      sleep 0.05
    done
  done
  die "these processes do not end: $pids"
}

down_quietly() {
  local node
  for node in "${nodes[@]}"; do
    if exists "$node" && [[ /proc/self/ns/net -ef /run/netns/$lab-$node ]]; then
      die "this shell is inside the lab ($node); leave it first"
    fi
  done
  stop_processes
  while mountpoint -q "$dir/bpf"; do umount "$dir/bpf"; done
  for node in "${nodes[@]}"; do
    if exists "$node"; then ip netns delete "$lab-$node"; fi
  done
  rm -rf -- "$dir"
}

down() {
  need_root down
  down_quietly
  printf 'The lab is gone.\n'
}

# --- looking around ------------------------------------------------------------------------------

status() {
  local node
  need_root status
  if [[ ! -e $dir ]]; then
    printf 'The lab is down.\n'
    return
  fi
  if [[ -e $dir/ready ]] && is_whole; then
    printf 'The lab is up; its files are in %s.\n\n' "$dir"
  else
    printf 'The lab is half there; up builds it anew, down removes it.\n\n'
  fi
  for node in "${nodes[@]}"; do
    exists "$node" || continue
    printf '%s\n' "$node"
    ip -n "$lab-$node" -brief address show scope global | sed 's/^/  /'
    ip netns pids "$lab-$node" | while read -r pid; do
      printf '  process %s: %s\n' "$pid" "$(tr '\0' ' ' <"/proc/$pid/cmdline")"
    done
  done
}

need_node() {
  [[ " ${nodes[*]} " == *" ${1:-} "* ]] || die "name one of: ${nodes[*]}"
  exists "$1" || die "the lab is down; run: $0 up"
}

execute() {
  need_root "exec"
  need_node "${1:-}"
  local node=$1
  shift
  [[ $# -gt 0 ]] || die "name a command to run in $node"
  # shellcheck source=/dev/null
  source "$dir/env"
  inside "$node" "$@"
}

shell() {
  need_root shell "${1:-}"
  need_node "${1:-}"
  printf 'You are in %s; leave with exit.\n' "$1"
  PS1="[$lab $1] \\w \\$ " execute "$1" bash --norc -i
}

demo() {
  need_root demo
  "$root/scripts/setup.sh"
  up
  # shellcheck source=/dev/null
  source "$dir/env"
  cd -- "$root"
  inside host "$root/.venv/bin/python" -m scripts.lab.demo "$lab"
}

check_name
command=${1:-}
[[ $# -eq 0 ]] || shift
case $command in
  up)
    if [[ ! -e $dir/ready ]] || ! is_whole; then up; fi
    printf 'The lab is up. Look around: %s status\n' "$0"
    ;;
  down) down ;;
  status) status ;;
  shell) shell "$@" ;;
  exec) execute "$@" ;;
  demo) demo ;;
  -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
