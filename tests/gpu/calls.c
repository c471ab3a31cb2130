/* calls.c: the cuda backend from its caller's side: streams, graphs, workspaces, what is refused
 * and with which words, and what happens when CUDA fails. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

TestSuite(calls);

static const kernel *fastest(void) { return runs_here(5) ? &kernels[5] : &kernels[3]; }

/* Some of everything, small. */
static problem usual(const kernel *r)
{
    const shape s = shape_of(1, 2, 1, 150, 200, 24, 40);
    problem x = question(&s, r);
    x.o.causal = SPARGE_CAUSAL_END;
    x.o.thresholds = (sparge_thresholds){0.2f, 0.7f, SPARGE_OFF, -1.0f};
    return x;
}

static void same_outputs(const scene *got, const answer *want)
{
    check_same_as("o", got->a.o.x, want->o.x, tensor_count(&want->o));
    check_same_as("lse", got->a.lse, want->lse, problem_rows(got->x));
    for (int64_t h = 0; h < got->x->p.batch * got->x->p.heads; h++)
        same_counts(&got->a.head[h], &want->head[h]);
}

static void no_stream_error(void)
{
    const char *error = stream_error();
    check(!error, "%s", error);
}

/* ---- Workspaces ---- */

/* Guards stand right before and right after it. */
Test(calls, a_workspace_of_exactly_the_bytes)
{
    fresh_device();
    for (int i = plain_quick(); i < RUNGS; i += plain_quick() ? 4 : 1)
        for (int n = 0; n < 8 && runs_here(kernels[i].n); n += 1 + 2 * plain_quick()) {
            check_case("kernel %d pv %d, %d", kernels[i].n, (int)kernels[i].pv_dtype, n);
            problem x = usual(&kernels[i]);
            x.o.smooth_k = n & 1;
            if (n & 2)
                x.o.thresholds.lambda = -INFINITY;
            use(&x, &kernels[i]);
            answer want = n & 4 ? attention(&x, NULL) : attend(&x);
            scene s;
            scene_open(&s, &x, &kernels[i], n & 4);
            s.result.mask = NULL; /* the mask stands in the workspace, too */
            int64_t bytes = -1;
            check(sparge_workspace_bytes(&s.p, &s.o, true, &bytes, &s.error) == SPARGE_OK, "%s",
                  s.error.text);
            sparge_problem nowhere = s.p; /* it does not look at pointers */
            nowhere.q.data = nowhere.k.data = nowhere.v.data = NULL;
            int64_t again = -1;
            check(sparge_workspace_bytes(&nowhere, &s.o, true, &again, NULL) == SPARGE_OK &&
                      again == bytes,
                  "pointers");
            char *memory = check_alloc((size_t)bytes);
            twins t = {.count = 0};
            s.o.workspace = twin(&t, memory);
            s.o.workspace_bytes = bytes;
            for (int turn = 0; turn < 2; turn++) { /* the second finds what the first left there */
                scene_poison(&s);
                check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
                scene_fetch(&s);
                same_outputs(&s, &want);
            }
            check(s.result.workspace <= bytes, "%lld bytes, said %lld",
                  (long long)s.result.workspace, (long long)bytes);
            twins_fetch(&t); /* looks at the guards */

            const int64_t needed = s.result.workspace;
            s.o.workspace_bytes = needed;
            check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
            scene_poison(&s);
            s.o.workspace_bytes = needed - 1;
            check_equal(scene_call(&s), SPARGE_ERR_ARGUMENT);
            check(strstr(s.error.text, "workspace has ") &&
                      strstr(s.error.text, check_text("%lld", (long long)needed)),
                  "%s", s.error.text);
            s.o.workspace_bytes = bytes + 300;
            s.o.workspace = (char *)s.o.workspace + 128;
            check_equal(scene_call(&s), SPARGE_ERR_ARGUMENT);
            check(scene_untouched(&s), "written after an error");
            twins_free(&t);
            check_free(memory);
            scene_close(&s);
            answer_free(&want);
            problem_free(&x);
        }
}

/* ---- Streams ---- */

/* Two calls are queued without waiting, in one workspace or in none; nothing is there before
 * somebody waits. */
