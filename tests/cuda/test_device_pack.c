/* Packing from a device's memory, on the emulated device, or with XKV_GPU_PLUGIN on a genuine one: entries that the
 * CPU verifies, against those that xkv_pack() makes of the same rows: the same integers but for some that are rounded
 * to a neighbour, the same bytes for equal integers, the same errors; whatever the layout, the target and the memory;
 * failures of any call. Streams run only when somebody waits, so that what is overwritten too early shows. */
#include "device_support.h"

#include "chunks.h"
#include "parts.h"
#include "rans.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* --- Subjects ----------------------------------------------------------------------------------------------------- */

/* A cache, its dictionary, and how it is packed. */
typedef struct subject {
    synthetic s;
    memory trained;
    xkv_dict *dict;
    xkv_pack_options o;
} subject;

/* 16-bit factors of fixed ranks; no dictionary. */
static subject make_factors(uint32_t tokens, uint32_t dtype, uint32_t rank_k, uint32_t rank_v)
{
    subject t = {.s = sample(tokens, dtype, 1), .o = xkv_pack_options_default()};

    t.o.profile = XKV_PROFILE_SVD;
    t.o.group_layers = 2;
    t.o.rank_k = rank_k;
    t.o.rank_v = rank_v;
    t.o.chunk_tokens = 32;
    t.o.window = 3;
    return t;
}

static subject make_subject(xkv_ctx *ctx, uint32_t tokens, uint32_t dtype, uint32_t cross)
{
    subject t = {.s = sample(tokens, dtype, 1), .o = xkv_pack_options_default()};

    t.dict = train_dict(ctx, &t.s, cross, &t.trained);
    t.o.profile = XKV_PROFILE_DICT;
    t.o.dict = t.dict;
    t.o.quality = 60;
    t.o.chunk_tokens = 32;
    t.o.window = 3;
    return t;
}

static void free_subject(xkv_ctx *ctx, subject *t)
{
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->trained);
    free_synthetic(&t->s);
}

/* The rows of a subject in the device's memory. */
static cache put_cache(const synthetic *s, layout l, bool paged)
{
    uint32_t tokens = s->geometry.token_count;
    cache c = make_cache(s, tokens, s->planes->dtype, l, paged);
    size_t row = row_width(s->planes) * xkv_dtype_size(s->planes->dtype);
    uint8_t *rows = malloc(tokens * row);

    for (uint32_t i = 0; i < c.planes; i++) {
        xkv_view_gather_bytes(&s->views[i], &s->planes[i], 0, tokens, rows, row);
        xkv_view_scatter_bytes(rows, row, &s->planes[i], 0, tokens, &c.host_views[i]);
    }
    device_copy(c.there, c.host, c.size);
    free(rows);
    return c;
}

/* Pack on the device; what came of it is in *p, whose entry is opened when the status is OK. */
static xkv_status pack_cache(xkv_ctx *ctx, const subject *t, const cache *c, const xkv_device_target *source, packed *p)
{
    xkv_output output = memory_output(&p->m);
    xkv_entry_info info;
    xkv_status status;

    memset(p, 0, sizeof *p);
    status = xkv_device_pack(ctx, device, &t->s.geometry, c->views, &t->o, source, &output, &p->report);
    if (status != XKV_OK)
        return status;
    assert_int_equal(p->m.size, p->report.entry_bytes);
    p->input = xkv_input_from_memory(p->m.data, p->m.size);
    assert_ok(ctx, xkv_entry_open(ctx, &p->input, &p->entry));
    xkv_entry_get_info(p->entry, &info);
    if (info.needs_dict)
        assert_ok(ctx, xkv_entry_attach(ctx, p->entry, t->o.dict));
    return XKV_OK;
}

static void free_result(xkv_ctx *ctx, packed *p)
{
    if (p->entry)
        free_packed(ctx, p);
    else
        memory_free(&p->m);
}

/* --- Comparing ---------------------------------------------------------------------------------------------------- */

static void assert_near(double found, double expected, double share, const char *what)
{
    if (!(fabs(found - expected) <= share * fabs(expected) + 1e-9))
        fail_msg("%s: %.9g, the CPU has %.9g", what, found, expected);
}

/* How many integers there are, and how many are not those of another entry. */
typedef struct difference {
    uint64_t integers, differ;
} difference;

