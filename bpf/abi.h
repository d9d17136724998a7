/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The map ABI: every constant and structure that programs and user space share.
 *
 * vgw/abi.py mirrors this file and tests/test_abi.py compiles static asserts
 * generated from that mirror against it. Layout rules: fixed-width types only,
 * all padding is explicit and written as zero, each field states its byte order
 * or unit ("host" unless it says "wire"), the size of a structure is a multiple
 * of eight. A change of any layout or number here raises VGW_ABI_VERSION.
 */
#ifndef VGW_ABI_H
#define VGW_ABI_H

#include <linux/types.h>

#define VGW_ABI_VERSION 7

/* The packet's path at a hook. User space calls to_vm "ingress", from_vm "egress". */
#define VGW_PATHS(X) \
	X(TO_VM)     \
	X(FROM_VM)

/* What a packet gets. WOULD_DROP is a drop that monitor mode let pass. */
#define VGW_VERDICTS(X) \
	X(ACCEPT)       \
	X(DROP)         \
	X(REJECT)       \
	X(WOULD_DROP)

/* Why a packet got its verdict; bpf/README.md says for each what raises it. */
#define VGW_REASONS(X)                                                        \
	X(NONE)                                                               \
	/* accepted without a rule */                                         \
	X(CT_ESTABLISHED) X(CT_RELATED) X(ARP) X(RARP) X(ND) X(DHCP)          \
	X(MEMBERSHIP)                                                         \
	/* decided by the policy; PROTOCOL: no rule named this protocol */    \
	X(RULE) X(DEFAULT) X(PROTOCOL)                                        \
	/* decided by the state of the endpoint */                            \
	X(QUARANTINE) X(NO_POLICY)                                            \
	/* the parser could not or would not read it */                       \
	X(TRUNCATED) X(BAD_LENGTH) X(BAD_VERSION) X(BAD_HEADER) X(BAD_ADDRESS) \
	X(LLC)                                                                \
	X(ETHERTYPE) X(VLAN) X(IP_OPTIONS) X(FRAGMENT) X(EXTENSION_HEADER)    \
	X(TCP_FLAGS) X(PORT_ZERO) X(ICMP_INNER) X(BAD_MTU) X(CHECKSUM_REQUEST) \
	X(ARP_INVALID) X(ND_INVALID) X(MEMBERSHIP_INVALID) X(DHCP_INVALID)    \
	/* a guard refused it */                                              \
	X(GROUP_MISMATCH) X(NOT_FOR_VM) X(SPOOF_MAC) X(SPOOF_ADDRESS)         \
	X(SPOOF_ARP) X(SPOOF_ND) X(DHCP_SERVER) X(ROUTER_ADVERTISEMENT)       \
	X(REDIRECT) X(ECHO_TO_GROUP) X(MEMBERSHIP_QUERY)                      \
	/* connection tracking refused it */                                  \
	X(NO_STATE) X(ICMP_UNRELATED) X(CT_FULL) X(CT_HALF_OPEN) X(CT_RATE)   \
	X(CT_BUSY)

#define VGW_MODES(X) \
	X(ENFORCE)   \
	X(MONITOR)   \
	X(QUARANTINE)

/* State of a flow; each has its own timeout in endpoint_config.timeout_ns. */
#define VGW_FLOW_STATES(X) \
	X(DEAD)            \
	X(TCP_SYN)         \
	X(TCP_ESTABLISHED) \
	X(TCP_FIN)         \
	X(TCP_CLOSED)      \
	X(UDP_SINGLE)      \
	X(UDP_REPLIED)     \
	X(ICMP)            \
	X(OTHER)

/* What a rule of the compiled policy does; PASS goes on with the next tier. */
#define VGW_ACTIONS(X) \
	X(ACCEPT)      \
	X(DROP)        \
	X(REJECT)      \
	X(PASS)