Test(calls, two_calls_on_a_stream)
{
    fresh_device();
    for (int i = plain_quick(); i < RUNGS; i += plain_quick() ? 4 : 1)
        for (int own = 0; own < 2 && runs_here(kernels[i].n); own++) {
            check_case("kernel %d pv %d, own workspace %d", kernels[i].n, (int)kernels[i].pv_dtype,
                       own);
            problem x = usual(&kernels[i]), y = usual(&kernels[i]);
            use(&x, &kernels[i]);
            use(&y, &kernels[i]);
            tensor_fill(&y.q, -1, 1);
            answer want_x = attention(&x, NULL), want_y = attention(&y, NULL);
            scene s[2];
            scene_open(&s[0], &x, &kernels[i], true);
            scene_open(&s[1], &y, &kernels[i], true);
            int64_t bytes;
            check(sparge_workspace_bytes(&s[0].p, &s[0].o, true, &bytes, NULL) == SPARGE_OK,
                  "bytes");
            char *memory = check_alloc((size_t)bytes);
            twins t = {.count = 0};
            void *there = own ? twin(&t, memory) : NULL, *stream = stream_make();
            for (int n = 0; n < 2; n++) {
                s[n].o.stream = stream;
                s[n].o.workspace = there;
                s[n].o.workspace_bytes = bytes;
                check(scene_call(&s[n]) == SPARGE_OK, "%s", s[n].error.text);
                const sparge_counts none = {0};
                same_counts(&s[n].result.counts, &none);
                check(s[n].result.seconds_attend == 0.0 && s[n].result.seconds_predict == 0.0,
                      "times");
            }
            if (on_model())
                check(scene_untouched(&s[0]) && scene_untouched(&s[1]), "it did not only queue");
            stream_wait(stream);
            scene_fetch(&s[0]);
            scene_fetch(&s[1]);
            same_outputs(&s[0], &want_x);
            same_outputs(&s[1], &want_y);
            stream_free(stream);
            no_stream_error();
            twins_free(&t);
            check_free(memory);
            scene_close(&s[0]);
            scene_close(&s[1]);
            answer_free(&want_x);
            answer_free(&want_y);
            problem_free(&x);
            problem_free(&y);
        }
}

/* Captured once, replayed with other inputs; thresholds of every head are gone by then. */
Test(calls, a_graph_replayed_with_changed_inputs)
{
    fresh_device();
    for (int i = plain_quick(); i < RUNGS; i += plain_quick() ? 4 : 1)
        for (int own = 0; own < 2 && runs_here(kernels[i].n); own++) {
            check_case("kernel %d pv %d, own workspace %d", kernels[i].n, (int)kernels[i].pv_dtype,
                       own);
            problem x = usual(&kernels[i]);
            const sparge_thresholds thresholds[2] = {{0.1f, 0.8f, SPARGE_OFF, -1.0f},
                                                     {0.1f, SPARGE_OFF, 0.5f, -INFINITY}};
            sparge_thresholds *each = malloc(sizeof thresholds);
            memcpy(each, thresholds, sizeof thresholds);
            scene s;
            x.o.per_head = each;
            scene_open(&s, &x, &kernels[i], true);
            int64_t bytes;
            check(sparge_workspace_bytes(&s.p, &s.o, true, &bytes, NULL) == SPARGE_OK, "bytes");
            char *memory = check_alloc((size_t)bytes);
            twins t = {.count = 0};
            s.o.workspace = own ? twin(&t, memory) : NULL;
            s.o.workspace_bytes = bytes;
            s.o.stream = stream_make();
            capture_begin(s.o.stream);
            const sparge_status status = scene_call(&s);
            void *graph = capture_end(s.o.stream);
            check(status == SPARGE_OK, "%s", s.error.text);
            no_stream_error();
            check(scene_untouched(&s), "a capture runs nothing");
            memset(each, 0x7f, sizeof thresholds);
            x.o.per_head = thresholds;
            for (int turn = 0; turn < 3; turn++) {
                tensor_fill(&x.q, -1, 1);
                tensor_fill(&x.k, -2, 2);
                tensor_fill(&x.v, -1, 1);
                twins_send(&s.inputs);
                scene_poison(&s);
                graph_launch(graph, s.o.stream);
                stream_wait(s.o.stream);
                no_stream_error();
                scene_fetch(&s);
                answer want = attention(&x, NULL);
                same_outputs(&s, &want);
                answer_free(&want);
            }
            graph_free(graph);
            stream_free(s.o.stream);
            no_stream_error();
            twins_free(&t);
            check_free(memory);
            scene_close(&s);
            free(each);
            problem_free(&x);
        }
}

/* ---- Pointers ---- */

