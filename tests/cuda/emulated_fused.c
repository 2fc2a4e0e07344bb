/* emulated_fused.c - the fused kernel on the CPU: sums are those of a whole block. */
#include "launch.h"

#define XKV_FUSED_TOKENS 64u
#define XKV_FUSED_DEPTH  32u

#include "element.h"
#include "fake_cuda.h"

#include <stdlib.h>

typedef struct xkv_fused_sums {
    float sum[XKV_FUSED_TOKENS][XKV_FUSED_DIM];
} xkv_fused_sums;

static void xkv_fused_clear(xkv_fused_sums *sums)
{
    memset(sums, 0, sizeof *sums);
}

static void xkv_fused_add(xkv_fused_sums *sums, const uint16_t *a, const uint16_t *b, uint32_t dim)
{
    for (uint32_t k = 0; k < XKV_FUSED_DEPTH; k++)
        for (uint32_t t = 0; t < XKV_FUSED_TOKENS; t++) {
            float x = xkv_f16_to_f32(a[k * XKV_FUSED_TOKENS + t]);
            for (uint32_t e = 0; x != 0 && e < dim; e++)
                sums->sum[t][e] += x * xkv_f16_to_f32(b[k * dim + e]);
        }
}

static void xkv_fused_take(const xkv_fused_sums *sums, float alpha, uint32_t dim, float *rows)
{
    for (uint32_t t = 0; t < XKV_FUSED_TOKENS; t++)
        for (uint32_t e = 0; e < dim; e++)
            rows[t * dim + e] = sums->sum[t][e] * alpha;
}

#include "fused_block.h"

static void check_spans(const xkv_plug_fused *o)
{
    uint64_t operands = (uint64_t)o->count[0] + o->count[1];

    for (int list = 0; list < 2; list++)
        for (uint32_t i = 0; i < o->count[list]; i++) {
            fake_check(&o->rows[list][i], sizeof(uint32_t));
            fake_check(o->q[list] + (o->rows[list][i] >> 2) * o->q_stride[list], o->store.tokens * sizeof(int16_t));
        }
    fake_check(o->high, operands * o->width * sizeof *o->high);
    fake_check(o->low, operands * o->width * sizeof *o->low);
    fake_check(o->fault, sizeof *o->fault);
    fake_check(o->store.planes, o->store.plane_count * sizeof *o->store.planes);
    if (o->store.mean)
        fake_check(o->store.mean, o->width * sizeof *o->store.mean);
    for (uint32_t i = 0; i < o->store.plane_count; i++)
        for (uint32_t t = 0; t < o->store.tokens; t++) {
            const xkv_plug_plane *p = &o->store.planes[i];
            uint32_t token = o->store.first + t, last = p->heads * p->head_dim - 1;
            bool blocks = xkv_is_blocks(p->view.dtype);
            fake_check(blocks ? xkv_view_block(&p->view, p->head_dim, token, last / XKV_BLOCK_ELEMENTS)
                              : xkv_view_element(&p->view, p->head_dim, token, last),
                       2);
        }
}

static void run_fused(const void *args)
{
    const xkv_plug_fused *o = args;
    uint8_t *shared = malloc(xkv_fused_shared(o->dim));

    memset(shared, 0xff, xkv_fused_shared(o->dim));
    check_spans(o);
    fake_cuda.fused++;
    for (uint32_t i = 0; i * XKV_FUSED_TOKENS < o->store.tokens; i++)
        for (uint32_t n = 0; n < o->heads; n++)
            xkv_block_fused(o, i, n, shared);
    free(shared);
}

FAKE_LAUNCH(fused)
