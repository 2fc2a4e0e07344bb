/* gpu_check_product.c - gpu_check for products: against f64, as closely as the type of their operands promises; and
 * what lies beside the matrix stays as it is. */
#include "gpu_check.h"
#include "pack_elements.h"

#include <stdlib.h>

/* --- Matrices ----------------------------------------------------------------------------------------------------- */

static double value_of(const void *x, uint64_t at, uint32_t type)
{
    uint16_t bits;

    if (type == XKV_PRODUCT_F32 || type == XKV_PRODUCT_TF32)
        return (double)((const float *)x)[at];
    bits = ((const uint16_t *)x)[at];
    return (double)(type == XKV_PRODUCT_BF16 ? xkv_bf16_to_f32(bits) : xkv_f16_to_f32(bits));
}

/* Room for `count` f32, with so many numbers of a type. */
static float *some_matrix(uint64_t count, uint32_t type, uint64_t *seed)
{
    float *x = malloc(count * 4);
    uint16_t *bits = (uint16_t *)(void *)x;

    for (uint64_t i = 0; i < count; i++) {
        float value = (float)gpu_normal(seed);
        if (type == XKV_PRODUCT_F32 || type == XKV_PRODUCT_TF32)
            x[i] = value;
        else
            bits[i] = type == XKV_PRODUCT_BF16 ? xkv_bf16_from_f32(value) : xkv_f16_from_f32(value);
    }
    return x;
}

/* --- One product -------------------------------------------------------------------------------------------------- */

/* Element (i, j) of a product of the host's matrices, C being what it was. */
static double element_of(const xkv_plug_product *o, uint64_t p, uint64_t i, uint64_t j)
{
    const xkv_plug_gemm *m = &o->g;
    double sum = 0;

    for (uint64_t l = 0; l < m->k; l++)
        sum += value_of(m->a, p * o->a_step + (m->component_major ? l * m->lda + i : i * m->lda + l), m->exact) *
               value_of(m->b, p * o->b_step + (o->transposed ? j * m->ldb + l : l * m->ldb + j), m->exact);
    return (double)m->alpha * sum + (double)m->beta * (double)m->c[p * o->c_step + i * m->ldc + j];
}

/* The share of its energy that `found` is off; C then has what was found. */
static double error_of(const xkv_plug_product *o, const float *found)
{
    double error = 0, energy = 0;

    for (uint64_t p = 0; p < o->batch; p++)
        for (uint64_t i = 0; i < o->g.m; i++)
            for (uint64_t j = 0; j < o->g.n; j++) {
                uint64_t at = p * o->c_step + i * o->g.ldc + j;
                double expected = element_of(o, p, i, j), left = expected - (double)found[at];
                error += left * left;
                energy += expected * expected;
                o->g.c[at] = found[at];
            }
    return error / energy;
}

/* `o` without its matrices, of which each has room for `size` numbers; as a product of a batch, or as the plain one. */
static void check_product_of(gpu *g, xkv_plug_product o, uint64_t size, bool plain, double limit)
{
    uint64_t seed = o.g.m * 31 + o.g.n * 7 + o.g.k + o.g.exact;
    float *a = some_matrix(size, o.g.exact, &seed), *b = some_matrix(size, o.g.exact, &seed);
    float *c = some_matrix(size, XKV_PRODUCT_F32, &seed), *found = malloc(size * 4);
    gpu_block a_there = gpu_put(g, a, size * 4), b_there = gpu_put(g, b, size * 4), there = gpu_put(g, c, size * 4);
    xkv_plug_product host = o;

    o.g.a = a_there.p;
    o.g.b = b_there.p;
    o.g.c = (void *)there.p;
    host.g.a = a;
    host.g.b = b;
    host.g.c = c;
    if (plain)
        GPU_TRY(g, gemm(g->d, &o.g, g->stream));
    else
        GPU_TRY(g, product(g->d, &o, g->stream));
    gpu_get(g, &there, found);
    check(error_of(&host, found) <= limit, "product, type %u, transposed %u %u: too far from f64", o.g.exact,
          o.g.component_major, o.transposed);
    check(memcmp(c, found, size * 4) == 0, "product, type %u, transposed %u %u: wrote beside the matrix", o.g.exact,
          o.g.component_major, o.transposed);
    release(g, &a_there, "product wrote beside A");
    release(g, &b_there, "product wrote beside B");
    release(g, &there, "product wrote beside C");
    free(a);
    free(b);
    free(c);
    free(found);
}

/* --- All of them -------------------------------------------------------------------------------------------------- */

/* As restoring asks for them, of odd shapes. */
static void check_gemm(gpu *g)
{
    static const uint32_t shapes[][3] = {{1, 1, 1},    {1, 64, 17},   {31, 33, 65},   {64, 128, 256},
                                         {129, 96, 5}, {2, 384, 700}, {257, 130, 300}};

    for (int i = 0; i < 7; i++)
        for (uint32_t kind = 0; kind < 4; kind++) {
            uint64_t m = shapes[i][0], n = shapes[i][1], k = shapes[i][2], major = kind >> 1;
            xkv_plug_product o = {.g = {.m = m,
                                        .n = n,
                                        .k = k,
                                        .lda = (major ? m : k) + 3,
                                        .ldb = n + 1,
                                        .ldc = n + 2,
                                        .alpha = 0.5f,
                                        .beta = 1,
                                        .component_major = (uint32_t)major,
                                        .exact = kind & 1},
                                  .batch = 1};
            check_product_of(g, o, 700 * 385, true, 1e-7); /* the largest */
        }
}

/* Two in a batch, of any type and orientation. */
static void check_batches(gpu *g)
{
    enum { LD = 72, STEP = LD * LD };

    for (uint32_t type = XKV_PRODUCT_F32; type <= XKV_PRODUCT_TF32; type++)
        for (uint32_t kind = 0; kind < 4; kind++) {
            xkv_plug_product o = {
                {NULL, NULL, NULL, 33, 40, 65, LD, LD, LD, -1, 1, kind & 1, type}, kind >> 1, 2, STEP, STEP, STEP};
            check_product_of(g, o, 2 * STEP, false, type == XKV_PRODUCT_TF32 ? 1e-5 : 1e-11);
        }
}

void check_products(gpu *g)
{
    check_gemm(g);
    check_batches(g);
}
