/* emulated_svd.c - emulated_launch.c for the kernels of the truncated SVD. */
#include "fake_cuda.h"
#include "launch.h"
#include "svd_elements.h"

static void run_sketch(const void *args)
{
    const xkv_plug_sketch *o = args;

    fake_check(o->out, o->count * sizeof *o->out);
    for (uint64_t i = 0; i < o->count; i++)
        xkv_sketch_element(o, i);
}

static void run_convert(const void *args)
{
    const xkv_plug_convert *o = args;
    uint64_t count = o->rows * o->cols;

    fake_check(o->from, count * (o->to_f64 ? 4 : 8));
    fake_check(o->to, count * (o->to_f64 ? 8 : 4));
    for (uint64_t row = 0; row < o->rows; row++)
        for (uint64_t column = 0; column < o->cols; column++)
            xkv_convert_element(o, row, column);
}

static void run_scale_gram(const void *args)
{
    const xkv_plug_scale_gram *o = args;

    fake_check(o->gram, o->n * o->n * sizeof *o->gram);
    fake_check(o->out, o->n * o->n * sizeof *o->out);
    fake_check(o->z, o->rows * o->n * sizeof *o->z);
    for (uint64_t row = 0; row < o->n + o->rows; row++)
        for (uint64_t column = 0; column < o->n; column++)
            xkv_scale_gram_element(o, row, column);
}

FAKE_LAUNCH(sketch)
FAKE_LAUNCH(convert)
FAKE_LAUNCH(scale_gram)
