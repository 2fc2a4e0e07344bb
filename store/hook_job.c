/* hook_job.c - the copy of everything that a save needs, in one block. */
#include "hook_internal.h"

#include "container.h"
#include "kernels.h"

#define ALIGN 64u

/* Cuts a block into pieces; without a block it only adds up their sizes. */
typedef struct cutter {
    uint8_t *block;
    uint64_t used; /* UINT64_MAX: too large to count */
} cutter;

static void *cut(cutter *c, uint64_t count, uint64_t size)
{
    uint64_t bytes, end;
    uint8_t *piece = c->block != NULL ? c->block + c->used : NULL;
    if (!xkv_mul64(count, size, &bytes) || !xkv_add64(c->used, bytes, &end) || end > UINT64_MAX - ALIGN) {
        c->used = UINT64_MAX;
        return NULL;
    }
    c->used = xkv_align64(end, ALIGN);
    return piece;
}

static void *cut_copy(cutter *c, const void *from, uint64_t count, uint64_t size)
{
    void *piece = cut(c, count, size);
    if (piece != NULL && count > 0)
        memcpy(piece, from, (size_t)(count * size));
    return piece;
}

/* --- Pieces ------------------------------------------------------------------------------------------------------- */

static void cut_prompt(cutter *c, const xkv_prompt *from, xkv_prompt *to)
{
    *to = *from;
    to->tokens = cut_copy(c, from->tokens, from->token_count, sizeof *from->tokens);
    xkv_media *media = cut_copy(c, from->media, from->media_count, sizeof *from->media);
    for (uint32_t i = 0; i < from->media_count; i++) {
        void *id = cut_copy(c, from->media[i].id, from->media[i].id_size, 1);
        if (media != NULL)
            media[i].id = id;
    }
    to->media = media;
}

static void cut_geometry(cutter *c, const xkv_geometry *from, uint32_t tokens, xkv_geometry *to)
{
    *to = *from;
    to->token_count = tokens;
    to->token_id_count = from->token_id_count < tokens ? from->token_id_count : tokens;
    to->planes = cut_copy(c, from->planes, from->plane_count, sizeof *from->planes);
    to->ropes = cut_copy(c, from->ropes, from->rope_count, sizeof *from->ropes);
    to->positions = cut_copy(c, from->positions, tokens, sizeof *from->positions);
    to->token_ids = cut_copy(c, from->token_ids, to->token_id_count, sizeof *from->token_ids);
}

/* Rows become dense: [token][head][dim]. */
static xkv_view *cut_rows(cutter *c, const xkv_geometry *g, uint32_t tokens, const xkv_view *from)
{
    xkv_view *views = cut(c, g->plane_count, sizeof *views);
    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &g->planes[i];
        uint32_t width = p->heads * p->head_dim;
        int64_t row = (int64_t)xkv_dtype_bytes(p->dtype, width), elem = (int64_t)xkv_dtype_size(p->dtype);
        uint8_t *rows = cut(c, tokens, (uint64_t)row);
        if (rows == NULL)
            continue;
        xkv_view_gather_bytes(&from[i], p, 0, tokens, rows, (size_t)row);
        views[i] = (xkv_view){rows, row, row, elem, .dtype = p->dtype, .head_dim = width};
    }
    return views;
}

static void cut_all(cutter *c, xkv_job *job, const xkv_prompt *prompt, const xkv_geometry *geometry,
                    const xkv_view *views, const xkv_hook_save_options *o)
{
    cut_prompt(c, prompt, &job->prompt);
    cut_geometry(c, geometry, prompt->token_count, &job->geometry);
    job->put = xkv_put_options_default();
    job->put.ttl = o->ttl;
    job->put.pin = o->pin;
    job->put.keys = cut_copy(c, o->keys, o->key_count, sizeof *o->keys);
    job->put.key_count = o->key_count;
    job->views = cut_rows(c, geometry, prompt->token_count, views);
}

/* --- Checks: what the copy relies on; the rest is checked by the put ---------------------------------------------- */

static xkv_status check_plane(xkv_ctx *ctx, const xkv_geometry *g, const xkv_view *views, uint32_t i)
{
    XKV_TRY(xkv_check_plane(ctx, g, i));
    XKV_TRY(xkv_check_view(ctx, g, i, &views[i]));
    if (views[i].dtype != g->planes[i].dtype)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "plane %u: its view has another dtype", i);
    return XKV_OK;
}

static xkv_status check_geometry(xkv_ctx *ctx, const xkv_geometry *g, const xkv_view *views, uint32_t tokens)
{
    if (g == NULL || views == NULL || g->planes == NULL || g->plane_count == 0 || g->plane_count > XKV_MAX_PLANES)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a save needs a geometry with planes, and their views");
    if (g->positions == NULL || g->rope_count > XKV_MAX_ROPES || (g->rope_count > 0 && g->ropes == NULL) ||
        (g->token_id_count > 0 && g->token_ids == NULL))
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "positions, ropes or token ids are missing");
    if (g->token_count < tokens)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the prompt has %u tokens, the planes %u rows", tokens,
                        g->token_count);
    for (uint32_t i = 0; i < g->plane_count; i++)
        XKV_TRY(check_plane(ctx, g, views, i));
    return XKV_OK;
}

static xkv_status check_prompt(xkv_ctx *ctx, const xkv_prompt *prompt, const xkv_hook_save_options *o)
{
    if (prompt == NULL || prompt->tokens == NULL || prompt->token_count == 0)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "a save needs the tokens of its prompt");
    if (prompt->media_count > 0 && prompt->media == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "media are NULL");
    if (o->key_count > 0 && o->keys == NULL)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "keys are NULL");
    return XKV_OK;
}

xkv_status xkv_job_check(xkv_ctx *ctx, const xkv_prompt *prompt, const xkv_geometry *geometry, const xkv_view *views,
                         const xkv_hook_save_options *o, uint64_t *size)
{
    xkv_job job = {0};
    cutter c = {0};
    XKV_TRY(check_prompt(ctx, prompt, o));
    XKV_TRY(check_geometry(ctx, geometry, views, prompt->token_count));
    cut_all(&c, &job, prompt, geometry, views, o);
    *size = c.used;
    return XKV_OK;
}

void xkv_job_copy(xkv_job *job, const xkv_prompt *prompt, const xkv_geometry *geometry, const xkv_view *views,
                  const xkv_hook_save_options *o)
{
    cutter c = {.block = job->block};
    cut_all(&c, job, prompt, geometry, views, o);
}
