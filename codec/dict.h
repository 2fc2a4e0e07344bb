/* dict.h - an opened dictionary (spec/dictionary.md, section 3). */
#ifndef XKV_DICT_H
#define XKV_DICT_H

#include "container.h"
#include "kernels.h"
#include "xkv/codec.h"

/* The basis of one group, folded with its metric. */
typedef struct xkv_basis {
    uint32_t rank, width;
    float *mean;      /* [width] m: the row that all-zero coefficients stand for */
    float *sigma;     /* [rank] standard deviation of each coefficient in training */
    float *synthesis; /* [rank][width] rows b_j */
    float *analysis;  /* [rank][width] rows W u_j: y_j = x . analysis_j - offset_j; NULL unless opened for packing */
    float *offset;    /* [rank] mu . u_j; likewise */
    float *blocks;    /* metric blocks of the heads, one behind the other; likewise */
} xkv_basis;

struct xkv_dict {
    xkv_container c;  /* geometry and one group per basis */
    xkv_basis *bases; /* [c.group_count] */
    double unit;      /* dict.unit */
    bool for_packing; /* bases have what packing needs */
};

/* The group of the dictionary that has a plane of this layer and kind, if any. */
bool xkv_dict_find_plane(const xkv_dict *dict, const xkv_plane *plane, uint32_t *group);

/* The basis of exactly the planes of `g` in `geometry` [Q6]; NULL if there is none. */
const xkv_basis *xkv_dict_basis(const xkv_dict *dict, const xkv_geometry *geometry, const xkv_group *g);

#endif
