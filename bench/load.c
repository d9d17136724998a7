// SPDX-License-Identifier: Apache-2.0
//
// Sends or receives the traffic of a measurement over the stack of its namespace, in bounds.
//
//   load stream-sink ADDRESS PORT SECONDS
//   load stream ADDRESS PORT SECONDS STREAMS
//   load datagram-sink ADDRESS PORT SECONDS
//   load datagrams ADDRESS PORT SECONDS BYTES
//   load echo ADDRESS PORT SECONDS
//   load ping ADDRESS PORT SECONDS
//
// stream: TCP, STREAMS connections that send as much as they can. The sink confirms how many bytes
// came at the end of each, so the time is that until all have arrived.
// datagrams: UDP, each with BYTES of payload, as many as go out; the sink counts what comes in.
// ping: TCP, one byte there and one back, again and again; prints the times of the round trips.
//
// A sink or echo says "ready" when it listens and ends when its standard input closes, or after
// SECONDS. Whoever sends does so for SECONDS. All print one JSON object at the end.

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
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
	MAX_SECONDS = 600,
	MAX_STREAMS = 64,
	BLOCK = 256 << 10,
	BATCH = 64,
	MAX_DATAGRAM = 1472,
	RECEIVE_BUFFER = 32 << 20,
	TICK_MS = 20,
	NS = 1000000000,
	// Round trips by their length: steps of NS_PER_STEP, all longer ones in the last.
	NS_PER_STEP = 100,
	STEPS = 1000000,
};

struct target {
	struct sockaddr_storage address;
	socklen_t length;
};

static char block[BLOCK];
static uint32_t round_trips[STEPS];

static struct target target(const char *address, const char *port)
{
	struct target to = { 0 };

	to.length = socket_address(address, number(port, 1, 65535), &to.address);
	return to;
}

static uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * NS + time.tv_nsec;
}

static int open_socket(const struct target *to, int kind)
{
	int fd = socket(to->address.ss_family, kind, 0), one = 1;

	if (fd < 0)
		die("socket");
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)))
		die("SO_REUSEADDR");
	return fd;
}

static int connected(const struct target *to, int kind)
{
	int fd = open_socket(to, kind);

	if (connect(fd, (const struct sockaddr *)&to->address, to->length))
		die("connect");
	return fd;
}

static int bound(const struct target *to, int kind)
{
	int fd = open_socket(to, kind);

	if (bind(fd, (const struct sockaddr *)&to->address, to->length))
		die("bind");
	return fd;
}

static int listening(const struct target *to)
{
	int fd = bound(to, SOCK_STREAM);

	if (listen(fd, MAX_STREAMS))
		die("listen");
	return fd;
}

static void say_ready(void)
{
	puts("ready");
	fflush(stdout);
}

static void no_delay(int fd)
{
	int one = 1;

	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		die("TCP_NODELAY");
}

// ---- TCP, as much as goes ------------------------------------------------------------------------

static void stream_sink(const struct target *at, uint64_t until)
{
	struct pollfd fds[2 + MAX_STREAMS] = { { 0, POLLIN, 0 }, { listening(at), POLLIN, 0 } };
	uint64_t received[2 + MAX_STREAMS] = { 0 }, total = 0;
	int used = 2;
	ssize_t got;

	say_ready();
	while (now_ns() < until) {
		if (poll(fds, used, TICK_MS) < 0)
			die("poll");
		if (fds[0].revents)
			break;
		if (fds[1].revents && used < 2 + MAX_STREAMS) {
			fds[used] = (struct pollfd){ accept(fds[1].fd, NULL, NULL), POLLIN, 0 };
			if (fds[used].fd < 0)
				die("accept");
			received[used++] = 0;
		}
		for (int i = 2; i < used; i++) {
			if (!fds[i].revents)
				continue;
			got = recv(fds[i].fd, block, sizeof(block), MSG_DONTWAIT);
			if (got > 0) {
				received[i] += got;
				continue;
			}
			if (got < 0 && errno == EAGAIN)
				continue;
			// The end, or the other side is gone and will not read this.
			send(fds[i].fd, &received[i], sizeof(received[i]), MSG_NOSIGNAL);
			total += received[i];
			close(fds[i].fd);
			fds[i] = fds[--used];
			received[i--] = received[used];
		}
	}
	printf("{\"bytes\": %llu}\n", (unsigned long long)total);
}

static uint64_t confirmed(int fd)
{
	uint64_t bytes = 0;

	if (shutdown(fd, SHUT_WR))
		die("shutdown");
	if (recv(fd, &bytes, sizeof(bytes), MSG_WAITALL) != sizeof(bytes)) {
		fputs("a stream was not confirmed\n", stderr);
		exit(1);
	}
	close(fd);
	return bytes;
}

static void stream(const struct target *to, double duration, int streams)
{
	struct pollfd fds[MAX_STREAMS];
	uint64_t begun, until, bytes = 0;

	for (int i = 0; i < streams; i++)
		fds[i] = (struct pollfd){ connected(to, SOCK_STREAM), POLLOUT, 0 };
	begun = now_ns();
	until = begun + (uint64_t)(duration * NS);
	while (now_ns() < until) {
		if (poll(fds, streams, TICK_MS) < 0)
			die("poll");
		for (int i = 0; i < streams; i++)
			if (fds[i].revents &&
			    send(fds[i].fd, block, sizeof(block), MSG_NOSIGNAL | MSG_DONTWAIT) < 0 &&
			    errno != EAGAIN)
				die("send");
	}
	for (int i = 0; i < streams; i++)
		bytes += confirmed(fds[i].fd);
	printf("{\"bytes\": %llu, \"seconds\": %.6f}\n", (unsigned long long)bytes,
	       (double)(now_ns() - begun) / NS);
}

