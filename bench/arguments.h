// SPDX-License-Identifier: Apache-2.0
//
// Reads the words of a command line, and ends the program with a message when it cannot go on: with
// status 2 for a wrong word, with 1 for what failed.
#ifndef BENCH_ARGUMENTS_H
#define BENCH_ARGUMENTS_H

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

static inline void die(const char *what)
{
	perror(what);
	exit(1);
}

static inline void refuse(const char *what, const char *why)
{
	fprintf(stderr, "%s %s\n", what, why);
	exit(2);
}

static inline uint64_t number(const char *text, uint64_t low, uint64_t high)
{
	char *end;
	uint64_t value;

	errno = 0;
	value = strtoull(text, &end, 10);
	if (errno || end == text || *end || value < low || value > high) {
		fprintf(stderr, "%s is not a number from %" PRIu64 " to %" PRIu64 "\n", text, low, high);
		exit(2);
	}
	return value;
}

static inline double seconds(const char *text, double most)
{
	char *end;
	double value = strtod(text, &end);

	if (end == text || *end || !(value > 0 && value <= most)) {
		fprintf(stderr, "%s is not a time of up to %g seconds\n", text, most);
		exit(2);
	}
	return value;
}

// Puts an IPv4 or IPv6 address and a port where it says, and returns the length.
static inline socklen_t socket_address(const char *text, uint16_t port, struct sockaddr_storage *into)
{
	struct sockaddr_in *four = (void *)into;
	struct sockaddr_in6 *six = (void *)into;

	if (inet_pton(AF_INET, text, &four->sin_addr) == 1) {
		four->sin_family = AF_INET;
		four->sin_port = htons(port);
		return sizeof(*four);
	}
	if (inet_pton(AF_INET6, text, &six->sin6_addr) == 1) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		return sizeof(*six);
	}
	refuse(text, "is not an address");
	return 0;
}

#endif
