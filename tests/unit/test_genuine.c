/* Genuine caches: every svd group against the optimum that LAPACK finds for the same rows, the size against the paper's
 * formula, the ratio, the exactness of lossless; and damaged entries, which never leave a restored file. */
#include "support.h"

#include <cblas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void dsyevd_(const char *jobz, const char *uplo, const int *n, double *a, const int *lda, double *w, double *work,
             const int *lwork, int *iwork, const int *liwork, int *info, size_t jobz_length, size_t uplo_length);

enum { SINKS = 4 };

/* --- The optimum -------------------------------------------------------------------------------------------------- */

/* Element (t, i) of an f16 plane before RoPE, in f64. */
static double unrotated(const xkv_geometry *g, const xkv_view *view, const xkv_plane *p, uint32_t t, uint32_t i)
{
    const xkv_rope *r = p->rope == XKV_NO_ROPE ? NULL : &g->ropes[p->rope];
    uint32_t head = i / p->head_dim, dim = i % p->head_dim, pair, first, second;
    const uint8_t *row =
        (const uint8_t *)view->data + (view->rows ? view->rows[t] : t) * view->token_stride + head * view->head_stride;
    uint16_t a, b;

    if (!r) {
        memcpy(&a, row + dim * view->dim_stride, 2);
        return test_from_half(a);
    }
    assert_int_equal(r->n_rot, p->head_dim);
    pair = r->style == XKV_ROPE_INTERLEAVED ? dim / 2 : dim % (r->n_rot / 2);
    first = r->style == XKV_ROPE_INTERLEAVED ? 2 * pair : pair;
    second = r->style == XKV_ROPE_INTERLEAVED ? first + 1 : first + r->n_rot / 2;
    memcpy(&a, row + first * view->dim_stride, 2);
    memcpy(&b, row + second * view->dim_stride, 2);
    double angle = g->positions[t] * r->inv_freq[pair];
    return dim == first ? test_from_half(a) * cos(angle) + test_from_half(b) * sin(angle)
                        : test_from_half(b) * cos(angle) - test_from_half(a) * sin(angle);
}

static double *group_rows(const xkv_geometry *g, const xkv_view *views, const xkv_group_info *group)
{
    uint32_t rows = g->token_count - SINKS, column = 0;
    double *x = malloc((size_t)rows * group->width * sizeof *x);

    assert_non_null(x);
    for (uint32_t k = 0; k < group->plane_count; k++) {
        const xkv_plane *p = &g->planes[group->planes[k]];
        uint32_t width = p->heads * p->head_dim;
        for (uint32_t t = 0; t < rows; t++)
            for (uint32_t i = 0; i < width; i++)
                x[(size_t)t * group->width + column + i] = unrotated(g, &views[group->planes[k]], p, t + SINKS, i);
        column += width;
    }
    return x;
}

/* Relative error of the best approximation of rank r: from all eigenvalues of X X^T or X^T X, whichever is smaller. */
static double optimal_error(const double *x, uint32_t rows, uint32_t width, uint32_t r)
{
    int n = (int)(rows < width ? rows : width), info = 0;
    int work_size = 1 + 6 * n + 2 * n * n, integer_size = 3 + 5 * n;
    double *gram = malloc((size_t)n * (size_t)n * sizeof *gram), *w = malloc((size_t)n * sizeof *w);
    double *work = malloc((size_t)work_size * sizeof *work), total = 0, tail = 0;
    int *integers = malloc((size_t)integer_size * sizeof *integers);

    if (rows < width)
        cblas_dgemm(CblasRowMajor, CblasNoTrans, CblasTrans, n, n, (int)width, 1, x, (int)width, x, (int)width, 0, gram,
                    n);
    else
        cblas_dgemm(CblasRowMajor, CblasTrans, CblasNoTrans, n, n, (int)rows, 1, x, (int)width, x, (int)width, 0, gram,
                    n);
    dsyevd_("N", "U", &n, gram, &n, w, work, &work_size, integers, &integer_size, &info, 1, 1);
    assert_int_equal(info, 0);
    for (int i = 0; i < n; i++) {
        total += fmax(w[i], 0);
        tail += (uint32_t)(n - i) > r ? fmax(w[i], 0) : 0;
    }
    free(gram);
    free(w);
    free(work);
    free(integers);
    return sqrt(tail / total);
}

