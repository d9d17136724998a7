# SPDX-License-Identifier: Apache-2.0
"""The Python side of scripts/netns-lab.sh: the guest's TAP, real packets, the demo."""
