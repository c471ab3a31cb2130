/* SPDX-License-Identifier: Apache-2.0 */
/* sparge_methods.h: the sparse attention of the field, each method by one name.
 *
 * A method is a function from q, k and v to a plan. A plan is one or more parts, each an ordinary
 * attention call over some of the keys, or over keys that stand for others. The parts of a plan
 * share no pair, so that sparge_merge makes one attention of them.
 *
 *     const sparge_method *method = sparge_method_find("xattention");
 *     sparge_plan plan;
 *     sparge_status status =
 *         sparge_method_plan(method, &problem, &options, NULL, NULL, &plan, &error);
 *     if (status == SPARGE_OK)
 *         status = sparge_plan_run(&plan, NULL, &result, &error);
 *     sparge_plan_free(&plan);
 *
 * All arrays are in host memory. A query, key or value that is not finite counts as 0 where a
 * method chooses. */
#ifndef SPARGE_METHODS_H
#define SPARGE_METHODS_H

#include "sparge_mask.h"
#include "sparge_order.h"

SPARGE_BEGIN_DECLS

/* ---- Methods ------------------------------------------------------------------------------ */

/* A trained gate of SeerAttention, of one layer: by what pooled q and k are multiplied. k_heads is
 * kv_heads, or heads. */
typedef struct sparge_gate {
    int64_t hidden, k_heads;
    double rope_base; /* of the rotation that q and k have had: transformers' rope_theta; 0: none */
    const float *q;   /* [heads][dim][hidden]; NULL: pooled q as it is, if hidden is dim */
    const float *k;   /* [k_heads][3 * dim][hidden]: of the largest, the least and the mean */
} sparge_gate;

/* What q, k and v alone do not say. */
typedef struct sparge_context {
    const sparge_grid *grid;     /* of the tokens, or NULL */
    const int64_t *segment_ends; /* [segments] ascending, the last is k_len; or NULL */
    int64_t segments;
    int64_t layer, step; /* of the model, from 0 */
    const double *first; /* [heads] of the problem, the first parameter of each; or NULL: all have
                            that of the call */
    const sparge_gate *gate; /* or NULL */
    void **state; /* what a method keeps from call to call of one layer, or NULL. *state is
                     NULL at first. The caller gives it to free() after the last call */
} sparge_context;

enum sparge_needs {
    SPARGE_NEEDS_CAUSAL = 1,
    SPARGE_NEEDS_NOT_CAUSAL = 2,
    SPARGE_NEEDS_GRID = 4,
    SPARGE_NEEDS_SEGMENTS = 8,
    SPARGE_NEEDS_STATE = 16,
};

typedef struct sparge_param {
    const char *name; /* the paper's symbol, if it has one */
    double low, high; /* both ends belong to the range */
    double usual;     /* the default */
    bool whole;       /* a whole number */
    const char *what;
} sparge_param;

enum { SPARGE_MAX_PARAMS = 8, SPARGE_MAX_PARTS = 8 };

typedef struct sparge_plan sparge_plan;
typedef struct sparge_executor sparge_executor;

typedef struct sparge_method {
    const char *name, *title;
    const char *paper;               /* "arXiv 2503.16428"; "" for our own */
    const char *repository, *commit; /* the authors' code that was read, or "" */
    const char *kind;                /* training-free, yardstick, ... */
    const char *evidence; /* how many of its blocks, pairs ... are those of the authors' code:
                             methods/authors.csv; or "" */
    unsigned needs;       /* of sparge_needs */
    sparge_param param[SPARGE_MAX_PARAMS]; /* the first sets the density, which never falls with
                                              it; a name of NULL ends them */
    bool falls;  /* the density never rises with the first parameter, but falls */
    bool at_run; /* it keeps all pairs, and its density is that of P.V, which a run tells */
    /* Fills in the parts of a plan whose problem and options are the caller's, checked. */
    sparge_status (*plan)(sparge_plan *plan, const sparge_context *context, const double *param,
                          sparge_error *error);
} sparge_method;

const sparge_method *const *sparge_methods(int *count);    /* all, by name; how many */
const sparge_method *sparge_method_find(const char *name); /* NULL: there is none */

/* Makes a plan. Parameters of NULL are the defaults. context may be NULL. The plan is empty if it
 * fails; SPARGE_ERR_UNSUPPORTED says what the method needs and has not got. The options go into
 * the parts, lambda too, but for cell and for what the method has of its own: blocks, and rules and
 * thresholds of SpargeAttn and submass. progress gets 0. `problem`, what it points to and the
 * context must stay until the plan is freed. */
