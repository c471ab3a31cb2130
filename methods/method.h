/* SPDX-License-Identifier: Apache-2.0 */
/* method.h: what methods are made of. A method walks over the heads (heads.c), makes maps of what
 * queries pay to keys (maps.c), ranks and keeps (select.c), and leaves masks in a plan (plan.c).
 * Its file has the rule of the paper, its parameters, and where the rule is our own reading.
 *
 * Letters as in ref/: query block i, key block j, query or key t, batch b, head h. */
#ifndef SPARGE_METHODS_METHOD_H
#define SPARGE_METHODS_METHOD_H

#include "common/block_mask.h"
#include "common/error.h"
#include "common/geometry.h"
#include "sparge_methods.h"

/* ---- memory.c: pieces that are freed together ---- */

typedef struct sparge_piece sparge_piece;

/* So many zeroed things in a list of pieces, which `sparge_release` frees; NULL: no memory. */
void *sparge_take(sparge_piece **pieces, int64_t count, size_t size);
void sparge_release(sparge_piece **pieces);

/* What a method keeps from call to call of one layer: what is there of it, or, at the first call
 * (*fresh, which may be NULL), so many bytes, zeroed. Without a state in the context they are the
 * plan's. SPARGE_ERR_ARGUMENT: it is of another method, or of a call of another size. */
sparge_status sparge_state(sparge_plan *plan, const sparge_context *context, const char *method,
                           int64_t bytes, bool *fresh, void **state, sparge_error *error);

/* Bits that all depend on all bits of x: the end of splitmix64 (Steele, Lea, Flood 2014). */
static inline uint64_t sparge_mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* One of 2^64, by all four numbers. */
static inline uint64_t sparge_hash(uint64_t seed, int64_t n, int64_t i, int64_t j)
{
    const int64_t word[3] = {n, i, j};
    uint64_t x = seed;
    for (int e = 0; e < 3; e++)
        x = sparge_mix(x + (uint64_t)word[e] * 0x9e3779b97f4a7c15u + 0x9e3779b97f4a7c15u);
    return x;
}

/* Rows in panels of 16, [rows / 16][dim][16], so that many products with one vector are quick. */
enum { SPARGE_LANES = 16 };
typedef struct sparge_panels {
    const float *x; /* NULL: no memory */
    int64_t dim;
} sparge_panels;

/* ---- heads.c: one query head after the other ---- */

/* q, k and v are packed, [tokens][channels], in f32; what is not finite is 0. */
typedef struct sparge_head {
    const sparge_problem *problem;
    const sparge_options *options;
    const sparge_context *context; /* never NULL */
    const double *param;
    sparge_geometry g;   /* of the caller's tokens, in the blocks of the part */
    int64_t b, h, n, kv; /* n: of all query heads; kv: of all key heads */
    float scale;         /* of scores: softmax_scale */
    float *q, *k, *v;    /* v: only if the method asks for it */
    sparge_panels keys;  /* k again, for products with many */
    void *shared;        /* of the walk */
    sparge_plan *plan;
    sparge_part *part;
    sparge_problem one;     /* the part's, of one batch and one head */
    sparge_mask *mask;      /* of this head alone; sparge_keep and sparge_pairs_set write to it */
    double *multiply_adds;  /* what making the plan takes */
    sparge_piece **scratch; /* freed after this head */
} sparge_head;

/* Fills in the mask of one head. SPARGE_ERR_MEMORY needs no message. Other heads are visited at the
 * same time: of the plan it writes to what belongs to its head, and takes no memory. */
typedef sparge_status sparge_head_function(const sparge_head *head, sparge_error *error);

typedef struct sparge_walk {
    int64_t block_q, block_k; /* of the part that is made if the plan has none; 0: of the options */
    bool needs_v;
    bool blind;   /* q and k are not looked at, and NULL */
    bool survey;  /* the heads of the first batch, before the walk that fills in masks */
    void *shared; /* what all heads are told */
    sparge_head_function *visit;
} sparge_walk;

/* Adds a part in blocks of this size (0: of the options), for a walk to give it a mask. */
sparge_part *sparge_add_blocks(sparge_plan *plan, int64_t block_q, int64_t block_k);
/* Walks over all heads, and gives their masks to the last part, or to one that it adds. */
sparge_status sparge_each_head(sparge_plan *plan, const sparge_context *context,
                               const double *param, const sparge_walk *walk, sparge_error *error);
/* Calls for each step from 0 on, several side by side, with memory that is freed after the step;
 * false: no memory. For what is not of one head, before the walk. */
typedef bool sparge_step_function(int64_t step, const void *user, sparge_piece **scratch);
sparge_status sparge_each_step(const sparge_plan *plan, int64_t steps,
                               sparge_step_function *function, const void *user);
/* All heads of a tensor as a walk has them, [batch][heads][tokens][dim]: for what looks at several
 * heads of a layer. NULL: no memory. */