/*
 * What a record of the perf buffer is about. LEASE: the bytes behind it are a frame. FLOOD: many
 * packets from the VM were dropped, for `reason` the last of them; it says nothing of that one.
 */
#define VGW_EVENT_KINDS(X) \
	X(PACKET)          \
	X(FLOW_START)      \
	X(FLOW_END)        \
	X(LEASE)           \
	X(FLOOD)

/*
 * Why a flow ended. REVOKED: a later policy refuses it; DISPLACED: half open, it made room;
 * DETACHED: the endpoint went, which only user space says.
 */
#define VGW_FLOW_ENDS(X) \
	X(NONE)          \
	X(TIMEOUT)       \
	X(CLOSED)        \
	X(REVOKED)       \
	X(FLUSHED)       \
	X(DISPLACED)     \
	X(DETACHED)

/* What is counted of floods: packets from the VM that are dropped where the name says, floods.h. */
#define VGW_FLOOD_DROPS(X) \
	X(AT_TC)           \
	X(AT_SHIELD)

#define VGW_ENUMERATE_PATH(name) VGW_PATH_##name,
#define VGW_ENUMERATE_VERDICT(name) VGW_VERDICT_##name,
#define VGW_ENUMERATE_REASON(name) VGW_REASON_##name,
#define VGW_ENUMERATE_MODE(name) VGW_MODE_##name,
#define VGW_ENUMERATE_FLOW_STATE(name) VGW_FLOW_##name,
#define VGW_ENUMERATE_ACTION(name) VGW_ACTION_##name,
#define VGW_ENUMERATE_EVENT_KIND(name) VGW_EVENT_##name,
#define VGW_ENUMERATE_FLOW_END(name) VGW_END_##name,
#define VGW_ENUMERATE_FLOOD_DROP(name) VGW_FLOOD_DROP_##name,

enum vgw_path { VGW_PATHS(VGW_ENUMERATE_PATH) VGW_PATH_COUNT };
enum vgw_verdict { VGW_VERDICTS(VGW_ENUMERATE_VERDICT) VGW_VERDICT_COUNT };
enum vgw_reason { VGW_REASONS(VGW_ENUMERATE_REASON) VGW_REASON_COUNT };
enum vgw_mode { VGW_MODES(VGW_ENUMERATE_MODE) VGW_MODE_COUNT };
enum vgw_flow_state { VGW_FLOW_STATES(VGW_ENUMERATE_FLOW_STATE) VGW_FLOW_COUNT };
enum vgw_action { VGW_ACTIONS(VGW_ENUMERATE_ACTION) VGW_ACTION_COUNT };
enum vgw_event_kind { VGW_EVENT_KINDS(VGW_ENUMERATE_EVENT_KIND) VGW_EVENT_COUNT };
enum vgw_flow_end { VGW_FLOW_ENDS(VGW_ENUMERATE_FLOW_END) VGW_END_COUNT };
enum vgw_flood_drop { VGW_FLOOD_DROPS(VGW_ENUMERATE_FLOOD_DROP) VGW_FLOOD_DROP_COUNT };

/* Bits of endpoint_config.guards. A guard that lacks its facts is left out by user space. */
#define VGW_GUARD_MAC (1 << 0)
#define VGW_GUARD_ADDRESS (1 << 1)
#define VGW_GUARD_ARP (1 << 2)
#define VGW_GUARD_ND (1 << 3)
#define VGW_GUARD_DHCP_SERVER (1 << 4)
#define VGW_GUARD_RA (1 << 5)

/* Bits of the flags in a rule word of a compiled policy. */
#define VGW_RULE_LOG (1 << 0)

