/* SPDX-License-Identifier: Apache-2.0 */
/*
 * VM fork: a process asks the VMM to fork the VM it runs in, and learns which copy it is in.
 *
 *     struct vmfork_fork_t fork;
 *     int result = vmfork_fork("web", 4, &fork);
 *     if (result != VMFORK_OK) {
 *         fprintf(stderr, "vmfork: %s\n", vmfork_strerror(result));
 *         exit(1);
 *     }
 *     if (fork.role == VMFORK_CHILD)
 *         serve(fork.index);
 *
 * There are two routes to the VMM: the device of the kernel module, /dev/vmfork, which serves root and the
 * members of its group, and the doorbell, which takes root. All functions take the device if there is one for
 * the caller, else the doorbell. Where the variable VMFORK_VIA was in the environment when the program was
 * executed, its value ("device" or "doorbell") is the one to take. The environment is read once, from
 * /proc/self/environ: setenv() changes nothing here, and may be called by other threads meanwhile.
 *
 * By the device, nothing of a child runs before its kernel has a random seed of its own. By the doorbell, the
 * tasks of other CPUs do: until vmfork_fork() returns, they may draw the same random numbers as those of the
 * parent and of the other children.
 *
 * Link with libvmfork.a; for a static program, with -static -Wl,--gc-sections. Any thread may call any function.
 */
#ifndef VMFORK_H
#define VMFORK_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Which side of the fork a VM is. */
#define VMFORK_PARENT 1
#define VMFORK_CHILD 2

/* Where a copy is: on the platform of its parent, or on another one. */
#define VMFORK_LOCAL 1
#define VMFORK_REMOTE 2

/* Largest count of children. */
#define VMFORK_MAX_CHILDREN 1024

/* What the functions return. No fork was made where nothing else is said. */
#define VMFORK_OK 0
#define VMFORK_EINVAL (-1)    /* An argument is NULL or out of range, or VMFORK_VIA names no route. */
#define VMFORK_ENOVMM (-2)    /* There is no VMM that can fork this machine. */
#define VMFORK_EVERSION (-3)  /* The VMM, or the kernel module, speaks another version of the interface. */
#define VMFORK_EACCESS (-4)   /* The caller lacks something that a fork needs: `vmfork detect` says what. */
#define VMFORK_ENOANSWER (-5) /* The VMM did not answer. */
#define VMFORK_EPROTOCOL (-6) /* The VMM's answer is not valid. Which VM this is, is not known: do not go on. */
#define VMFORK_EPARENT (-7)   /* The fork was made; this is the parent, and could not finish it. */
#define VMFORK_ECHILD (-8)    /* The fork was made; this is a child with an incomplete identity: do not go on. */
#define VMFORK_ECOPIED (-9)   /* Somebody else's fork made this VM while this caller waited for its own. */
#define VMFORK_EDEADLINE (-10)    /* It was not this caller's turn before its deadline. */
#define VMFORK_EINTERRUPTED (-11) /* A signal came before it was this caller's turn. */

/* The VMM made no fork, for the reason `code`, one of VMFORK_REFUSED_*. */
#define VMFORK_REFUSED(code) (-100 - (code))
#define VMFORK_REFUSED_UNKNOWN_COMMAND 1
#define VMFORK_REFUSED_NOT_LAUNCHED 2
#define VMFORK_REFUSED_BUSY 3
#define VMFORK_REFUSED_INVALID_COUNT 4
#define VMFORK_REFUSED_INVALID_TYPE 5
#define VMFORK_REFUSED_INVALID_FLAGS 6
#define VMFORK_REFUSED_QUIESCE 7
#define VMFORK_REFUSED_CAPTURE 8
#define VMFORK_REFUSED_FREEZE 9
#define VMFORK_REFUSED_PLACE 10
#define VMFORK_REFUSED_LAUNCH 11
#define VMFORK_REFUSED_SIGNAL 12
#define VMFORK_REFUSED_INTERNAL 13
#define VMFORK_REFUSED_CHILDREN 14
#define VMFORK_REFUSED_RATE 15
#define VMFORK_REFUSED_GENERATION 16
#define VMFORK_REFUSED_MEMORY 17
#define VMFORK_REFUSED_INCOMPLETE 18
#define VMFORK_REFUSED_COPIED 19 /* told as VMFORK_ECOPIED */
#define VMFORK_REFUSED_TIMEOUT 20

/* A fork as one VM saw it. */
struct vmfork_fork_t {
    uint32_t role;         /*   0: VMFORK_PARENT or VMFORK_CHILD. */
    uint32_t index;        /*   4: which child this is, from 1 to count; 0 in the parent. */
    uint32_t count;        /*   8: how many children were made. */
    uint32_t generation;   /*  12: how many forks lie between this VM and a booted one. */
    uint8_t vm_id[16];     /*  16: ID of this VM, a UUID in network byte order. */
    uint8_t parent_id[16]; /*  32: ID of the VM that this is a copy of; zero in one that was booted. */
    char name[65];         /*  48: name of this VM on its platform, NUL-terminated. */
    char vm_type[33];      /* 113: VM type of this VM, NUL-terminated. */
};

/*
 * Forks this VM into itself and `count` children (1 to VMFORK_MAX_CHILDREN) of the VM type `vm_type`, which is 1 to 32
 * of a-z, 0-9 and -, with no - at either end. Returns in the parent and in every child.
 *
 * Returns VMFORK_OK with `*out` filled in, or a negative code with `*out` untouched.
 */
int vmfork_fork(const char *vm_type, uint32_t count, struct vmfork_fork_t *out);

/*
 * The same, but gives up with VMFORK_EDEADLINE where it is not the caller's turn within `timeout_ms` milliseconds. Callers in one guest are
 * served one after another.
 */
int vmfork_fork_within(const char *vm_type, uint32_t count, uint64_t timeout_ms, struct vmfork_fork_t *out);

/* A copy that a fork has made, as its parent is told of it. */
struct vmfork_copy_t {
    uint8_t vm_id[16];  /*  0: ID of the VM, a UUID in network byte order. */
    uint32_t index;     /* 16: which child it is, from 1 to the fork's count. */
    uint32_t placement; /* 20: VMFORK_LOCAL or VMFORK_REMOTE. */
    char platform[33];  /* 24: name of the platform that has launched it, NUL-terminated; empty where there is one alone. */
};

/*
 * Lists the copies of this VM's latest fork, lowest index first: writes the first `capacity` of them to `copies`, which may be
 * NULL where that is 0.
 *
 * Returns how many there are, 0 in a child and where the VMM does not say where they are, or a negative code.
 */
int vmfork_copies(struct vmfork_copy_t *copies, uint32_t capacity);

/*
 * Finds the number of forks that lie between this VM and a booted one. It changes in every copy before the copy runs, whoever has asked for the
 * fork, and never in a parent; reading it takes no system call. All its bits are ones in a VM that has moved to a VMM that does not tell.
 *
 * Needs the device. Returns VMFORK_OK with `*out` pointing to the number, or a negative code with `*out` untouched. The pointer is the same for
 * all callers in a process, and valid until the process ends or executes another program: also in copies of the VM, and after fork(2).
 */
int vmfork_generation_map(const volatile uint64_t **out);

/* Returns VMFORK_OK where a VMM can fork this machine, else VMFORK_ENOVMM or VMFORK_EVERSION. Needs no privilege. */
int vmfork_detect(void);

/* Returns what a code means: a constant string in English, never NULL. */
const char *vmfork_strerror(int code);

#ifdef __cplusplus
}
#endif

#endif /* VMFORK_H */
