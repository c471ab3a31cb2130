/* SPDX-License-Identifier: Apache-2.0 */
/* refusals.c: what the cuda backend refuses and with which words, and what happens when CUDA fails.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

#include "sparge_cuda.h"

TestSuite(refusals);

/* ---- What is refused ---- */

static void refused(const sparge_problem *p, const sparge_options *o, sparge_status status,
                    const char *sentence)
{
    int64_t bytes = -7;
    sparge_error error = {"?"};
    const sparge_status got = sparge_workspace_bytes(p, o, true, &bytes, &error);
    check(got == status && strstr(error.text, sentence), "%s: \"%s\", not \"%s\"",
          sparge_status_string(got), error.text, sentence);
    check_equal(bytes, (int64_t)-7);
    sparge_result result = {.o = {&bytes, SPARGE_F32, 1, 1, 1}};
    check_equal(sparge_attend(p, o, NULL, &result, NULL), status);
    check_equal(sparge_attention(p, o, &result, &error), status);
    check(strstr(error.text, sentence), "%s", error.text);
    check_equal(bytes, (int64_t)-7);
}

Test(refusals, precisions_of_each_kernel)
{
    static const sparge_dtype all[] = {SPARGE_INT8, SPARGE_INT12, SPARGE_F32, SPARGE_F16,
                                       SPARGE_FP8};
    fresh_device();
    problem x = usual(&kernels[0]);
    x.o.backend = SPARGE_CUDA;
    for (int n = 0; n <= 5; n++)
        for (int qk = 0; qk < 3; qk++)
            for (int pv = 0; pv < 5; pv++) {
                check_case("kernel %d, qk %d, pv %d", n, qk, pv);
                bool has = false;
                for (int i = 0; i < RUNGS; i++)
                    has |= (n == 0 || kernels[i].n == n) && kernels[i].qk_dtype == all[qk] &&
                           kernels[i].pv_dtype == all[pv] && runs_here(kernels[i].n);
                x.o.cuda.kernel = n;
                x.o.qk_dtype = all[qk];
                x.o.pv_dtype = all[pv];
                int64_t bytes;
                if (has)
                    check_equal(sparge_workspace_bytes(&x.p, &x.o, true, &bytes, NULL), SPARGE_OK);
                else
                    refused(&x.p, &x.o, SPARGE_ERR_UNSUPPORTED,
                            n ? check_text("kernel is %d, which", n) : "no kernel");
            }
    problem_free(&x);
}

Test(refusals, sizes_that_the_backend_does_not_have)
{
    fresh_device();
    check_case("sizes");
    problem x = usual(&kernels[2]);
    use(&x, &kernels[2]);
    sparge_problem p = x.p;
    sparge_options o = x.o;
    o.block_q = 64;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED,
            "blocks are 64 x 64, the cuda backend has 128 x 64 alone");
    o = x.o;
    o.block_k = 128;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "128 x 128");
    o = x.o;
    p.dim = 129;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "dim is 129");
    p = x.p;
    p.dim_v = 129;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "dim_v 129");
    p = x.p;
    p.k_len = (int64_t)1 << 28;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED,
            "k_len is 268435456, a row of its blocks does not fit into shared memory");
    p.k_len = 64 * 40000; /* the row fits, but with cells there is more */
    int64_t bytes;
    check_equal(sparge_workspace_bytes(&p, &o, true, &bytes, NULL), SPARGE_OK);
    o.cell = 8;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "k_len is 2560000, a row of its blocks does not fit");
    o = x.o;
    p.k_len = ((int64_t)1 << 30) + 1;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "too much for one launch");
    p = x.p;
    p.q_len = ((int64_t)1 << 30) + 1;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "too much for one launch");
    o.cuda.kernel = 6;
    refused(&x.p, &o, SPARGE_ERR_ARGUMENT, "kernel is 6");
    o = x.o;
    o.rules = SPARGE_RULES_PAPER;
    refused(&x.p, &o, SPARGE_ERR_UNSUPPORTED, "rules");
    if (runs_here(5)) {
        use(&x, &kernels[5]);
        for (int64_t rows = 1; rows < 140; rows++) {
            x.o.skip_rows = rows;
            const bool has = rows == 16 || rows == 32 || rows == 64 || rows >= 128;
            if (!has)
                refused(&x.p, &x.o, SPARGE_ERR_UNSUPPORTED,
                        "kernel is 5, which tests lambda for 16, 32, 64 or 128 rows");
            else
                check_equal(sparge_workspace_bytes(&x.p, &x.o, true, &bytes, NULL), SPARGE_OK);
            sparge_options never = x.o;
            never.thresholds.lambda = -INFINITY;
            check_equal(sparge_workspace_bytes(&x.p, &never, true, &bytes, NULL), SPARGE_OK);
        }
    }
    problem_free(&x);
}