/* One chunk of a group as integers by component; 0 where it is not coded. */
static void read_integers(xkv_ctx *ctx, const xkv_entry *entry, const xkv_group *g, uint32_t chunk, uint32_t tokens,
                          int16_t *q)
{
    xkv_side side = {0};
    uint8_t *bytes = malloc(g->parts[XKV_PART_CHUNKS + chunk].size + 1);
    int16_t *coded;
    uint32_t n = 0;

    assert_ok(ctx, xkv_side_read(ctx, entry, g, &side));
    coded = calloc((size_t)side.coded * tokens + 1, sizeof *coded);
    assert_ok(ctx, xkv_side_integers(ctx, entry, g, &side, chunk, bytes, coded));
    memset(q, 0, (size_t)g->rank * tokens * sizeof *q);
    for (uint32_t i = 0; i < g->rank; i++)
        if (side.tables[i] != 0)
            memcpy(q + (size_t)i * tokens, coded + (size_t)n++ * tokens, tokens * sizeof *q);
    /* The bytes are those of the CPU's encoder. */
    xkv_rans_shape shape = {tokens, side.coded, tokens, side.coded_tables};
    uint8_t *again = malloc(xkv_rans_bound(&shape) + 1);
    assert_int_equal(xkv_rans_encode(xkv_coder_cpu_generic(), &shape, coded, again),
                     g->parts[XKV_PART_CHUNKS + chunk].size);
    assert_memory_equal(again, bytes, g->parts[XKV_PART_CHUNKS + chunk].size);
    free(again);
    xkv_side_free(ctx, &side);
    free(coded);
    free(bytes);
}

static void compare_chunk(xkv_ctx *ctx, const packed *a, const packed *b, uint32_t group, uint32_t chunk, difference *d)
{
    const xkv_container *c = &a->entry->c;
    const xkv_group *g = &c->groups[group];
    uint32_t t0, t1;
    int16_t *x, *y;

    xkv_chunk_coded(c, chunk, &t0, &t1);
    if (t0 == t1)
        return;
    x = malloc((size_t)g->rank * (t1 - t0) * sizeof *x);
    y = malloc((size_t)g->rank * (t1 - t0) * sizeof *y);
    read_integers(ctx, a->entry, g, chunk, t1 - t0, x);
    read_integers(ctx, b->entry, &b->entry->c.groups[group], chunk, t1 - t0, y);
    for (size_t i = 0; i < (size_t)g->rank * (t1 - t0); i++) {
        d->integers++;
        d->differ += x[i] != y[i];
    }
    free(x);
    free(y);
}

/* Everything that an entry says of itself; `share` of errors that rounding may change. */
static difference compare(xkv_ctx *ctx, const packed *p, const packed *expected, double share)
{
    const xkv_container *a = &p->entry->c, *b = &expected->entry->c;
    difference d = {0, 0};

    assert_ok(ctx, xkv_entry_verify(ctx, p->entry, NULL, NULL));
    assert_int_equal(a->group_count, b->group_count);
    for (uint32_t i = 0; i < a->group_count; i++) {
        const xkv_group *g = &a->groups[i], *h = &b->groups[i];
        assert_int_equal(g->codec, h->codec);
        assert_int_equal(g->reason, h->reason);
        assert_int_equal(g->rank, h->rank);
        assert_near(g->energy, h->energy, 1e-6, "energy");
        assert_near(g->error, h->error, share, "error");
        for (uint32_t k = 0; k < g->plane_count; k++)
            assert_near(g->plane_errors[k], h->plane_errors[k], share, "error of a plane");
        for (uint32_t k = 0; k < a->chunk_count; k++)
            if (g->codec == XKV_GROUP_DICT || g->codec == XKV_GROUP_CROSS)
                compare_chunk(ctx, p, expected, i, k, &d);
            else if (g->codec != XKV_GROUP_SVD)
                assert_int_equal(g->parts[XKV_PART_CHUNKS + k].checksum, h->parts[XKV_PART_CHUNKS + k].checksum);
        assert_int_equal(g->parts[XKV_PART_EXACT].checksum, h->parts[XKV_PART_EXACT].checksum);
    }
    assert_near(p->report.error_metric, expected->report.error_metric, share, "error in the metric");
    assert_near((double)p->m.size, (double)expected->m.size, 0.01, "size");
    return d;
}

