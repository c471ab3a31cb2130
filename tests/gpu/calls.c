/* SPDX-License-Identifier: Apache-2.0 */
/* calls.c: the cuda backend from its caller's side: streams, graphs, workspaces,
 * pointers, how many launches. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/gpu/gpu.h"

#include "sparge_cuda.h"

TestSuite(calls);

static const kernel *fastest(void) { return runs_here(5) ? &kernels[5] : &kernels[3]; }

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
            s.o.cuda.workspace = twin(&t, memory);
            s.o.cuda.workspace_bytes = bytes;
            for (int turn = 0; turn < 2; turn++) { /* the second finds what the first left there */
                scene_poison(&s);
                check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
                scene_fetch(&s);
                same_outputs(&s, &want);
            }
            check(s.result.workspace_bytes <= bytes, "%lld bytes, said %lld",
                  (long long)s.result.workspace_bytes, (long long)bytes);
            twins_fetch(&t); /* looks at the guards */

            const int64_t needed = s.result.workspace_bytes;
            s.o.cuda.workspace_bytes = needed;
            check(scene_call(&s) == SPARGE_OK, "%s", s.error.text);
            scene_poison(&s);
            s.o.cuda.workspace_bytes = needed - 1;
            check_equal(scene_call(&s), SPARGE_ERR_ARGUMENT);
            check(strstr(s.error.text, "workspace has ") &&
                      strstr(s.error.text, check_text("%lld", (long long)needed)),
                  "%s", s.error.text);
            s.o.cuda.workspace_bytes = bytes + 300;
            s.o.cuda.workspace = (char *)s.o.cuda.workspace + 128;
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
                s[n].o.cuda.stream = stream;
                s[n].o.cuda.workspace = there;
                s[n].o.cuda.workspace_bytes = bytes;
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
            const sparge_thresholds thresholds[2] = {{0.1f, 0.8f, SPARGE_OFF, -1.0f, 0},
                                                     {0.1f, SPARGE_OFF, 0.5f, -INFINITY, 0}};
            sparge_thresholds *each = malloc(sizeof thresholds);
            memcpy(each, thresholds, sizeof thresholds);
            scene s;
            x.o.per_head = each;
            scene_open(&s, &x, &kernels[i], true);
            int64_t bytes;
            check(sparge_workspace_bytes(&s.p, &s.o, true, &bytes, NULL) == SPARGE_OK, "bytes");
            char *memory = check_alloc((size_t)bytes);
            twins t = {.count = 0};
            s.o.cuda.workspace = own ? twin(&t, memory) : NULL;
            s.o.cuda.workspace_bytes = bytes;
            s.o.cuda.stream = stream_make();
            capture_begin(s.o.cuda.stream);
            const sparge_status status = scene_call(&s);
            void *graph = capture_end(s.o.cuda.stream);
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
                graph_launch(graph, s.o.cuda.stream);
                stream_wait(s.o.cuda.stream);
                no_stream_error();
                scene_fetch(&s);
                answer want = attention(&x, NULL);
                same_outputs(&s, &want);
                answer_free(&want);
            }
            graph_free(graph);
            stream_free(s.o.cuda.stream);
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
            s.o.cuda.workspace_bytes = 1 << 30;
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
            case 7: s.o.cuda.workspace = bad; break;
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

#ifdef SPARGE_CUDA_MODEL
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
