# SPDX-License-Identifier: Apache-2.0
"""Policy files: what is accepted, what is warned about, and that all mistakes come at once."""

import time
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.policy.texts import (
    RULE,
    interface,
    parse,
    problems_of,
    rule,
    whole,
)
from vgw.abi import Action, FlowState, Mode
from vgw.errors import ExitCode, PolicyError
from vgw.policy.guards import half_open_max
from vgw.policy.model import (
    ANY_SERVICE,
    ICMP,
    ICMPV6,
    SCTP,
    TCP,
    UDP,
    AllowedPair,
    Guards,
    Hook,
    Logging,
    Service,
    Tier,
    Tracking,
)
from vgw.policy.parse import parse_sources

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_key_of_the_schema() -> None:
    document = parse("""\
schema: vgw/v1
vms:
  web01:
    labels: {role: web, env: prod}
    mode: monitor
    conntrack:
      timeouts: {tcp_established: 1d2h, udp_single: 5s}
      half_open_max: 600
      new_per_second: 10000
      grace: 0s
    reject_per_second: 7
    log: {flows: true, per_second: 50}
    interfaces:
      - name: tap-web01
        mac: 52:54:00:00:00:AA
        addresses: [10.20.0.11, "2001:db8:20::11"]
        allowed_pairs: [{address: 10.20.0.100, mac: "00:00:5e:00:01:01"}, {address: 10.9.0.0/16}]
        vlans: [7, 4094]
        guards: {mac: true, address: true, arp: true, nd: true, dhcp_server: true, ra: false}
        conntrack_max: 1024
        hook: tc
  db01: {}
groups:
  web: {labels: {role: web}}
  inside: {groups: [web], cidrs: [10.20.0.0/16, "2001:db8::1"], vms: [db01]}
services:
  http: [tcp/80, tcp/8000-8099]
policies:
  - name: p1
    tier: group
    applies_to: {labels: {role: web}}
    ingress:
      - name: r1
        action: reject
        from: [inside, 192.0.2.0/24, "2001:db8::7"]
        local: [10.20.0.11]
        services: [http, udp/53]
        source_ports: [1024-65535, "53"]
        log: true
        enabled: false
        comment: "Größe: ticket 4711"
    egress:
      - {name: r2, action: pass, to: [any]}
  - {name: p2, tier: baseline, applies_to: {vms: [db01]}}
defaults: {ingress: reject, egress: drop, log: true}
""")
    web01 = document.vms["web01"]
    (nic,) = web01.interfaces
    assert web01.reject_per_second == 7
    assert web01.log == Logging(flows=True, per_second=50)
    assert (web01.mode, dict(web01.labels)) == (Mode.MONITOR, {"role": "web", "env": "prod"})
    assert nic.mac == "52:54:00:00:00:aa"
    assert nic.addresses == (ip_address("10.20.0.11"), ip_address("2001:db8:20::11"))
    assert nic.allowed_pairs == (
        AllowedPair(ip_network("10.20.0.100"), "00:00:5e:00:01:01"),
        AllowedPair(ip_network("10.9.0.0/16")),
    )
    assert (nic.vlans, nic.guards, nic.hook) == ((7, 4094), Guards(ra=False), Hook.TC)
    assert nic.conntrack_max == 1024
    timeouts = {FlowState.TCP_ESTABLISHED: 26 * 3600, FlowState.UDP_SINGLE: 5}
    assert dict(nic.tracking.timeouts_ns) == {
        state: seconds * 10**9 for state, seconds in timeouts.items()
    }
    assert nic.tracking.half_open_max == 600
    assert (nic.tracking.new_per_second, nic.tracking.grace_seconds) == (10000, 0)
    inside = document.groups["inside"]
    assert (inside.groups, inside.vms) == (("web",), ("db01",))
    assert inside.cidrs == (ip_network("10.20.0.0/16"), ip_network("2001:db8::1"))
    assert document.services["http"] == (Service(TCP, (80, 80)), Service(TCP, (8000, 8099)))
    first, second = document.policies
    assert (first.tier, dict(first.applies_to.labels)) == (Tier.GROUP, {"role": "web"})
    assert second.applies_to.vms == ("db01",)
    (r1,), (r2,) = first.ingress, first.egress
    assert r1.peers == ("inside", ip_network("192.0.2.0/24"), ip_network("2001:db8::7"))
    assert r1.local == (ip_network("10.20.0.11"),)
    assert r1.services == ("http", Service(UDP, (53, 53)))
    assert r1.source_ports == ((1024, 65535), (53, 53))
    assert (r1.action, r1.log, r1.enabled) == (Action.REJECT, True, False)
    assert (r1.comment, r1.file, r1.line) == ("Größe: ticket 4711", "policy.yaml", 33)
    assert (r2.action, r2.peers, r2.services) == (Action.PASS, (), ())
    assert document.defaults.ingress is Action.REJECT
    assert document.defaults.egress is Action.DROP
    assert document.defaults.log


