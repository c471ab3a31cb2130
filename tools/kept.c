/* SPDX-License-Identifier: Apache-2.0 */
/* kept.c: sums of counts, and reasons. */
#include "tools/kept.h"

#include <string.h>

#include "common/counts.h"
#include "tools/intermediates.h"

/* ---- Counts ---- */

sparge_counts kept_sum(const sparge_counts *heads, int64_t count)
{
    sparge_counts sum = {0};
    for (int64_t h = 0; h < count; h++)
        sparge_counts_add(&sum, &heads[h]);
    return sum;
}

double kept_pv_tiles(const sparge_counts *c)
{
    return c->qk_tokens ? (double)c->tile_tokens * (double)c->pv_tokens / (double)c->qk_tokens
                        : 0.0;
}

/* ---- Reasons ---- */

/* In the order of the bits. since: why it holds whatever tau, topk and min_mass are, and what would
 * do. */
static const struct {
    const char *key, *words;
    bool theta; /* it is theta that finds so */
    const char *since;
} names[REASONS] = {
    {"mass", "mass", false, NULL},
    {"topk", "top-k", false, NULL},
    {"dissimilar_q", "dissimilar queries", true,
     "their queries not self-similar; a lower theta leaves more to choose"},
    {"dissimilar_k", "dissimilar keys", true,
     "their keys not self-similar; a lower theta leaves more to choose"},
    {"overflow", "overflow", false, "their scores are not finite; scale q or k down"},
    {"diagonal", "the diagonal", false,
     "they are on the causal diagonal; smaller blocks leave more to choose"},
    {"sink", "the sink", false, "they are the sink; smaller key blocks leave more to choose"},
    {"min_mass", "min-mass", false, NULL},
};

reasons reasons_of(const array *why, const sparge_problem *p, const sparge_options *o)
{
    const int64_t rows = why->shape[2], columns = why->shape[3], blocks = array_count(why);
    const sparge_geometry g = geometry_of(p, o);
    reasons r = {0};
    for (int64_t at = 0; at < blocks; at++) {
        const unsigned bits = ((const uint8_t *)why->data)[at];
        r.pairs += at % columns < sparge_blocks_visible(&g, at / columns % rows);
        for (int n = 0; n < REASONS; n++) {
            r.kept[n] += bits >> n & 1;
            r.alone[n] += bits == 1u << n;
        }
    }
    return r;
}

json_t *reasons_json(const int64_t count[REASONS])
{
    json_t *json = json_object();
    bool ok = json != NULL;
    for (int n = 0; n < REASONS && ok; n++)
        ok = json_object_set_new(json, names[n].key, json_integer(count[n])) == 0;
    if (ok)
        return json;
    json_decref(json);
    return NULL;
}

static double percent(const reasons *r, int64_t count)
{
    return 100.0 * (double)count / (double)r->pairs;
}

void reasons_text(const reasons *r, char text[256])
{
    text[0] = '\0';
    for (int n = 0; n < REASONS; n++)
        if (r->kept[n]) {
            const size_t used = strlen(text);
            snprintf(text + used, 256 - used, "%s%.0f %% by %s",
                     used ? ", " : "kept: ", percent(r, r->kept[n]), names[n].words);
        }
}

void reasons_warn(const reasons *r, const sparge_options *o, const char *file)
{
    int most = -1;
    for (int n = 0; n < REASONS; n++)
        if (names[n].since && 2 * r->kept[n] > r->pairs && (most < 0 || r->kept[n] > r->kept[most]))
            most = n;
    if (most < 0 || o->per_head)
        return;
    char theta[64] = "";
    if (names[most].theta)
        snprintf(theta, sizeof theta, "theta %g finds ", (double)o->thresholds.theta);
    fprintf(stderr,
            "sparge: %s: %.0f %% of the visible block pairs are kept whatever tau, topk and "
            "min_mass are, "
            "since %s%s\n",
            file, percent(r, r->kept[most]), theta, names[most].since);
}