static void check(xkv_ctx *ctx, const subject *t, const cache *c, const xkv_device_target *source, difference *all)
{
    packed p, expected = pack_planes(ctx, &t->s, &t->o);
    difference d;

    assert_ok(ctx, pack_cache(ctx, t, c, source, &p));
    d = compare(ctx, &p, &expected, 1e-3);
    all->integers += d.integers;
    all->differ += d.differ;
    free_packed(ctx, &p);
    free_packed(ctx, &expected);
}

/* --- Entries ------------------------------------------------------------------------------------------------------ */

/* One integer of 10,000 may be another: where a coefficient lies within its own rounding of the middle between two. */
static void assert_few(const difference *d)
{
    if (d->differ * 10000 > d->integers)
        fail_msg("%llu of %llu integers differ", (unsigned long long)d->differ, (unsigned long long)d->integers);
}

static void test_layouts(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    difference d = {0, 0};

    (void)state;
    for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++)
        for (int l = 0; l < LAYOUTS; l++) {
            subject t = make_subject(ctx, 131, dtype, l % 2 ? 6 : 0);
            cache c = put_cache(&t.s, (layout)l, (l + (int)dtype) % 2);
            check(ctx, &t, &c, NULL, &d);
            free_cache(&c);
            free_subject(ctx, &t);
        }
    assert_few(&d);
    assert_int_equal(warnings_logged + errors_logged, 0);
    xkv_ctx_free(ctx);
}

/* Tokens around those of chunks, rounds and tiles; sinks and window that leave few or none. */
static void test_lengths(void **state)
{
    static const uint32_t lengths[] = {1, 7, 8, 31, 32, 33, 36, 63, 64, 65, 67, 68, 300, 2100};
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 2100, XKV_F16, 6);
    difference d = {0, 0};

    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        cache c;
        t.s.geometry.token_count = lengths[i];
        t.o.sinks = i % 2 ? 4 : 40;
        c = put_cache(&t.s, TOKEN_MAJOR, true);
        check(ctx, &t, &c, NULL, &d);
        free_cache(&c);
    }
    assert_few(&d);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Fine and coarse steps, ratios and errors, which a sample on the host finds the step for. */
static void test_targets(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 1300, XKV_BF16, 6);
    cache c = put_cache(&t.s, TOKEN_MAJOR, true);
    difference d = {0, 0};

    (void)state;
    for (double quality = 1; quality <= 100; quality += 33) {
        t.o.quality = quality;
        check(ctx, &t, &c, NULL, &d);
    }
    t.o.quality = 0;
    for (double ratio = 4; ratio < 12; ratio += 3) {
        t.o.ratio = ratio;
        check(ctx, &t, &c, NULL, &d);
    }
    assert_few(&d);
    t.o.ratio = 0;
    t.o.error = 0.15;
    packed p, expected = pack_planes(ctx, &t.s, &t.o);
    assert_ok(ctx, pack_cache(ctx, &t, &c, NULL, &p));
    assert_ok(ctx, xkv_entry_verify(ctx, p.entry, NULL, NULL));
    assert_true(p.report.error_metric <= t.o.error);
    assert_near((double)p.m.size, (double)expected.m.size, 0.05, "size");
    free_packed(ctx, &p);
    free_packed(ctx, &expected);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

static void set_element(synthetic *s, uint32_t plane, uint32_t token, float x)
{
    float *row = (float *)(void *)((uint8_t *)s->views[plane].data + token * s->views[plane].token_stride);

    assert_int_equal(s->planes[plane].dtype, XKV_F32);
    row[1] = x;
}

/* Groups that cannot be coded are lossless, and their bytes those of the cache: a NaN, a value beyond the quantizer,
 * which with a cross stage is found by the stage; planes that no dictionary knows. */
static void test_lossless_groups(void **state)
{
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (uint32_t cross = 0; cross <= 6; cross += 6)
        for (int kind = 0; kind < 3; kind++) {
            subject t = make_subject(ctx, 131, XKV_F32, cross);
            difference d = {0, 0};
            cache c;
            packed p;
            set_element(&t.s, 1, 77, kind == 0 ? NAN : kind == 1 ? -INFINITY : 1e9f);
            c = put_cache(&t.s, HEAD_MAJOR, true);
            check(ctx, &t, &c, NULL, &d);
            assert_ok(ctx, pack_cache(ctx, &t, &c, NULL, &p));
            assert_true(p.report.lossless_groups > 0 && p.report.lossless_groups < p.report.group_count);
            assert_int_equal(p.report.nonfinite_planes, kind < 2);
            free_packed(ctx, &p);
            free_cache(&c);
            free_subject(ctx, &t);
        }
    xkv_ctx_free(ctx);
}

