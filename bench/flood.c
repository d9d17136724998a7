// SPDX-License-Identifier: Apache-2.0
//
// Sends frames into devices as fast as it can, within bounds.
//
//   flood COUNT SECONDS SEED ORDER DISTINCT STEP...
//   STEP = TARGET SIDE FRAME
//
// A round sends each step's frame once, in order; there are at most COUNT rounds, in at most
// SECONDS. TARGET is tap:FD, a TAP that the caller opened, or packet:NAMESPACE:INTERFACE, NAMESPACE
// being a path and nothing for one's own. FRAME is a TCP or UDP frame in hexadecimal, without
// options, tags or extension headers. Its SIDE (source, destination or neither) is what differs
// between rounds: the last 32 bits of the address and the port. ORDER is
//
//   random      one of DISTINCT addresses, any port from 1024 on; drawn by SEED
//   sequential  all ports of an address, then the next of DISTINCT addresses: each pair once
//
// Frames of the same target keep their order. Rounds go in batches, so the second step of a round
// follows the first steps of the rounds that are with it in the batch. At the end it prints one
// JSON object; `refused` of the frames sent were dropped before they left the device, or there was
// no room for them.

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "arguments.h"

enum {
	MAX_SECONDS = 3600,
	MAX_STEPS = 8,
	BATCH = 64,
	MAX_FRAME = 1514,
	FIRST_PORT = 1024,
	PORTS = 65536 - FIRST_PORT,
	SEND_BUFFER = 4 << 20,
};

struct step {
	int fd;
	bool is_tap;
	bool varies;
	int length;
	int address_at, port_at;       // offsets in the frame
	int ip_sum_at, sum_at;         // 0: there is none
	bool is_udp;
	uint32_t address;              // of the template, in host order
	uint32_t ip_partial, partial;  // checksums of the template without what varies
	uint8_t frames[BATCH][MAX_FRAME];
	struct iovec vectors[BATCH];
	struct mmsghdr messages[BATCH];
};

struct order {
	bool sequential;
	uint64_t distinct;
	uint64_t state;  // of the generator
	uint64_t round;
};

static struct step steps[MAX_STEPS];

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

// ---- targets -----------------------------------------------------------------------------------

static void enter(int namespace)
{
	if (namespace < 0)
		die("open the network namespace");
	if (setns(namespace, CLONE_NEWNET) < 0)
		die("setns");
	close(namespace);
}

static int bind_packet(const char *interface)
{
	struct sockaddr_ll address = {.sll_family = AF_PACKET};
	int fd = socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, 0), size = SEND_BUFFER;

	if (fd < 0)
		die("packet socket");
	address.sll_ifindex = (int)if_nametoindex(interface);
	if (!address.sll_ifindex)
		die(interface);
	if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0)
		die("bind");
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0)
		die("SO_SNDBUFFORCE");
	return fd;
}

// Open NAMESPACE:INTERFACE.
static int open_packet(char *where)
{
	char *colon = strchr(where, ':');
	int home, fd;

	if (!colon)
		refuse(where, "is not NAMESPACE:INTERFACE");
	*colon = '\0';
	if (!*where)
		return bind_packet(colon + 1);
	home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	enter(open(where, O_RDONLY | O_CLOEXEC));
	fd = bind_packet(colon + 1);
	enter(home);
	return fd;
}

static void open_target(struct step *step, char *target)
{
	if (strncmp(target, "tap:", 4) == 0) {
		step->is_tap = true;
		step->fd = (int)number(target + 4, 0, 1 << 20);
	} else if (strncmp(target, "packet:", 7) == 0) {
		step->fd = open_packet(target + 7);
	} else {
		refuse(target, "is no target");
	}
}

// ---- frames ------------------------------------------------------------------------------------

static int digit(char letter)
{
	if (letter >= '0' && letter <= '9')
		return letter - '0';
	if (letter >= 'a' && letter <= 'f')
		return letter - 'a' + 10;
	refuse("a frame", "is not hexadecimal");
	return 0;
}

static void read_frame(struct step *step, const char *text)
{
	size_t length = strlen(text) / 2;

	if (length < ETH_HLEN || length > MAX_FRAME || strlen(text) % 2)
		refuse("a frame", "has no length that a frame has");
	step->length = (int)length;
	for (size_t i = 0; i < length; i++)
		step->frames[0][i] = (uint8_t)(digit(text[2 * i]) << 4 | digit(text[2 * i + 1]));
}

static uint16_t word(const uint8_t *at)
{
	return (uint16_t)(at[0] << 8 | at[1]);
}

static void put_word(uint8_t *at, uint32_t value)
{
	at[0] = (uint8_t)(value >> 8);
	at[1] = (uint8_t)value;
}

