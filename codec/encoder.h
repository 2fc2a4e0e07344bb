/* encoder.h - what the files of xkv_pack() share: its state, and who does what.
 *
 *   encode.c         the call: preparation, metadata, report
 *   encode_choose.c  profile, ranks and step for what was asked
 *   encode_groups.c  one group after the other: coded, measured, or stored lossless
 *   encode_parts.c   the parts of a group, in batches on the pool
 *   encode_append.c  the groups of an entry that tokens are appended to
 */
#ifndef XKV_ENCODER_H
#define XKV_ENCODER_H

#include "chunks.h"
#include "cross.h"
#include "parts.h"
#include "plan.h"
#include "rate.h"
#include "scalar.h"
#include "svd_group.h"
#include "svdq.h"

/* Chunks are encoded a batch at a time, one per slot, and written in order. */
typedef struct xkv_slot {
    ZSTD_CCtx *zstd;
    uint8_t *raw, *planes, *packed;
    const void *data; /* what to write: raw or packed */
    uint64_t size;
    uint32_t method;
} xkv_slot;

/* The entry that tokens are appended to. */
typedef struct xkv_appending {
    const xkv_entry *base;  /* NULL: all tokens are packed */
    uint32_t tokens;        /* of its tokens, those before its window */
    uint32_t chunks;        /* of its chunks, those that stay as they are: the full ones */
    bool exact;             /* its rows must be those that are given */
    xkv_cross_stage stage;  /* its own */
    xkv_meta_value *values; /* its metadata */
    uint8_t error[8];       /* the value error.metric */
    double metric_error;    /* what that was */
} xkv_appending;

typedef struct xkv_encoder {
    xkv_ctx *ctx;
    const xkv_kernels *kernels;
    xkv_pack_options o;
    xkv_pool *pool;
    uint32_t threads;
    const xkv_view *views;
    struct xkv_device_packing *device; /* which has the rows; views are those of few of them (device_pack.h); or NULL */
    xkv_container c;
    xkv_container_writer w;
    xkv_rotator *rotators; /* [threads] */
    xkv_slot *slots;       /* [threads] */
    uint8_t *nonfinite;    /* [plane_count] */
    uint64_t done, total;  /* raw bytes, for progress */
    double kind_squares[4], kind_energy[4];
    uint32_t fallbacks;
    xkv_transform *transforms; /* [group_count] of coded groups; rank 0: none */
    xkv_scalar *scalars;       /* [group_count] what the transforms of profile scalar point to */
    xkv_coded cross;           /* the cross stage at `step`; rank 0: none */
    xkv_svdq *svdqs;           /* [decomposed] and those of quantized svd */
    uint32_t decomposed;       /* group_count, once there are any */
    float step;
    double metric_squares, metric_energy;
    uint32_t components, component_total;
    bool automatic;                    /* profile auto chooses, or has chosen */
    bool trial;                        /* a profile is tried: a sample will do */
    xkv_profile_estimate estimates[8]; /* by profile */
    xkv_appending append;
} xkv_encoder;

/* --- encode.c --- */

/* xkv_pack() without framing and without forgetting the last error, for use inside other calls; `device` may be NULL.
 */
XKV_MUST_CHECK xkv_status xkv_encoder_pack_rows(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_view *views,
                                                struct xkv_device_packing *device, const xkv_pack_options *options,
                                                const xkv_output *output, xkv_pack_report *report);

/* --- encode_parts.c --- */

/* Encode the parts of a group in order, and write them; with `count_only` add up their aligned sizes instead. `f` is
 * for codec svd, `coded` for the quantized ones. */
XKV_MUST_CHECK xkv_status xkv_encoder_write_group(xkv_encoder *e, xkv_group *g, const xkv_factors *f,
                                                  const xkv_coded *coded, uint64_t *count_only);
/* Scratch of the slots. */
void xkv_encoder_release_slots(xkv_encoder *e);

/* --- encode_groups.c --- */

/* Raw bytes of a group. */
uint64_t xkv_encoder_group_bytes(const xkv_encoder *e, const xkv_group *g);
/* Make a group lossless, since its codec does not suit it. */
void xkv_encoder_fall_back(xkv_encoder *e, xkv_group *g);
/* Code the cross stage at e->step, in place of what was there; nothing without one. */
XKV_MUST_CHECK xkv_status xkv_encoder_code_cross(xkv_encoder *e);
/* Code a group at e->step, and measure it. `basis` is set for svdq; the caller frees it and `coded`. */
XKV_MUST_CHECK xkv_status xkv_encoder_code_group(xkv_encoder *e, xkv_group *g, xkv_svdq_basis *basis, xkv_coded *coded);
/* Error of what was coded so far, in the metric. */
double xkv_encoder_metric_error(const xkv_encoder *e);
/* Add the errors of a group that is coded to those of its kinds of planes. */
void xkv_encoder_count_error(xkv_encoder *e, const xkv_group *g);
/* A group is written: tell it. Errors: CANCELLED. */
XKV_MUST_CHECK xkv_status xkv_encoder_report_progress(xkv_encoder *e, const xkv_group *g);
/* All groups, written. */
XKV_MUST_CHECK xkv_status xkv_encoder_pack_groups(xkv_encoder *e);

/* --- encode_append.c --- */

/* Groups, metadata and head of the file: those of e->append.base, for the tokens there are now. */
XKV_MUST_CHECK xkv_status xkv_encoder_plan_append(xkv_encoder *e, const xkv_output *output);
/* All groups, written. */
XKV_MUST_CHECK xkv_status xkv_encoder_append_groups(xkv_encoder *e);
void xkv_encoder_release_append(xkv_encoder *e);

/* --- encode_choose.c --- */

/* Profile auto: try what there is on a sample, and set e->o.profile. */
XKV_MUST_CHECK xkv_status xkv_encoder_choose_profile(xkv_encoder *e);
/* Groups and head of the file for the profile. */
XKV_MUST_CHECK xkv_status xkv_encoder_plan(xkv_encoder *e, const xkv_output *output);
/* Ranks of 16-bit svd for a ratio. */
XKV_MUST_CHECK xkv_status xkv_encoder_choose_ranks(xkv_encoder *e);
/* Transforms of quantized groups, and the step for what was asked. */
XKV_MUST_CHECK xkv_status xkv_encoder_choose_step(xkv_encoder *e);
void xkv_encoder_release_transforms(xkv_encoder *e);
void xkv_encoder_release_decompositions(xkv_encoder *e);

#endif
