// SPDX-License-Identifier: Apache-2.0
//
// Opens TCP connections as fast as they come about, or accepts them; both ends in bounds.
//
//   connections server ADDRESS FIRST_PORT PORTS SECONDS
//   connections client ADDRESS FIRST_PORT PORTS SECONDS CONNECTIONS IN_FLIGHT
//
// The server listens on PORTS ports from FIRST_PORT on, says "ready" when it does, and ends when its
// standard input closes or after SECONDS. The client keeps IN_FLIGHT connections on the way, to one
// port after the other, until it has begun CONNECTIONS of them or SECONDS are over. A connection that
// has come about is reset at once, so that none waits in TIME_WAIT and no port is used up. At the end
// it prints one JSON object.

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "arguments.h"

enum {
	MAX_SECONDS = 600,
	MAX_PORTS = 4096,
	BACKLOG = 4096,
	EVENTS = 256,
	TICK_MS = 20,
};

// The other end, or the own one of a server; the port is filled in for each socket.
struct endpoint {
	struct sockaddr_storage address;
	socklen_t length;
	int first_port;
	int ports;
};

struct client {
	struct endpoint server;
	int epoll;
	long limit;     // connections to begin
	int in_flight;  // wanted at a time
	long begun;
	long completed;
	long failed;
	int open;
};

static double now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static struct endpoint endpoint_of(char *const *words)
{
	struct endpoint found = {0};

	found.length = socket_address(words[0], 0, &found.address);
	found.first_port = (int)number(words[1], 1, 65535);
	found.ports = (int)number(words[2], 1, MAX_PORTS);
	if (found.first_port + found.ports > 65536) {
		fprintf(stderr, "%d ports from %d on are too many\n", found.ports, found.first_port);
		exit(2);
	}
	return found;
}

static void set_port(struct endpoint *endpoint, int index)
{
	in_port_t port = htons((in_port_t)(endpoint->first_port + index % endpoint->ports));

	if (endpoint->address.ss_family == AF_INET)
		((struct sockaddr_in *)&endpoint->address)->sin_port = port;
	else
		((struct sockaddr_in6 *)&endpoint->address)->sin6_port = port;
}

static int open_socket(const struct endpoint *endpoint)
{
	int fd = socket(endpoint->address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	return fd;
}

static void watch(int epoll, int fd, unsigned int events)
{
	struct epoll_event event = {.events = events, .data.fd = fd};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) < 0)
		die("epoll_ctl");
}

// ---- server ------------------------------------------------------------------------------------

static void listen_on(struct endpoint *here, int index, int epoll)
{
	int fd = open_socket(here), on = 1;

	set_port(here, index);
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) < 0)
		die("SO_REUSEADDR");
	if (bind(fd, (struct sockaddr *)&here->address, here->length) < 0)
		die("bind");
	if (listen(fd, BACKLOG) < 0)
		die("listen");
	watch(epoll, fd, EPOLLIN);
}

// Accept all that wait and close them; they have been reset by the other end, or will be.
static void accept_all(int listener)
{
	int fd;

	while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) >= 0)
		close(fd);
	if (errno != EAGAIN && errno != ECONNABORTED && errno != EINTR)
		die("accept");
}

static int serve(struct endpoint here, double time)
{
	struct epoll_event events[EVENTS];
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	double end = now(CLOCK_MONOTONIC) + time;
	bool ended = false;

	if (epoll < 0)
		die("epoll_create1");
	for (int index = 0; index < here.ports; index++)
		listen_on(&here, index, epoll);
	watch(epoll, STDIN_FILENO, EPOLLIN);
	printf("ready\n");
	fflush(stdout);
	while (!ended && now(CLOCK_MONOTONIC) < end) {
		int ready = epoll_wait(epoll, events, EVENTS, TICK_MS);

		for (int i = 0; i < ready; i++) {
			if (events[i].data.fd == STDIN_FILENO)
				ended = true;
			else
				accept_all(events[i].data.fd);
		}
	}
	return 0;
}

// ---- client ------------------------------------------------------------------------------------

// Close without the exchange of FINs.
static void reset(int fd)
{
	struct linger linger = {.l_onoff = 1, .l_linger = 0};

	if (setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger)) < 0)
		die("SO_LINGER");
	close(fd);
}

static void begin(struct client *client)
{
	int fd = open_socket(&client->server);

	set_port(&client->server, (int)(client->begun % client->server.ports));
	client->begun++;
	if (connect(fd, (struct sockaddr *)&client->server.address, client->server.length) < 0 &&
	    errno != EINPROGRESS) {
		client->failed++;
		close(fd);
		return;
	}
	client->open++;
	watch(client->epoll, fd, EPOLLOUT);
}

static void finish(struct client *client, int fd)
{
	int error = 0;
	socklen_t length = sizeof(error);

	if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
		die("SO_ERROR");
	if (error)
		client->failed++;
	else
		client->completed++;
	client->open--;
	reset(fd);
}

static int request(struct client client, double time)
{
	struct epoll_event events[EVENTS];
	double start, elapsed, cpu;

	client.epoll = epoll_create1(EPOLL_CLOEXEC);
	if (client.epoll < 0)
		die("epoll_create1");
	start = now(CLOCK_MONOTONIC);
	cpu = now(CLOCK_PROCESS_CPUTIME_ID);
	for (;;) {
		int ready;

		while (client.open < client.in_flight && client.begun < client.limit)
			begin(&client);
		elapsed = now(CLOCK_MONOTONIC) - start;
		if (elapsed >= time || client.open == 0)
			break;
		ready = epoll_wait(client.epoll, events, EVENTS, TICK_MS);
		for (int i = 0; i < ready; i++)
			finish(&client, events[i].data.fd);
	}
	cpu = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
	printf("{\"completed\": %ld, \"failed\": %ld, \"unanswered\": %d, \"seconds\": %.6f, "
	       "\"cpu_seconds\": %.6f}\n",
	       client.completed, client.failed, client.open, elapsed, cpu);
	return 0;
}

int main(int argc, char **argv)
{
	// A bench that is killed leaves nothing running.
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (argc == 6 && strcmp(argv[1], "server") == 0)
		return serve(endpoint_of(argv + 2), seconds(argv[5], MAX_SECONDS));
	if (argc == 8 && strcmp(argv[1], "client") == 0) {
		struct client client = {
			.server = endpoint_of(argv + 2),
			.limit = number(argv[6], 1, 10000000),
			.in_flight = (int)number(argv[7], 1, EVENTS),
		};

		return request(client, seconds(argv[5], MAX_SECONDS));
	}
	fprintf(stderr, "usage: connections server ADDRESS FIRST_PORT PORTS SECONDS\n"
			"       connections client ADDRESS FIRST_PORT PORTS SECONDS CONNECTIONS IN_FLIGHT\n");
	return 2;
}