static uint16_t folded(uint32_t sum)
{
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

// Sum of what a checksum covers but for some words (RFC 1624).
static uint32_t without(const uint8_t *frame, int sum_at, int at, int words)
{
	uint32_t sum = (uint16_t)~word(frame + sum_at);

	for (int i = 0; i < words; i++)
		sum += (uint16_t)~word(frame + at + 2 * i);
	return sum;
}

// Find what varies in a frame and what of its checksums stays.
static void prepare(struct step *step, const char *side)
{
	const uint8_t *frame = step->frames[0];
	bool is_ipv4 = word(frame + 12) == ETH_P_IP, is_source = strcmp(side, "source") == 0;
	int transport = ETH_HLEN + (is_ipv4 ? 20 : 40);
	uint8_t protocol = frame[ETH_HLEN + (is_ipv4 ? 9 : 6)];

	if (strcmp(side, "neither") == 0)
		return;
	if (!is_source && strcmp(side, "destination") != 0)
		refuse(side, "is no side of a packet");
	if (step->length < transport + 8 || (!is_ipv4 && word(frame + 12) != ETH_P_IPV6))
		refuse("a frame", "is not of TCP or UDP");
	step->varies = true;
	if (is_ipv4)
		step->address_at = ETH_HLEN + (is_source ? 12 : 16);
	else
		step->address_at = ETH_HLEN + (is_source ? 8 : 24) + 12;
	step->port_at = transport + (is_source ? 0 : 2);
	step->is_udp = protocol == IPPROTO_UDP;
	step->sum_at = transport + (step->is_udp ? 6 : 16);
	step->address = (uint32_t)word(frame + step->address_at) << 16 |
			word(frame + step->address_at + 2);
	step->partial = without(frame, step->sum_at, step->address_at, 2) +
			(uint16_t)~word(frame + step->port_at);
	if (!is_ipv4)
		return;
	step->ip_sum_at = ETH_HLEN + 10;
	step->ip_partial = without(frame, step->ip_sum_at, step->address_at, 2);
}

static void fill_batch(struct step *step)
{
	for (int i = 0; i < BATCH; i++) {
		if (i)
			memcpy(step->frames[i], step->frames[0], (size_t)step->length);
		step->vectors[i].iov_base = step->frames[i];
		step->vectors[i].iov_len = (size_t)step->length;
		step->messages[i].msg_hdr.msg_iov = &step->vectors[i];
		step->messages[i].msg_hdr.msg_iovlen = 1;
	}
}

static void vary(const struct step *step, uint8_t *frame, uint32_t index, uint32_t port)
{
	uint32_t address = step->address + index;
	uint32_t changed = (address >> 16) + (address & 0xffff);
	uint16_t sum = (uint16_t)~folded(step->partial + changed + port);

	put_word(frame + step->address_at, address >> 16);
	put_word(frame + step->address_at + 2, address);
	put_word(frame + step->port_at, port);
	if (step->ip_sum_at)
		put_word(frame + step->ip_sum_at,
			 (uint16_t)~folded(step->ip_partial + changed));
	// A UDP checksum of zero would say that there is none.
	put_word(frame + step->sum_at, step->is_udp && !sum ? 0xffff : sum);
}

static uint64_t draw(uint64_t *state)
{
	uint64_t value = *state;

	value ^= value << 13;
	value ^= value >> 7;
	value ^= value << 17;
	*state = value;
	return value;
}

static void next(struct order *order, uint32_t *index, uint32_t *port)
{
	if (order->sequential) {
		*port = FIRST_PORT + (uint32_t)(order->round % PORTS);
		*index = (uint32_t)(order->round / PORTS % order->distinct);
	} else {
		*index = (uint32_t)(draw(&order->state) % order->distinct);
		*port = FIRST_PORT + (uint32_t)(draw(&order->state) % PORTS);
	}
	order->round++;
}

// ---- sending -----------------------------------------------------------------------------------

static bool is_refusal(int error)
{
	return error == ENOBUFS || error == EAGAIN || error == EIO || error == ENOMEM;
}

// Send the first frames of a step's batch; return how many were refused.
static int send_frames(struct step *step, int count)
{
	int refused = 0, sent = 0;

	while (sent < count) {
		int taken;

		if (step->is_tap)
			taken = write(step->fd, step->frames[sent], (size_t)step->length) < 0 ? -1 : 1;
		else
			taken = sendmmsg(step->fd, step->messages + sent,
					 (unsigned int)(count - sent), MSG_DONTWAIT);
		if (taken < 0) {
			if (errno == EINTR)
				continue;
			if (!is_refusal(errno))
				die("send");
			refused++;
			taken = 1;
		}
		sent += taken;
	}
	return refused;
}

static void flood(struct order *order, int count, uint64_t rounds, double time)
{
	double start = now(), elapsed = 0;
	uint64_t refused = 0;

	while (order->round < rounds && elapsed < time) {
		uint64_t left = rounds - order->round;
		int batch = left < BATCH ? (int)left : BATCH;

		for (int i = 0; i < batch; i++) {
			uint32_t index, port;

			next(order, &index, &port);
			for (int n = 0; n < count; n++)
				if (steps[n].varies)
					vary(&steps[n], steps[n].frames[i], index, port);
		}
		for (int n = 0; n < count; n++)
			refused += (uint64_t)send_frames(&steps[n], batch);
		elapsed = now() - start;
	}
	printf("{\"rounds\": %llu, \"sent\": %llu, \"refused\": %llu, \"seconds\": %.6f}\n",
	       (unsigned long long)order->round,
	       (unsigned long long)order->round * (unsigned long long)count,
	       (unsigned long long)refused, elapsed);
}

int main(int argc, char **argv)
{
	int count = (argc - 6) / 3;
	struct order order = {0};

	// A bench that is killed leaves nothing running.
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (argc < 9 || (argc - 6) % 3 || count > MAX_STEPS) {
		fprintf(stderr, "usage: flood COUNT SECONDS SEED random|sequential DISTINCT "
				"TARGET SIDE FRAME...\n");
		return 2;
	}
	order.state = number(argv[3], 1, UINT64_MAX);
	order.sequential = strcmp(argv[4], "sequential") == 0;
	if (!order.sequential && strcmp(argv[4], "random") != 0)
		refuse(argv[4], "is no order");
	order.distinct = number(argv[5], 1, UINT32_MAX);
	for (int n = 0; n < count; n++) {
		open_target(&steps[n], argv[6 + 3 * n]);
		read_frame(&steps[n], argv[8 + 3 * n]);
		prepare(&steps[n], argv[7 + 3 * n]);
		fill_batch(&steps[n]);
	}
	flood(&order, count, number(argv[1], 1, UINT64_MAX), seconds(argv[2], MAX_SECONDS));
	return 0;
}