Test(refusals, the_best_kernel_is_found)
{
    fresh_device();
    static const struct {
        sparge_dtype qk_dtype, pv_dtype;
        int64_t rows;
        int kernel, below_9;
        sparge_dtype got, got_below;
    } want[] = {
        {SPARGE_INT8, SPARGE_FASTEST, 64, 5, 4, SPARGE_FP8, SPARGE_F16},
        {SPARGE_INT8, SPARGE_F16, 64, 5, 4, SPARGE_F16, SPARGE_F16},
        {SPARGE_INT8, SPARGE_INT8, 64, 4, 4, SPARGE_INT8, SPARGE_INT8},
        {SPARGE_INT8, SPARGE_FASTEST, 48, 4, 4, SPARGE_F16, SPARGE_F16},
        {SPARGE_F32, SPARGE_FASTEST, 64, 2, 2, SPARGE_F32, SPARGE_F32},
        {SPARGE_F32, SPARGE_F32, 5, 2, 2, SPARGE_F32, SPARGE_F32},
    };
    for (int old = 0; old < 1 + on_model(); old++) {
#ifdef SPARGE_CUDA_MODEL
        cuda_model_settings.major = old ? 8 : 9;
#endif
        const bool below = !runs_here(5);
        for (int64_t n = 0; n < COUNT(want); n++) {
            check_case("qk %d pv %d rows %lld, old %d", (int)want[n].qk_dtype,
                       (int)want[n].pv_dtype, (long long)want[n].rows, old);
            problem x = usual(&kernels[0]);
            x.o.backend = SPARGE_CUDA;
            x.o.qk_dtype = want[n].qk_dtype;
            x.o.pv_dtype = want[n].pv_dtype;
            x.o.skip_rows = want[n].rows;
            answer a = attention(&x, NULL);
            check_equal(a.result.kernel, below ? want[n].below_9 : want[n].kernel);
            check_equal(a.result.pv_dtype, below ? want[n].got_below : want[n].got);
            answer_free(&a);
            problem_free(&x);
        }
    }
    fresh_device();
}

#ifdef SPARGE_CUDA_MODEL
/* ---- Devices that are not there, or too old, or too small ---- */

Test(refusals, devices)
{
    fresh_device();
    check_case("devices");
    problem x = usual(&kernels[2]);
    use(&x, &kernels[2]);
    check(sparge_backend_available(SPARGE_CUDA), "there is one");
    cuda_model_settings.devices = 0;
    check(!sparge_backend_available(SPARGE_CUDA), "there is none");
    refused(&x.p, &x.o, SPARGE_ERR_UNSUPPORTED, "there is no CUDA device here");
    void *data = &x;
    sparge_error error;
    check_equal(sparge_device_alloc(10, &data, &error), SPARGE_ERR_UNSUPPORTED);
    check(!data && strstr(error.text, "there is no CUDA device here"), "%s", error.text);
    cuda_model_settings.devices = 1;
    cuda_model_settings.major = 7;
    cuda_model_settings.minor = 5;
    check(!sparge_backend_available(SPARGE_CUDA), "it is too old");
    refused(&x.p, &x.o, SPARGE_ERR_UNSUPPORTED, "compute capability 7.5, it must be at least 8.0");
    cuda_model_settings.major = 8;
    cuda_model_settings.minor = 0;
    check(sparge_backend_available(SPARGE_CUDA), "8.0 will do");
    use(&x, &kernels[5]);
    refused(&x.p, &x.o, SPARGE_ERR_UNSUPPORTED, "kernel is 5, which needs compute capability 9.0");
    cuda_model_settings.major = 12;
    refused(&x.p, &x.o, SPARGE_ERR_UNSUPPORTED, "kernel is 5, which needs compute capability 9.0");
    problem_free(&x);
    fresh_device();
}

