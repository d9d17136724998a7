# SPDX-License-Identifier: Apache-2.0
"""Changes that are killed, or fail, at each of their steps (vgw/steps.py), under traffic."""
