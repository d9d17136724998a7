/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* BCC sizes ring buffers by it; vgw has none. */
#define PAGE_SIZE 4096
