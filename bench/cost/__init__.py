# SPDX-License-Identifier: Apache-2.0
"""What the firewall costs, side by side with none, with others, and with one in user space."""
