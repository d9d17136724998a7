// SPDX-License-Identifier: Apache-2.0
//
// Stands for QEMU's network: moves all frames between the TAP of a VM on the host and another TAP,
// which is the card that the VM's kernel sees.
//
//   relay FD FD
//
// Both are TAPs that the caller opened non-blocking, with virtio headers and the same offloads.

#include "frames.h"

int main(int count, char **words)
{
	int fds[2];

	if (count != 3) {
		fputs("relay FD FD\n", stderr);
		return 2;
	}
	fds[0] = descriptor(words[1]);
	fds[1] = descriptor(words[2]);
	move_frames(fds, NULL);
}