def test_what_is_left_out_has_the_documented_defaults() -> None:
    document = parse(interface("mac: 52:54:00:00:00:11, addresses: [10.0.0.1]"))
    (nic,) = document.vms["web01"].interfaces
    assert (nic.guards, nic.conntrack_max, nic.hook) == (Guards(), 65536, Hook.AUTO)
    assert nic.tracking == Tracking((), None, 0, 60)
    assert half_open_max(nic) == 16384
    assert document.vms["web01"].mode is Mode.ENFORCE
    assert document.vms["web01"].reject_per_second == 100
    assert document.vms["web01"].log == Logging(flows=False, per_second=1000)
    assert document.defaults.ingress is Action.DROP
    assert document.defaults.egress is Action.ACCEPT
    assert not document.defaults.log


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_valid(example: Path) -> None:
    document = parse_sources([(example.name, example.read_text())])
    assert document.policies
    # The one warning is about a guard that an example turns off on purpose.
    assert all("`guards` turns it off" in warning.message for warning in document.warnings)


TEN_MISTAKES = """\
schema: vgw/v1
vms:
  web01:
    labels: {role: web}
    interfaces:
      - name: tap-web01-is-too-long
        mac: 53:54:00:00:00:11
        addresses: [10.20.0.11/24]
groups:
  office: {cidrs: [192.0.2.1/24]}
polices: []
policies:
  - name: web
    tier: vms
    applies_to: {vms: [web02]}
    ingress:
      - {name: a, action: accept, from: [ofice], services: [tcp/70000]}
      - {name: a, action: accept}
"""


def test_ten_mistakes_give_ten_problems_with_their_places() -> None:
    found = problems_of(TEN_MISTAKES)
    places = [(problem.line, problem.column, problem.path) for problem in found]
    assert places == [
        (6, 15, "vms.web01.interfaces[0].name"),
        (7, 14, "vms.web01.interfaces[0].mac"),
        (8, 21, "vms.web01.interfaces[0].addresses[0]"),
        (10, 20, "groups.office.cidrs[0]"),
        (11, 1, "polices"),
        (14, 11, "policies[0].tier"),
        (15, 24, "policies[0].applies_to.vms[0]"),
        (17, 42, "policies[0].ingress[0].from[0]"),
        (17, 61, "policies[0].ingress[0].services[0]"),
        (18, 16, "policies[0].ingress[1].name"),
    ]
    assert "192.0.2.0/24" in found[3].message
    assert "did you mean 'policies'?" in found[4].message
    assert "did you mean 'web01'?" in found[6].message
    assert "did you mean 'office'?" in found[7].message
    assert "already, on line 17" in found[9].message


def test_the_error_prints_one_line_for_each_problem_and_exits_with_three() -> None:
    with pytest.raises(PolicyError) as caught:
        parse(TEN_MISTAKES)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems)
    assert lines[4].startswith("policy.yaml:11:1: polices: unknown key 'polices'")
    assert caught.value.exit_code is ExitCode.POLICY_INVALID


@pytest.mark.parametrize(
    ("text", "service"),
    [
        ("tcp/1-65535", Service(TCP, (1, 65535))),
        ("udp/53", Service(UDP, (53, 53))),
        ("sctp/38412", Service(SCTP, (38412, 38412))),
        ("icmp/echo-request", Service(ICMP, icmp_type=8)),
        ("icmp/any", Service(ICMP)),
        ("icmp/3/4", Service(ICMP, icmp_type=3, icmp_code=4)),
        ("icmp/timestamp-reply/any", Service(ICMP, icmp_type=14)),
        ("icmpv6/echo-request", Service(ICMPV6, icmp_type=128)),
        ("icmpv6/router-solicitation/0", Service(ICMPV6, icmp_type=133, icmp_code=0)),
        ("icmpv6/255", Service(ICMPV6, icmp_type=255)),
        ("proto/1", Service(1)),
        ("proto/255", Service(255)),
        ("any", ANY_SERVICE),
    ],
)
def test_services(text: str, service: Service) -> None:
    assert parse(whole(f"services: {{s: [{text}]}}")).services["s"] == (service,)


def test_words_that_yaml_turns_into_other_values_stay_names() -> None:
    document = parse(
        whole(
            "vms: {no: {labels: {on: yes, port: 0o17, at: 2024-01-01, x: 1e3}}, 017: {}, true: {}}"
        )
    )
    assert set(document.vms) == {"no", "017", "true"}
    assert dict(document.vms["no"].labels) == {
        "on": "yes",
        "port": "0o17",
        "at": "2024-01-01",
        "x": "1e3",
    }
    assert parse(interface("mac: 10:20:30:40:50:59")).vms["web01"].interfaces[0].mac == (
        "10:20:30:40:50:59"
    )


