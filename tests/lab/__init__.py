# SPDX-License-Identifier: Apache-2.0
"""Real packets through real interfaces, in network namespaces of the tests' own."""