/* --- One cache ---------------------------------------------------------------------------------------------------- */

typedef struct genuine {
    const char *cache, *model;
    uint32_t rank_k, rank_v;
} genuine;

typedef struct opened {
    xkv_ctx *ctx;
    xkv_model *model;
    xkv_cache *cache;
    memory m;
    xkv_pack_report report;
    xkv_input input;
    xkv_entry *entry;
} opened;

static opened pack(const genuine *g, const xkv_pack_options *options)
{
    opened o = {.ctx = new_ctx(2)};
    memory *m = calloc(1, sizeof *m);
    xkv_output output = memory_output(m);

    assert_ok(o.ctx, xkv_model_from_gguf(o.ctx, g->model, NULL, &o.model));
    assert_ok(o.ctx, xkv_cache_open(o.ctx, g->cache, o.model, &o.cache));
    assert_ok(o.ctx, xkv_pack_cache(o.ctx, o.cache, options, &output, &o.report));
    o.m = *m;
    free(m);
    o.input = xkv_input_from_memory(o.m.data, o.m.size);
    assert_ok(o.ctx, xkv_entry_open(o.ctx, &o.input, &o.entry));
    return o;
}

static void close_opened(opened *o)
{
    xkv_entry_close(o->ctx, o->entry);
    xkv_cache_free(o->ctx, o->cache);
    xkv_model_free(o->ctx, o->model);
    memory_free(&o->m);
    xkv_ctx_free(o->ctx);
}

/* xKV's size: coefficients and components at 16 bits (arXiv 2503.18893; two bytes times r (tokens + N)), plus sinks. */
static double formula_bytes(const opened *o)
{
    xkv_entry_info info;
    double bytes = 0;

    xkv_entry_get_info(o->entry, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_group_info g;
        xkv_entry_get_group(o->entry, i, &g);
        bytes += 2.0 * g.rank * (xkv_entry_geometry(o->entry)->token_count - SINKS + g.width) + 2.0 * SINKS * g.width;
    }
    return bytes;
}

static void near_the_optimum(const genuine *g)
{
    xkv_pack_options options = xkv_pack_options_default();
    xkv_entry_info info;
    opened o;
    double worst = 0;

    options.rank_k = g->rank_k;
    options.rank_v = g->rank_v;
    o = pack(g, &options);
    xkv_entry_get_info(o.entry, &info);
    for (uint32_t i = 0; i < info.group_count; i++) {
        const xkv_geometry *geometry = xkv_cache_geometry(o.cache);
        xkv_group_info group;
        xkv_entry_get_group(o.entry, i, &group);
        assert_int_equal(group.codec, XKV_CODEC_SVD);
        double *x = group_rows(geometry, xkv_cache_views(o.cache), &group);
        double ratio = group.error / optimal_error(x, geometry->token_count - SINKS, group.width, group.rank);
        worst = fmax(worst, ratio);
        free(x);
    }
    double size = (double)o.m.size / formula_bytes(&o);
    print_message("%s: worst group %.4f of the optimum, size %.4f of the formula\n", strrchr(g->cache, '/') + 1, worst,
                  size);
    assert_true(worst >= 0.9999 && worst <= 1.05);
    assert_true(fabs(size - 1) <= 0.02);
    close_opened(&o);
}

static void svd_of_the_sample(void **state)
{
    (void)state;
    near_the_optimum(&(genuine){XKV_DATA_DIR "/smollm2-135m-jargon.ggsq", XKV_DATA_DIR "/smollm2-135m.gguf", 32, 48});
}

static void svd_of_full_caches(void **state)
{
    static const struct {
        const char *name;
        uint32_t rank_k, rank_v;
    } models[] = {{"smollm2-135m", 76, 115}, {"qwen2.5-coder-0.5b", 51, 76}};
    const char *shared = getenv("XKV_SHARED_DIR") ? getenv("XKV_SHARED_DIR") : XKV_SHARED_DIR;

    (void)state;
    if (shared[0] == 0) {
        print_message("SKIP: XKV_SHARED_DIR is not set\n");
        skip();
    }
    for (size_t i = 0; i < 2; i++) {
        char cache[1024], model[1024];
        (void)snprintf(cache, sizeof cache, "%s/data/%s/test/jargon-5.ggsq", shared, models[i].name);
        (void)snprintf(model, sizeof model, "%s/data/%s/header.gguf", shared, models[i].name);
        near_the_optimum(&(genuine){cache, model, models[i].rank_k, models[i].rank_v});
    }
}