#define VGW_NO_RULE 0xffffffff     /* a rule number that names no rule */
#define VGW_MAX_ADDRESSES 24       /* owned addresses and allowed pairs of an interface */
#define VGW_MAX_VLANS 16           /* tags an interface may use */
#define VGW_REASON_SLOTS 64        /* room for reasons in the stats map */
#define VGW_QUEUE_BATCH 4          /* flow keys in one element of expiry_queue */
#define VGW_FRAGMENTS 512          /* datagrams in fragments that an endpoint remembers */
#define VGW_EXPIRY_MARGIN 16       /* batches that expiry leaves in expiry_queue */
#define VGW_SERVICE_FOREIGN_ICMP 0x01000000 /* ICMP over IPv6, ICMPv6 over IPv4: mere numbers */
#define VGW_IMAGE_LINE_WORDS 8     /* words in a line of a compiled policy: those of a cache line */
#define VGW_CHUNK_LINES 1024       /* lines of a small one, which is in one map; */
#define VGW_MEDIUM_LINES 8192      /* and of a medium one, which is in one map too; */
#define VGW_PART_LINES 65536       /* lines in a map of a large one, */
#define VGW_IMAGE_PARTS 20         /* and such maps it may have */
#define VGW_CONFIG_SLOTS 2         /* configurations and policies: one in force, one spare */

/* IPv6 address, wire order; IPv4 as ::ffff:a.b.c.d. */
struct vgw_address {
	union {
		__u8 bytes[16];
		__be32 words[4];
		__be64 halves[2];
	};
};

/* An address or range the endpoint may use, and with which MAC. */
struct owned_address {
	struct vgw_address network;     /* wire, already masked */
	struct vgw_address mask;        /* wire */
	__u8 mac[8];                    /* wire, two zero bytes: the MAC it goes with */
	__u64 mac_mask;                 /* all ones, or 0: goes with any MAC */
};

/* Everything about an endpoint that a program needs besides the rules. */
struct endpoint_config {
	__u64 endpoint;                 /* identity of this attachment, in every event */
	__u64 flow_epoch;               /* flows of another epoch are dead: flushed */
	__u64 timeout_ns[16];           /* ns, by enum vgw_flow_state */
	__u64 grace_until_ns;           /* clock.h; until then open TCP connections
					 * that nobody knows of are taken over; 0: they are not */
	__u32 generation;               /* number of the policy in force; 0: none */
	__u32 first_counter[VGW_PATH_COUNT]; /* of the policy of each path, in rule_counters */
	__u32 log_per_second;           /* events a second before suppression */
	__u32 reject_per_second;        /* answers to rejected packets a second */
	__u32 reply_mark;               /* skb mark that our own answers carry; 0: they carry none */
	__u32 half_open_max;            /* half-open flows that each side may have opened */
	__u32 new_per_second;           /* flows each side may open in a second; 0: any number */
	__u32 address_count;            /* used entries of addresses */
	__u32 vlan_count;               /* used entries of vlans */
	__u16 vlans[VGW_MAX_VLANS];     /* 802.1Q ids the guest may use */
	__u8 mac[8];                    /* wire, two zero bytes; all zero: unknown */
	__u8 mode;                      /* enum vgw_mode */
	__u8 guards;                    /* VGW_GUARD_* */
	__u8 log_flows;                 /* 1: the beginning and the end of flows are events */
	__u8 learns;                    /* 1: the VM's addresses are those that it is leased */
	__u32 flood_drops;              /* packets from the VM that one CPU drops in a window of
					 * floods.h, and it is a flood; 0: none is */
	struct owned_address addresses[VGW_MAX_ADDRESSES];
};

/* Which slot of `configs`, `policies` and `rule_counters` is in force. */
struct active_slot {
	__u32 slot;                     /* 0 or 1 */
	__u32 pad;
};

/* Part of a compiled policy, which vgw/policy/ writes and image.h describes. */
struct image_line {
	__u64 words[VGW_IMAGE_LINE_WORDS];
};

/*
 * What a map holds of it: lines, but declared as bytes. BCC makes code that reads and writes each
 * number of a map's type as text, which takes time to compile, the more the longer the map's values.
 */
