/* dict.h - an opened dictionary (spec/dictionary.md, sections 3 and 4). */
#ifndef XKV_DICT_H
#define XKV_DICT_H

#include "container.h"
#include "kernels.h"
#include "panels.h"
#include "xkv/codec.h"

/* The basis of one group, folded with its metric. */
typedef struct xkv_basis {
    uint32_t rank, width;
    uint32_t top;      /* leading coefficients that the cross stage speaks for; 0 without one */
    uint32_t cross_at; /* where the first of them stands in its rows */
    float *mean;       /* [width] m: the row that all-zero coefficients stand for */
    float *sigma;      /* [rank] standard deviation of each coefficient in training */
    xkv_panels rows;   /* [rank][width] b_j */
    float *analysis;   /* [rank][width] rows W u_j: y_j = x . analysis_j - offset_j; NULL unless opened for packing */
    float *offset;     /* [rank] mu . u_j; likewise */
    float *blocks;     /* metric blocks of the heads, one behind the other; likewise */
} xkv_basis;

/* The basis of the cross stage: its rows are the leading coefficients of all groups side by side. */
typedef struct xkv_cross_basis {
    uint32_t rank, width;
    float *sigma;      /* [rank] */
    float *components; /* [rank][width] rows p_i */
    xkv_panels rows;   /* the same */
    float *analysis;   /* [rank][width]; NULL unless opened for packing */
} xkv_cross_basis;

struct xkv_dict {
    xkv_container c;        /* geometry and one group per basis */
    xkv_basis *bases;       /* [c.group_count], that of the cross stage unused */
    xkv_cross_basis *cross; /* NULL without one */
    double unit;            /* dict.unit */
    bool for_packing;       /* bases have what packing needs */
};

/* The group of the dictionary that has a plane of this layer and kind, if any. */
bool xkv_dict_find_plane(const xkv_dict *dict, const xkv_plane *plane, uint32_t *group);

/* The basis of exactly the planes of `g` in `geometry` [Q6]; NULL if there is none. */
const xkv_basis *xkv_dict_basis(const xkv_dict *dict, const xkv_geometry *geometry, const xkv_group *g);

#endif