/* Other profiles are the CPU's, from a copy: byte for byte. */
/* --- Factors ------------------------------------------------------------------------------------------------------ */

/* What an entry restores, in f32, of a group against the rows that were packed: the error it says it has. Rotation does
 * not change it. */
static void check_recorded(xkv_ctx *ctx, const subject *t, const packed *p)
{
    const xkv_container *c = &p->entry->c;
    uint32_t tokens = t->s.geometry.token_count, width = row_width(t->s.planes), planes = t->s.geometry.plane_count;
    size_t size = (size_t)tokens * width;
    float *rows = calloc(planes * size, sizeof *rows);
    xkv_view *views = calloc(planes, sizeof *views);

    for (uint32_t i = 0; i < planes; i++)
        views[i] = (xkv_view){.data = rows + i * size,
                              .token_stride = 4 * (int64_t)width,
                              .head_stride = 4 * (int64_t)t->s.planes->head_dim,
                              .dim_stride = 4,
                              .dtype = XKV_F32};
    assert_ok(ctx, xkv_entry_read(ctx, p->entry, NULL, views));
    for (uint32_t j = 0; j < c->group_count; j++) {
        const xkv_group *g = &c->groups[j];
        double squares = 0;
        for (uint32_t i = 0; i < g->plane_count; i++)
            for (uint32_t k = c->sinks; k < tokens - c->window; k++)
                for (uint32_t e = 0; e < width; e++) {
                    double x = element(&t->s, t->s.data, g->planes[i], k, e);
                    double y = (double)rows[g->planes[i] * size + k * width + e];
                    squares += (x - y) * (x - y);
                }
        assert_near(sqrt(squares / g->energy), g->error, 1e-3, "recorded error");
    }
    free(rows);
    free(views);
}

/* With one iteration, beside what the CPU finds with eight, which is optimal: at most 5 % more; and beside what it
 * finds with as many. */
static void check_factors(xkv_ctx *ctx, subject *t, layout l, bool paged)
{
    cache c = put_cache(&t->s, l, paged);
    packed p, expected, optimal;

    t->o.iterations = 8;
    optimal = pack_planes(ctx, &t->s, &t->o);
    t->o.iterations = 1;
    expected = pack_planes(ctx, &t->s, &t->o);
    assert_ok(ctx, pack_cache(ctx, t, &c, NULL, &p));
    (void)compare(ctx, &p, &expected, 0.01);
    for (uint32_t i = 0; i < p.entry->c.group_count; i++)
        if (!(p.entry->c.groups[i].error <= 1.05 * optimal.entry->c.groups[i].error))
            fail_msg("group %u: error %g, %g is optimal", i, p.entry->c.groups[i].error,
                     optimal.entry->c.groups[i].error);
    check_recorded(ctx, t, &p);
    free_packed(ctx, &p);
    free_packed(ctx, &expected);
    free_packed(ctx, &optimal);
    free_cache(&c);
}

static void test_factors(void **state)
{
    static const uint32_t lengths[] = {40, 67, 131};
    xkv_ctx *ctx = logging_ctx();
    uint64_t least, best;

    (void)state;
    for (uint32_t i = 0; i < 3; i++)
        for (uint32_t dtype = XKV_F32; dtype <= XKV_BF16; dtype++) {
            subject t = make_factors(lengths[i], dtype, 5 + i, 9);
            assert_ok(ctx, xkv_device_pack_size(ctx, device, &t.s.geometry, &t.o, &least, &best));
            assert_true(least > 0 && best == least);
            check_factors(ctx, &t, (layout)i, dtype != XKV_F32);
            free_subject(ctx, &t);
        }
    assert_int_equal(warnings_logged + errors_logged, 0);
    xkv_ctx_free(ctx);
}

