# SPDX-License-Identifier: Apache-2.0
"""The catalogue of packets (A to L), life cycle (M) and hostile input (N): what each id is about.

The letters of `layers`: r rows of a verdict table, run on the evaluator and on the loaded programs;
n real packets through a device; c the control side alone; f faults put in; z fuzzing.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Entry(NamedTuple):
    """One id of the catalogue."""

    id: str
    layers: str
    title: str


_TEXT: Final = """
A1 n frames shorter than an Ethernet header
A2 r nothing behind the Ethernet header
A3 r IPv4 header cut
A4 r IPv6 header cut
A5 r upper header cut
A6 r the shortest packets that are whole
A7 r IPv4 total length beyond the frame
A8 r IPv4 total length below the header, or zero
A9 r frame longer than the packet in it
A10 r upper header that lies in the padding
A11 r IPv6 payload length that lies
A12 r UDP length that lies
A13 r TCP data offset too small or too large
A14 r IP version and EtherType that differ
A15 r every accepted packet, cut at every byte
A16 n headers outside the linear part of a socket buffer
B1 r one 802.1Q tag
B2 r priority tags
B3 r two tags and more, 802.1ad
B4 n tag beside the frame or in it
B5 r 802.3 length with LLC or SNAP
B6 r tag, then LLC or SNAP
B7 r EtherTypes other than IP and ARP
B8 r protocols of bridges and switches
B9 r source MAC that is not the VM's
B10 r source MAC of the gateway or another VM
B11 r flooded frames for somebody else
B12 r RARP
B13 r wake on LAN and storage over Ethernet
B14 n frame longer than the MTU
C1 r IPv4 header length below five words
C2 r IPv4 options
C3 r IPv4 header length beyond the frame
C4 r source routes, record route, timestamps
C5 r broken IPv4 options
C6 r IGMP with router alert
C7 r IGMP with another option
C8 r reserved flag and type of service
C9 r TTL 0 and 1
C10 r wrong checksums
C11 r protocol numbers without a rule
C12 r IPv4 sources that are no host's
D1 r first fragment with the whole upper header
D2 r tiny first fragment
D3 r TCP fragment at offset 1
D4 r later fragment of an accepted packet
D5 r later fragment of a denied or unseen packet
D6 r fragments out of order and twice
D7 n overlapping fragments, same id of another protocol
D8 r fragments beyond the largest datagram
D9 r fragments with impossible lengths or flags
D10 n reuse of an id, by another flow or another VM
D11 n flood of first fragments
D12 r later fragment smaller than an ICMP header
D13 r fragments with options, fragments in a VLAN
D14 f memory of a fragment lost in between
E1 r hop-by-hop options
E2 r hop-by-hop options behind another header
E3 r destination options and other extension headers
E4 r routing header of type 0
E5 r routing headers of other types
E6 r long chains of extension headers
E7 r extension headers longer than the packet
E8 r authentication header before TCP
E9 r next headers that are no extension
E10 r upper layers that begin like other headers
E11 r no next header
E12 r first IPv6 fragment without the whole chain
E13 r later IPv6 fragment that looks like TCP
E14 r atomic fragments
E15 r two fragment headers
E16 n overlapping IPv6 fragments
E17 r IPv6 fragments that disagree about the next header
E18 r fragment header among other extension headers
E19 r jumbograms
E20 r mobility, HIP and Shim6 headers
E21 r IPv6 sources that are no host's, IPv4-mapped addresses
E22 n cost of verifying the programs
E23 r flow label and traffic class
F1 r source addresses that are not the VM's
F2 r spoofed source on an open connection
F3 r ARP sender that is not the source of the frame
F4 r ARP for addresses that are not the VM's
F5 r ARP of other kinds
F6 r ARP toward the VM
F7 r neighbour advertisements
F8 r right option in a frame with the wrong source
F9 r neighbour and router solicitations
F10 r neighbour discovery from a foreign link-local address
F11 r neighbour discovery that no host sends
F12 r neighbour discovery in fragments and behind extension headers
F13 r router advertisements
F14 r router advertisements behind other headers
F15 r router advertisements in priority tags and SNAP
F16 r redirects
F17 r messages of a DHCP server
F18 r DHCP requests in another's name
F19 r DHCP requests as clients send them
F20 r DHCP that cannot be read
F21 r DHCP answers
F22 r duplicate address detection for another's address
F23 r allowed address pairs
F24 c an address pair that covers everything
F25 f the VM's address changes
G1 r combinations of TCP flags
G2 r openings that are right
G3 r segments without a connection
G4 r SYN-ACK without SYN
G5 r SYN-ACK with a wrong acknowledgement
G6 n resets in and out of sequence
G7 n forged resets free nothing
G8 n SYN inside an open connection
G9 n ports used again
G10 n simultaneous open
G11 n split handshakes
G12 n half-closed connections
G13 n the last segments of a connection, lost and repeated
G14 r forged FIN
G15 n window scaling seen or not
G16 n idle connections and their timeouts
G17 n resets with data and in answer to a SYN
G18 r urgent pointers
G19 n one connection opened from both sides
G20 n change of policy under an open connection
G21 r wrap of sequence numbers
G22 n two CPUs open one connection
G23 n connection that the table lost
H1 r echo replies nobody asked for
H2 r neighbour discovery opens no echo flow
H3 r errors about an open connection
H4 r errors sent to somebody else
H5 r errors about another's connection, or the wrong way round
H6 r quoted packets that cannot be read
H7 n errors about segments that were never sent
H8 r errors about errors and about groups
H9 n path MTU discovery
H10 r next-hop MTU below the minimum
H11 r redirects toward the VM
H12 n answers to rejected packets
H13 r other ICMP types
H14 n echo requests to groups
I1 r UDP without checksum over IPv4
I2 r UDP without checksum over IPv6
I3 n replies of UDP
I4 n timeouts of UDP
I5 r SCTP by its ports
I6 r other transport and routing protocols
I7 r GRE
I8 r IPsec
I9 r IP in IP
I10 r tunnels from the VM to its host
I11 r BFD from the VM to its host
I12 r payload of name services
I13 r payload that asks for open ports
I14 r metadata and management addresses
I15 r port 0
I16 r ports of protocols that have none
J1 r broadcasts
J2 r group membership
J3 r group membership that no host sends
J4 r MAC and address that disagree about being a group
J5 r answers to multicast
K1 n super-packets of a guest
K2 n packets beyond 64 KiB
K3 n aggregates toward the VM
K4 n partial checksums
K5 n virtio-net headers that lie
K6 n MTUs
K7 n several queues
K8 n attaching under traffic
K9 n packets never grow
K10 n another user of XDP
K11 n redirects into a protected interface
K12 n super-packets toward a guest without segmentation
L1 n flood of SYNs from the network
L2 n scan by a VM
L3 n flood of UDP
L4 n full table of connections
L5 n maps that evict early
L6 f expiry of a connection in use
L7 n chosen collisions
L8 n dearest rule lookup
L9 n flood of log records
L10 c log records lost
L11 c reader of log records that stops
L12 c limit of memory
L13 f interfaces that come and go
L14 n answers as an amplifier
L15 c rules at their limit
L16 n limit of connections, and forged ends
L17 n counters near their limits
M1 f controller killed under traffic
M2 f restart with the same policy
M3 f restart of a version with other maps
M4 f killed at every step of a change
M5 f killed between making a map and putting it in
M6 f change that fails halfway
M7 f one bad policy among a hundred
M8 f start while the source of policy cannot be read
M9 f source of policy that does not answer
M10 f source of policy that gives a part, or an old state
M11 f policy removed from under a running VM
M12 f reboot of the host
M13 f VM that is there before the controller
M14 f interface gone and back under its name
M15 f interface index of another VM before
M16 f interface renamed, odd names
M17 f interface moved to another namespace and back
M18 f interface down and up a thousand times
M19 f one program attached, the other refused
M20 f XDP program of somebody else
M21 f tc filter of somebody else, our filter deleted
M22 f qdisc deleted or replaced
M23 f program detached or replaced by another tool
M24 f pinned map removed or replaced
M25 f pins of an earlier run, version or user
M26 f bpffs missing, read-only or gone
M27 f two controllers
M28 f kernel that lacks a feature
M29 f programs that do not compile or load
M30 f out of memory in the middle of a change
M31 f disk full, state directory read-only
M32 f state file cut, flipped, old or of another host
M33 f wall clock that jumps, host that was suspended
M34 f netlink messages lost
M35 f VM that moves with open flows
M36 f back to the release before
M37 f settings and modules reset by an upgrade
M38 f service stopped
M39 f controller alive but stuck
N1 c YAML that is no policy: bombs, depth, size, tags, encodings
N2 c ranges and rules beyond what tables hold
N3 c what selects nothing
N4 c values that look right and are not
N5 c order of rules and policies
N6 c names that are paths, commands or control characters
N7 c names and comments in logs
N8 c names in metrics
N9 c metrics asked for by strangers, slowly, all at once
N10 c socket of commands: strangers, floods, halves of messages
N11 c commands by others, and in a hostile environment
N12 c policy text in C source
N13 c records of the perf buffer that are none
N14 c bytes of packets in logs
N15 c policy of another host, or an old one again
N16 c quotas
N17 z fuzzers of policy, state, socket and records
N18 c flood of interfaces named like VMs
"""

CATALOGUE: Final = {
    entry.id: entry for entry in (Entry(*line.split(" ", 2)) for line in _TEXT.split("\n") if line)
}
