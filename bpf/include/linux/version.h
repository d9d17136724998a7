/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The programs run on any kernel that loads them, so they ask for no version. */
#define LINUX_VERSION_CODE 0
#define KERNEL_VERSION(major, minor, patch) (((major) << 16) + ((minor) << 8) + (patch))
