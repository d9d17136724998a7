# SPDX-License-Identifier: Apache-2.0
"""The addresses of VMs as DHCP servers lease them: read, kept, and made part of the policy."""
