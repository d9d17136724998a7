# SPDX-License-Identifier: Apache-2.0
"""Settings of an interface that the `ip` of a supported host may be too old for."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing

from pyroute2.ethtool.ioctl import IoctlEthtool

_RTM_NEWLINK, _NLM_F_REQUEST_ACK, _NLMSG_ERROR = 16, 0x5, 2
#: IFLA_GSO_MAX_SIZE, IFLA_GRO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE, IFLA_GRO_IPV4_MAX_SIZE.
_SIZE_ATTRIBUTES = (41, 58, 63, 64)


def set_features(name: str, **features: bool) -> None:
    """Switch device features on or off, by ethtool's names with `_` for `-`."""
    with closing(IoctlEthtool(name)) as device:
        there = device.get_features()
        for feature, value in features.items():
            there[feature.replace("_", "-")] = value
        device.set_features(there)


def allow_big_tcp(name: str, size: int) -> None:
    """Let super-packets of TCP be so large, both families, sent and received."""
    attributes = b"".join(struct.pack("=HHI", 8, kind, size) for kind in _SIZE_ATTRIBUTES)
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0)
    length = 16 + len(body) + len(attributes)
    header = struct.pack("=IHHII", length, _RTM_NEWLINK, _NLM_F_REQUEST_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.bind((0, 0))
        sock.send(header + body + attributes)
        kind, error = struct.unpack_from("=4xH10xi", sock.recv(4096))
    if kind != _NLMSG_ERROR or error:
        raise OSError(-error, f"{name}: {os.strerror(-error)}")
