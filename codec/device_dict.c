#include "device_dict.h"

#include "device_tables.h"

#include <math.h>

float xkv_largest(const float *x, size_t n)
{
    float most = 0;

    for (size_t i = 0; i < n; i++)
        most = fmaxf(most, fabsf(x[i]));
    return most;
}

float xkv_operand_scale(float largest)
{
    int exponent;

    if (!(largest > 0) || !isfinite(largest))
        return 1;
    (void)frexpf(largest, &exponent);
    exponent = 14 - exponent;
    return ldexpf(1, exponent > 100 ? 100 : exponent < -100 ? -100 : exponent);
}

/* --- Copying ------------------------------------------------------------------------------------------------------ */

xkv_status xkv_device_wait_copies(xkv_ctx *ctx, xkv_device *d)
{
    XKV_TRY(xkv_device_result(ctx, d, d->api->record(d->plug, d->begun, d->copies)));
    return xkv_device_result(ctx, d, d->api->wait(d->plug, d->begun));
}

xkv_status xkv_device_load_tables(xkv_ctx *ctx, xkv_device *d)
{
    const uint64_t size = XKV_BASE_TABLES * sizeof(xkv_warp_table);
    xkv_warp_table *tables = NULL;
    void *there = NULL;
    xkv_status status = XKV_OK;

    if (d->tables)
        return XKV_OK;
    XKV_TRY(XKV_NEW(ctx, XKV_BASE_TABLES, &tables));
    xkv_device_tables(tables);
    XKV_TRY_GOTO(xkv_device_result(ctx, d, d->api->alloc(d->plug, size, &there)), out);
    XKV_TRY_GOTO(xkv_device_upload(ctx, d, tables, size, there, d->copies), out);
    XKV_TRY_GOTO(xkv_device_wait_copies(ctx, d), out);
    d->tables = there;
    there = NULL;
out:
    d->api->release(d->plug, there);
    xkv_release(ctx, tables);
    return status;
}

/* --- Dictionaries ------------------------------------------------------------------------------------------------- */

/* `rows` are the basis's. */
static float column_norm(const xkv_basis *b, const float *rows)
{
    double most = 0;

    for (size_t i = 0; i < b->width && b->top > 0; i++) {
        double sum = 0;
        for (size_t j = 0; j < b->top; j++)
            sum += (double)rows[j * b->width + i] * (double)rows[j * b->width + i];
        most = fmax(most, sum);
    }
    return (float)sqrt(most);
}

static uint64_t basis_bytes(const xkv_basis *b)
{
    return (uint64_t)b->rank * b->width * sizeof(float);
}

/* Device memory with `size` bytes at `from` on their way to it. */
static xkv_status copy_rows(xkv_ctx *ctx, xkv_device *d, const float *from, uint64_t size, float **rows)
{
    XKV_TRY(xkv_device_result(ctx, d, d->api->alloc(d->plug, size, (void **)rows)));
    return xkv_device_upload(ctx, d, from, size, *rows, d->copies);
}

static xkv_status copy_synthesis(xkv_ctx *ctx, xkv_device *d, const xkv_basis *b, xkv_device_basis *out)
{
    float *rows = NULL;
    xkv_status status;

    XKV_TRY(XKV_NEW(ctx, b->rank, &out->largest));
    XKV_TRY(XKV_NEW(ctx, (size_t)b->rank * b->width, &rows));
    xkv_panels_get(&b->rows, 0, b->rank, rows);
    for (size_t j = 0; j < b->rank; j++)
        out->largest[j] = xkv_largest(rows + j * b->width, b->width);
    out->top_norm = column_norm(b, rows);
    status = copy_rows(ctx, d, rows, basis_bytes(b), &out->rows);
    xkv_release(ctx, rows);
    return status;
}

static xkv_status copy_basis(xkv_ctx *ctx, xkv_device *d, const xkv_basis *b, xkv_device_basis *out)
{
    if (!b->rows.data)
        return XKV_OK;
    XKV_TRY(copy_synthesis(ctx, d, b, out));
    return b->analysis ? copy_rows(ctx, d, b->analysis, basis_bytes(b), &out->analysis) : XKV_OK;
}

static xkv_status copy_cross(xkv_ctx *ctx, xkv_device *d, const xkv_cross_basis *b, float **rows)
{
    return b && b->analysis ? copy_rows(ctx, d, b->analysis, 4ull * b->rank * b->width, rows) : XKV_OK;
}

xkv_status xkv_device_dict_copy(xkv_ctx *ctx, xkv_device *device, const xkv_dict *dict, xkv_device_dict **dict_p)
{
    xkv_device_dict *d = NULL;
    xkv_status status = XKV_OK;

    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &d));
    d->device = device;
    d->dict = dict;
    XKV_TRY_GOTO(XKV_NEW_ZERO(ctx, dict->c.group_count, &d->bases), out);
    for (uint32_t i = 0; i < dict->c.group_count; i++)
        XKV_TRY_GOTO(copy_basis(ctx, device, &dict->bases[i], &d->bases[i]), out);
    XKV_TRY_GOTO(copy_cross(ctx, device, dict->cross, &d->cross), out);
    XKV_TRY_GOTO(xkv_device_wait_copies(ctx, device), out);
    *dict_p = d;
    return XKV_OK;
out:
    xkv_device_dict_free(ctx, d);
    return status;
}

xkv_status xkv_device_dict_create(xkv_ctx *ctx, xkv_device *device, const xkv_dict *dict, xkv_device_dict **dict_p)
{
    xkv_ctx_begin(ctx);
    return xkv_device_dict_copy(ctx, device, dict, dict_p);
}

void xkv_device_dict_free(xkv_ctx *ctx, xkv_device_dict *d)
{
    if (!d)
        return;
    for (uint32_t i = 0; d->bases && i < d->dict->c.group_count; i++) {
        d->device->api->release(d->device->plug, d->bases[i].rows);
        d->device->api->release(d->device->plug, d->bases[i].analysis);
        xkv_release(ctx, d->bases[i].largest);
    }
    d->device->api->release(d->device->plug, d->cross);
    xkv_release(ctx, d->bases);
    xkv_release(ctx, d);
}

const xkv_device_basis *xkv_device_basis_find(const xkv_device_dict *d, const xkv_basis *basis)
{
    for (uint32_t i = 0; i < d->dict->c.group_count; i++)
        if (basis == &d->dict->bases[i])
            return &d->bases[i];
    return NULL;
}
