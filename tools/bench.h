/* SPDX-License-Identifier: Apache-2.0 */
/* bench.h: sparge bench: what its parts hand to each other. bench.c runs them in this order:
 * bench_args.c reads the lists, bench_inputs.c makes inputs and masks, bench_group.c the cases that
 * are timed in turns, bench_check.c sees that they are right, bench_time.c times, bench_report.c
 * prints. */
#ifndef SPARGE_TOOLS_BENCH_H
#define SPARGE_TOOLS_BENCH_H

#include "sparge_inspect.h"
#include "tools/device.h"
#include "tools/inputs.h"
#include "tools/progress.h"

/* ---- What is asked ----------------------------------------------------------------------- */

enum { BENCH_LIST = 32, BENCH_CAUSALS = 3 };

/* Numbers, or the places of words in their enum. */
typedef struct bench_list {
    double item[BENCH_LIST];
    int count;
} bench_list;

/* Where the mask of a case comes from. RANDOM and BANDED are imposed. ONEDNN: dense, and not ours.
 */
typedef enum bench_mask {
    BENCH_RANDOM,
    BENCH_BANDED,
    BENCH_PREDICTED,
    BENCH_DENSE,
    BENCH_ONEDNN
} bench_mask;

const char *bench_mask_string(bench_mask mask);

typedef struct bench_args {
    options_base base;
    bench_list q_len, dim, heads, sparsity, mask, threads, isa, qk, pv, causal;
    sparge_backend backend; /* CPU or CUDA */
    bench_list kernel;      /* of cuda; 0: the best that can do it. There FASTEST in qk is int8, or
                               f32 where a kernel has no int8 */
    attention_args attention; /* what is predicted, and of a capture --params and its manifest */
    const char *capture;      /* q, k and v; NULL: synthetic */
    int64_t repeat;           /* rounds that count */
    bool json, allow_busy;
} bench_args;

void bench_parse(int argc, char **argv, bench_args *args);
int bench_cores(void); /* that this process may use */

/* ---- What is run ------------------------------------------------------------------------- */

/* Seconds of a call, of all of it and of its parts, and the peaks of the machine in the same pass,
 * in operations a second. NaN where a figure does not apply. */
enum {
    BENCH_TOTAL,
    BENCH_PREDICT,
    BENCH_QUANTIZE,
    BENCH_ATTEND,
    BENCH_PEAK_F32,
    BENCH_PEAK_INT8,
    BENCH_FIGURES
};

typedef struct bench_times {
    double figure[BENCH_FIGURES]; /* what one pass does for prediction and codes is QUANTIZE */
} bench_times;

/* One way to compute attention for the inputs of a group. */
typedef struct bench_case {
    sparge_dtype qk, pv;
    int kernel; /* of cuda, else 0 */
    bench_mask kind;
    double imposed;     /* the sparsity that was asked for; NaN where the predictor decides */
    sparge_mask mask;   /* for PREDICTED the place of the result; no bits when dense */
    device_memory bits; /* of the mask */
    int dense;          /* the case of the same precision without a mask */
    bool shown;         /* asked for, not only compared with */
    bool wrong;         /* its result did not pass the check */
    bench_times *pass;
    int passes, kept, capacity; /* kept: of the rounds that count */
    bench_times median;
    sparge_result result; /* of the last call */
} bench_case;

/* What runs under one choice of instruction set and threads, and how fast it could at most. */
typedef struct bench_machine {
    sparge_isa isa;
    int threads;
    sparge_peaks peaks;
    double bytes; /* per second, from main memory */
} bench_machine;

/* The cases of one shape, instruction set and number of threads: timed in turns, so that whatever
 * slows the machine down for a while slows all of them. On cpu cases[0] is dense f32, the baseline.
 * On cuda there is none: f32 is what the two lessons before dp4a compute in, and nobody's fast
 * attention. */
typedef struct bench_group {
    const bench_args *args;
    const inputs *in;
    sparge_problem problem; /* that of `in`, where the backend finds it */
    sparge_options options; /* without qk, pv and kernel */
    bench_machine machine;
    bench_case *cases;
    int count;
    array o, want;     /* [batch][heads][q_len][dim_v]; on cuda `want` of one head */
    sparge_mask spare; /* where the predictor writes for a case whose mask is imposed; cpu alone */
    device_memory input[3], output; /* q, k, v and o; on cuda o is in the type of q */
    device_memory workspace;        /* of cuda */
    double foreign; /* cores that others used, at most, in a busy round; NaN: unknown */
    bool busy;      /* too many: there are no times, or with --allow-busy disturbed ones */
} bench_group;

/* Of g, args to machine are given. */
void bench_group_make(bench_group *g);
void bench_group_free(bench_group *g);

sparge_options bench_options(const bench_group *g, const bench_case *c);

/* Runs a case; leaves its output in g->output. */
void bench_run(bench_group *g, bench_case *c, bench_times *times);
/* And brings that to g->o in f32, with the mask that was predicted. */
void bench_fetch(bench_group *g, bench_case *c);

/* o of heads that lie packed from `data` on. */
sparge_out bench_output(const sparge_problem *p, void *data, sparge_dtype dtype);

/* bench_onednn.c: can it compute these, and does it: o is packed; false: no memory, or oneDNN
 * refused. */
bool bench_onednn_can(const bench_group *g);
bool bench_onednn(const sparge_problem *p, int threads, float *o);

/* ---- The parts --------------------------------------------------------------------------- */

/* Normal numbers of variance 1 whose blocks of tokens are alike, from a fixed seed. */
void bench_synthetic(int64_t heads, int64_t len, int64_t dim, inputs *out);
/* The same for cuda: in f16, and a head from the third on repeats one of the first two. */
void bench_synthetic_f16(int64_t heads, int64_t len, int64_t dim, inputs *out);
void bench_capture(const char *path, inputs *out);

/* Keeps round((1 - sparsity) * visible) of the key blocks that each query block sees, at least 1.
 */
void bench_impose(bench_mask kind, double sparsity, const sparge_problem *problem,
                  const sparge_options *options, sparge_mask *mask);

/* Sets c->wrong, and says why in `text`, where the result of a case cannot be trusted. */
void bench_check(bench_group *g, bench_case *c, char text[256]);

/* Fills in the medians, or sets g->busy; the watched share of the work goes on from `from` to `to`.
 */
void bench_time(bench_group *g, progress *watch, double from, double to);

void bench_print_machine(void);
void bench_print_peaks(const bench_machine *machine);
void bench_print_group(const bench_group *g);
void bench_json_group(const bench_group *g, json_t *rows);
/* "int8/int8 random 0.5", and " causal" where it is; on cuda "kernel 5 int8/fp8 random 0.5". */
void bench_case_name(const bench_group *g, const bench_case *c, char text[64]);

#endif
