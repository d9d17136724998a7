# SPDX-License-Identifier: Apache-2.0
"""The fuzzer of what the controller is fed: policy text, state files, requests, kernel records."""
