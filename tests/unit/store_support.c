#include "store_support.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* --- Folders ------------------------------------------------------------------------------------------------------ */

void make_folder(test_store *t)
{
    const char *base = getenv("TMPDIR");
    memset(t, 0, sizeof *t);
    if (base == NULL || strlen(base) > 40) /* every commit is synced: in memory that costs nothing */
        base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
    snprintf(t->folder, sizeof t->folder, "%.40s/xkv-store-XXXXXX", base);
    assert_non_null(mkdtemp(t->folder));
    snprintf(t->path, sizeof t->path, "%s/store", t->folder);
    t->ctx = new_ctx(1);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

void remove_folder(test_store *t)
{
    xkv_store_close(t->ctx, t->store);
    assert_int_equal(xkv_ctx_memory_used(t->ctx), 0);
    xkv_ctx_free(t->ctx);
    nftw(t->folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    memset(t, 0, sizeof *t);
}

void make_store(test_store *t, uint64_t byte_cap)
{
    xkv_store_properties p = xkv_store_properties_default();
    p.byte_cap = byte_cap;
    make_folder(t);
    assert_ok(t->ctx, xkv_store_create(t->ctx, t->path, &p));
    assert_ok(t->ctx, xkv_store_open(t->ctx, t->path, NULL, &t->store));
}

void reopen_store(test_store *t)
{
    xkv_store_close(t->ctx, t->store);
    t->store = NULL;
    assert_ok(t->ctx, xkv_store_open(t->ctx, t->path, NULL, &t->store));
}

xkv_namespace make_namespace(const char *salt)
{
    xkv_namespace_fields f = xkv_namespace_fields_default();
    xkv_namespace ns;
    f.salt = salt;
    f.salt_size = salt != NULL ? strlen(salt) : 0;
    assert_int_equal(xkv_namespace_make(NULL, &f, &ns), XKV_OK);
    return ns;
}

/* --- Rows --------------------------------------------------------------------------------------------------------- */

/* What all tokens before `state` have left. */
static uint64_t step(uint64_t state, int32_t token)
{
    uint64_t s = state ^ (uint64_t)(uint32_t)token;
    return test_random(&s);
}

static float value_of(uint64_t state, uint32_t plane, uint32_t i)
{
    uint64_t s = state + plane * 1000003u + i;
    return (float)(test_random(&s) >> 40);
}

rows *make_rows(const int32_t *tokens, uint32_t count)
{
    rows *r = calloc(1, sizeof *r);
    uint64_t state = 1;
    assert_non_null(r);
    assert_true(count <= STORE_TOKENS);
    for (uint32_t p = 0; p < 2 * STORE_LAYERS; p++) {
        r->planes[p] = (xkv_plane){p / 2, p % 2, XKV_F32, 1, STORE_WIDTH, XKV_NO_ROPE};
        r->views[p] = (xkv_view){r->data[p], sizeof r->data[p][0], sizeof r->data[p][0], 4, NULL, .dtype = XKV_F32};
    }
    for (uint32_t t = 0; tokens != NULL && t < count; t++) {
        state = step(state, tokens[t]);
        for (uint32_t p = 0; p < 2 * STORE_LAYERS; p++)
            for (uint32_t i = 0; i < STORE_WIDTH; i++)
                r->data[p][t][i] = value_of(state, p, i);
    }
    for (uint32_t t = 0; t < count; t++)
        r->positions[t] = (int32_t)t;
    r->geometry = (xkv_geometry){.layer_count = STORE_LAYERS,
                                 .plane_count = 2 * STORE_LAYERS,
                                 .token_count = count,
                                 .planes = r->planes,
                                 .positions = r->positions};
    return r;
}

xkv_status put_rows(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const int32_t *tokens, uint32_t count,
                    const xkv_put_options *options, xkv_put_report *report)
{
    rows *r = make_rows(tokens, count);
    xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_status status =
        xkv_store_put_planes(ctx, store, ns, &prompt, &r->geometry, r->views, NULL, NULL, 0, options, report);
    free(r);
    return status;
}

bool hit_is_right(xkv_ctx *ctx, xkv_hit *hit, uint32_t matched, const int32_t *tokens, xkv_status *status)
{
    rows *expected = make_rows(tokens, matched), *got = make_rows(NULL, matched);
    *status = xkv_hit_read(ctx, hit, NULL, got->views);
    bool right = *status == XKV_OK && memcmp(expected->data, got->data, sizeof got->data) == 0;
    free(expected);
    free(got);
    return right;
}

xkv_match find_rows(xkv_ctx *ctx, xkv_store *store, const xkv_namespace *ns, const int32_t *tokens, uint32_t count)
{
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    xkv_match m;
    xkv_hit *hit = NULL;
    xkv_status status = XKV_OK;
    assert_ok(ctx, xkv_store_match(ctx, store, ns, &prompt, 0, &m, &hit));
    assert_true((hit != NULL) == (m.reason == XKV_MATCH_FOUND));
    assert_true((m.tokens > 0) == (m.reason == XKV_MATCH_FOUND));
    if (hit != NULL && !hit_is_right(ctx, hit, m.tokens, tokens, &status))
        fail_msg("wrong rows: %s", xkv_ctx_error(ctx));
    xkv_hit_close(ctx, hit);
    return m;
}

synthetic small_cache(uint64_t seed)
{
    const synthetic_options o = {.layers = 2,
                                 .tokens = 64,
                                 .heads = 2,
                                 .head_dim = 8,
                                 .dtype = XKV_F32,
                                 .rank = 6,
                                 .group_layers = 2,
                                 .noise = 0.1,
                                 .seed = seed};
    return make_synthetic(&o);
}

void make_tokens(uint64_t seed, int32_t vocabulary, int32_t *tokens, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = (int32_t)(test_random(&seed) % (uint64_t)vocabulary);
}
