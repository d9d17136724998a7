# SPDX-License-Identifier: Apache-2.0
"""Policy: pure functions from a policy file to map contents; no I/O, no kernel, no clock."""
