# SPDX-License-Identifier: Apache-2.0
"""The controller: everything that touches interfaces, pins and sockets of the host."""
