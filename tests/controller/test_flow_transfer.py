# SPDX-License-Identifier: Apache-2.0
"""Flows go from one host to another: with their ages, whole or not at all, in their order."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import ipaddress
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.controller import observe
from tests.controller.conftest import run
from tests.controller.observe import open_connection, received, send_to_vm, traces
from tests.controller.policies import VM_MAC, document, from_vm, interface, to_vm
from tests.controller.process import Controller
from vgw import abi
from vgw.controller import flow_import
from vgw.controller.clock import SECOND_NS, coarse_now_ns
from vgw.controller.conntrack import list_flows
from vgw.controller.flow_export import Token, export_flows
from vgw.controller.flow_file import FlowFileError, FlowReader
from vgw.controller.flow_import import Piece, import_flows, put_piece
from vgw.controller.flow_table import RECORD, put_flows, read_flows
from vgw.controller.paths import Paths
from vgw.controller.reconcile import Host
from vgw.errors import VgwError

pytestmark = pytest.mark.bpf
Tap = Callable[[str], int]
HTTP = "[{name: http, action: accept, services: [tcp/80]}]"
#: Nothing that was open before the attach is taken over.
NO_GRACE = "conntrack: {grace: 0s},"
OURS, THEIRS = "tap0", "tap1"


def policy(name: str, rules: str = HTTP, mac: str = VM_MAC) -> Any:
    text = interface(name, vm=NO_GRACE).replace(VM_MAC, mac)
    return document(rules, vms={"web01": text})


@pytest.fixture
def there(paths: Paths, tmp_path: Path) -> Iterator[Host]:
    """Another host: a bpffs and state of its own."""
    bpffs = tmp_path / "there"
    bpffs.mkdir()
    run("mount", "-t", "bpf", "bpf", str(bpffs))
    places = dataclasses.replace(
        paths, bpffs=bpffs / "vgw", state_dir=tmp_path / "state2", run_dir=tmp_path / "run2"
    )
    try:
        yield Host(places)
    finally:
        run("umount", "-l", str(bpffs))


def passes(vm: int, name: str, port: int = 40001) -> bool:
    """Tell whether the next segment to the VM passes."""
    return observe.passes(vm, to_vm(sport=port, flags="A", length=port % 7), name)


def exported(host: Host, since: str | None = None) -> tuple[bytes, str]:
    out = io.BytesIO()
    answer = export_flows(host, "web01", out, None if since is None else Token.parse(since))
    return out.getvalue(), answer["token"]


def imported(host: Host, data: bytes, **options: Any) -> dict[str, Any]:
    """Import and return what became of the flows of the only interface."""
    answer = import_flows(
        host, "web01", io.BytesIO(data), lambda piece: put_piece(host, piece), **options
    )
    (row,) = answer["interfaces"]
    return {name: value for name, value in row.items() if value and name != "interface"}


def states(host: Host) -> dict[int, str]:
    return {flow["remote_port"]: flow["state"] for flow in list_flows(host, "web01")["flows"]}


def meta(host: Host) -> abi.ConntrackMeta:
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        return endpoint.maps.meta()


def test_catalogue_M35_open_flows_arrive_with_the_vm(host: Host, there: Host, tap: Tap) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    open_connection(source, OURS)
    there.attach(policy(THEIRS), "web01")
    assert not passes(target, THEIRS), "without its state the connection breaks"

    data, _ = exported(host)
    assert imported(there, data) == {"flows": 1, "added": 1}

    before, after = (list_flows(each, "web01")["flows"][0] for each in (host, there))
    assert after["interface"] == THEIRS, "the interface is found by its MAC"
    assert after["generation"] == 0, "no policy of this host has judged it"
    for field in ("packets", "bytes", "state", "direction", "local", "remote"):
        assert after[field] == before[field]
    assert abs(after["age"] - before["age"]) < 5
    assert passes(target, THEIRS)
    assert list_flows(there, "web01")["flows"][0]["rule"] == "http"
    there.detach("web01")
    host.detach("web01")
    assert traces(host.paths) == traces(there.paths) == []


def test_a_policy_that_denies_a_flow_ends_it(host: Host, there: Host, tap: Tap) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    open_connection(source, OURS)
    there.attach(policy(THEIRS, "[{name: ssh, action: accept, services: [tcp/22]}]"), "web01")

    imported(there, exported(host)[0])

    assert not passes(target, THEIRS)
    assert states(there) == {}


def test_a_delta_brings_what_was_opened_changed_and_ended(
    host: Host, there: Host, tap: Tap
) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    for port in (1001, 1002, 1003):
        open_connection(source, OURS, port)
    full, token = exported(host)
    imported(there, full)

    (endpoint,) = host.open_endpoints("web01")
    with endpoint:  # as if 1003 had ended, 1002 were closing and 1001 had been idle for long
        flows = read_flows(endpoint)
        ports = [abi.be16(port) for port in flows["key"]["remote_port"].tolist()]
        flows["flow"]["claim"] = 1
        flows["flow"]["state"][ports.index(1003)] = abi.FlowState.DEAD
        flows["flow"]["state"][ports.index(1002)] = abi.FlowState.TCP_FIN
        flows["flow"]["last_seen_ns"][ports.index(1001)] -= 60 * SECOND_NS
        put_flows(host.artefact, endpoint.fds, flows)
    open_connection(source, OURS, 1004)
    delta, _ = exported(host, token)

    assert imported(there, delta) == {
        "flows": 2, "added": 1, "replaced": 2, "ended": 1,
    }  # fmt: skip
    assert states(there) == {
        1001: "tcp_established",
        1002: "tcp_fin",
        1004: "tcp_established",
    }
    assert imported(there, delta)["replaced"] >= 2, "the same delta again changes nothing"
    assert len(states(there)) == 3
    with pytest.raises(VgwError, match="so number 0 is older"):
        imported(there, full)
    with pytest.raises(VgwError, match="export all flows"):
        exported(host, token.replace(Token.parse(token).origin, "0" * 16))
    assert passes(target, THEIRS, 1004)


def test_deltas_come_in_their_order(host: Host, there: Host, tap: Tap) -> None:
    tap(OURS)
    tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    full, token = exported(host)
    first, token = exported(host, token)
    second, _ = exported(host, token)

    with pytest.raises(VgwError, match="import the full export first"):
        imported(there, first)
    imported(there, full)
    with pytest.raises(VgwError, match="comes too early"):
        imported(there, second)
    imported(there, first)
    imported(there, second)


def test_a_flow_that_packets_have_used_is_not_overwritten(
    host: Host, there: Host, tap: Tap
) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    open_connection(source, OURS)
    data, _ = exported(host)
    imported(there, data)
    assert passes(target, THEIRS)
    used = list_flows(there, "web01")["flows"][0]["packets"]

    assert imported(there, data) == {"flows": 1, "kept": 1}

    assert list_flows(there, "web01")["flows"][0]["packets"] == used


def test_half_open_flows_are_counted_and_leave_the_count(host: Host, there: Host, tap: Tap) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    send_to_vm(OURS, to_vm(sport=40001))
    os.write(source, from_vm(sport=80, dport=40001, flags="SA"))
    imported(there, exported(host)[0])

    found = meta(there)
    assert (found.entries, list(found.half_open), list(found.created)) == (1, [1, 0], [0, 0])
    imported(there, exported(host)[0])
    assert list(meta(there).half_open) == [1, 0], "imported again it counts once"

    send_to_vm(THEIRS, to_vm(sport=40001, flags="A"))
    assert received(target, to_vm(sport=40001, flags="A"))
    assert list(meta(there).half_open) == [0, 0]


def damaged(data: bytes) -> dict[str, bytes]:
    """Return streams that are to be refused, by what is wrong with them."""
    head, rest = data.split(b"\n", 1)
    other_head = json.dumps({**json.loads(head), "schema": "vgw/flows/v9"}).encode()
    lies = json.loads(head)
    lies["fields"][0][2] = 1 << 40

    def sealed(body: bytes) -> bytes:
        return body + hashlib.sha256(body).hexdigest().encode() + b"\n"

    body = rest[:-65]
    return {
        "cut off": data[: len(data) // 2],
        "without its last byte": data[:-1],
        "one bit": data[:-200] + bytes([data[-200] ^ 1]) + data[-199:],
        "empty": b"",
        "text": b"no flows\n" * 20,
        "of another form": sealed(other_head + b"\n" + body),
        "with absurd fields": sealed(json.dumps(lies).encode() + b"\n" + body),
        "shorter than it says": sealed(head + b"\n" + body[:-8]),
        "longer than it says": sealed(head + b"\n" + body + b"x"),
        "deeply nested": sealed(b"[" * 100_000 + b"\n"),
    }


def test_catalogue_M32_damaged_streams_are_refused_whole(host: Host, there: Host, tap: Tap) -> None:
    source = tap(OURS)
    tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    open_connection(source, OURS)
    data, _ = exported(host)

    for what, bad in damaged(data).items():
        with pytest.raises(FlowFileError):
            imported(there, bad)
        assert states(there) == {}, what
    assert imported(there, data) == {"flows": 1, "added": 1}, "the control"


def test_catalogue_N17_no_stream_makes_anything_but_a_refusal(
    host: Host, there: Host, tap: Tap
) -> None:
    """Streams with right checksums in which anything else may be wrong."""
    source = tap(OURS)
    tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    open_connection(source, OURS)
    body = exported(host)[0][:-65]
    chance = random.Random(35)
    refused = 0
    for _ in range(400):
        changed = bytearray(body)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(min(len(body), 2000))
            piece = chance.choice(PIECES)
            changed[place : place + chance.randint(0, 3)] = piece
        data = bytes(changed)
        try:
            imported(there, data + hashlib.sha256(data).hexdigest().encode() + b"\n")
        except VgwError:
            refused += 1
    assert refused > 100


#: What a stream is spoilt with.
PIECES = (
    *(b"", b"0", b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"\n", b"\0", b"\xff"),
    *(b'"u8"', b"Infinity", b"99999999999999999999", b",", b'"', b"}", b"]"),
)


def test_flows_of_another_vm_are_refused_unless_asked_for(
    host: Host, there: Host, tap: Tap
) -> None:
    source = tap(OURS)
    tap(THEIRS)
    host.attach(policy(OURS), "web01")
    open_connection(source, OURS)
    other = document(HTTP, vms={"web02": interface(THEIRS, vm=NO_GRACE)})
    there.attach(other, "web02")
    data, _ = exported(host)

    def take(from_vm: str | None) -> dict[str, Any]:
        return import_flows(
            there, "web02", io.BytesIO(data), lambda piece: put_piece(there, piece), from_vm
        )

    with pytest.raises(VgwError, match="these are flows of VM web01"):
        take(None)
    assert take("web01")["interfaces"][0]["added"] == 1


def test_a_version_with_other_fields_is_understood(host: Host, there: Host, tap: Tap) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    open_connection(source, OURS)
    data, _ = exported(host)
    (section,) = FlowReader(io.BytesIO(data)).sections()

    foreign = _foreign_version(data, section.records)

    assert imported(there, foreign) == {"flows": 1, "added": 1, "unknown": 1}
    assert states(there) == {40001: "tcp_established"}
    assert passes(target, THEIRS)


def _foreign_version(data: bytes, records: Any) -> bytes:
    """Return the stream that a version with other fields, kinds and numbers would have written."""
    head = json.loads(data.split(b"\n", 1)[0])
    names = ["remote", "local", "protocol", "remote_port", "local_port"]
    head["fields"] = [
        ["remote", "u1", 16], ["local", "u1", 16], ["protocol", "u1", 1], ["remote_port", "u2", 1],
        ["local_port", "u2", 1], ["state", "u1", 1], ["opener", "u1", 1], ["mood", "u4", 3],
        ["idle_ns", "u8", 1], ["age_ns", "u8", 1], ["tcp_acked", "u8", 2], ["tcp_end", "u8", 2],
    ]  # fmt: skip
    head["key_fields"] = len(names)
    head["enums"]["vgw_flow_state"] = {"TCP_ESTABLISHED": 77, "TCP_DREAMING": 78}
    rows = np.zeros(
        2, [(name, f"<{kind}", (n,) if n > 1 else ()) for name, kind, n in head["fields"]]
    )
    key, flow = records["key"][0], records["flow"][0]
    for name in names:
        rows[name] = key[name]["bytes"] if name in ("local", "remote") else key[name]
    rows["state"] = [77, 78]
    rows["remote_port"][1] = 9
    rows["opener"], rows["tcp_acked"] = flow["opener"], flow["tcp_acked"]
    rows["tcp_end"] = flow["tcp_end"]
    about = {"interface": OURS, "mac": VM_MAC, "flows": 2, "unchanged": 0}
    body = b"".join(json.dumps(each).encode() + b"\n" for each in (head, about)) + rows.tobytes()
    return body + hashlib.sha256(body).hexdigest().encode() + b"\n"


@pytest.mark.parametrize(
    ("field", "value"),
    [("state", 99), ("opener", 7), ("tcp_fins", 4), ("half_open", 2)],
)
def test_pieces_with_values_that_no_flow_has_are_refused(
    there: Host, tap: Tap, field: str, value: int
) -> None:
    tap(THEIRS)
    there.attach(policy(THEIRS), "web01")
    record = np.zeros(1, RECORD)
    record["flow"]["state"] = abi.FlowState.TCP_ESTABLISHED
    good = Piece("web01", THEIRS, "s", 0, record.tobytes(), last=True)
    assert put_piece(there, good)["added"] == 1
    record["flow"][field] = value

    with pytest.raises(VgwError, match="values that no flow has"):
        put_piece(there, dataclasses.replace(good, records=record.tobytes()))
    with pytest.raises(VgwError, match="another size"):
        put_piece(there, dataclasses.replace(good, records=b"x"))


def fill(host: Host, count: int) -> None:
    """Give a VM so many open connections, without a packet for each."""
    records = np.zeros(count, RECORD)
    records["key"]["local"]["bytes"] = list(abi.address_bytes(ipaddress.ip_address("10.20.0.11")))
    numbers = np.arange(count, dtype=">u4").view("u1").reshape(-1, 4)
    records["key"]["remote"]["bytes"][:, 12:] = numbers
    records["key"]["remote"]["bytes"][:, 10:12] = 255
    records["key"]["protocol"] = 6
    flow = records["flow"]
    flow["state"], flow["generation"] = abi.FlowState.TCP_ESTABLISHED, 1
    flow["last_seen_ns"] = flow["created_ns"] = coarse_now_ns()
    (endpoint,) = host.open_endpoints("web01")
    with endpoint:
        assert put_flows(host.artefact, endpoint.fds, records).added == count


def test_many_flows_and_a_table_without_room(host: Host, there: Host, tap: Tap) -> None:
    tap(OURS)
    tap(THEIRS)
    host.attach(policy(OURS), "web01")
    small = document(HTTP, vms={"web01": interface(THEIRS, ", conntrack_max: 4096")})
    there.attach(small, "web01")
    fill(host, 10_000)

    row = imported(there, exported(host)[0])

    assert row["flows"] == 10_000
    assert (row["added"], row["full"]) == (4096, 10_000 - 4096)
    assert meta(there).entries == 4096
    assert host.expire("web01") == 0, "the queue has each live flow once"
    assert meta(host).entries == 10_000


def test_a_running_controller_takes_the_pieces(
    host: Host, there: Host, tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tap(OURS), tap(THEIRS)
    host.attach(policy(OURS), "web01")
    there.attach(policy(THEIRS), "web01")
    fill(host, 100)
    open_connection(source, OURS)
    monkeypatch.setattr(flow_import, "PIECE", 30)
    run("ip", "link", "set", "lo", "up")
    controller = Controller(there.paths, 9477)
    try:
        answer = import_flows(
            there, "web01", io.BytesIO(exported(host)[0]), controller.client.put_flows
        )
        assert answer["interfaces"][0]["added"] == 101
        assert [record["sequence"] for record in controller.records("import")] == [0]
        with pytest.raises(VgwError, match="records in the request is not base64"):
            controller.client.call(
                "conntrack_import", vm="web01", interface=THEIRS, stream="x", sequence=0,
                records="\N{SNOWMAN}", last=True,
            )  # fmt: skip
    finally:
        controller.end()
    assert passes(target, THEIRS)
