/* SPDX-License-Identifier: Apache-2.0 */
/* price.c: one price of density for the heads of all layers, and what each of them buys for it.
 *
 * A curve has its points by rising density. A place on it is a number from 0, the first point, to
 * points - 1; between two points the logarithm of the loss, the density and the scale of the
 * parameter are linear. */
#include <float.h>
#include <stdlib.h>

#include "common/error.h"
#include "tune/tune.h"

/* How much of a head's loss is its own, in the logarithm; the rest is the mean of all heads. The
 * quadratic estimate is too large for heads whose error saturates, and one text is little: without
 * shrinking single heads get far too much. */
static const double own_share = 0.5;

/* How far the grid reaches from the usual value, on the scale of the parameter. A dense point costs
 * most, and tells least. */
static const double sparser = 3.0, denser = 2.3;

/* ---- The scale of a parameter ---- */

/* Does it lie between two ends? */
static bool is_share(const sparge_param *q) { return !q->whole && q->high < (double)INFINITY; }

double tune_scale(const sparge_param *q, double x)
{
    return is_share(q) ? log((x - q->low) / (q->high - x)) : log(x);
}

static double value_of(const sparge_param *q, double scale)
{
    if (is_share(q))
        return q->low + (q->high - q->low) / (1.0 + exp(-scale));
    return fmax(q->low, fmin(q->high, q->whole ? round(exp(scale)) : exp(scale)));
}

int sparge_loss_grid(const sparge_method *method, double first[SPARGE_LOSS_POINTS])
{
    int points = 0;
    if (!method || !method->param[0].name)
        return 0;
    const sparge_param *q = &method->param[0];
    for (int n = 0; n < SPARGE_LOSS_POINTS; n++) {
        const double away = (sparser + denser) * n / (SPARGE_LOSS_POINTS - 1) - sparser;
        const double x = value_of(q, tune_scale(q, q->usual) + (method->falls ? -away : away));
        if (points == 0 || x != first[points - 1]) /* whole numbers may meet */
            first[points++] = x;
    }
    return points;
}

/* ---- Curves ---- */

typedef struct curve {
    const sparge_loss_point *point; /* as measured */
    bool finite;
    double *density, *loss, *drawn; /* [points], monotone; loss: logarithms, `drawn` to the mean */
    double place, denser, sparser;  /* what is chosen, and what it lies between */
} curve;

typedef struct market {
    const sparge_param *param;
    curve *curve;
    int64_t heads, points;
    const sparge_loss_goal *goal;
} market;

/* The density never falls from point to point, and the loss never rises. */
static void make_monotone(const market *m, curve *c)
{
    for (int64_t n = 0; n < m->points; n++) {
        c->finite &= !isnan(c->point[n].loss);
        c->density[n] = fmax(c->point[n].density, n ? c->density[n - 1] : 0.0);
    }
    for (int64_t n = m->points - 1; n >= 0; n--)
        c->loss[n] = fmax(log(fmax(c->point[n].loss, DBL_MIN)),
                          n < m->points - 1 ? c->loss[n + 1] : -(double)INFINITY);
}

static void draw_to_mean(const market *m)
{
    for (int64_t n = 0; n < m->points; n++) {
        double sum = 0.0;
        for (const curve *c = m->curve; c < m->curve + m->heads; c++)
            sum += c->finite ? exp(c->loss[n]) : 0.0;
        for (curve *c = m->curve; c < m->curve + m->heads; c++)
            c->drawn[n] = own_share * c->loss[n] + (1.0 - own_share) * log(sum / (double)m->heads);
    }
}

/* The number at a place. */
static double at(const market *m, const double *x, double place)
{
    const int64_t n = (int64_t)fmin(place, (double)(m->points - 1));
    const double part = place - (double)n;
    return part > 0.0 ? x[n] + part * (x[n + 1] - x[n]) : x[n];
}

/* Where drawn loss + exp(log_price) * density is least. Between two points it is convex: an
 * exponential and a line. Of equal places the sparser. */
static double best_place(const market *m, const curve *c, double log_price)
{
    double best = 0.0, least = (double)INFINITY;
    for (int64_t n = 0; n < m->points; n++) {
        const bool last = n == m->points - 1;
        const double rise = last ? 0.0 : c->density[n + 1] - c->density[n];
        const double fall = last ? 0.0 : c->drawn[n] - c->drawn[n + 1];
        /* where the slopes of both cancel */
        const double flat = fall > 0.0 ? (c->drawn[n] - log_price - log(rise / fall)) / fall : 0.0;
        const double place = (double)n + fmax(0.0, fmin(flat, 1.0));
        const double sum = exp(at(m, c->drawn, place)) + exp(log_price) * at(m, c->density, place);
        if (sum < least) {
            least = sum;
            best = place;
        }
    }
    return best;
}

