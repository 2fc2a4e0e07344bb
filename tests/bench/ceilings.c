#include "bench.h"

#include <cblas.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <zstd.h>

/* --- sgemm -------------------------------------------------------------------------------------------------------- */

static float *ramp(size_t n)
{
    float *x = bench_alloc(n, sizeof *x);

    for (size_t i = 0; i < n; i++)
        x[i] = (float)(i % 17) - 8;
    return x;
}

/* OpenBLAS's threads spin for a while after a call and would take a core from what is measured next. */
static void let_blas_rest(uint32_t threads)
{
    openblas_set_num_threads(1);
    if (threads > 1)
        nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL);
}

double bench_sgemm(uint32_t threads, bool transposed, size_t m, size_t n, size_t k, int repeats)
{
    float *a = ramp(m * k), *b = ramp(k * n), *c = bench_alloc(m * n, sizeof *c);
    double best = 0, flops = 2.0 * (double)m * (double)n * (double)k;

    openblas_set_num_threads((int)threads);
    for (int i = 0; i <= repeats; i++) {
        double start = bench_now();
        cblas_sgemm(CblasRowMajor, transposed ? CblasTrans : CblasNoTrans, CblasNoTrans, (blasint)m, (blasint)n,
                    (blasint)k, 1, a, (blasint)(transposed ? m : k), b, (blasint)n, 0, c, (blasint)n);
        double rate = flops / (bench_now() - start) / 1e9;
        if (i > 0 && rate > best)
            best = rate;
    }
    let_blas_rest(threads);
    free(a);
    free(b);
    free(c);
    return best;
}

double bench_sgemm_square(const bench_plan *plan, uint32_t threads, int repeats)
{
    size_t n = plan->quick ? 384 : 2048;

    return bench_sgemm(threads, false, n, n, n, repeats);
}

/* --- memcpy ------------------------------------------------------------------------------------------------------- */

typedef struct copy {
    uint8_t *from, *to;
    size_t share;
} copy;

static void copy_share(void *user, uint32_t worker)
{
    copy *c = user;

    memcpy(c->to + worker * c->share, c->from + worker * c->share, c->share);
}

double bench_memcpy(const bench_plan *plan, uint32_t threads)
{
    size_t size = (plan->quick ? 8u : 256u) << 20;
    copy c = {.from = bench_alloc(size, 1), .to = bench_alloc(size, 1), .share = size / threads};
    double best = 0;

    for (size_t i = 0; i < size; i += 512) /* have every page in memory */
        c.from[i] = c.to[i] = 1;
    for (int i = 0; i <= plan->repeats; i++) {
        double start = bench_now();
        bench_parallel(threads, copy_share, &c);
        double rate = (double)(c.share * threads) / (bench_now() - start) / 1e9;
        if (i > 0 && rate > best)
            best = rate;
    }
    free(c.from);
    free(c.to);
    return best;
}

json_t *bench_ceilings(const bench_plan *plan)
{
    json_t *all = bench_json(json_array());

    for (int i = 0; i < plan->thread_counts; i++) {
        uint32_t threads = plan->threads[i];
        json_array_append_new(all,
                              bench_json(json_pack("{s:i, s:f, s:f}", "threads", (int)threads, "sgemm_square_gflops",
                                                   bench_sgemm_square(plan, threads, plan->repeats), "memcpy_gb_per_s",
                                                   bench_memcpy(plan, threads))));
    }
    return all;
}

/* --- zstd on byte planes ------------------------------------------------------------------------------------------ */

typedef struct frame {
    uint8_t *plane, *packed;
    size_t size, capacity, packed_size;
    bool highest; /* byte of its elements */
} frame;

typedef struct worker {
    ZSTD_CCtx *compressor;
    ZSTD_DCtx *decompressor;
    uint8_t *out; /* of the largest plane: what is decompressed is not kept */
} worker;

struct bench_frames {
    frame *frames;
    size_t count, largest;
    int level;
    atomic_size_t next;
    bool failed;
    worker *workers;
    uint32_t worker_count;
};

static const uint8_t *element(const xkv_view *v, const xkv_plane *p, uint32_t token, uint32_t i)
{
    int64_t row = v->rows ? v->rows[token] : token;

    return (const uint8_t *)v->data + row * v->token_stride + (i / p->head_dim) * v->head_stride +
           (i % p->head_dim) * v->dim_stride;
}

/* Byte `b` of all elements of a group's tokens [t0, t1): spec/codec.md, section 2. */
static void take_plane(const xkv_geometry *geometry, const xkv_group_info *g, const xkv_view *views, uint32_t t0,
                       uint32_t t1, size_t b, uint8_t *out)
{
    size_t column = 0, rows = t1 - t0;
    bool highest = b + 1 == xkv_dtype_size(geometry->planes[g->planes[0]].dtype);

    for (uint32_t i = 0; i < g->plane_count; i++) {
        const xkv_plane *p = &geometry->planes[g->planes[i]];
        for (uint32_t k = 0; k < p->heads * p->head_dim; k++, column++)
            for (size_t t = 0; t < rows; t++)
                out[highest ? column * rows + t : t * g->width + column] =
                    element(&views[g->planes[i]], p, t0 + (uint32_t)t, k)[b];
    }
}

