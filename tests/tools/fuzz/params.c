/* SPDX-License-Identifier: Apache-2.0 */
/* params.c: libFuzzer target: any bytes give either one line of error and nothing, or thresholds in
 * their ranges and in strict order, which are found, and come back the same from a file that we
 * write. */
#include "tools/params.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static void require(bool condition)
{
    if (!condition)
        abort();
}

static bool within(double x, double low, double high) { return x >= low && x <= high; }

static void check_thresholds(const sparge_thresholds *k)
{
    require(within((double)k->theta, -1.0, 1.0));
    require(k->tau == SPARGE_OFF || within((double)k->tau, 0.0, 1.0));
    require(k->topk == SPARGE_OFF || within((double)k->topk, 0.0, 1.0));
    require(within((double)k->min_mass, 0.0, (double)FLT_MAX));
    require(k->tau != SPARGE_OFF || k->topk != SPARGE_OFF || k->min_mass > 0.0f);
    require(k->lambda == -INFINITY || within((double)k->lambda, -1e30, 0.0));
}

static void check_heads(const params *p)
{
    require(p->head && p->heads >= 0);
    for (int64_t n = 0; n < p->heads; n++) {
        const params_head *h = &p->head[n];
        require(h->layer >= 0 && h->layer <= INT32_MAX && h->head >= 0 && h->head <= INT32_MAX);
        check_thresholds(&h->thresholds);
        sparge_thresholds found;
        require(params_find(p, "fuzz", h->layer, h->head, &found, NULL) == EXIT_FINE);
        require(memcmp(&found, &h->thresholds, sizeof found) == 0);
        require(n == 0 || h[-1].layer < h->layer ||
                (h[-1].layer == h->layer && h[-1].head < h->head));
    }
    sparge_thresholds none;
    require(params_find(p, "fuzz", -1, 0, &none, NULL) &&
            params_find(p, "fuzz", 0, -1, &none, NULL));
}

static void check_round_trip(const params *want, const sparge_options *o)
{
    char *text = NULL;
    size_t length = 0;
    FILE *stream = open_memstream(&text, &length);
    json_t *header = params_header(want->model, want->weights, o), *heads = json_array();
    for (int64_t n = 0; n < want->heads; n++) {
        const params_head *h = &want->head[n];
        require(json_array_append_new(heads,
                                      params_line(h->layer, h->head, false, &h->thresholds)) == 0);
    }
    require(stream && json_object_set_new(header, "heads", heads) == 0);
    require(json_write_lines(stream, "fuzz", header, NULL) && fclose(stream) == 0);
    json_decref(header);
    params got;
    require(params_read_memory(text, length, "fuzz", &got, NULL) == EXIT_FINE);
    require(got.heads == want->heads && got.options.softmax_scale == want->options.softmax_scale);
    for (int64_t n = 0; n < got.heads; n++) {
        const params_head *a = &got.head[n], *b = &want->head[n];
        require(a->layer == b->layer && a->head == b->head &&
                a->thresholds.theta == b->thresholds.theta);
        require(a->thresholds.tau == b->thresholds.tau && a->thresholds.topk == b->thresholds.topk);
        require(a->thresholds.min_mass == b->thresholds.min_mass);
        require(a->thresholds.lambda == b->thresholds.lambda);
    }
    require(params_model(&got, "fuzz", want->model, NULL, NULL) == EXIT_FINE);
    sparge_options same = *o;
    require(params_obey(&got, "fuzz", options_all(), &same, NULL) == EXIT_FINE);
    params_free(&got);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static const params nothing;
    params got;
    file_error error;
    memset(&got, 0xff, sizeof got);
    memset(&error, 'x', sizeof error);
    const exit_code code = params_read_memory((const char *)bytes, size, "fuzz", &got, &error);
    if (code) {
        require(code == EXIT_FILE && memcmp(&got, &nothing, sizeof got) == 0);
        require(memchr(error.text, '\0', sizeof error.text) != NULL);
        require(strncmp(error.text, "fuzz: ", 6) == 0 && error.text[6] &&
                !strchr(error.text, '\n'));
        return 0;
    }
    require(error.text[0] == '\0' && json_is_object(got.json));
    require(within((double)got.options.block_q, 1, 1024) &&
            within((double)got.options.block_k, 1, 1024));
    require(within((double)got.options.cell, 0, 1024));
    require(within((double)got.options.skip_rows, 1, 1024) &&
            (unsigned)got.options.causal <= SPARGE_CAUSAL_START);
    require(got.options.softmax_scale == 0.0f ||
            within((double)got.options.softmax_scale, (double)FLT_MIN, (double)FLT_MAX));
    check_heads(&got);
    sparge_options o = got.options, taken = sparge_options_default(SPARGE_RULES_DEFAULT);
    if (got.options.skip_rows <= got.options.block_q) { /* as a file of ours has it */
        require(params_obey(&got, "fuzz", options_all(), &o, &error) == EXIT_FINE);
        require(params_obey(&got, "fuzz", 0, &taken, &error) == EXIT_FINE);
        require(taken.rules == o.rules && taken.cell == o.cell && taken.causal == o.causal &&
                taken.softmax_scale == o.softmax_scale && taken.sink == o.sink);
        check_round_trip(&got, &o);
    }
    params_free(&got);
    params_free(&got); /* all 0: harmless */
    return 0;
}
