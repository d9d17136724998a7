# SPDX-License-Identifier: Apache-2.0
"""Every mistake a policy can have: its exact place, its path and what is said about it."""

import pytest

from tests.policy.texts import (
    INTERFACE,
    RULE,
    assert_one_problem,
    interface,
    parse,
    problems_of,
    rule,
    whole,
)
from vgw.abi import MAX_ADDRESSES, MAX_VLANS

POLICY = "{name: p, tier: vm, applies_to: {all: true}"
DROP_R = "{name: r, action: drop}"
TWO_MACS = """\
vms:
  a: {interfaces: [{name: t, mac: 52:54:00:00:00:0a}]}
  b: {interfaces: [{name: u, mac: §52:54:00:00:00:0A}]}
"""


@pytest.mark.parametrize(
    ("field", "path", "message"),
    [
        ("from: [§unknown]", "from[0]", "unknown group 'unknown'"),
        ("from: §[]", "from", "selecting nothing is not selecting everything"),
        ("from: §any", "from", "a list is expected here, not 'any'"),
        ("from: [§any, office]", "from[0]", "covers the other entries"),
        ("from: [§'fe80::1%eth0']", "from[0]", "has a zone"),
        ("from: [§10.0.0.256]", "from[0]", "not an address"),
        ("from: [§10.0.0.0-10.0.0.9]", "from[0]", "unknown group"),
        ("from: [§{a: b}]", "from[0]", "single value is expected here, not a mapping"),
        ("§to: [office]", "to", "an ingress rule has `from`, not `to`"),
        ("local: [§any]", "local[0]", "leave it out"),
        ("local: §[]", "local", "the list is empty"),
        ("services: §[]", "services", "the list is empty"),
        ("services: [§https]", "services[0]", "unknown service 'https'"),
        ("services: [§tcp]", "services[0]", "tcp/1-65535"),
        ("services: [§80]", "services[0]", "as in tcp/80"),
        ("services: [§22:22]", "services[0]", "'22:22' is not a name"),
        ("services: [§tcp/any]", "services[0]", "tcp/1-65535"),
        ("services: [§TCP/80]", "services[0]", "not a protocol"),
        ("services: [§esp/80]", "services[0]", "by their number as in proto/47"),
        ("services: [§proto/47/80]", "services[0]", "has no ports"),
        ("services: [§icmp/256]", "services[0]", "0 to 255"),
        ("services: [§icmp/packet-too-big]", "services[0]", "not an ICMP type"),
        ("services: [§icmp/3/999]", "services[0]", "not an ICMP code from 0 to 255"),
        ("services: [§icmp/any/0]", "services[0]", "a code needs one type"),
        ("§source_ports: ['53']", "source_ports", "`any` (no `services` given) has none"),
        ("§source_ports: ['53'], services: [ping]", "source_ports", "the service 'ping' has none"),
        ("services: [any], §source_ports: ['53']", "source_ports", "`any` has none"),
        ("services: [proto/47], §source_ports: ['53']", "source_ports", "protocol 47 has none"),
        ("services: [udp/53], source_ports: §[]", "source_ports", "the list is empty"),
        ("log: §yes", "log", "write true or false"),
        ("log: §on", "log", "write true or false"),
        ("log: §1", "log", "write true or false"),
        ("enabled: §True", "enabled", "write true or false"),
        ("comment: §~", "comment", "is a null value"),
        ("comment: §'a\n\n        b'", "comment", "one line"),
        (r'comment: §"\e[31m"', "comment", "printable"),
        ("comment: §" + "x" * 257, "comment", "at most 256"),
        ("§serivces: [http]", "serivces", "did you mean 'services'?"),
        ("§<<: {log: true}", "'<<'", "merge keys"),
        ("log: true, §log: false", "log", "duplicate key 'log'; it is already on line 13"),
    ],
)
def test_mistakes_in_rules(field: str, path: str, message: str) -> None:
    assert_one_problem(rule(field), f"policies[0].ingress[0].{path}", message)