/* ---- The goal ---- */

/* What the goal is about, with the sign by which it never falls from a sparser to a denser choice:
 * the mean density, or less the sum of the losses. */
static double worth(const market *m)
{
    double density = 0.0, loss = 0.0;
    for (const curve *c = m->curve; c < m->curve + m->heads; c++) {
        density += at(m, c->density, c->place);
        loss += c->finite ? exp(at(m, c->loss, c->place)) : 0.0;
    }
    return m->goal->loss > 0.0 ? -loss : density / (double)m->heads;
}

/* Every head goes so far from its sparser place to its denser one. */
static double worth_between(const market *m, double part)
{
    for (curve *c = m->curve; c < m->curve + m->heads; c++)
        c->place = c->sparser + part * (c->denser - c->sparser);
    return worth(m);
}

static double worth_at_price(const market *m, double log_price)
{
    for (curve *c = m->curve; c < m->curve + m->heads; c++)
        c->place = c->finite ? best_place(m, c, log_price) : c->denser;
    return worth(m);
}

/* Bisects the price; and then what is left, which a head leaps over at a price, between the places
 * on both sides of its leap. */
static sparge_status meet_goal(const market *m, sparge_error *error)
{
    const bool by_loss = m->goal->loss > 0.0;
    const double wanted = by_loss ? -m->goal->loss : m->goal->density;
    double low = log(DBL_MIN), high = log(DBL_MAX), from = 0.0, to = 1.0;
    for (curve *c = m->curve; c < m->curve + m->heads; c++) {
        c->denser = (double)(m->points - 1);
        c->sparser = c->finite ? 0.0 : c->denser;
    }
    const double least = worth_between(m, 0.0), most = worth_between(m, 1.0);
    if (!(wanted >= least && wanted <= most))
        return sparge_fail(error, SPARGE_ERR_ARGUMENT,
                           "%s %g cannot be reached: over the values that were measured it goes "
                           "from %.6g to %.6g",
                           by_loss ? "loss" : "density", fabs(wanted), fabs(by_loss ? most : least),
                           fabs(by_loss ? least : most));
    for (double price = 0.5 * (low + high); low < price && price < high;
         price = 0.5 * (low + high)) {
        const bool dear = worth_at_price(m, price) < wanted;
        *(dear ? &high : &low) = price;
        for (curve *c = m->curve; c < m->curve + m->heads; c++)
            *(dear ? &c->sparser : &c->denser) = c->place;
    }
    for (double part = 0.5; from < part && part < to; part = 0.5 * (from + to))
        *(worth_between(m, part) < wanted ? &from : &to) = part;
    worth_between(m, to);
    return SPARGE_OK;
}

static void tell_choice(const market *m, const curve *c, sparge_loss_point *to)
{
    const int64_t n = (int64_t)c->place;
    const double part = c->place - (double)n, here = tune_scale(m->param, c->point[n].first);
    to->density = at(m, c->density, c->place);
    to->loss = c->finite ? exp(at(m, c->loss, c->place)) : (double)NAN;
    to->first = c->point[n].first;
    if (part > 0.0)
        to->first =
            value_of(m->param, here + part * (tune_scale(m->param, c->point[n + 1].first) - here));
}

sparge_status tune_choose(const sparge_param *param, const sparge_loss_point *point, int64_t heads,
                          int64_t points, const sparge_loss_goal *goal, sparge_loss_point *chosen,
                          sparge_error *error)
{
    market m = {param, calloc((size_t)heads, sizeof *m.curve), heads, points, goal};
    double *numbers = malloc((size_t)(3 * heads * points) * sizeof *numbers);
    sparge_status status = m.curve && numbers ? SPARGE_OK : SPARGE_ERR_MEMORY;
    for (int64_t h = 0; h < heads && !status; h++) {
        double *const own = numbers + 3 * h * points;
        m.curve[h] = (curve){.point = point + h * points,
                             .finite = true,
                             .density = own,
                             .loss = own + points,
                             .drawn = own + 2 * points};
        make_monotone(&m, &m.curve[h]);
    }
    if (!status) {
        draw_to_mean(&m);
        status = meet_goal(&m, error);
    }
    for (int64_t h = 0; h < heads && !status; h++)
        tell_choice(&m, &m.curve[h], &chosen[h]);
    free(m.curve);
    free(numbers);
    return status;
}