/* Rows whose columns are dependent, NaN, or too large for the device: the CPU takes over, and the bytes are its. */
static void test_factors_of_the_cpu(void **state)
{
    static const float values[] = {0, 1e30f, NAN};
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (int i = 0; i < 3; i++) {
        subject t = make_factors(67, XKV_F32, 5, 9);
        float *rows = (float *)(void *)t.s.data;
        cache c;
        packed p, expected;
        for (uint32_t k = 0; k < 67 * row_width(t.s.planes); k++) /* the first plane of K, and with it its group */
            rows[k] = i == 2 && k > 0 ? rows[k] : values[i];
        for (uint32_t k = 0; i == 0 && k < t.s.size / 4; k++)
            rows[k] = 0;
        c = put_cache(&t.s, TOKEN_MAJOR, false);
        expected = pack_planes(ctx, &t.s, &t.o);
        assert_ok(ctx, pack_cache(ctx, &t, &c, NULL, &p));
        (void)compare(ctx, &p, &expected, 0.01);
        assert_int_equal(p.entry->c.groups[0].parts[XKV_PART_CHUNKS].checksum,
                         expected.entry->c.groups[0].parts[XKV_PART_CHUNKS].checksum);
        free_packed(ctx, &p);
        free_packed(ctx, &expected);
        free_cache(&c);
        free_subject(ctx, &t);
    }
    xkv_ctx_free(ctx);
}

static void test_other_profiles(void **state)
{
    static const uint32_t profiles[] = {XKV_PROFILE_LOSSLESS, XKV_PROFILE_SCALAR, XKV_PROFILE_SVD, XKV_PROFILE_AUTO};
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 131, XKV_BF16, 0);
    cache c = put_cache(&t.s, TRANSPOSED, true);
    uint64_t least = 1, best = 1;

    (void)state;
    for (int i = 0; i < 4; i++) {
        packed p, expected;
        t.o.profile = profiles[i];
        t.o.quality = 0;
        t.o.error = i > 0 ? 0.2 : 0;
        expected = pack_planes(ctx, &t.s, &t.o);
        assert_ok(ctx, pack_cache(ctx, &t, &c, NULL, &p));
        assert_int_equal(p.m.size, expected.m.size);
        assert_memory_equal(p.m.data, expected.m.data, p.m.size);
        free_packed(ctx, &p);
        free_packed(ctx, &expected);
        assert_ok(ctx, xkv_device_pack_size(ctx, device, &t.s.geometry, &t.o, &least, &best));
        assert_true(least == 0 && best == 0);
    }
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* --- The caller's memory, stream and dictionary ------------------------------------------------------------------- */

