/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What is known of the packet being judged: the parser fills it, the rest reads it.
 */
#ifndef VGW_PACKET_H
#define VGW_PACKET_H

#include "abi.h"
#include "byteorder.h"

#ifndef NULL
#define NULL ((void *)0)
#endif

/* What sort of packet it is, as far as its treatment differs. */
enum packet_kind {
	KIND_PLAIN,      /* tracked by its ports, or by its protocol alone */
	KIND_ARP,
	KIND_RARP,
	KIND_ND,         /* ICMPv6 133 to 136 */
	KIND_MEMBERSHIP, /* IGMP and MLD */
	KIND_ECHO,       /* ICMP echo request or reply: ports hold the identifier */
	KIND_ICMP_ERROR, /* quotes a packet that went the other way */
	KIND_ICMP_OTHER, /* judged by the policy, without state */
	KIND_FRAGMENT,   /* a later fragment: belongs to the flow of the first one */
};

/* The frame as a hook hands it over. */
struct frame {
	void *data;       /* first byte that can be read directly */
	void *data_end;   /* byte behind the last one that can be read directly */
	u32 length;       /* bytes of the whole frame */
	u32 segments;     /* packets on the wire that a GSO frame stands for; 0: not known */
	u32 segment_size; /* payload bytes of each but the last of them */
	bool gso;         /* the kernel vouches for a frame longer than its headers say */
	bool tagged;      /* an 802.1Q tag is held beside the frame */
	u16 tag_protocol; /* host order; of that tag */
	u16 tag_control;  /* host order; of that tag */
	bool checksum_asked; /* somebody behind the hooks is to write a checksum: */
	u32 checksum_start;  /* over what follows this byte of the frame, */
	u32 checksum_offset; /* to so many bytes behind it */
};

/* Tuple of the packet that an ICMP error quotes. */
struct quoted_packet {
	struct vgw_address source;
	struct vgw_address destination;
	__be16 source_port;      /* wire; echo: identifier; 0 without ports */
	__be16 destination_port; /* wire; echo: identifier */
	u32 tcp_sequence;        /* host order; of TCP */
	u8 protocol;
	bool echo;
	bool echo_reply;
};

/* A MAC in memory order with two zero bytes behind it, like those of the ABI. */
struct mac {
	union {
		u8 bytes[8];
		u64 padded;
	};
};

struct packet {
	/* Zero where the parser did not come to it. */
	struct vgw_address source;      /* ARP: sender's protocol address */
	struct vgw_address destination;
	struct mac source_mac;
	struct mac destination_mac;
	u32 header_length;              /* bytes in front of the TCP or UDP payload */
	u32 upper_start;                /* bytes in front of the upper header; 0: not IP */
	u16 ethertype;                  /* host order; 0: not read */
	u16 vlan;                       /* 802.1Q id; 0: untagged */
	__be16 source_port;             /* wire; echo: identifier */
	__be16 destination_port;        /* wire; echo: identifier */
	u8 kind;                        /* enum packet_kind */
	u8 protocol;
	u8 tcp_flags;
	u8 icmp_type;
	u8 icmp_code;
	bool foreign_icmp;              /* ICMP over IPv6 or ICMPv6 over IPv4: just a number */
	bool fragment_header;           /* IPv6: there is a fragment header */
	bool first_fragment;            /* the datagram goes on in later fragments */
	u64 router_alert;               /* 1: IPv6 hop-by-hop header with a router alert */

	/* As the hook says. */
	u32 wire_length;                /* bytes, all segments of a GSO frame with their headers */
	u32 segment_size;               /* as in struct frame; 0: it is no GSO frame */
	u32 segments;                   /* of a GSO frame: as in struct frame */
	u32 checksum_asked;             /* 1: a checksum is asked for: */
	u32 checksum_start;             /* as in struct frame */
	u32 checksum_offset;            /* as in struct frame */