// ---- UDP, as many as go --------------------------------------------------------------------------

static void datagram_sink(const struct target *at, uint64_t until)
{
	static char buffers[BATCH][MAX_DATAGRAM];
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec vectors[BATCH];
	struct pollfd fds[2] = { { 0, POLLIN, 0 }, { bound(at, SOCK_DGRAM), POLLIN, 0 } };
	int size = RECEIVE_BUFFER, got;
	uint64_t received = 0;

	if (setsockopt(fds[1].fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)))
		die("SO_RCVBUFFORCE");
	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){ buffers[i], sizeof(buffers[i]) };
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	say_ready();
	while (now_ns() < until) {
		if (poll(fds, 2, TICK_MS) < 0)
			die("poll");
		while ((got = recvmmsg(fds[1].fd, messages, BATCH, MSG_DONTWAIT, NULL)) > 0)
			received += got;
		if (fds[0].revents)
			break;
	}
	printf("{\"received\": %llu}\n", (unsigned long long)received);
}

static void datagrams(const struct target *to, double duration, int bytes)
{
	struct iovec vector = { block, bytes };
	struct mmsghdr messages[BATCH] = { 0 };
	int fd = connected(to, SOCK_DGRAM), sent;
	uint64_t total = 0, begun = now_ns(), until = begun + (uint64_t)(duration * NS);

	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &vector;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	while (now_ns() < until) {
		sent = sendmmsg(fd, messages, BATCH, 0);
		if (sent < 0 && errno != ENOBUFS && errno != ECONNREFUSED)
			die("sendmmsg");
		total += sent > 0 ? sent : 0;
	}
	printf("{\"sent\": %llu, \"seconds\": %.6f}\n", (unsigned long long)total,
	       (double)(now_ns() - begun) / NS);
}

// ---- round trips ---------------------------------------------------------------------------------

static void echo(const struct target *at, uint64_t until)
{
	struct pollfd fds[3] = { { 0, POLLIN, 0 }, { listening(at), POLLIN, 0 }, { -1, POLLIN, 0 } };
	char byte;

	say_ready();
	while (now_ns() < until) {
		if (poll(fds, 3, TICK_MS) < 0)
			die("poll");
		if (fds[0].revents)
			break;
		if (fds[2].fd < 0 && fds[1].revents) {
			fds[2].fd = accept(fds[1].fd, NULL, NULL);
			if (fds[2].fd < 0)
				die("accept");
			no_delay(fds[2].fd);
		}
		if (fds[2].fd >= 0 && fds[2].revents) {
			if (recv(fds[2].fd, &byte, 1, 0) == 1) {
				send(fds[2].fd, &byte, 1, MSG_NOSIGNAL);
			} else {
				close(fds[2].fd);
				fds[2].fd = -1;
			}
		}
	}
	puts("{}");
}

// The length in ns that `share` of all round trips do not exceed.
static uint64_t quantile(uint64_t trips, double share)
{
	uint64_t below = 0;

	for (uint64_t step = 0; step < STEPS; step++) {
		below += round_trips[step];
		if (below >= share * trips)
			return (step + 1) * NS_PER_STEP;
	}
	return (uint64_t)STEPS * NS_PER_STEP;
}

static void ping(const struct target *to, double duration)
{
	int fd = connected(to, SOCK_STREAM);
	uint64_t trips = 0, begun = now_ns(), until = begun + (uint64_t)(duration * NS);
	uint64_t sent = begun, back, step;
	char byte = 0;

	no_delay(fd);
	while (sent < until) {
		if (send(fd, &byte, 1, MSG_NOSIGNAL) != 1 || recv(fd, &byte, 1, 0) != 1)
			die("ping");
		back = now_ns();
		step = (back - sent) / NS_PER_STEP;
		round_trips[step < STEPS ? step : STEPS - 1]++;
		trips++;
		sent = back;
	}
	printf("{\"trips\": %llu, \"seconds\": %.6f, \"median_ns\": %llu, \"p99_ns\": %llu}\n",
	       (unsigned long long)trips, (double)(now_ns() - begun) / NS,
	       (unsigned long long)quantile(trips, 0.5), (unsigned long long)quantile(trips, 0.99));
}

int main(int count, char **words)
{
	const char *role = count > 1 ? words[1] : "";
	const char *more = count > 5 ? words[5] : "";
	struct target to;
	double duration;
	uint64_t until;

	if (count < 5)
		refuse("load", "ROLE ADDRESS PORT SECONDS [STREAMS or BYTES]");
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	to = target(words[2], words[3]);
	duration = seconds(words[4], MAX_SECONDS);
	until = now_ns() + (uint64_t)(duration * NS);
	if (!strcmp(role, "stream-sink"))
		stream_sink(&to, until);
	else if (!strcmp(role, "stream"))
		stream(&to, duration, number(more, 1, MAX_STREAMS));
	else if (!strcmp(role, "datagram-sink"))
		datagram_sink(&to, until);
	else if (!strcmp(role, "datagrams"))
		datagrams(&to, duration, number(more, 1, MAX_DATAGRAM));
	else if (!strcmp(role, "echo"))
		echo(&to, until);
	else if (!strcmp(role, "ping"))
		ping(&to, duration);
	else
		refuse(role, "is not something to do");
	return 0;
}
