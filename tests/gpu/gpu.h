/* SPDX-License-Identifier: Apache-2.0 */
/* gpu.h: what the files of the cuda backend's tests share: which kernels there are, the same
 * question to ref and to a kernel, and the judgement of what comes back. */
#ifndef SPARGE_TESTS_GPU_GPU_H
#define SPARGE_TESTS_GPU_GPU_H

#include "tests/support/problem.h"

#ifdef SPARGE_CUDA_MODEL
#include <cuda_model.h>
#endif

#define COUNT(array) ((int64_t)(sizeof(array) / sizeof *(array)))

/* What each kernel multiplies with, the fastest first. */
typedef struct kernel {
    int n;
    sparge_dtype qk_dtype, pv_dtype;
} kernel;
extern const kernel kernels[];
enum { RUNGS = 7 };

/* Every kernel with every precision it has, those that run here; --quick: kernels 2, 4 and 5 with
 * one each. */
#define EACH_RUNG(r)                                                     \
    for (const kernel *r = kernels + plain_quick(); r < kernels + RUNGS; \
         r += plain_quick() ? 2 : 1)                                     \
        if (runs_here(r->n))

bool on_model(void);
bool runs_here(int n);   /* this kernel; a device before sm_90 has no kernel 5 */
void fresh_device(void); /* the model's settings and counts as at first; nothing on a GPU */
void any_schedule(void); /* of the model, at random: late mode, order of threads, resident blocks */

/* 128 x 64 blocks on ref with the precisions of a kernel. */
problem question(const shape *s, const kernel *r);
void use(problem *x, const kernel *r);

typedef struct reply {
    answer a;
    sparge_mask mask; /* that attention predicted */
} reply;

typedef struct terms { /* of a question */
    bool predict;
    sparge_dtype dtype;
    tensor_layout layout;
    int64_t spare; /* words in a row of the predicted mask */
} terms;

reply ask_ref(problem *x, const terms *t);
reply ask_kernel(problem *x, const kernel *r, const terms *t);
void forget(reply *r);

/* Everything that is promised of a kernel's answer, ref's being `want`. */
void compare(const problem *x, const kernel *r, const reply *got, const reply *want);
/* Asks both and compares. */
void verify_with(problem *x, const kernel *r, const terms *t);
void verify(problem *x, const kernel *r, bool predict);
/* Stage 1 alone: the mask, whose rows have so many words to spare, and intermediates are ref's. */
void verify_prediction(problem *x, const kernel *r, int64_t spare);

/* How far answers lay from the judge at most, as a share of what is allowed; printed by a test at
 * the end. */
extern double worst_ratio[RUNGS];

sparge_mask wide_mask(const problem *x, int64_t spare);

/* ---- One question with variations, of every kernel ---- */

/* n is 0 .. count - 1; under --quick every quick-th. */
#define EACH_CASE(r, n, count, quick)                                                \
    for (int n = (fresh_device(), 0); n < (count); n += plain_quick() ? (quick) : 1) \
        EACH_RUNG(r)                                                                 \
    if (name_case(r, n))

#define EACH_KERNEL(r) EACH_CASE(r, only, 1, 1)

bool name_case(const kernel *r, int n); /* true */

problem question_of(const kernel *r, int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len,
                    int64_t k_len, int64_t dim, int64_t dim_v);

/* Writes x, sees that the kernel gives ref's answers over x's mask or that of attention, frees x.
 */
enum { GIVEN = 1, PREDICTED = 2 };
void check_answers(problem *x, const kernel *r, unsigned masks);

/* A kernel's own answer over x's mask, in f32; verified: x is written and it is ref's first. */
answer answer_of(problem *x, const kernel *r);
answer verified(problem *x, const kernel *r);
void forget_both(answer *a, problem *x);

/* That answer, or that over a predicted mask, is near dense attention on the real inputs. */
void near_dense(problem *x, const kernel *r, bool predict);

void set_mask(problem *x, bool (*keep)(int64_t line, int64_t j)); /* line: a row of the mask */
bool second_alone(int64_t line, int64_t j);                       /* key block 1 */

/* ---- Calls that are made by hand ---- */

/* A question on the device, with poisoned outputs in host memory to compare afterwards. */
typedef struct scene {
    const problem *x;
    twins inputs, outputs;
    sparge_problem p;
    sparge_options o;
    sparge_mask given, mask; /* of attend; of attention */
    sparge_mask host_mask;
    answer a;
    sparge_result result;
    sparge_error error;
    bool predict;
} scene;

problem usual(const kernel *r); /* some of everything, small */
void scene_open(scene *s, problem *x, const kernel *r, bool predict);
sparge_status scene_call(scene *s);
void scene_fetch(scene *s);  /* outputs to host memory */
void scene_poison(scene *s); /* the outputs, there and here */
void same_outputs(const scene *got, const answer *want);
bool scene_untouched(scene *s); /* they still are poison on the device */
void scene_close(scene *s);

/* ---- Streams and graphs (stream.cu) ---- */

#ifdef __cplusplus
extern "C" {
#endif
void *stream_make(void);
void stream_wait(void *stream);
void stream_free(void *stream);
void capture_begin(void *stream);
void *capture_end(void *stream); /* a graph that can be launched */
void graph_launch(void *graph, void *stream);
void graph_free(void *graph);
const char *stream_error(void); /* of these functions, the first one; NULL */
void *pinned_alloc(size_t bytes);
void pinned_free(void *p);
#ifdef __cplusplus
}
#endif

#endif
