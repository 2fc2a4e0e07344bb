/* engine.c STORE_FOLDER - an engine with a prefix store: computes a prompt, saves it, and reuses it for a longer one.
 * The functions up to the line of dashes are those of the README. */
#include <stdio.h>
#include <xkv/hook.h>

/* Before prefill: how many leading tokens of the prompt are in the engine's cache then. It computes the others. */
static uint32_t reuse(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, const xkv_prompt *prompt,
                      const xkv_geometry *geometry, const xkv_view *cache)
{
    xkv_hook_match_options options = xkv_hook_match_options_default();
    xkv_hook_found found;
    xkv_hook_hit *hit;
    options.seconds_per_token = 0.002; /* what prefill takes here: a load that takes longer is declined */
    if (xkv_hook_match(ctx, hook, ns, prompt, &options, &found, &hit) != XKV_OK || hit == NULL)
        return 0; /* found.reason says why */
    xkv_status status = xkv_hook_load(ctx, hit, geometry, cache, NULL);
    xkv_hook_hit_close(hit);
    return status == XKV_OK ? found.tokens : 0; /* whatever went wrong is a miss */
}

/* After prefill: returns when the rows are copied; they are packed and stored in the background. */
static void keep(xkv_ctx *ctx, xkv_hook *hook, const xkv_namespace *ns, const xkv_prompt *prompt,
                 const xkv_geometry *geometry, const xkv_view *cache)
{
    if (xkv_hook_save(ctx, hook, ns, prompt, geometry, cache, NULL, NULL) != XKV_OK)
        fprintf(stderr, "not saved: %s\n", xkv_ctx_error(ctx));
}

/* ------------------------------------------------------------------------------------------------------------------ */

enum { TOKENS = 64, WIDTH = 4 };

/* One layer; the rows of a real engine come from a model. */
typedef struct engine {
    float k[TOKENS][WIDTH], v[TOKENS][WIDTH];
    xkv_view views[2];
} engine;

static engine *new_engine(engine *e)
{
    memset(e, 0, sizeof *e);
    e->views[0] = (xkv_view){.data = e->k, .token_stride = 16, .head_stride = 16, .dim_stride = 4, .dtype = XKV_F32};
    e->views[1] = e->views[0];
    e->views[1].data = e->v;
    return e;
}

static void prefill(engine *e, const int32_t *tokens, uint32_t first, uint32_t end)
{
    for (uint32_t t = first; t < end; t++) {
        for (int i = 0; i < WIDTH; i++) {
            e->k[t][i] = (float)tokens[t] + (float)i;
            e->v[t][i] = (float)tokens[t] - (float)i;
        }
    }
}

/* Non-zero when a longer prompt got all it could from the store, in right rows. */
static int run(xkv_ctx *ctx, xkv_hook *hook)
{
    static engine first, second;
    static const xkv_plane planes[2] = {
        {.kind = XKV_PLANE_K, .dtype = XKV_F32, .heads = 1, .head_dim = WIDTH, .rope = XKV_NO_ROPE},
        {.kind = XKV_PLANE_V, .dtype = XKV_F32, .heads = 1, .head_dim = WIDTH, .rope = XKV_NO_ROPE}};
    int32_t tokens[TOKENS], positions[TOKENS];
    xkv_namespace_fields fields = xkv_namespace_fields_default();
    xkv_namespace ns;
    for (int32_t t = 0; t < TOKENS; t++)
        tokens[t] = 7 * (positions[t] = t);
    const xkv_geometry geometry = {
        .layer_count = 1, .plane_count = 2, .token_count = TOKENS, .planes = planes, .positions = positions};
    xkv_prompt prompt = {.tokens = tokens, .token_count = 40};
    fields.settings = "engine.c, one layer";
    if (xkv_namespace_make(ctx, &fields, &ns) != XKV_OK)
        return 0;

    new_engine(&first);
    prefill(&first, tokens, reuse(ctx, hook, &ns, &prompt, &geometry, first.views), 40);
    keep(ctx, hook, &ns, &prompt, &geometry, first.views);
    if (xkv_hook_flush(ctx, hook, 10000) != XKV_OK)
        return 0;

    new_engine(&second);
    prompt.token_count = TOKENS;
    uint32_t reused = reuse(ctx, hook, &ns, &prompt, &geometry, second.views);
    prefill(&first, tokens, 40, TOKENS);
    prefill(&second, tokens, reused, TOKENS);
    printf("%u of %d tokens came from the store\n", reused, TOKENS);
    return reused == 40 && memcmp(first.k, second.k, sizeof first.k) == 0 &&
           memcmp(first.v, second.v, sizeof first.v) == 0;
}

int main(int argc, char **argv)
{
    xkv_ctx *ctx;
    xkv_store *store = NULL;
    xkv_hook *hook = NULL;
    int right = 0;
    if (argc != 2 || xkv_ctx_create(NULL, &ctx) != XKV_OK)
        return 2;
    if (xkv_store_create(ctx, argv[1], NULL) == XKV_OK && xkv_store_open(ctx, argv[1], NULL, &store) == XKV_OK &&
        xkv_hook_create(ctx, store, NULL, &hook) == XKV_OK)
        right = run(ctx, hook);
    if (!right)
        fprintf(stderr, "%s\n", xkv_ctx_error(ctx));
    xkv_hook_close(hook);
    xkv_store_close(ctx, store);
    xkv_ctx_free(ctx);
    return right ? 0 : 1;
}