const float *sparge_load_heads(const sparge_in *in, int64_t batch, int64_t heads, int64_t tokens,
                               int64_t dim, sparge_piece **memory);

/* ---- plan.c ---- */

/* Adds a part of the caller's problem and options but for its cell, which need not divide the
 * blocks of a method; without a mask. */
sparge_part *sparge_plan_add(sparge_plan *plan);
/* The same with an empty mask in its blocks; its options and problem are set. */
sparge_status sparge_part_mask(sparge_part *part, sparge_error *error);
/* Gives each head of the last part its thresholds: set writes those of a head that has these
 * parameters over those of the caller. Then a backend must be here that takes them. */
typedef void sparge_set_thresholds(const sparge_problem *problem, const double *param,
                                   sparge_thresholds *thresholds);
sparge_status sparge_set_part(sparge_plan *plan, const sparge_context *context, const double *param,
                              sparge_set_thresholds *set, sparge_error *error);
/* The same, and its backend predicts its mask by them. */
sparge_status sparge_predict_part(sparge_plan *plan, const sparge_context *context,
                                  const double *param, sparge_set_thresholds *set,
                                  sparge_error *error);
/* The parameters of a query head: those of the call, and the first its own if it has one. */
const double *sparge_param_of(const sparge_context *context, int64_t head, const double *param,
                              double own[SPARGE_MAX_PARAMS]);
/* Pairs of blocks of which some query sees some key. */
int64_t sparge_visible_pairs(const sparge_geometry *g);
/* Keys and values of a part as packed arrays of the plan, zeroed: a view of [batch][heads][tokens]
 * [dim] floats; NULL data: no memory. */
sparge_in sparge_plan_array(sparge_plan *plan, int64_t heads, int64_t tokens, int64_t dim);

/* ---- maps.c: how much queries pay to keys ---- */

float sparge_method_dot(const float *a, const float *b, int64_t dim);
sparge_panels sparge_method_panels(const float *x, int64_t rows, int64_t dim,
                                   sparge_piece **memory);
/* s[r] = scale * sparge_method_dot(q, row r) of the first n rows, to the bit. */
void sparge_method_scores(const sparge_panels *rows, const float *q, float scale, int64_t n,
                          float *s);
/* The same of several vectors, q [queries][dim] and s [queries][n]: quicker for four or more. */
void sparge_method_products(const sparge_panels *rows, const float *q, int64_t queries, float scale,
                            int64_t n, float *s);
/* Means of blocks of rows, [blocks][dim]. padded: the last block counts as a whole one. */
void sparge_method_pool(const float *x, int64_t rows, int64_t dim, int64_t block, bool padded,
                        float *mean);
/* Replaces scores by their softmax. */
void sparge_method_softmax(float *s, int64_t n);
/* What query t pays to each key, [k_len]: softmax over the visible ones, 0 for the others. It
 * counts its multiply-adds. */
void sparge_method_row(const sparge_head *head, int64_t t, float *p);
/* The output, [dim_v], of a query that has the scores s, [k_len], over those places of an order of
 * the keys (NULL: theirs) whose bit is set (NULL: all), and what it pays to each key. It counts its
 * multiply-adds. */
void sparge_method_output(const sparge_head *head, const float *s, const int64_t *order,
                          const uint32_t *places, float *p, double *o);
/* The softmax of one mean query over the means of the first key blocks. It counts its
 * multiply-adds. */
void sparge_method_pooled_row(const sparge_head *head, const float *q_mean, const float *k_mean,
                              int64_t blocks, float *p);
/* Sums of the rows of a map over blocks: adds p[k_len] to mass[k_blocks]. */
void sparge_method_add_blocks(const sparge_head *head, const float *p, double *mass);

/* ---- order.c: orders that bring tokens together which belong together, and keys in such an order.
 * index[p] is the arriving number of the token at place p, as sparge_token_order has it. ---- */

/* The patches of t x h x w tokens of a grid one after the other, both in row-major order; those at
 * the edges are smaller. Text keeps its place. */
void sparge_order_patches(const sparge_grid *grid, int64_t t, int64_t h, int64_t w, int64_t *index);
/* Patches of h x w tokens, frame by frame, and then all text. */
void sparge_order_frames(const sparge_grid *grid, int64_t h, int64_t w, int64_t *index);
/* A token order of the head's grid, and where in it each token stands. */
sparge_status sparge_order_grid(const sparge_head *head, sparge_order order, int64_t **index,
                                int64_t **place, sparge_error *error);
/* By the remainder of the token's number by `stride`. */
void sparge_order_residues(int64_t len, int64_t stride, int64_t *index);
/* A tree of halves, [len][dim]: rows are cut in two by the channel in which they lie farthest
 * apart, weighted by how far those of y do, which they are to be multiplied by; the larger half
 * comes first, and each half is cut again, down to one row. Cuts stand at multiples of block, and
 * inside a block at multiples of powers of two. Adds its multiply-adds. SPARGE_ERR_MEMORY. */