@pytest.mark.parametrize(
    ("field", "path", "message"),
    [
        ("from: [§10.0.0.1/8]", "from[0]", "the network is 10.0.0.0/8"),
        ("from: [§10.0.0.0/33]", "from[0]", "IPv4 has /0 to /32"),
        ("from: [§'2001:db8::/129']", "from[0]", "IPv6 has /0 to /128"),
        ("from: [§10.0.0.0/08]", "from[0]", "no valid prefix length"),
        ("from: [§10.0.0.0/255.0.0.0]", "from[0]", "no valid prefix length"),
        ("from: [§'::ffff:10.0.0.0/104']", "from[0]", "write it as IPv4"),
        ("from: [§010.0.0.1]", "from[0]", "not an address"),
        ("local: [§10.0.0.1/8]", "local[0]", "host bits"),
        ("services: [§tcp/0]", "services[0]", "1 to 65535"),
        ("services: [§tcp/65536]", "services[0]", "1 to 65535"),
        ("services: [§tcp/080]", "services[0]", "1 to 65535"),
        ("services: [§tcp/0x50]", "services[0]", "1 to 65535"),
        ("services: [§tcp/http]", "services[0]", "1 to 65535"),
        ("services: [§tcp/-5]", "services[0]", "1 to 65535"),
        ("services: [§tcp/٢٢]", "services[0]", "1 to 65535"),
        ("services: [§tcp/90-80]", "services[0]", "reversed; write 80-90"),
        ("services: [§proto/0]", "services[0]", "from 1 to 255"),
        ("services: [§proto/300]", "services[0]", "from 1 to 255"),
        ("services: [§proto/0o17]", "services[0]", "from 1 to 255"),
        ("services: [udp/53], source_ports: [§53-1]", "source_ports[0]", "reversed; write 1-53"),
    ],
)
def test_catalogue_N4_values_that_look_right_are_mistakes(
    field: str, path: str, message: str
) -> None:
    """The rest of the policy, which is valid, is refused with them: there is no document."""
    assert_one_problem(rule(field), f"policies[0].ingress[0].{path}", message)


@pytest.mark.parametrize("word", ["allow", "Accept", "no"])
def test_unknown_actions(word: str) -> None:
    text = RULE.replace("INGRESS", "egress").replace("accept, FIELD", f"§{word}")
    path = "policies[0].egress[0].action"
    assert_one_problem(text, path, "accept, drop, reject or pass")


def test_from_in_an_egress_rule() -> None:
    text = rule("§from: [office]", "egress")
    message = "an egress rule has `to`, not `from`"
    assert_one_problem(text, "policies[0].egress[0].from", message)


