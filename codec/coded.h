/* coded.h - groups of quantized, entropy-coded coefficients (spec/dictionary.md, section 1): from rows to integers, and
 * from integers to rows. */
#ifndef XKV_CODED_H
#define XKV_CODED_H

#include "dict.h"
#include "panels.h"
#include "rans.h"
#include "rows.h"

/* What turns rows into coefficients and back. All pointers belong to somebody else. */
typedef struct xkv_transform {
    uint32_t rank, width;
    uint32_t top;            /* leading components that the cross stage codes; 0 without one */
    uint32_t cross_at;       /* where the first of them stands in its rows */
    const float *mean;       /* [width], or NULL for 0 */
    const xkv_panels *basis; /* [rank][width]; NULL: the diagonal below */
    const float *analysis;   /* [rank][width] and */
    const float *offset;     /* [rank]: y_j = x . analysis_j - offset_j; NULL for 0 */
    const float *diagonal;   /* [width] scalar: x_i = mean_i + y_i * diagonal_i */
    const float *blocks;     /* metric blocks of the group's heads, one behind the other; NULL: no metric */
    const uint8_t *tables;   /* [rank] of the entry that is appended to: to be used as they are; NULL: to be chosen */

    /* Codec svdq: components that are stored with the entry. */
    const struct xkv_svdq *own;   /* which they are before rounding; else NULL */
    const double *component_bits; /* [rank] that storing them takes, for the choice among them; else NULL */
    const double *component_lost; /* [rank] share of the coefficients' energy that rounding them loses; likewise */
} xkv_transform;

xkv_transform xkv_transform_of_basis(const xkv_basis *basis);

/* The coefficients of a run of tokens. */
typedef struct xkv_coded {
    uint32_t first, tokens; /* tokens [first, first + tokens) of the cache */
    uint32_t rank;
    float step;
    uint8_t *tables;         /* [rank]; 0: not coded */
    uint32_t coded;          /* how many are */
    uint8_t *coded_tables;   /* [coded] their tables */
    int16_t *q;              /* [coded][tokens] their integers */
    const int16_t *device_q; /* or those of components first_row .. rank - 1, in a device's memory (device_pack.h) */
    uint32_t first_row;
    const struct xkv_svdq_basis *basis;   /* svdq: what they are coefficients of; belongs to somebody else */
    bool overflow;                        /* a coefficient exceeds 32767 steps: nothing else is set */
    double bits;                          /* of the coded components */
    double metric_squares, metric_energy; /* sums of |(x - y) W|^2 and |x W - mu|^2; 0 without a metric */
} xkv_coded;

/* Coefficients first .. rank-1 of x [tokens][width] into y, component-major: y[(j - first) * stride + t]. */
void xkv_analyze(const xkv_kernels *k, const xkv_transform *t, uint32_t first, const float *x, uint32_t tokens,
                 float *y, size_t stride);

/* Whether n coefficients of this sum of squares are nothing but zeros at `step`, almost surely. */
bool xkv_is_all_zeros(double energy, float step, uint32_t n);
/* Whether a component is worth its bits: coding it lowers the squared error by `gain`. `own`: the component itself is
 * stored with the entry, which `bits` include. */
bool xkv_is_worth_coding(double gain, float step, bool own, double bits);

/* Quantize one component and choose its table, or 0 when coding it is not worth its bits: it must lower
 * squared error + lambda * step^2 * bits, where `more_bits` are those that it takes elsewhere and `lost` is the squared
 * error that it has elsewhere. q is [n]; *bits is 0 when not coded. False when a value does not fit. */
bool xkv_code_component(const xkv_coder *coder, const float *y, uint32_t n, float step, double more_bits, double lost,
                        int16_t *q, uint8_t *table, double *bits, double *squares);

/* Quantize y [rank - first][tokens] with coded->step, choose the tables (components below `first` have none; `t`, which
 * may be NULL, says what components cost beside), and keep the integers of those that are coded. `coded` holds rank,
 * tokens and step, and gets the rest. */
XKV_MUST_CHECK xkv_status xkv_code_components(xkv_ctx *ctx, xkv_pool *pool, const xkv_transform *t, const float *y,
                                              uint32_t first, xkv_coded *coded);