/* An allocation that fails, at every amount of memory up to what is enough. */
Test(refusals, memory_that_is_not_there)
{
    fresh_device();
    check_case("memory");
    problem x = usual(&kernels[5]);
    scene s;
    scene_open(&s, &x, &kernels[5], true);
    const struct cuda_model_counts before = cuda_model_count();
    int64_t bytes;
    check(sparge_workspace_bytes(&s.p, &s.o, true, &bytes, NULL) == SPARGE_OK, "bytes");
    for (int64_t more = 0; more < 2 * bytes; more += bytes / 9) {
        cuda_model_settings.memory = before.bytes + (size_t)more;
        scene_poison(&s);
        const sparge_status status = scene_call(&s);
        if (status == SPARGE_OK) {
            check(more >= s.result.workspace_bytes, "%lld bytes were enough", (long long)more);
            continue;
        }
        check(status == SPARGE_ERR_MEMORY && more < s.result.workspace_bytes &&
                  strstr(s.error.text, "cudaMallocAsync"),
              "%s: %s", sparge_status_string(status), s.error.text);
        check(scene_untouched(&s), "written after an error");
        check_equal(cuda_model_count().allocations, before.allocations);
        check_equal(cuda_model_count().handles, before.handles);
    }
    cuda_model_settings.memory = 1 << 30;
    scene_close(&s);
    problem_free(&x);
}

/* Eight rows of S stand in shared memory together, or fewer: on the smallest device that there is
 * (99 KB) 3000 blocks leave room for six. */
Test(refusals, rows_of_scores_in_little_shared_memory)
{
    fresh_device();
    check_case("99 KB");
    cuda_model_settings.shared_memory = 99 << 10;
    const shape s = shape_of(1, 1, 1, 128 * 9, 64 * (plain_quick() ? 100 : 3000), 1, 1);
    problem x = question(&s, &kernels[2]);
    x.o.thresholds.tau = 0.6f;
    verify_prediction(&x, &kernels[2], 0);
    problem_free(&x);
    fresh_device();
}

/* ---- CUDA fails ---- */

static const char *const calls_by_name[] = {"cuda", "the launch of ", "no CUDA device"};

static void fails_well(scene *s, struct cuda_model_counts before, sparge_status status,
                       const char *what, uint64_t n)
{
    bool named = false;
    for (int64_t i = 0; i < COUNT(calls_by_name); i++)
        named |= strstr(s->error.text, calls_by_name[i]) != NULL;
    check(status != SPARGE_OK && status != SPARGE_ERR_ARGUMENT && status != SPARGE_ERR_SHAPE &&
              named,
          "%s %llu failed: %s, \"%s\"", what, (unsigned long long)n, sparge_status_string(status),
          s->error.text);
    check(strstr(s->error.text, "\?\?\?") == NULL, "the sentence was not written: %s",
          s->error.text);
    stream_wait(NULL); /* memory is freed in the order of its stream */
    const struct cuda_model_counts after = cuda_model_count();
    check(after.allocations == before.allocations && after.handles == before.handles,
          "%s %llu leaks: %s", what, (unsigned long long)n, s->error.text);
}