@pytest.mark.parametrize(
    ("field", "path", "message"),
    [
        ("§name: tap2", "name", "duplicate key"),
        ("§colour: red", "colour", "unknown key 'colour' of an interface; allowed: name, mac"),
        ("mac: §52:54:00:00:00", "mac", "not a MAC address"),
        ("mac: §52-54-00-00-00-11", "mac", "not a MAC address"),
        ("mac: §01:54:00:00:00:11", "mac", "multicast"),
        ("mac: §00:00:00:00:00:00", "mac", "zero"),
        ("mac: §null", "mac", "'null' is a null value"),
        ("mac: §", "mac", "the value is missing"),
        ("addresses: §learn", "addresses", "not available yet"),
        ("addresses: §10.0.0.1", "addresses", "a list is expected"),
        ("addresses: [§10.0.0.1/32]", "addresses[0]", "one address"),
        ("addresses: [§224.0.0.1]", "addresses[0]", "is multicast"),
        ("addresses: [§0.0.0.0]", "addresses[0]", "the unspecified address"),
        ("addresses: [§127.0.0.1]", "addresses[0]", "is loopback"),
        ("addresses: [§255.255.255.255]", "addresses[0]", "is broadcast"),
        ("addresses: [§'::ffff:10.0.0.1']", "addresses[0]", "write it as IPv4"),
        ("addresses: [10.0.0.1, §10.0.0.1]", "addresses[1]", "in this list already"),
        ("addresses: ['2001:db8::1', §'2001:DB8:0::1']", "addresses[1]", "in this list already"),
        ("allowed_pairs: [{address: §0.0.0.0/0}]", "allowed_pairs[0].address", "address: false"),
        ("allowed_pairs: [{address: §'::/0'}]", "allowed_pairs[0].address", "address: false"),
        ("allowed_pairs: [{address: §224.0.0.0/8}]", "allowed_pairs[0].address", "multicast"),
        ("allowed_pairs: [§{mac: 52:54:00:00:00:12}]", "allowed_pairs[0]", "needs the key"),
        ("allowed_pairs: [§10.0.0.1]", "allowed_pairs[0]", "a mapping is expected"),
        (
            "allowed_pairs: [{address: 10.0.0.1}, §{address: 10.0.0.1/32}]",
            "allowed_pairs[1]",
            "in the list already, on line 5",
        ),
        (
            "allowed_pairs: [{address: 10.0.0.1, mac: §ff:ff:ff:ff:ff:ff}]",
            "allowed_pairs[0].mac",
            "multicast",
        ),
        ("vlans: [§0]", "vlans[0]", "from 1 to 4094"),
        ("vlans: [§4095]", "vlans[0]", "from 1 to 4094"),
        ("vlans: [7, §7]", "vlans[1]", "in this list already"),
        ("vlans: [§0x7]", "vlans[0]", "from 1 to 4094"),
        (f"§vlans: {list(range(1, MAX_VLANS + 2))}", "vlans", "an interface has at most"),
        ("guards: §false", "guards", "a mapping is expected"),
        ("guards: {§dhcp_servers: true}", "guards.dhcp_servers", "did you mean 'dhcp_server'?"),
        ("guards: {mac: §off}", "guards.mac", "write true or false"),
        ("conntrack_max: §1023", "conntrack_max", "from 1024 to 131072"),
        ("conntrack_max: §131073", "conntrack_max", "from 1024 to 131072"),
        ("conntrack_max: §0o17777", "conntrack_max", "decimal"),
        ("conntrack_max: §017777", "conntrack_max", "decimal"),
        ("conntrack_max: §10_000", "conntrack_max", "decimal"),
        ("conntrack_max: §4e3", "conntrack_max", "decimal"),
        ("hook: §tcx", "hook", "auto, xdp or tc"),
    ],
)
def test_mistakes_in_interfaces(field: str, path: str, message: str) -> None:
    assert_one_problem(interface(field), f"vms.web01.interfaces[0].{path}", message)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("grace: §1", "grace", "write it as 30s"),
        ("grace: §61m", "grace", "from 0s to 3600s"),
        ("grace: §-1s", "grace", "write it as 30s"),
        ("half_open_max: §511", "half_open_max", "from 512 to 131072"),
        ("half_open_max: §none", "half_open_max", "decimal"),
        ("new_per_second: §10000001", "new_per_second", "from 0 to 10000000"),
        ("§half_open: 3", "half_open", "did you mean"),
        ("timeouts: §30s", "timeouts", "a mapping is expected"),
        ("timeouts: {§tcp: 30s}", "timeouts.tcp", "unknown key"),
        ("timeouts: {§dead: 30s}", "timeouts.dead", "unknown key"),
        ("timeouts: {icmp: §0s}", "timeouts.icmp", "from 1s to"),
        ("timeouts: {icmp: §31d}", "timeouts.icmp", "from 1s to"),
        ("timeouts: {icmp: §1h 2m}", "timeouts.icmp", "write it as 30s"),
    ],
)
def test_mistakes_in_conntrack(text: str, path: str, message: str) -> None:
    policy = f"schema: vgw/v1\nvms: {{web01: {{conntrack: {{{text}}}}}}}\n"
    assert_one_problem(policy, f"vms.web01.conntrack.{path}", message)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("§vms: {}", "document", "a policy file needs the key `schema`"),
        ("schema: §vgw/v2\npolicys: {}", "schema", "reads only vgw/v1"),
        ("schema: §[]", "schema", "reads only vgw/v1"),
        ("schema: vgw/v1\n§vms2: {}", "vms2", "did you mean 'vms'?"),
        ("schema: vgw/v1\nvms:§", "vms", "the value is missing"),
        ("schema: vgw/v1\npolicies: §{}", "policies", "a list is expected here, not a mapping"),
        ("§- schema", "document", "is a mapping that begins with"),
        ("§vgw", "document", "is a mapping that begins with"),
        ("§~", "document", "the file is empty"),
        ("§", "document", "the file is empty"),
        ("§# nothing but a comment\n", "document", "the file is empty"),
    ],
)
def test_mistakes_in_the_frame_of_a_file(text: str, path: str, message: str) -> None:
    assert_one_problem(text, path, message)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("vms: {? §[a] : {}}", "vms.?", "a key must be a text"),
        ("vms: {a: {reject_per_second: §-1}}", "vms.a.reject_per_second", "from 0 to 10000"),
        ("vms: {a: {log: {per_second: §100001}}}", "vms.a.log.per_second", "from 0 to 100000"),
        ("vms: {a: {log: {flows: §maybe}}}", "vms.a.log.flows", "true or false"),
        ("vms: {a: {log: {§flow: true}}}", "vms.a.log.flow", "unknown key"),
        ("vms: {a: {log: §true}}", "vms.a.log", "a mapping is expected"),
        ("vms: {a: {reject_per_second: §10001}}", "vms.a.reject_per_second", "from 0 to 10000"),
        ("vms: {a: {mode: §enforced}}", "vms.a.mode", "enforce, monitor or quarantine"),
        ("vms: {a: {labels: {§a b: c}}}", "vms.a.labels.'a b'", "is not a label"),
        ("vms: {a: {labels: {k: §~}}}", "vms.a.labels.k", "null"),
        ("vms: {a: {labels: {k: §[a]}}}", "vms.a.labels.k", "single value"),
        ("groups: {§any: {}}", "groups.any", "cannot name a group"),
        ("groups: {§10.0.0.1: {}}", "groups.10.0.0.1", "cannot name a group"),
        ("groups: {g: {labels: §{}}}", "groups.g.labels", "would select every VM"),
        ("groups: {g: {vms: [§nobody]}}", "groups.g.vms[0]", "unknown VM 'nobody'"),
        ("groups: {g: {groups: [§gg]}}", "groups.g.groups[0]", "unknown group 'gg'"),
        ("groups: {g: {groups: [§g]}}", "groups.g.groups[0]", "g -> g"),
        (
            "groups: {a: {groups: [b]}, b: {groups: [c]}, c: {groups: [§a]}, d: {groups: [a]}}",
            "groups.c.groups[0]",
            "a -> b -> c -> a",
        ),
        ("services: {§any: [tcp/1]}", "services.any", "cannot name a service"),
        ("services: {§tcp: [tcp/1]}", "services.tcp", "cannot name a service"),
        ("services: {§80: [tcp/80]}", "services.80", "cannot name a service"),
        ("services: {s: §[]}", "services.s", "selecting nothing"),
        ("services: {s: §tcp/80}", "services.s", "a list is expected"),
        ("services: {t: [tcp/1], s: [§t]}", "services.s[0]", "is not a service"),
        ("defaults: {ingress: §pass}", "defaults.ingress", "a default cannot be pass"),
        ("defaults: {egress: §allow}", "defaults.egress", "accept, drop or reject"),
        ("defaults: {log: §maybe}", "defaults.log", "true or false"),
        ("policies: [§{name: p, tier: vm}]", "policies[0]", "needs the key `applies_to`"),
        (
            "policies: [{name: p, tier: §high, applies_to: {all: true}}]",
            "policies[0].tier",
            "admin, group, vm or baseline",
        ),
        (
            "policies: [{name: p, tier: vm, applies_to: §{}}]",
            "policies[0].applies_to",
            "exactly one of all, labels or vms, not none",
        ),
        (
            "policies: [{name: p, tier: vm, applies_to: §{all: true, labels: {a: b}}}]",
            "policies[0].applies_to",
            "not `all` and `labels`",
        ),
        (
            "policies: [{name: p, tier: vm, applies_to: {all: §false}}]",
            "policies[0].applies_to.all",
            "can only be true",
        ),
        (
            "policies: [{name: p, tier: vm, applies_to: {vms: §[]}}]",
            "policies[0].applies_to.vms",
            "selecting nothing",
        ),
        (
            "policies: [{name: p, tier: vm, applies_to: {labels: §{}}}]",
            "policies[0].applies_to.labels",
            "would select every VM",
        ),
        (
            f"policies: [{POLICY}}}, {POLICY.replace('p,', '§p,')}}}]",
            "policies[1].name",
            "the policy 'p' is defined twice",
        ),
        (
            f"policies: [{POLICY}, ingress: [{DROP_R}], egress: [{DROP_R.replace('r,', '§r,')}]}}]",
            "policies[0].egress[0].name",
            "already, on line 2",
        ),
        (
            "vms: {a: {interfaces: [{name: t}]}, b: {interfaces: [{name: §t}]}}",
            "vms.b.interfaces[0].name",
            "belongs to VM 'a' at 1.yaml:2 already",
        ),
        (
            TWO_MACS,
            "vms.b.interfaces[0].mac",
            "belongs to VM 'a'",
        ),
    ],
)
def test_mistakes_in_sections(text: str, path: str, message: str) -> None:
    assert_one_problem(whole(text), path, message)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("vms: {§../../etc: {}}", "vms.'../../etc'", "is not a name"),
        ("vms: {§a/b: {}}", "vms.'a/b'", "is not a name"),
        ("vms: {§'': {}}", "vms.''", "is not a name"),
        ("vms: {§-x: {}}", "vms.'-x'", "is not a name"),
        ("vms: {§'a%n': {}}", "vms.'a%n'", "is not a name"),
        ('vms: {§"a\\n": {}}', r"vms.'a\n'", r"'a\n' is not a name"),
        ('vms: {§"\\e[1m": {}}', r"vms.'\x1b[1m'", "is not a name"),
        ("vms: {§w\u0435b: {}}", r"vms.'w\u0435b'", r"'w\u0435b' is not a name"),
        ("vms: {§" + "a" * 64 + ": {}}", "vms.'" + "a" * 64 + "'", "1 to 63"),
    ],
)
def test_catalogue_N6_names_of_vms_that_are_more_than_names(
    text: str, path: str, message: str
) -> None:
    assert_one_problem(whole(text), path, message)