sparge_status sparge_method_plan(const sparge_method *method, const sparge_problem *problem,
                                 const sparge_options *options, const sparge_context *context,
                                 const double *param, sparge_plan *plan, sparge_error *error);

/* Makes the plan whose density of tokens (at_run: of P.V's) is nearest, by bisecting the first
 * parameter. It writes that to param[0] and takes the others from there. One value is for all
 * heads: context->first must be NULL. SPARGE_ERR_ARGUMENT names the densities that can be reached.
 */
sparge_status sparge_method_plan_at(const sparge_method *method, const sparge_problem *problem,
                                    const sparge_options *options, const sparge_context *context,
                                    double *param, double density, const sparge_executor *executor,
                                    sparge_plan *plan, sparge_error *error);

/* ---- Plans -------------------------------------------------------------------------------- */

/* An attention call. */
typedef struct sparge_part {
    sparge_problem problem; /* of the caller's arrays, or of the plan's */
    sparge_options options;
    sparge_mask mask; /* no bits: dense, or predicted */
    bool predicted;   /* by sparge_attention, with these options */
    bool pooled;      /* its keys are not the caller's: each stands for several, and k_bias counts
                         them */
    /* Which key of this part a key of the caller is, or is pooled in: [batch][kv_heads of the
     * part][k_len of the caller]; -1: none. NULL: each is itself. */
    const int64_t *place;
} sparge_part;

struct sparge_plan {
    sparge_problem problem; /* the caller's */
    sparge_options options; /* the caller's; softmax_scale is what 0 stands for */
    sparge_part part[SPARGE_MAX_PARTS];
    int parts;
    const int64_t *q_order; /* [batch][heads][q_len] which query of the caller stands at each place
                               of every part's q; NULL: itself */
    double seconds;         /* that making the plan took */
    double multiply_adds;   /* what making the plan took */
    struct sparge_piece *memory; /* of the arrays above */
};

/* How plans are run: by what has the signatures of sparge_predict, sparge_attend and
 * sparge_attention. A program whose backend is cuda gives its own, which copy. */
struct sparge_executor {
    sparge_status (*predict)(const sparge_problem *, const sparge_options *, sparge_mask *,
                             const sparge_intermediates *, sparge_error *);
    sparge_status (*attend)(const sparge_problem *, const sparge_options *, const sparge_mask *,
                            sparge_result *, sparge_error *);
    sparge_status (*attention)(const sparge_problem *, const sparge_options *, sparge_result *,
                               sparge_error *);
};

/* Attends by a plan. An executor of NULL is this library's on ref and cpu. result as of
 * sparge_attend: counts are of all parts, pairs and tokens of the caller's problem, so that a plan
 * of several parts, or of keys in another order, may have more of qk_done than of pairs. mask and
 * intermediates are those of a plan of one part in the caller's order, and must be NULL of others.
 * A plan of one part gives what sparge_attend gives. seconds_predict has the plan's own seconds
 * too. */
sparge_status sparge_plan_run(const sparge_plan *plan, const sparge_executor *executor,
                              sparge_result *result, sparge_error *error);

/* Is the plan one call of the caller's own q, k and v, in their order? */
bool sparge_plan_is_plain(const sparge_plan *plan);

/* Predicts the masks that the plan leaves to be predicted; lambda still holds. */
sparge_status sparge_plan_predict(sparge_plan *plan, const sparge_executor *executor,
                                  sparge_error *error);

/* What running the plan counts if lambda skips nothing: [batch * heads]. Masks must be predicted.
 */
sparge_status sparge_plan_count(const sparge_plan *plan, sparge_counts *head_counts,
                                sparge_error *error);

/* Writes to pairs[batch][heads][q_len][k_len] how each visible pair is attended: 1 itself, 2 by a
 * key that it is pooled in, 0 not at all. Pairs that a bias hides count as if there were none.
 * SPARGE_ERR_SHAPE names a pair that is in two parts. Masks must be predicted. */
sparge_status sparge_plan_pairs(const sparge_plan *plan, uint8_t *pairs, sparge_error *error);

void sparge_plan_free(sparge_plan *plan); /* NULL and an empty plan are allowed */

SPARGE_END_DECLS

#endif