	/* Left over from another packet but where one of its kind was read. */
	u32 ip_length;                  /* of IP: bytes of it, its header included */
	u32 hop_limit;                  /* of IPv6 */
	u32 tcp_sequence;               /* of TCP: host order */
	u32 tcp_acknowledged;           /* of TCP: host order */
	u32 tcp_payload;                /* of TCP: bytes behind its header, of a fragment the most
					 * that may follow */
	__be32 fragment_id;             /* of fragments: wire; of the datagram */
	u32 fragment_offset;            /* of fragments: bytes of the datagram's payload before it */
	u32 fragment_length;            /* of fragments: bytes of it in this one */
	u8 fragment_protocol;           /* of fragments: as the fragment's header names it */
	bool dhcp_well_formed;          /* of a client's BOOTP request: it has plain fields */
	u8 dhcp_client_mac[6];          /* of a client's BOOTP request */
	u8 arp_operation;               /* of ARP */
	bool nd_has_link_layer;         /* of neighbour discovery: there is the option */
	u8 arp_sender_mac[6];           /* of ARP */
	u8 arp_target_mac[6];           /* of ARP */
	u8 nd_link_layer[6];            /* of neighbour discovery: what the option says */
	u8 nd_fixed;                    /* of neighbour discovery: bytes in front of the options */
	u8 nd_option;                   /* of neighbour discovery: type of the option that counts */
	struct vgw_address target;      /* what ARP or neighbour discovery asks for or announces */
	struct quoted_packet quoted;    /* of an ICMP error */
};

/* Bytes of a packet that are zero where the parser did not come to them. */
#define PACKET_CLEARED __builtin_offsetof(struct packet, wire_length)

/* Part of a datagram, or what could be taken for one. */
static __always_inline bool is_fragment(const struct packet *packet)
{
	return packet->fragment_header || packet->first_fragment || packet->kind == KIND_FRAGMENT;
}

/* The verdict on a packet, with what led to it. */
struct decision {
	u32 verdict; /* enum vgw_verdict */
	u32 reason;  /* enum vgw_reason */
	u32 rule;    /* its number in the policy, or VGW_NO_RULE */
	u32 flags;   /* VGW_RULE_* of the rule or default that decided */
};

/* Which of the packet's claims the endpoint's configuration bears out. */
struct ownership {
	u64 mac;    /* 1: the MAC is the interface's or an allowed pair's */
	u64 source; /* 1: the source address goes with the MAC */
	u64 target; /* 1: so does the address that ARP or neighbour discovery asks for */
};

/* What rule lookup keeps of the record of a class in a wide image; image.h has it in full. */
struct class_record {
	u64 blocks; /* bit n: block n has rules that admit the class, and there is a word for it */
	u64 refs;   /* number of the first of these words */
	u64 ref;    /* that for the block that is looked into */
};

/* What rule lookup is at. */
struct lookup {
	u64 unfinished;   /* 1: the lookup is left to the stage, or has blocks left to look into */
	u64 classes[4];   /* of the fields */
	u64 word;         /* which word of the field the search is on */
	u64 block;        /* that is looked into */
	u64 summary;      /* groups of places of that block in which all fields have rules */
	u64 groups[4];    /* rules of such a group that each field admits */
	u64 place;        /* of the first match in that block */
	u64 before;       /* bits of the blocks before it */
	u64 best;         /* rule word of the first match so far */
	u64 left;         /* narrow image: matches; wide: blocks left to look into */
	struct class_record records[4];
	struct image_line common; /* rules of half a block that all fields admit */
};

/* An answer to a rejected packet, as reject.h puts it together. */
struct answer {
	u64 start;      /* where in `bytes` the answer begins */
	u64 length;     /* bytes of the answer */
	u64 link;       /* bytes of its link header, which is as long as the frame's */
	u64 quoted;     /* bytes of the rejected packet, from its IP header on, to be quoted */
	u64 checksum;   /* bytes of the frame up to the end of a checksum that a card may fill in */
	u8 bytes[152];  /* what is behind the IP header begins at one place, whatever is before */
};

/* What frame_head.h reads of a frame, and what the hook says beside it. */
struct frame_head {
	u64 words[8];  /* of the frame from its first byte on; what may differ is 0 */
	u64 beside[2]; /* length and path; where a checksum is asked for */
};

#define DENIAL_BITS 6 /* of the number of a place for a denial */

/* What the policy said of a packet without a flow, as denials.h remembers it. */
struct denial {
	struct frame_head head;
	u64 flows_made; /* as in struct scratch, when it was said */
	u64 generation; /* of the policy */
	u64 epoch;      /* of the flows that there were */
	struct decision decision;
};