/* Every call and every launch in turn; then the same question is answered. */
static void fail_in_turn(const kernel *r, bool predict, bool queued)
{
    problem x = usual(r);
    static sparge_thresholds each[300];
    for (int h = 0; h < 300; h++)
        each[h] = x.o.thresholds;
    x.o.per_head = each;
    use(&x, r);
    answer want = predict ? attention(&x, NULL) : attend(&x);
    scene s;
    scene_open(&s, &x, r, predict);
    void *stream = queued ? stream_make() : NULL;
    s.o.cuda.stream = stream;
    sparge_intermediates intermediates = {0};
    twins t = {.count = 0};
    intermediates.q_int = twin(&t, s.a.intermediates.q_int); /* the launch of intermediates, too */
    s.result.intermediates = &intermediates;
    const struct cuda_model_counts before = cuda_model_count();
    check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
    const struct cuda_model_counts after = cuda_model_count();
    if (queued)
        stream_wait(stream);
    const uint64_t calls = after.calls - before.calls, launches = after.launches - before.launches;
    check(calls > 10 && launches > 3, "%llu calls", (unsigned long long)calls);
    for (uint64_t n = 1; n <= calls; n++) {
        cuda_model_fail_call(n, n % 2 ? 999 : 2); /* unknown, or out of memory */
        const sparge_status status = scene_call(&s);
        cuda_model_fail_call(0, 0);
        if (queued)
            stream_wait(stream);
        /* What only releases may fail unheard after the answer is there. */
        if (status == SPARGE_OK) {
            check(n + 4 > calls && !queued, "call %llu failed in silence", (unsigned long long)n);
            continue;
        }
        fails_well(&s, before, status, "call", n);
    }
    for (uint64_t n = 1; n <= launches; n++) {
        cuda_model_fail_launch(n, 701);
        const sparge_status status = scene_call(&s);
        cuda_model_fail_launch(0, 0);
        if (queued)
            stream_wait(stream);
        fails_well(&s, before, status, "launch", n);
        check(status == SPARGE_ERR_DEVICE && strstr(s.error.text, "the launch of ") &&
                  strstr(s.error.text, "cudaErrorLaunchOutOfResources"),
              "launch %llu: %s", (unsigned long long)n, s.error.text);
    }
    scene_poison(&s);
    check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
    if (queued) {
        stream_wait(stream);
        stream_free(stream);
    }
    stream_error();
    scene_fetch(&s);
    same_outputs(&s, &want);
    twins_free(&t);
    scene_close(&s);
    answer_free(&want);
    problem_free(&x);
}

Test(refusals, every_call_and_every_launch_fails_in_turn)
{
    fresh_device();
    for (int i = 1 + 4 * plain_quick(); i < RUNGS; i += 2)
        for (int n = 0; n < 4; n += 1 + 2 * plain_quick()) {
            check_case("kernel %d pv %d, %d", kernels[i].n, (int)kernels[i].pv_dtype, n);
            fail_in_turn(&kernels[i], n & 1, n & 2);
        }
    fresh_device();
}

Test(refusals, allocations_and_copies_that_fail)
{
    fresh_device();
    check_case("copies");
    sparge_error error;
    void *data = &error;
    char host[16] = "", other[16] = "";
    cuda_model_fail_call(1, 2);
    check_equal(sparge_device_alloc(16, &data, &error), SPARGE_ERR_MEMORY);
    check(!data && strstr(error.text, "cudaMalloc"), "%s", error.text);
    check_equal(sparge_device_alloc((int64_t)1 << 50, &data, &error), SPARGE_ERR_MEMORY);
    check_equal(sparge_device_alloc(-1, &data, &error), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_device_alloc(16, NULL, &error), SPARGE_ERR_ARGUMENT);
    check(sparge_device_alloc(16, &data, &error) == SPARGE_OK, "%s", error.text);
    cuda_model_fail_call(1, 999);
    check_equal(sparge_device_copy(data, host, 16, &error), SPARGE_ERR_DEVICE);
    check(strstr(error.text, "cudaMemcpy"), "%s", error.text);
    check_equal(sparge_device_copy(data, host, -1, &error), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_device_copy(data, NULL, 1, &error), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_device_copy(NULL, data, 1, &error), SPARGE_ERR_ARGUMENT);
    check_equal(sparge_device_copy(NULL, NULL, 0, &error), SPARGE_OK);
    memcpy(host, "fifteen letters", 16);
    check_equal(sparge_device_copy(data, host, 16, &error), SPARGE_OK);
    check_equal(sparge_device_copy(other, data, 16, &error), SPARGE_OK);
    check(!memcmp(host, other, 16), "%s", other);
    sparge_device_free(data);
    sparge_device_free(NULL);
    check_equal(cuda_model_count().allocations, (uint64_t)0);
}
#endif