static void test_workspace(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 300, XKV_BF16, 6);
    cache c = put_cache(&t.s, TOKEN_MAJOR, true);
    xkv_device_target source = xkv_device_target_default();
    xkv_device_dict *dict = NULL;
    difference d = {0, 0};
    uint64_t least, best, used;
    packed p;

    (void)state;
    assert_ok(ctx, xkv_device_dict_create(ctx, device, t.dict, &dict));
    assert_ok(ctx, xkv_device_pack_size(ctx, device, &t.s.geometry, &t.o, &least, &best));
    assert_true(least > 0 && least < best);
    source.dict = dict;
    assert_true(device->api->stream_create(device->plug, &source.stream) == XKV_OK);
    for (uint64_t size = least; size <= best; size += (best - least) / 3) {
        source.workspace_size = size;
        source.workspace = device_alloc(size);
        used = control ? control->blocks : 0;
        check(ctx, &t, &c, &source, &d);
        assert_true(!control || control->blocks == used); /* nothing is allocated that stays */
        device_free(source.workspace);
    }
    assert_few(&d);
    source.workspace = device_alloc(best);
    source.workspace_size = least - 1;
    assert_int_equal(pack_cache(ctx, &t, &c, &source, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    source.workspace_size = best - 1;
    source.workspace = (uint8_t *)source.workspace + 1;
    assert_int_equal(pack_cache(ctx, &t, &c, &source, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    device_free((uint8_t *)source.workspace - 1);
    device->api->stream_destroy(device->plug, source.stream);
    xkv_device_dict_free(ctx, dict);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

static void test_refusals(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 67, XKV_BF16, 0), other = make_subject(ctx, 67, XKV_BF16, 0);
    cache c = put_cache(&t.s, TOKEN_MAJOR, false);
    xkv_device_target source = xkv_device_target_default();
    xkv_device_dict *dict = NULL;
    packed p;

    (void)state;
    c.views[1].data = (uint8_t *)c.views[1].data + 1;
    assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    c.views[1].data = (uint8_t *)c.views[1].data - 1;
    c.views[1].dtype = XKV_F16;
    assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    c.views[1].dtype = XKV_BF16;
    assert_ok(ctx, xkv_device_dict_create(ctx, device, other.dict, &dict));
    source.dict = dict;
    assert_int_equal(pack_cache(ctx, &t, &c, &source, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    t.o.ratio = 3; /* beside a quality */
    assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    xkv_device_dict_free(ctx, dict);
    free_cache(&c);
    free_subject(ctx, &t);
    free_subject(ctx, &other);
    xkv_ctx_free(ctx);
}

static int stop(void *user, uint64_t done, uint64_t total)
{
    (void)user;
    return 2 * done > total;
}

static void test_cancel(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 67, XKV_BF16, 6);
    cache c = put_cache(&t.s, TOKEN_MAJOR, false);
    difference d = {0, 0};
    packed p;

    (void)state;
    t.o.progress = stop;
    assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_CANCELLED);
    free_result(ctx, &p);
    t.o.progress = NULL;
    xkv_ctx_cancel(ctx);
    assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_CANCELLED);
    free_result(ctx, &p);
    xkv_ctx_reset(ctx);
    check(ctx, &t, &c, NULL, &d);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* --- Failures ----------------------------------------------------------------------------------------------------- */

/* Less and less memory: smaller tiles, then the CPU; always an entry, and a word in the log. */
static void test_short_of_memory(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 300, XKV_BF16, 6);
    cache c = put_cache(&t.s, TOKEN_MAJOR, true);
    uint64_t least, best;
    uint32_t smaller = 0, warned = 0;
    difference d = {0, 0};

    (void)state;
    assert_ok(ctx, xkv_device_pack_size(ctx, device, &t.s.geometry, &t.o, &least, &best));
    for (uint64_t room = 0; room < best + (1u << 20); room += best / 20) {
        control->memory = control->used + room;
        warnings_logged = 0;
        check(ctx, &t, &c, NULL, &d);
        assert_true(warnings_logged <= 1);
        assert_string_equal(xkv_ctx_error(ctx), "");
        smaller += warnings_logged == 1 && room > least;
        warned += warnings_logged;
    }
    control->memory = 0;
    assert_true(smaller > 0 && warned > smaller);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Whichever call of the runtime fails, the status says so or the entry is right, nothing is left behind, and the next
 * one is right. */
static void check_failing_calls(xkv_ctx *ctx, const subject *t, uint32_t least, double share)
{
    cache c = put_cache(&t->s, TOKEN_MAJOR, false);
    packed p, expected = pack_planes(ctx, &t->s, &t->o);
    uint64_t calls = control->calls, blocks = control->blocks;
    uint32_t failed = 0;

    assert_ok(ctx, pack_cache(ctx, t, &c, NULL, &p));
    free_packed(ctx, &p);
    calls = control->calls - calls;
    for (uint64_t at = 1; at <= calls; at += 1 + at / 60) {
        control->error = at % 2 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
        control->fail_at = control->calls + at;
        xkv_status status = pack_cache(ctx, t, &c, NULL, &p);
        control->fail_at = 0;
        if (status == XKV_OK)
            (void)compare(ctx, &p, &expected, share);
        else
            assert_true(status == XKV_ERROR_BACKEND || status == XKV_ERROR_MEMORY);
        free_result(ctx, &p);
        failed += status != XKV_OK;
        assert_true(control->blocks <= blocks + 6); /* giving back may be what failed */
        blocks = control->blocks;
    }
    assert_true(failed > least);
    assert_ok(ctx, pack_cache(ctx, t, &c, NULL, &p));
    (void)compare(ctx, &p, &expected, share);
    free_packed(ctx, &p);
    free_packed(ctx, &expected);
    free_cache(&c);
}

static void test_failing_calls(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 70, XKV_BF16, 6), factors = make_factors(70, XKV_BF16, 5, 9);

    (void)state;
    check_failing_calls(ctx, &t, 100, 1e-3);
    check_failing_calls(ctx, &factors, 100, 0.01);
    free_subject(ctx, &t);
    free_subject(ctx, &factors);
    xkv_ctx_free(ctx);
}

/* A device that has not even memory for the solver: the CPU packs. */
static void test_factors_without_a_solver(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_factors(67, XKV_BF16, 5, 9);
    xkv_device *shared = device;
    cache c = put_cache(&t.s, TOKEN_MAJOR, true);
    packed p, expected = pack_planes(ctx, &t.s, &t.o);

    assert_int_equal(open_the_device(state), 0);
    control->error = cudaErrorMemoryAllocation;
    control->fail_at = control->calls + 1;
    assert_ok(ctx, pack_cache(ctx, &t, &c, NULL, &p));
    control->fail_at = 0;
    assert_int_equal(warnings_logged, 1);
    assert_int_equal(p.m.size, expected.m.size);
    assert_memory_equal(p.m.data, expected.m.data, p.m.size);
    xkv_device_close(ctx, device);
    device = shared;
    free_packed(ctx, &p);
    free_packed(ctx, &expected);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Factors need all rows of a group at once: with less memory the CPU packs, and says so; a workspace that is too small
 * is refused. */
static void test_factors_short_of_memory(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_factors(131, XKV_BF16, 5, 9);
    cache c = put_cache(&t.s, TOKEN_MAJOR, true);
    xkv_device_target source = xkv_device_target_default();
    packed p, expected = pack_planes(ctx, &t.s, &t.o);
    uint64_t least, best;

    (void)state;
    assert_ok(ctx, xkv_device_pack_size(ctx, device, &t.s.geometry, &t.o, &least, &best));
    control->memory = control->used + least / 2;
    assert_ok(ctx, pack_cache(ctx, &t, &c, NULL, &p));
    control->memory = 0;
    assert_int_equal(warnings_logged, 1);
    assert_int_equal(p.m.size, expected.m.size);
    assert_memory_equal(p.m.data, expected.m.data, p.m.size);
    free_packed(ctx, &p);
    source.workspace = device_alloc(least);
    source.workspace_size = least - 1;
    assert_int_equal(pack_cache(ctx, &t, &c, &source, &p), XKV_ERROR_ARGUMENT);
    free_result(ctx, &p);
    source.workspace_size = least;
    assert_ok(ctx, pack_cache(ctx, &t, &c, &source, &p));
    (void)compare(ctx, &p, &expected, 0.01);
    free_packed(ctx, &p);
    free_packed(ctx, &expected);
    device_free(source.workspace);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* A broken context: a status for this and every further call, one line in the log, and the CPU goes on. Last, since
 * nothing repairs it. */
static void test_broken_device(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 70, XKV_BF16, 0);
    cache c = put_cache(&t.s, TOKEN_MAJOR, false);
    packed p;

    (void)state;
    control->error = cudaErrorIllegalAddress;
    control->fail_at = control->calls + 150;
    assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_BACKEND);
    assert_non_null(strstr(xkv_ctx_error(ctx), "cannot be used any more"));
    free_result(ctx, &p);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(pack_cache(ctx, &t, &c, NULL, &p), XKV_ERROR_BACKEND);
        free_result(ctx, &p);
    }
    assert_int_equal(errors_logged, 1);
    p = pack_planes(ctx, &t.s, &t.o);
    free_packed(ctx, &p);
    free_cache(&c);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest everywhere[] = {
        cmocka_unit_test(test_layouts),        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_targets),        cmocka_unit_test(test_lossless_groups),
        cmocka_unit_test(test_other_profiles), cmocka_unit_test(test_workspace),
        cmocka_unit_test(test_refusals),       cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_factors),        cmocka_unit_test(test_factors_of_the_cpu),
    };
    const struct CMUnitTest told_to_fail[] = {
        /* the last one leaves the device broken */
        cmocka_unit_test(test_short_of_memory),
        cmocka_unit_test(test_factors_short_of_memory),
        cmocka_unit_test(test_factors_without_a_solver),
        cmocka_unit_test(test_failing_calls),
        cmocka_unit_test(test_broken_device),
    };
    int failed;

    if (!find_device())
        return 77;
    failed = cmocka_run_group_tests_name("everywhere", everywhere, open_the_device, NULL);
    if (control != NULL)
        failed += cmocka_run_group_tests_name("told to fail", told_to_fail, NULL, NULL);
    return failed;
}
