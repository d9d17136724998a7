# SPDX-License-Identifier: Apache-2.0
"""The VMs that run on this host, as those who run them say: libvirt, QEMU processes, Proxmox."""
