/* SPDX-License-Identifier: Apache-2.0 */
/* cuda_model.h: what a test says to the model, and what it may ask; for C and C++. */
#ifndef CUDA_MODEL_H
#define CUDA_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Read at every call and launch; a test writes what it wants. CUDA_MODEL_LATE and CUDA_MODEL_SEED
 * in the environment give the first two their values at the start of the program and at every
 * reset. */
extern struct cuda_model_settings {
    int late;      /* 0: copies and products happen at once; 1, 2: as late as the program allows;
                      products read shared memory when they are waited for (1) or issued (2) */
    uint64_t seed; /* 0: threads take turns in ascending order; else a random order, this one */
    unsigned resident_blocks; /* how many blocks run side by side: 2 */
    int devices;              /* 1; 0 makes every call fail with cudaErrorNoDevice */
    int major, minor;         /* compute capability: 9.0 */
    int multiprocessors;      /* 4 */
    size_t shared_memory;     /* bytes that a block may opt in to: 227 KB */
    size_t memory;            /* bytes that may be allocated: 1 GB */
    bool quiet;               /* what goes wrong inside a kernel is not printed to stderr */
} cuda_model_settings;

/* As a new process: the settings above, no sticky error, nothing planned to fail, counts at 0. All
 * memory of the device is freed, and streams, events and graphs are gone. */
void cuda_model_reset(void);

/* The nth call of the API, or the nth launch, from here on (1 is the next) fails with this
 * cudaError_t and, unless it is one that releases something, does nothing. It does not stick. n = 0
 * takes it back. */
void cuda_model_fail_call(uint64_t n, int error);
void cuda_model_fail_launch(uint64_t n, int error);

struct cuda_model_counts {
    uint64_t calls;       /* of the API, without those that only ask for an error or its name */
    uint64_t launches;    /* calls among them that launch a kernel */
    uint64_t kernels;     /* grids that ran: a graph adds its own every time */
    uint64_t allocations; /* alive now, */
    uint64_t bytes;       /* and their sum */
    uint64_t handles;     /* streams, events and graphs that were not destroyed */
};
struct cuda_model_counts cuda_model_count(void);

/* What went wrong inside a kernel: the text of the sticky error; "" if nothing did. */
const char *cuda_model_report(void);

/* Who waits for what in the blocks that are resident; for a debugger: `call cuda_model_threads()`.
 */
void cuda_model_threads(void);

#ifdef __cplusplus
}
#endif
#endif