def test_files_are_one_document_in_their_order() -> None:
    policy = "policies: [{{name: {}, tier: vm, applies_to: {{all: true}}, ingress: [{}]}}]"
    document = parse_sources(
        [
            ("a.yaml", whole(policy.format("a", "{name: r, action: drop, from: [g]}"))),
            ("b.yaml", whole(policy.format("b", "") + "\ngroups: {g: {cidrs: [10.0.0.0/8]}}")),
        ]
    )
    assert [policy.name for policy in document.policies] == ["a", "b"]
    assert document.policies[0].ingress[0].file == "a.yaml"


def test_conflicts_between_files_name_both_places() -> None:
    found = problems_of(
        whole("vms: {a: {}}\ngroups: {g: {}}\nservices: {s: [tcp/1]}\ndefaults: {}"),
        whole("vms: {a: {}}\ngroups: {g: {}}\nservices: {s: [tcp/1]}\ndefaults: {}"),
        "vms: {b: {}}",
    )
    assert [(problem.file, problem.line, problem.path) for problem in found] == [
        ("2.yaml", 2, "vms.a"),
        ("2.yaml", 3, "groups.g"),
        ("2.yaml", 4, "services.s"),
        ("2.yaml", 5, "defaults"),
        ("3.yaml", 1, "document"),
    ]
    assert found[0].message == "the VM 'a' is defined twice; it is defined at 1.yaml:2"
    assert "once in all files; it is at 1.yaml:5" in found[3].message


def test_an_unreadable_file_does_not_make_its_names_unknown() -> None:
    found = problems_of(
        whole("policies: [{name: p, tier: vm, applies_to: {vms: [a]}, ingress: 1}]"),
        whole("vms: {a: {}\n"),
    )
    assert [problem.file for problem in found] == ["1.yaml", "2.yaml"]
    assert found[1].message.startswith("not valid YAML: did not find expected ',' or '}'")


def test_a_wrong_definition_does_not_make_its_name_unknown() -> None:
    (problem,) = problems_of(
        rule("from: [10.x]").replace("office:", "10.x:").replace("192.0.2.0", "192.0.2.1")
    )
    assert problem.path == "groups.10.x.cidrs[0]"


def test_no_files() -> None:
    with pytest.raises(PolicyError, match="no policy file was found"):
        parse_sources([])


def test_warnings() -> None:
    document = parse("""\
schema: vgw/v1
vms:
  web01:
    interfaces:
      - {name: tap1}
      - {name: tap2, mac: 52:54:00:00:00:11, addresses: [10.0.0.1], guards: {ra: false, nd: false}}
  idle: {labels: {role: idle}}
groups:
  empty: {}
  nobody: {labels: {role: ghost}}
  addressless: {vms: [idle]}
  fine: {vms: [web01]}
policies:
  - {name: ghosts, tier: vm, applies_to: {labels: {role: ghost}}}
  - {name: everyone, tier: vm, applies_to: {all: true}}
""")
    found = [(each.line, each.column, each.path, each.message) for each in document.warnings]
    tap1 = "interface 'tap1' of VM 'web01' is without the guards"
    assert found == [
        (5, 9, "vms.web01.interfaces[0]", f"{tap1} mac: the interface has no `mac`"),
        (
            5,
            9,
            "vms.web01.interfaces[0]",
            f"{tap1} address, arp, nd: the interface has no `addresses`",
        ),
        (
            6,
            9,
            "vms.web01.interfaces[1]",
            "interface 'tap2' of VM 'web01' is without the guards nd, ra: `guards` turns it off",
        ),
        (7, 3, "vms.idle", "the VM 'idle' has no interfaces; nothing of it is protected"),
        (9, 3, "groups.empty", "the group 'empty' has no addresses and matches nothing"),
        (10, 3, "groups.nobody", "the group 'nobody' has no addresses and matches nothing"),
        (
            11,
            3,
            "groups.addressless",
            "the group 'addressless' has no addresses and matches nothing",
        ),
        (14, 12, "policies[0].name", "the policy 'ghosts' applies to no VM"),
    ]


def test_the_digest_identifies_the_text() -> None:
    text = whole("vms: {}")
    assert parse(text).digest == parse_sources([("other.yaml", text)]).digest
    assert len(parse(text).digest) == 64
    others = {
        parse(text + "# \n").digest,
        parse_sources([("a", text), ("b", text)]).digest,
        parse_sources(
            [("a", text + text.replace("schema", "# schema").replace("vms", "# "))]
        ).digest,
    }
    assert parse(text).digest not in others
    assert len(others) == 3


def test_fifty_thousand_rules_take_seconds() -> None:
    rules = "\n".join(
        f"      - {{name: r{n}, action: accept, from: [10.{n >> 8 & 255}.{n & 255}.0/24], "
        f"services: [tcp/{n % 60000 + 1}]}}"
        for n in range(50_000)
    )
    text = RULE.replace("INGRESS", "ingress").replace(
        "      - {name: r1, action: accept, FIELD}", rules
    )
    started = time.process_time()
    document = parse(text)
    assert time.process_time() - started < 60
    assert len(document.policies[0].ingress) == 50_000
