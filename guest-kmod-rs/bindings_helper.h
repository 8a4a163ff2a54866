/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the module needs of the kernel beyond the `kernel` crate: see bindings.rs. Sorted alphabetically.
 */

#include <linux/delay.h>
#include <linux/errno.h>
#include <linux/fs.h>
#include <linux/io.h>
#include <linux/ioport.h>
#include <linux/kobject.h>
#include <linux/kthread.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/poll.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/stat.h>
#include <linux/stop_machine.h>
#include <linux/timekeeping.h>
#include <linux/wait.h>
#include <uapi/linux/random.h>
#include <uapi/linux/sched/types.h>

/* Macros that are casts or calls of other macros, which bindgen leaves out. */
const int VMFORK_DYNAMIC_MINOR = MISC_DYNAMIC_MINOR;
const __poll_t VMFORK_EPOLLIN = EPOLLIN | EPOLLRDNORM;
const fmode_t VMFORK_FMODE_WRITE = (__force fmode_t)FMODE_WRITE;
const unsigned long VMFORK_MEMREMAP_WB = MEMREMAP_WB;
const unsigned int VMFORK_RNDRESEEDCRNG = RNDRESEEDCRNG;
const unsigned int VMFORK_TASK_NORMAL = TASK_NORMAL;
const vm_flags_t VMFORK_VM_MAYWRITE = VM_MAYWRITE;
const vm_flags_t VMFORK_VM_WRITE = VM_WRITE;
