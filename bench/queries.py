# SPDX-License-Identifier: Apache-2.0
"""Headers as the queries that bpf/query.h makes of packets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bench.headers import Header
from bench.policy_probe import QUERY, Queries
from vgw import abi
from vgw.policy.model import ECHO_REQUEST, PORT_PROTOCOLS


def queries(headers: Sequence[Header]) -> Queries:
    """Return one query toward the VM for each header, of either version."""
    found = np.zeros(len(headers), QUERY)
    fields = found["fields"]
    fields[:, 0] = _words([(each.version, each.remote) for each in headers])
    fields[:, 1] = _words([(each.version, each.local) for each in headers])
    fields[:, 2, 0] = [service_of(each) for each in headers]
    fields[:, 3, 0] = [source_of(each) for each in headers]
    found["path"] = abi.Path.TO_VM
    found["ipv6"] = [each.version == 6 for each in headers]
    found["ordinary"] = [_is_ordinary(each) for each in headers]
    return found


def service_of(header: Header) -> int:
    """Return what the rules' services are compared with."""
    return header.protocol << 16 | header.dport


def source_of(header: Header) -> int:
    """Return what the rules' source ports are compared with."""
    return header.protocol << 16 | header.sport


def _is_ordinary(header: Header) -> bool:
    """Tell whether defaults speak of a header."""
    if header.protocol in PORT_PROTOCOLS:
        return True
    return header.dport >> 8 == ECHO_REQUEST.get(header.protocol)


def _words(addresses: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint32]:
    """Return (version, address) as four words each, of IPv4 the first one only."""
    shifts = {4: (0,), 6: (96, 64, 32, 0)}
    rows = [
        [address >> shift & 0xFFFFFFFF for shift in shifts[version]] + [0, 0, 0]
        for version, address in addresses
    ]
    return np.array([row[:4] for row in rows], np.uint32)
