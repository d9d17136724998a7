# SPDX-License-Identifier: Apache-2.0
"""What the firewall costs by how many there are: VMs on a host, flows of a VM, rules."""