/* Every pointer that may be given, as one of the host's; the needed ones as NULL. */
Test(calls, pointers_that_are_not_the_devices)
{
    fresh_device();
    static const char *const names[] = {
        "q.data",
        "k.data",
        "v.data",
        "result.o",
        "result.lse",
        "result.head_counts",
        "mask.bits",
        "workspace",
        "intermediates.k_mean",
        "intermediates.q_pool",
        "intermediates.k_pool",
        "intermediates.q_sim",
        "intermediates.k_sim",
        "intermediates.s_all",
        "intermediates.s",
        "intermediates.why",
        "intermediates.q_int",
        "intermediates.k_int",
        "intermediates.v_int",
        "intermediates.q_scale",
        "intermediates.k_scale",
        "intermediates.v_scale",
        "intermediates.pv_done",
        "intermediates.m",
        "intermediates.l",
    };
    for (int64_t n = 0; n < COUNT(names); n++)
        for (int how = 0; how < 4; how++) { /* memory, pinned memory; NULL; predict alone */
            check_case("%s, %d", names[n], how);
            problem x = usual(fastest());
            scene s;
            scene_open(&s, &x, fastest(), true);
            static float host[1 << 16];
            sparge_intermediates intermediates = {0};
            s.result.intermediates = &intermediates;
            s.o.workspace_bytes = 1 << 30;
            void *pinned = how == 1 ? pinned_alloc(sizeof host) : NULL;
            void *bad = how == 1 ? pinned : how == 2 ? NULL : host;
            switch (n) {
            case 0: s.p.q.data = bad; break;
            case 1: s.p.k.data = bad; break;
            case 2: s.p.v.data = bad; break;
            case 3: s.result.o.data = bad; break;
            case 4: s.result.lse = bad; break;
            case 5: s.result.head_counts = bad; break;
            case 6: s.mask.bits = bad; break;
            case 7: s.o.workspace = bad; break;
            default:
                memcpy((char *)&intermediates + (n - 8) * (int64_t)sizeof bad, &bad, sizeof bad);
            }
            const bool needed = n <= 3 || n == 6, predicts = n != 2 && n != 3 && n != 4 && n != 5;
            sparge_status status = SPARGE_OK;
            if (how == 3 && predicts)
                status = sparge_predict(&s.p, &s.o, &s.mask, &intermediates, &s.error);
            else if (how < 3)
                status = scene_call(&s);
            if (how == 2 ? needed : how < 3 || predicts) {
                check_equal(status, SPARGE_ERR_ARGUMENT);
                check(strstr(s.error.text, names[n]) &&
                          strstr(s.error.text, how == 2 ? "NULL" : "host memory"),
                      "%s", s.error.text);
                if (n == 6) /* it is an output that is not there any more */
                    s.mask.bits = NULL;
                check(scene_untouched(&s), "written after an error");
            } else {
                check(status == SPARGE_OK, "%s", s.error.text);
            }
            if (pinned)
                pinned_free(pinned);
            no_stream_error();
            scene_close(&s);
            problem_free(&x);
        }
}

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

Test(calls, precisions_of_each_kernel)
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
                x.o.kernel = n;
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

Test(calls, sizes_that_the_backend_does_not_have)
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
    p.k_len = ((int64_t)1 << 30) + 1;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "too much for one launch");
    p = x.p;
    p.q_len = ((int64_t)1 << 30) + 1;
    refused(&p, &o, SPARGE_ERR_UNSUPPORTED, "too much for one launch");
    o.kernel = 6;
    refused(&x.p, &o, SPARGE_ERR_ARGUMENT, "kernel is 6");
    o = x.o;
    o.rules = SPARGE_RULES_PAPER;
    refused(&x.p, &o, SPARGE_ERR_UNSUPPORTED, "rules");
    if (runs_here(5)) {
        use(&x, &kernels[5]);
        for (int64_t rows = 1; rows < 140; rows++) {
            x.o.skip_rows = rows;
            const bool has = rows == 16 || rows == 32 || rows == 64 || rows >= 128;
            int64_t bytes;
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

Test(calls, the_best_kernel_is_found)
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

Test(calls, devices)
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
Test(calls, memory_that_is_not_there)
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
            check(more >= s.result.workspace, "%lld bytes were enough", (long long)more);
            continue;
        }
        check(status == SPARGE_ERR_MEMORY && more < s.result.workspace &&
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
Test(calls, rows_of_scores_in_little_shared_memory)
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
    s.o.stream = stream;
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

Test(calls, every_call_and_every_launch_fails_in_turn)
{
    fresh_device();
    for (int i = 1 + 4 * plain_quick(); i < RUNGS; i += 2)
        for (int n = 0; n < 4; n += 1 + 2 * plain_quick()) {
            check_case("kernel %d pv %d, %d", kernels[i].n, (int)kernels[i].pv_dtype, n);
            fail_in_turn(&kernels[i], n & 1, n & 2);
        }
    fresh_device();
}

Test(calls, allocations_and_copies_that_fail)
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

/* ---- Launches ---- */

/* Prediction within seven, whatever is asked for; the whole call within thirteen. */
Test(calls, how_many_launches)
{
    fresh_device();
    for (int i = plain_quick(); i < RUNGS; i += plain_quick() ? 4 : 1)
        for (int n = 0; n < 4; n++) {
            check_case("kernel %d pv %d, %d", kernels[i].n, (int)kernels[i].pv_dtype, n);
            problem x = usual(&kernels[i]);
            const sparge_thresholds each[2] = {x.o.thresholds, x.o.thresholds};
            x.o.per_head = n & 1 ? each : NULL;
            x.o.smooth_k = n & 2;
            scene s;
            scene_open(&s, &x, &kernels[i], true);
            uint64_t before = cuda_model_count().launches;
            check(sparge_predict(&s.p, &s.o, &s.mask, NULL, &s.error) == SPARGE_OK, "%s",
                  s.error.text);
            const uint64_t predict = cuda_model_count().launches - before;
            before = cuda_model_count().launches;
            check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
            const uint64_t both = cuda_model_count().launches - before;
            check(predict <= 7 && both <= 13, "%llu launches, %llu with stage 2",
                  (unsigned long long)predict, (unsigned long long)both);
            scene_close(&s);
            problem_free(&x);
        }
}
#endif