static void ratio_of_the_sample(void **state)
{
    static const genuine sample = {XKV_DATA_DIR "/smollm2-135m-jargon.ggsq", XKV_DATA_DIR "/smollm2-135m.gguf", 0, 0};

    (void)state;
    for (int profile = 0; profile < 2; profile++) {
        xkv_pack_options options = xkv_pack_options_default();
        options.ratio = 4;
        options.profile = profile ? XKV_PROFILE_SCALAR : XKV_PROFILE_SVD;
        opened o = pack(&sample, &options);
        double ratio = (double)o.report.raw16_bytes / (double)o.m.size;
        print_message("asked for 4, got %.3f\n", ratio);
        assert_true(fabs(ratio / 4 - 1) <= 0.03);
        close_opened(&o);
    }
}

static void lossless_of_the_sample(void **state)
{
    static const genuine sample = {XKV_DATA_DIR "/smollm2-135m-jargon.ggsq", XKV_DATA_DIR "/smollm2-135m.gguf", 0, 0};
    opened o = pack(&sample, NULL);
    uint64_t size, restored;
    const uint8_t *source = xkv_cache_data(o.cache, &size);
    uint8_t *image;

    (void)state;
    assert_ok(o.ctx, xkv_entry_restored_size(o.ctx, o.entry, 0, &restored));
    assert_int_equal(restored, size);
    image = malloc(size);
    assert_ok(o.ctx, xkv_entry_restore(o.ctx, o.entry, 0, NULL, NULL, image, size));
    assert_memory_equal(image, source, size);
    free(image);
    close_opened(&o);
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

static uint8_t *read_file(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    uint8_t *data = malloc(1 << 20);

    assert_non_null(f);
    *size = fread(data, 1, 1 << 20, f);
    assert_int_equal(fclose(f), 0);
    return data;
}

static void write_file(const char *path, const uint8_t *data, size_t size)
{
    FILE *f = fopen(path, "wb");

    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, size, f), size);
    assert_int_equal(fclose(f), 0);
}

/* Unpacking `data` fails and leaves nothing behind. */
static void assert_refused(xkv_ctx *ctx, const char *folder, const uint8_t *data, size_t size)
{
    char entry[300], restored[300];

    (void)snprintf(entry, sizeof entry, "%s/entry.xkv", folder);
    (void)snprintf(restored, sizeof restored, "%s/restored", folder);
    write_file(entry, data, size);
    assert_int_not_equal(xkv_unpack_file(ctx, entry, restored, 0, 0), XKV_OK);
    assert_int_equal(access(restored, F_OK), -1);
    assert_int_equal(unlink(entry), 0);
}

static void damaged_entries_restore_nothing(void **state)
{
    static const char *const entries[] = {XKV_GOLDEN_DIR "/lossless-heads.xkv", XKV_GOLDEN_DIR "/svd-window.xkv",
                                          XKV_GOLDEN_DIR "/scalar-coarse.xkv"};
    char memory_folder[] = "/dev/shm/xkv-test-XXXXXX", disk_folder[] = "/tmp/xkv-test-XXXXXX";
    char *folder = access("/dev/shm", W_OK) == 0 ? memory_folder : disk_folder; /* thousands of files, none to keep */
    xkv_ctx *ctx = new_ctx(2);

    (void)state;
    assert_non_null(mkdtemp(folder));
    for (size_t e = 0; e < 3; e++) {
        size_t size;
        uint8_t *data = read_file(entries[e], &size);
        for (size_t i = 0; i < size; i++) {
            data[i] ^= 0x20;
            assert_refused(ctx, folder, data, size);
            data[i] ^= 0x20;
        }
        for (size_t cut = 0; cut < size; cut += 1 + cut % 7)
            assert_refused(ctx, folder, data, cut);
        free(data);
    }
    assert_int_equal(rmdir(folder), 0); /* nothing else is in it */
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(svd_of_the_sample),
        cmocka_unit_test(svd_of_full_caches),
        cmocka_unit_test(ratio_of_the_sample),
        cmocka_unit_test(lossless_of_the_sample),
        cmocka_unit_test(damaged_entries_restore_nothing),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
