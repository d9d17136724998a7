/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What BCC asks of the kernel's configuration. */
#define CONFIG_BPF_SYSCALL 1
