/* fake_cufile.h - a cuFile for tests, which kernels/cuda/direct.c loads in the genuine one's place: it reads with
 * pread(), and what it is told to spoil it spoils. */
#ifndef FAKE_CUFILE_H
#define FAKE_CUFILE_H

#include <stdint.h>

/* What the tests set and read: found by its name in the plug-in. */
typedef struct fake_cufile_control {
    int register_error; /* what registering a file gives */
    uint64_t fail_at;   /* the read (1 = the first) that fails; 0: none */
    uint64_t flip_at;   /* that brings a wrong bit */
    uint64_t most;      /* bytes that a read brings; 0: all */

    uint64_t reads, open_files; /* so far; registered ones */
} fake_cufile_control;

#endif
