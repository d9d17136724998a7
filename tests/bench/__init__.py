# SPDX-License-Identifier: Apache-2.0
"""The measurements themselves: what they measure with, and that they measure it."""
