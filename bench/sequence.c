// SPDX-License-Identifier: Apache-2.0
//
// Sends numbered datagrams between two network namespaces, both ways, and tells what became of each.
//
//   sequence NAMESPACE_A ADDRESS_A NAMESPACE_B ADDRESS_B RATE
//
// The namespaces are paths, the addresses IPv4. There are four streams: from A to B and from B to A,
// each to port ALLOWED, which has to let them pass, and to port DENIED, which must not. In each batch
// one more datagram goes from A to port ALLOWED of B from a port of its own: a new connection.
//
// A batch is sent and then awaited, so queues never overflow: what does not come within a second was
// lost on the way. About RATE datagrams of the allowed streams are sent a second. It prints a line
// `sent lost reordered denied passed slowest` (the last one in microseconds, of a batch) a few times a
// second, and ends with a last one when its standard input does.

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
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
	ALLOWED = 5001,
	DENIED = 5002,
	SOURCE = 5000,
	BATCH = 64,
	PATIENCE_MS = 1000,
	REPORT_MS = 200,
	RECEIVE_BUFFER = 1 << 20,
};

struct side {
	int home;  // network namespace
	struct in_addr address;
	int sender;
	int allowed, denied;  // receivers
	uint64_t next;        // number of the next datagram that this side receives
};

static struct side sides[2];
static uint64_t sent, lost, reordered, denied, passed, slowest_us;

static uint64_t now_us(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_nsec / 1000;
}

static int open_socket(const struct side *side, uint16_t port)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = side->address,
	};
	int size = RECEIVE_BUFFER;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)) ||
	    bind(fd, (struct sockaddr *)&address, sizeof(address)))
		die("a socket");
	return fd;
}

static void open_side(struct side *side, const char *path, const char *address)
{
	if (inet_pton(AF_INET, address, &side->address) != 1)
		die(address);
	side->home = open(path, O_RDONLY | O_CLOEXEC);
	if (side->home < 0 || setns(side->home, CLONE_NEWNET))
		die(path);
	side->sender = open_socket(side, SOURCE);
	side->allowed = open_socket(side, ALLOWED);
	side->denied = open_socket(side, DENIED);
}

// What a side refuses to send itself (EPERM of its egress) is a loss as well: it does not arrive.
static void send_to(int fd, const struct side *to, uint16_t port, uint64_t number)
{
	struct sockaddr_in address = {
		.sin_family = AF_INET, .sin_port = htons(port), .sin_addr = to->address,
	};

	sendto(fd, &number, sizeof(number), 0, (struct sockaddr *)&address, sizeof(address));
}

// Take what is there, in the order of its numbers; those from a port of their own have none.
static unsigned take(struct side *side)
{
	unsigned taken = 0;
	uint64_t number;

	while (recv(side->allowed, &number, sizeof(number), 0) == sizeof(number)) {
		taken++;
		if (number == UINT64_MAX)
			continue;
		if (number != side->next)
			reordered++;
		side->next = number + 1;
	}
	return taken;
}

static void await(struct side *side, unsigned expected)
{
	struct pollfd poll_fd = { .fd = side->allowed, .events = POLLIN };
	unsigned taken = take(side);

	while (taken < expected) {
		int ready = poll(&poll_fd, 1, PATIENCE_MS);

		if (ready < 0 && errno != EINTR)
			die("poll");
		if (ready == 0)
			break;
		taken += take(side);
	}
	if (taken < expected)
		lost += expected - taken;
}

static void drain(const struct side *side)
{
	uint64_t number;

	while (recv(side->denied, &number, sizeof(number), 0) >= 0)
		passed++;
}

static void new_connection(const struct side *from, const struct side *to)
{
	int fd;

	if (setns(from->home, CLONE_NEWNET))
		die("setns");
	fd = open_socket(from, 0);
	send_to(fd, to, ALLOWED, UINT64_MAX);
	close(fd);
}

static void batch(uint64_t first)
{
	uint64_t start = now_us(), taken;

	for (int side = 0; side < 2; side++) {
		struct side *from = &sides[side], *to = &sides[!side];

		for (uint64_t number = first; number < first + BATCH; number++) {
			send_to(from->sender, to, ALLOWED, number);
			send_to(from->sender, to, DENIED, number);
		}
	}
	new_connection(&sides[0], &sides[1]);
	await(&sides[0], BATCH);
	await(&sides[1], BATCH + 1);
	drain(&sides[0]);
	drain(&sides[1]);
	sent += 2 * BATCH + 1;
	denied += 2 * BATCH;
	taken = now_us() - start;
	if (taken > slowest_us)
		slowest_us = taken;
}

static void report(void)
{
	printf("%lu %lu %lu %lu %lu %lu\n", sent, lost, reordered, denied, passed, slowest_us);
	fflush(stdout);
}

static bool is_over(uint64_t until_us)
{
	struct pollfd input = { .fd = STDIN_FILENO };
	uint64_t now = now_us();
	int wait = until_us > now ? (int)((until_us - now) / 1000) : 0;

	return poll(&input, 1, wait) > 0 && input.revents & (POLLHUP | POLLERR);
}

int main(int count, char **words)
{
	uint64_t begin = now_us(), reported = begin, number = 0;
	double rate;

	if (count != 6 || (rate = strtod(words[5], NULL)) <= 0) {
		fprintf(stderr, "usage: sequence NAMESPACE ADDRESS NAMESPACE ADDRESS RATE\n");
		return 2;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	open_side(&sides[0], words[1], words[2]);
	open_side(&sides[1], words[3], words[4]);
	while (!is_over(begin + (uint64_t)((double)sent / rate * 1e6))) {
		batch(number);
		number += BATCH;
		if (now_us() - reported > REPORT_MS * 1000) {
			report();
			reported = now_us();
		}
	}
	report();
	return 0;
}