struct image_chunk {
	__u8 lines[VGW_CHUNK_LINES * VGW_IMAGE_LINE_WORDS * 8];
};

struct image_medium {
	__u8 lines[VGW_MEDIUM_LINES * VGW_IMAGE_LINE_WORDS * 8];
};

struct image_part {
	__u8 lines[VGW_PART_LINES * VGW_IMAGE_LINE_WORDS * 8];
};

/* A question to the policy, from the side of the packet that opens a flow. */
struct policy_query {
	__u32 fields[4][4];             /* remote and local address (IPv4: one word), service, source */
	__u8 path;                      /* enum vgw_path of the opener */
	__u8 ipv6;                      /* 1: the addresses are of four words */
	__u8 ordinary;                  /* 1: `any` and the default speak of it */
	__u8 pad[5];
};

/* A flow, named from the endpoint's side, so both directions have one key. */
struct flow_key {
	struct vgw_address local;       /* wire; the VM's side */
	struct vgw_address remote;      /* wire */
	__be16 local_port;              /* wire; ICMP echo: identifier; 0 without ports */
	__be16 remote_port;             /* wire; ICMP echo: identifier; 0 without ports */
	__u8 protocol;                  /* IP protocol number */
	__u8 asker;                     /* ICMP echo: 1 + path of the request; else 0 */
	__u16 vlan;                     /* 802.1Q id, 0: untagged */
};

struct flow {
	__u64 last_seen_ns;             /* clock.h */
	__u64 created_ns;               /* clock.h */
	__u64 epoch;                    /* endpoint_config.flow_epoch at creation */
	__u64 claim;                    /* 1 while one CPU resets or deletes a dead flow */
	__u64 packets[2];               /* by enum vgw_path; not atomic */
	__u64 bytes[2];                 /* by enum vgw_path; wire bytes; not atomic */
	__u32 generation;               /* policy under which it was last accepted */
	__u32 rule;                     /* number of the rule that accepted it, or VGW_NO_RULE: default */
	__u32 tcp_acked[2];             /* by enum vgw_path: last acknowledgement number sent on it */
	__u32 tcp_end[2];               /* by enum vgw_path: number behind the last byte sent on it */
	__u64 half_open;                /* 1 while it counts in conntrack_meta.half_open */
	__u8 state;                     /* enum vgw_flow_state */
	__u8 opener;                    /* enum vgw_path of the first packet */
	__u8 tcp_fins;                  /* bit 1 << path: a FIN was seen on it */
	__u8 reported;                  /* 1: its end was an event already, it is only not deleted yet */
	__u8 pad[4];
};

/* Counters of a conntrack table and positions of its expiry queue. */
struct conntrack_meta {
	__u64 head;                     /* next position of expiry_queue to look at */
	__u64 tail;                     /* next position of expiry_queue to fill */
	__u64 entries;                  /* flows in the table, dead ones included */
	__u64 created[2];               /* new connections by enum vgw_path */
	__u64 half_open[2];             /* half-open flows by enum vgw_path of the opener */
	__u64 window[2];                /* by enum vgw_path: the second that `opened` counts for */
	__u64 opened[2];                /* by enum vgw_path: new connections asked for in it */
	__u64 pressed;                  /* 1: the last new flow found no room */
	__u64 dhcp_asked_ns[2];         /* clock.h; of the VM's last broadcast or
					 * multicast request, by DHCPv4 and DHCPv6; 0: never */
	__u64 dhcp_renewed_ns;          /* clock.h; of its last DHCPv4 request to
					 * one server, whether that passed or not; 0: never */
	__u64 imported;                 /* flows that came from another table */
};

/* Keys of flows in order of creation, a batch an element. */
struct queue_batch {
	struct flow_key keys[VGW_QUEUE_BATCH];
};

/* The batch a CPU is filling before it goes to expiry_queue. */
struct queue_buffer {
	__u64 count;                    /* used entries of batch.keys */
	struct queue_batch batch;
};

