# SPDX-License-Identifier: Apache-2.0
"""Set-up, checks and the lab; a package so that tests can use the lab's Python side."""
