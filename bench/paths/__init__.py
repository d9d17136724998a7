# SPDX-License-Identifier: Apache-2.0
"""What one packet costs on each of its ways through the programs, by test runs of the kernel."""