/* The datagram that a fragment is part of, on one path. */
struct fragment_key {
	struct vgw_address source;      /* wire */
	struct vgw_address destination; /* wire */
	__be32 identification;          /* wire; IPv4: in the last two bytes */
	__u16 vlan;                     /* 802.1Q id, 0: untagged */
	__u8 protocol;                  /* as the fragment's header names it */
	__u8 path;                      /* enum vgw_path */
};

/* What is remembered of the first fragment of a datagram, after it was accepted. */
struct fragment {
	struct flow_key flow;           /* the flow it belongs to */
	__u64 seen_ns;                  /* clock.h; of the first fragment */
	__u32 end;                      /* bytes of the datagram's payload in the first fragment */
	__u32 pad;
};

struct packet_counter {
	__u64 packets;
	__u64 bytes;                    /* as on the wire */
};

struct rule_counter {
	__u64 packets;                  /* packets this rule decided, not those of its open flows */
	__u64 bytes;                    /* as on the wire */
	__u64 last_hit_ns;              /* clock.h */
};

/* Events of one endpoint: due = sent + suppressed + lost. */
struct event_meter {
	__u64 window;                   /* second the budget counts for */
	__u64 used;                     /* events in that second */
	__u64 sent;
	__u64 suppressed;               /* over endpoint_config.log_per_second */
	__u64 lost;                     /* no reader, or the reader's buffer was full */
};

/* Answers to rejected packets of one endpoint: due = sent + suppressed + failed. */
struct reject_meter {
	__u64 window;                   /* second the budget counts for */
	__u64 used;                     /* answers in that second */
	__u64 sent;
	__u64 suppressed;               /* over endpoint_config.reject_per_second */
	__u64 failed;                   /* the kernel could not send it */
};

/*
 * One record of the perf buffer, alone for a PACKET. Of a flow (struct flow_event) `path`,
 * addresses and ports are those of its first packet, `generation` and `rule` those that
 * accepted it last. Behind a LEASE stand bytes of the frame, which has `length` of them.
 */
struct event {
	__u64 time_ns;                  /* CLOCK_MONOTONIC */
	__u64 endpoint;                 /* endpoint_config.endpoint */
	__u32 generation;
	__u32 rule;                     /* its number in the policy of path and generation, or VGW_NO_RULE */
	__u32 length;                   /* bytes on the wire */
	__u16 abi;                      /* VGW_ABI_VERSION */
	__u16 ethertype;                /* after VLAN tags; 0: not read */
	struct vgw_address source;      /* wire; zero: not read */
	struct vgw_address destination; /* wire; zero: not read */
	__be16 source_port;             /* wire */
	__be16 destination_port;        /* wire */
	__u16 vlan;                     /* 802.1Q id, 0: untagged */
	__u8 path;                      /* enum vgw_path */
	__u8 verdict;                   /* enum vgw_verdict */
	__u8 reason;                    /* enum vgw_reason */
	__u8 protocol;
	__u8 tcp_flags;
	__u8 icmp_type;
	__u8 icmp_code;
	__u8 source_mac[6];             /* wire */
	__u8 destination_mac[6];        /* wire */
	__u8 rule_path;                 /* enum vgw_path of the policy that numbers `rule` */
	__u8 kind;                      /* enum vgw_event_kind */
	__u8 end;                       /* enum vgw_flow_end of a flow that ended, else 0 */
	__u8 state;                     /* enum vgw_flow_state of a flow, else 0 */
	__u8 pad[3];
};

/* The record of a flow: FLOW_START, FLOW_END. */
struct flow_event {
	struct event event;
	__u64 packets[2];               /* by enum vgw_path */
	__u64 bytes[2];                 /* by enum vgw_path; wire bytes */
	__u64 created_ns;               /* clock.h */
	__u64 last_seen_ns;             /* clock.h */
};

#endif