/* The cross stage of an entry, as decoding a group needs it. */
typedef struct xkv_cross {
    const xkv_cross_basis *basis;
    uint32_t rank;         /* components listed; at most those of the basis */
    const uint8_t *tables; /* [rank] */
    float step;
    uint32_t coded;
    const uint8_t *coded_tables; /* [coded] */
} xkv_cross;

/* Columns [first, first + count) of a group's rows. */
typedef struct xkv_columns {
    uint32_t first, count;
} xkv_columns;

/* What turns the integers of a group into rows. */
typedef struct xkv_synthesis {
    const xkv_transform *t;
    const uint8_t *tables; /* [rank] of integers; belongs to somebody else */
    float step, cross_step;
    uint32_t top;                /* coefficients that the cross stage adds to; 0 without one */
    const xkv_panels *mix;       /* the stage's components */
    uint32_t coded, cross_coded; /* the group's own, and those of the stage if there is a top: */
    uint32_t *rows, *cross_rows; /* [coded], [cross_coded] which they are; none for a diagonal */
    uint32_t *leading;           /* [top] 0, 1, .. */
} xkv_synthesis;

/* `cross` NULL: none. */
XKV_MUST_CHECK xkv_status xkv_synthesis_create(xkv_ctx *ctx, const xkv_transform *t, const uint8_t *tables, float step,
                                               const xkv_cross *cross, xkv_synthesis *s);
/* Of coefficients that are no integers: all of them, and no cross stage. */
XKV_MUST_CHECK xkv_status xkv_synthesis_create_plain(xkv_ctx *ctx, const xkv_transform *t, xkv_synthesis *s);
void xkv_synthesis_free(xkv_ctx *ctx, xkv_synthesis *s);

/* f32 of scratch that these take for `tokens` tokens. */
size_t xkv_synthesis_scratch(const xkv_synthesis *s, uint32_t tokens);

/* The integers of a run of tokens: the i-th coded component's at q[i * stride + t]. q NULL: there are none. */
typedef struct xkv_integers {
    const int16_t *q;
    size_t stride;
} xkv_integers;

/* The same from token `token` of the run on. */
static inline xkv_integers xkv_integers_from(xkv_integers in, uint32_t token)
{
    if (in.q)
        in.q += token;
    return in;
}

/* Rows x [tokens][width] (K before RoPE) of a run of tokens: from the mean and the group's own integers, and then what
 * the integers of the cross stage add to them. Of their columns these `columns` [column_count] are made; the others
 * hold the mean. */
void xkv_synthesize_own(const xkv_synthesis *s, xkv_integers own, uint32_t tokens, const xkv_columns *columns,
                        uint32_t column_count, float *scratch, float *x);
void xkv_synthesize_cross(const xkv_synthesis *s, xkv_integers cross, uint32_t tokens, const xkv_columns *columns,
                          uint32_t column_count, float *scratch, float *x);

/* Rows likewise from coefficients y [tokens][rank]. */
void xkv_synthesize_plain(const xkv_synthesis *s, const float *y, uint32_t tokens, const xkv_columns *columns,
                          uint32_t column_count, float *scratch, float *x);

/* Tokens [t0, t1), whose errors are measured from token `measured` on. */
typedef struct xkv_span {
    uint32_t t0, t1, measured;
} xkv_span;

/* Analyze, quantize, choose, and measure tokens of g with `step`. `cross` (may be NULL) and its integers of the same
 * tokens add to it. Sets g's energy, error, plane errors and energies; with t->own nothing is measured, since its
 * components are not rounded yet. */
XKV_MUST_CHECK xkv_status xkv_code_group(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g,
                                         const xkv_view *views, xkv_span span, const xkv_transform *t, float step,
                                         const xkv_cross *cross, xkv_integers cross_q, xkv_coded *coded);

/* Energies alone of tokens [t0, t1): g's and its planes', and in the metric, if `t` (may be NULL) has one. Errors are
 * set to 0. */
XKV_MUST_CHECK xkv_status xkv_weigh_group(xkv_ctx *ctx, xkv_pool *pool, xkv_rotator *rotators, xkv_group *g,
                                          const xkv_view *views, uint32_t t0, uint32_t t1, const xkv_transform *t,
                                          double *metric_energy);
void xkv_coded_free(xkv_ctx *ctx, xkv_coded *coded);

#endif