def test_catalogue_N6_a_name_of_64_kilobytes_is_refused_in_one_short_line() -> None:
    (problem,) = problems_of(whole(f"vms: {{? {'a' * 65536} : {{}}}}"))
    assert "is not a name" in problem.message
    assert len(str(problem)) < 300


@pytest.mark.parametrize(
    "name", ["a b", "tap/1", "a:b", ".", "..", "", "sixteen-letters-", "tap\u00e9"]
)
def test_interface_names_that_the_kernel_or_a_log_would_not_take(name: str) -> None:
    (problem,) = problems_of(INTERFACE.replace("tap1, FIELD", f'"{name}"'))
    assert "is not an interface name" in problem.message


def test_an_interface_has_room_for_its_addresses_and_the_derived_one() -> None:
    listed = [f"{{address: 10.1.{number}.0/24}}" for number in range(MAX_ADDRESSES - 2)]
    start = "mac: 52:54:00:00:00:11, addresses: [10.0.0.1], allowed_pairs:"
    document = parse(interface(f"{start} [{', '.join(listed)}]"))
    assert len(document.vms["web01"].interfaces[0].allowed_pairs) == MAX_ADDRESSES - 2

    listed.append("{address: 10.2.0.0/16}")
    (problem,) = problems_of(interface(f"{start} [{', '.join(listed)}]"))
    assert problem.path == "vms.web01.interfaces[0].allowed_pairs"
    assert problem.message.startswith(f"{MAX_ADDRESSES + 1} addresses")
