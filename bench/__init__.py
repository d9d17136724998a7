# SPDX-License-Identifier: Apache-2.0
"""Measurements, each a command that prints a table or JSON; see README.md beside this file."""
