# SPDX-License-Identifier: Apache-2.0
"""vgw: a firewall for virtual machines in the host's kernel."""

__version__ = "0.1.0"