static frame *add_frame(bench_frames *f, size_t size)
{
    frame *n = &f->frames[f->count++];

    n->size = size;
    n->capacity = ZSTD_compressBound(size);
    n->plane = bench_alloc(size, 1);
    n->packed = bench_alloc(n->capacity, 1);
    if (size > f->largest)
        f->largest = size;
    return n;
}

static void add_group(bench_frames *f, const xkv_geometry *geometry, const xkv_entry_info *info,
                      const xkv_group_info *g, const xkv_view *views)
{
    size_t elem = xkv_dtype_size(geometry->planes[g->planes[0]].dtype);

    for (uint32_t c = 0; c < info->chunk_count; c++) {
        uint32_t t0 = c * info->chunk_tokens, t1 = t0 + info->chunk_tokens;
        if (t1 > geometry->token_count)
            t1 = geometry->token_count;
        for (size_t b = 0; b < elem; b++) {
            frame *n = add_frame(f, (size_t)(t1 - t0) * g->width);
            n->highest = b + 1 == elem;
            take_plane(geometry, g, views, t0, t1, b, n->plane);
        }
    }
}

bench_frames *bench_frames_create(const xkv_entry *entry, const xkv_view *views, int level)
{
    bench_frames *f = bench_alloc(1, sizeof *f);
    xkv_entry_info info;
    xkv_group_info g;

    f->level = level;
    xkv_entry_get_info(entry, &info);
    f->frames = bench_alloc(4ull * info.group_count * info.chunk_count, sizeof *f->frames);
    for (uint32_t i = 0; i < info.group_count; i++) {
        xkv_entry_get_group(entry, i, &g);
        add_group(f, xkv_entry_geometry(entry), &info, &g, views);
    }
    return f;
}

static void free_workers(bench_frames *f)
{
    for (uint32_t i = 0; i < f->worker_count; i++) {
        ZSTD_freeCCtx(f->workers[i].compressor);
        ZSTD_freeDCtx(f->workers[i].decompressor);
        free(f->workers[i].out);
    }
    free(f->workers);
}

void bench_frames_free(bench_frames *f)
{
    free_workers(f);
    for (size_t i = 0; i < f->count; i++) {
        free(f->frames[i].plane);
        free(f->frames[i].packed);
    }
    free(f->frames);
    free(f);
}

static void compress_frames(void *user, uint32_t index)
{
    bench_frames *f = user;
    ZSTD_CCtx *zstd = f->workers[index].compressor;
    size_t i;

    while ((i = atomic_fetch_add(&f->next, 1)) < f->count) {
        frame *n = &f->frames[i];
        ZSTD_CCtx_reset(zstd, ZSTD_reset_session_and_parameters);
        ZSTD_CCtx_setParameter(zstd, ZSTD_c_compressionLevel, f->level);
        if (n->highest)
            ZSTD_CCtx_setParameter(zstd, ZSTD_c_windowLog, 16); /* as the library does: codec/parts.c */
        n->packed_size = ZSTD_compress2(zstd, n->packed, n->capacity, n->plane, n->size);
    }
}

static void decompress_frames(void *user, uint32_t index)
{
    bench_frames *f = user;
    worker *w = &f->workers[index];
    size_t i;

    while ((i = atomic_fetch_add(&f->next, 1)) < f->count) {
        frame *n = &f->frames[i];
        if (ZSTD_decompressDCtx(w->decompressor, w->out, f->largest, n->packed, n->packed_size) != n->size)
            f->failed = true;
    }
}

static void make_workers(bench_frames *f, uint32_t threads)
{
    if (f->worker_count == threads)
        return;
    free_workers(f);
    f->workers = bench_alloc(threads, sizeof *f->workers);
    f->worker_count = threads;
    for (uint32_t i = 0; i < threads; i++) {
        f->workers[i] = (worker){ZSTD_createCCtx(), ZSTD_createDCtx(), bench_alloc(f->largest, 1)};
        if (!f->workers[i].compressor || !f->workers[i].decompressor)
            bench_die("zstd: no memory");
    }
}

static double run_frames(bench_frames *f, uint32_t threads, bench_task_fn task)
{
    double start;

    make_workers(f, threads);
    atomic_store(&f->next, 0);
    start = bench_now();
    bench_parallel(threads, task, f);
    if (f->failed)
        bench_die("zstd: a byte plane did not come back");
    return bench_now() - start;
}

double bench_frames_compress(bench_frames *f, uint32_t threads)
{
    return run_frames(f, threads, compress_frames);
}

double bench_frames_decompress(bench_frames *f, uint32_t threads)
{
    return run_frames(f, threads, decompress_frames);
}
