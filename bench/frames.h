// SPDX-License-Identifier: Apache-2.0
//
// Moves frames between TAPs that were opened with virtio headers, as the host's side of a virtual
// network card does: one read and one write for each frame, of up to 64 KiB where a sender leaves
// segmentation to others.
#ifndef BENCH_FRAMES_H
#define BENCH_FRAMES_H

#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

#include "arguments.h"

enum {
	VIRTIO_HEADER = sizeof(struct virtio_net_hdr),
	LARGEST_FRAME = VIRTIO_HEADER + 14 + 4 + 65536,
	FRAMES_PER_TURN = 64,
};

// What becomes of a frame without its virtio header; `from` is 0 or 1.
typedef bool (*accepts_frame)(const uint8_t *frame, size_t length, int from);

static int descriptor(const char *text)
{
	int fd = atoi(text);

	if (fd <= 0)
		refuse(text, "is not a descriptor");
	return fd;
}

// Moves what waits at fds[from], some frames at most, so that the other way gets its turn.
static void move_waiting(const int *fds, int from, accepts_frame accepts)
{
	static uint8_t frame[LARGEST_FRAME];
	ssize_t length;

	for (int turn = 0; turn < FRAMES_PER_TURN; turn++) {
		length = read(fds[from], frame, sizeof(frame));
		if (length < 0 && errno == EAGAIN)
			return;
		if (length < VIRTIO_HEADER)
			die("read from a TAP");
		if (accepts && !accepts(frame + VIRTIO_HEADER, length - VIRTIO_HEADER, from))
			continue;
		// What the kernel does not take is lost, as on any wire.
		if (write(fds[!from], frame, length) < 0 && errno != EAGAIN && errno != EINVAL &&
		    errno != EIO && errno != ENOBUFS)
			die("write to a TAP");
	}
}

// Moves frames both ways until killed; goes with the process that started it.
static void move_frames(const int *fds, accepts_frame accepts)
{
	struct pollfd polled[2] = { { fds[0], POLLIN, 0 }, { fds[1], POLLIN, 0 } };

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		if (poll(polled, 2, -1) < 0)
			die("poll");
		for (int from = 0; from < 2; from++)
			if (polled[from].revents)
				move_waiting(fds, from, accepts);
	}
}

#endif