/* Those of a CPU, each in the place that its head says. */
struct denial_places {
	struct denial at[1 << DENIAL_BITS];
};

#define VGW_FLOW_NOTES 8 /* flows that a packet may open and end, and room to spare */

/* A flow that began or ended with the packet being judged. */
struct flow_note {
	struct flow_key key;
	struct flow flow;
	u64 end; /* enum vgw_flow_end; NONE: it began */
};

/*
 * Work memory of the packet being judged. Values that would tell many paths apart for
 * the verifier live here and not in registers: what it reads from memory is alike on
 * all of them, so it walks what follows once. See forget_values. What every packet needs
 * stands in front, in few lines of the processor's cache.
 */
struct scratch {
	struct packet packet;
	struct ownership owns;
	struct decision decision;
	struct flow_key key;
	u64 now;     /* of clock.h, read once the packet comes to conntrack */
	u32 slot;    /* of configs and policies, read once for the packet */
	u32 asked;   /* 1: the decision is the policy's, on query */
	u32 denying; /* more than 0: this CPU denies a lot, see denials.h */
	u32 denial_known; /* 1: it was denied before, and got the decision in `denied` */
	u32 vacant;  /* 1: there was no flow of this key, not even a dead one */
	u32 rejudge; /* 1: query is about a flow of an older policy, not a new one */
	u32 opener;  /* enum vgw_path of the side that opens the flow that query is about */
	u32 taken;   /* 1: it is an open TCP connection that is taken over */
	struct lookup lookup;
	struct policy_query query;
	struct flow flow;
	u64 flood_window; /* that flood_dropped counts for, see floods.h */
	u64 flood_dropped; /* by this CPU */
	u64 head_known; /* 1: the frame has a head; read only while denying */
	u64 flows_made; /* of the endpoint, before the packet's flow was looked for */
	struct frame_head head;
	struct decision denied;
	struct queue_batch batch; /* of the expiry queue */
	struct fragment_key fragment_key;
	struct fragment fragment;
	struct event event;
	u64 noted; /* used entries of notes */
	struct flow_note notes[VGW_FLOW_NOTES];
	struct flow_event flow_event;
	struct answer answer;
};

/*
 * Makes the compiler read the work memory again from here on. It stands between the
 * stages and in loops, where a value kept in a register would be a known constant on
 * each of many paths, and the verifier would walk the rest of the program for each.
 */
static __always_inline void forget_values(void)
{
	asm volatile("" ::: "memory");
}

static __always_inline void decide(struct scratch *work, u32 verdict, u32 reason)
{
	work->decision.verdict = verdict;
	work->decision.reason = reason;
	work->decision.rule = VGW_NO_RULE;
	work->decision.flags = 0;
}

static __always_inline bool is_group_mac(const struct mac *mac)
{
	return mac->bytes[0] & 1;
}

static __always_inline void copy_mac(u8 *to, const void *from)
{
	const u16 *source = from;
	u16 *target = (u16 *)to;

	target[0] = source[0];
	target[1] = source[1];
	target[2] = source[2];
}

static __always_inline bool same_mac(const u8 *first, const u8 *second)
{
	const u16 *a = (const u16 *)first;
	const u16 *b = (const u16 *)second;

	return a[0] == b[0] && a[1] == b[1] && a[2] == b[2];
}

/* The MAC at `from`, behind which two more bytes can be read: one load, and one store. */
static __always_inline void take_mac(struct mac *mac, const void *from)
{
	mac->padded = *(const u64 *)from & htonll(0xffffffffffff0000ULL);
}

static __always_inline void copy_key(struct flow_key *to, const struct flow_key *from)
{
	u64 *target = (u64 *)to;
	const u64 *source = (const u64 *)from;

	target[0] = source[0];
	target[1] = source[1];
	target[2] = source[2];
	target[3] = source[3];
	target[4] = source[4];
}

static __always_inline bool same_address(const struct vgw_address *a, const struct vgw_address *b)
{
	return a->halves[0] == b->halves[0] && a->halves[1] == b->halves[1];
}

#endif
