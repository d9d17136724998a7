# SPDX-License-Identifier: Apache-2.0
"""Services and ports as written in a policy: `tcp/80`, `icmp/echo-request`, `proto/47`, `any`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from vgw.policy.model import ANY_SERVICE, ICMP, ICMP_PROTOCOLS, ICMPV6, SCTP, TCP, UDP, Service
from vgw.policy.values import ANY, integer, name, words
from vgw.policy.yaml_nodes import show

_PORTS: Final = {"tcp": TCP, "udp": UDP, "sctp": SCTP}
_ICMPS: Final = {"icmp": ICMP, "icmpv6": ICMPV6}
_NAMES: Final = {number: name for name, number in (_PORTS | _ICMPS).items()}
#: Words before a slash; none of them can name a service.
PROTOCOLS: Final = (*_PORTS, *_ICMPS, "proto")

#: Names of ICMP types by protocol (IANA's, without the deprecated ones).
ICMP_TYPES: Final[Mapping[int, Mapping[str, int]]] = {
    ICMP: {
        "echo-reply": 0,
        "destination-unreachable": 3,
        "redirect": 5,
        "echo-request": 8,
        "router-advertisement": 9,
        "router-solicitation": 10,
        "time-exceeded": 11,
        "parameter-problem": 12,
        "timestamp-request": 13,
        "timestamp-reply": 14,
    },
    ICMPV6: {
        "destination-unreachable": 1,
        "packet-too-big": 2,
        "time-exceeded": 3,
        "parameter-problem": 4,
        "echo-request": 128,
        "echo-reply": 129,
        "multicast-listener-query": 130,
        "multicast-listener-report": 131,
        "multicast-listener-done": 132,
        "router-solicitation": 133,
        "router-advertisement": 134,
        "neighbor-solicitation": 135,
        "neighbor-advertisement": 136,
        "redirect": 137,
        "multicast-listener-report-v2": 143,
    },
}


@lru_cache(maxsize=4096)
def service(text: str) -> Service:
    """Convert one alternative of a service; ValueError says what is wrong."""
    if text == ANY:
        return ANY_SERVICE
    protocol, slash, rest = text.partition("/")
    if not slash:
        raise ValueError(f"{show(text)} is not a service; {_advice(text)}")
    if protocol in _PORTS:
        if rest == ANY:
            raise ValueError(f"for every port write {protocol}/1-65535")
        return Service(_PORTS[protocol], ports=port_range(rest))
    if protocol in _ICMPS:
        return _icmp(text, _ICMPS[protocol], rest)
    if protocol == "proto":
        if "/" in rest:
            raise ValueError(f"{show(text)}: proto/N has no ports; {words(tuple(_PORTS))} have")
        return Service(integer(rest, 1, 255, "a protocol number"))
    raise ValueError(
        f"{show(protocol)} is not a protocol of services; write {words(PROTOCOLS)}, other "
        "protocols by their number as in proto/47"
    )


def service_or_name(text: str) -> Service | str:
    """Convert an entry of a rule's `services`; a service's name stays text."""
    if "/" in text or text == ANY or text in PROTOCOLS or _is_digits(text):
        return service(text)
    return name(text)


def service_name(text: str) -> str:
    """Check a name of a service: a name that is not a word or number of a service itself."""
    if text == ANY or text in PROTOCOLS or _is_digits(text):
        raise ValueError(f"{show(text)} cannot name a service: it is part of the notation")
    return name(text)


def port_range(text: str) -> tuple[int, int]:
    """Convert `80` or `8000-8099`, both ends included."""
    first, dash, last = text.partition("-")
    try:
        low = integer(first, 1, 65535, "a port")
        high = integer(last, 1, 65535, "a port") if dash else low
    except ValueError:
        raise ValueError(
            f"{show(text)} is not a port or range such as 80 or 8000-8099; ports are numbers "
            "from 1 to 65535"
        ) from None
    if low > high:
        raise ValueError(f"the range {show(text)} is reversed; write {high}-{low}")
    return low, high


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _advice(text: str) -> str:
    if text in _PORTS:
        return f"for every port write {text}/1-65535"
    if text in _ICMPS:
        return f"for every type write {text}/any"
    if _is_digits(text):
        return f"a port needs its protocol, as in tcp/{text} or udp/{text}"
    return "write tcp/80, icmp/echo-request, proto/47 or any"


def _icmp(text: str, protocol: int, rest: str) -> Service:
    types = ICMP_TYPES[protocol]
    type_text, slash, code_text = rest.partition("/")
    icmp_type = None if type_text == ANY else types.get(type_text)
    if icmp_type is None and type_text != ANY:
        try:
            icmp_type = integer(type_text, 0, 255)
        except ValueError:
            raise ValueError(
                f"{show(type_text)} is not an ICMP type; write a number from 0 to 255, any, or "
                f"one of {', '.join(types)}"
            ) from None
    if not slash:
        return Service(protocol, icmp_type=icmp_type)
    if icmp_type is None:
        raise ValueError(f"{show(text)}: a code needs one type before it, not any")
    code = None if code_text == ANY else integer(code_text, 0, 255, "an ICMP code")
    return Service(protocol, icmp_type=icmp_type, icmp_code=code)


def service_text(service: Service) -> str:
    """Return a service as a policy file writes it."""
    if service.protocol is None:
        return "any"
    name = _NAMES.get(service.protocol)
    if service.ports is not None:
        return f"{name}/{range_text(service.ports)}"
    if service.icmp_type is not None:
        code = "" if service.icmp_code is None else f"/{service.icmp_code}"
        return f"{name}/{service.icmp_type}{code}"
    is_icmp = service.protocol in ICMP_PROTOCOLS
    return f"{name}/any" if is_icmp else f"proto/{service.protocol}"


def range_text(ports: tuple[int, int]) -> str:
    """Return a range of ports as a policy file writes it."""
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"