sparge_status sparge_order_tree(const float *x, int64_t len, const float *y, int64_t y_len,
                                int64_t dim, int64_t block, int64_t *index, double *multiply_adds);
/* Inside each whole segment of so many tokens by falling score, of equals the earlier first. */
sparge_status sparge_order_segments(const float *score, int64_t len, int64_t segment,
                                    int64_t *index);
/* Packed rows in an order. */
void sparge_order_rows(const float *x, const int64_t *order, int64_t len, int64_t dim, float *to);
/* Rows of head h of a tensor in an order, with what is not finite, to the packed floats of the head
 * at hand. */
void sparge_copy_rows(const sparge_head *head, const sparge_in *from, int64_t h,
                      const int64_t *order, int64_t len, int64_t dim, const sparge_in *to);
/* Gives the last part keys of its own for each query head, and the plan an order of queries, and
 * their part q; then fills in those of the head at hand: order[place] is the caller's token that
 * stands there. */
sparge_status sparge_own_keys(sparge_plan *plan);
sparge_status sparge_own_queries(sparge_plan *plan);
sparge_status sparge_own_tokens(sparge_plan *plan); /* both */
void sparge_order_keys(const sparge_head *head, const int64_t *order);
void sparge_order_queries(const sparge_head *head, const int64_t *order);
void sparge_order_tokens(const sparge_head *head, const int64_t *order);

/* ---- select.c: what is kept ---- */

/* A candidate: a block of a row, or of a head. */
typedef struct sparge_ranked {
    float score;
    int64_t at;
} sparge_ranked;

/* The best first; of equals the lower `at`. */
void sparge_rank(sparge_ranked *x, int64_t n);
/* The best so many stand first, in any order. */
void sparge_rank_best(sparge_ranked *x, int64_t n, int64_t count);
/* How many of the best have this mass together. crossing: the one that reaches it belongs to them,
 * or else they stay below or at it. */
int64_t sparge_count_mass(const sparge_ranked *x, int64_t n, double mass, bool crossing);
int64_t sparge_count_above(const sparge_ranked *x, int64_t n, double threshold);

/* Keeps block j for row i of the head at hand. */
void sparge_keep(const sparge_head *head, int64_t i, int64_t j);
bool sparge_kept(const sparge_head *head, int64_t i, int64_t j);
/* Keeps the blocks that hold the last visible key of some query of row i, if causal, so that no
 * query is without a key. */
void sparge_keep_diagonal(const sparge_head *head, int64_t i);

/* The key at which query t stands, its last visible one. If not causal, where that would be if the
 * last query stood at the last key. */
int64_t sparge_place_of(const sparge_geometry *g, int64_t t);
/* A rule of places: does a query that stands in block `at` of the keys attend to block j? */
typedef bool sparge_place_rule(const sparge_head *head, int64_t at, int64_t j);
/* Keeps for each row of blocks what the rule keeps for some of its queries. */
void sparge_keep_by_place(const sparge_head *head, sparge_place_rule *rule);

/* The selector of submass, for the scores of others (methods of the name NAME_t): keeps the first
 * block, the diagonal, and each visible block of row i whose mass is above t even shares of all
 * blocks of the call, where the masses of a row are 1 together. 0 keeps all. */
void sparge_keep_shares(const sparge_head *head, int64_t i, const double *mass, double t);

/* Pairs of one row of blocks, to be set at once: [block_q][words]. */
typedef struct sparge_pairs {
    int64_t words;
    uint32_t *bits;
} sparge_pairs;

sparge_pairs sparge_pairs_make(const sparge_head *head); /* no bits: no memory */
void sparge_pairs_clear(const sparge_head *head, const sparge_pairs *pairs);
/* Keys from to `to` - 1, clipped to those that are, for query r of the block. */
void sparge_pairs_range(const sparge_head *head, const sparge_pairs *pairs, int64_t r, int64_t from,
                        int64_t to);
/* On a grid where text has all pairs: the share of the video's own pairs that makes this density;
 * how many places to both sides have it; and the keys of a query at a place, so many to each. */
double sparge_video_share(const sparge_head *head, double density);
double sparge_video_band(const sparge_head *head, double density);
void sparge_pairs_near(const sparge_head *head, const sparge_pairs *pairs, int64_t r, int64_t place,
                       int64_t width);
/* Each query keeps so many pages of keys of this size, those whose mean keys have the largest
 * products with its row of q, [q_len][dim]; if causal its last one first. Of equals the earlier. */
sparge_status sparge_keep_pages(const sparge_head *head, const float *q, int64_t size,
                                int64_t count, sparge_error *error);
sparge_status sparge_pairs_set(const sparge_head *head, const sparge_pairs *pairs, int64_t i,
                               sparge_error *error);

#endif
