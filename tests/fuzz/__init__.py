# SPDX-License-Identifier: Apache-2.0
"""The differential fuzzer: XDP, tc and the reference evaluator must judge any packets alike."""
