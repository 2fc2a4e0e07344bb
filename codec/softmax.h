/* softmax.h - online softmax (Milakov and Gimelshein, arXiv 1805.02867): rows of scores come tile by tile, and sums
 * made with earlier weights are rescaled when a larger score appears. */
#ifndef XKV_SOFTMAX_H
#define XKV_SOFTMAX_H

#include <stddef.h>

/* One row of scores: the largest so far, and the sum of exp(score - largest). */
typedef struct xkv_softmax {
    float largest; /* -inf: no score yet */
    double sum;
} xkv_softmax;

/* scores[n] = cap * tanh(scores / cap). */
void xkv_softcap(float *scores, size_t n, float cap);

/* Turn scores[n] (-inf: hidden) into weights exp(score - largest) and add them up. What earlier weights made is to be
 * multiplied by the result, which is 1 when nothing changes. *added: sum of the new weights. */
float xkv_softmax_add(xkv_softmax *row, float *scores, size_t n, float *added);

/* Log of the sum of exp(score); -inf when there was none. */
float xkv_softmax_lse(const xkv_softmax *row);

#endif
