/* Groups become ready in order, each whole when it is announced, whatever fails or stops in between; and any number of
 * leading tokens restores to the same bits. */
#include "support.h"

#include "entry_internal.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { LAYERS = 7, TOKENS = 700, CHUNK = 64, MAX_GROUPS = 16 };

typedef enum profile { LOSSLESS, SCALAR, CROSS, PROFILES } profile;

/* What the tests read: one entry, and all of its rows as one thread restores them. */
typedef struct subject {
    xkv_ctx *ctx;
    synthetic s;
    memory dict_file;
    xkv_dict *dict;
    packed p;
    uint8_t *whole;
} subject;

static subject make_subject(profile which)
{
    subject u = {.ctx = new_ctx(1)};
    xkv_pack_options o = xkv_pack_options_default();

    u.s = make_synthetic(&(synthetic_options){.layers = LAYERS,
                                              .tokens = TOKENS,
                                              .heads = 2,
                                              .head_dim = 8,
                                              .dtype = XKV_F16,
                                              .rank = 5,
                                              .group_layers = 1,
                                              .noise = 0.1,
                                              .rope = 1});
    if (which == CROSS) {
        xkv_train_options t = xkv_train_options_default();
        xkv_input input;
        const synthetic *list = &u.s;
        memory *m = calloc(1, sizeof *m);
        t.group_layers = 1;
        t.cross = 8;
        t.zstd_level = 1;
        assert_ok(u.ctx, train_on(u.ctx, &list, 1, &t, m));
        u.dict_file = *m;
        free(m);
        input = xkv_input_from_memory(u.dict_file.data, u.dict_file.size);
        assert_ok(u.ctx, xkv_dict_open(u.ctx, &input, 1, &u.dict));
    }
    o.chunk_tokens = CHUNK;
    o.group_layers = 1;
    o.window = 3;
    o.dict = u.dict;
    o.quality = which == CROSS ? 60 : 0;
    o.error = which == SCALAR ? 0.05 : 0;
    o.profile = which == CROSS ? XKV_PROFILE_DICT : which == SCALAR ? XKV_PROFILE_SCALAR : XKV_PROFILE_LOSSLESS;
    u.p = pack_planes(u.ctx, &u.s, &o);
    u.whole = restore(u.ctx, &u.s, u.p.entry);
    return u;
}

static void free_subject(subject *u)
{
    free(u->whole);
    free_packed(u->ctx, &u->p);
    xkv_dict_close(u->ctx, u->dict);
    memory_free(&u->dict_file);
    free_synthetic(&u->s);
    xkv_ctx_free(u->ctx);
}

/* --- A read that is watched --------------------------------------------------------------------------------------- */

typedef struct watch {
    const subject *u;
    const xkv_entry *entry;
    const uint8_t *data;
    uint32_t announced; /* groups, in order from 0 */
    uint32_t stop_at;   /* that group's callback asks to stop */
} watch;

/* The group that comes next in order, all of its rows there. */
static int ready(void *user, uint32_t group)
{
    watch *w = user;
    xkv_group_info g;

    assert_int_equal(group, w->announced);
    xkv_entry_get_group(w->entry, group, &g);
    for (uint32_t i = 0; i < g.plane_count; i++) {
        size_t at = (size_t)((uint8_t *)w->u->s.views[g.planes[i]].data - w->u->s.data);
        assert_memory_equal(w->data + at, w->u->whole + at, w->u->s.size / w->u->s.geometry.plane_count);
    }
    w->announced++;
    return group == w->stop_at;
}

/* An input that fails, or cancels the call, at its n-th read. */
typedef struct tricky {
    xkv_input good;
    atomic_int reads;
    int fail_at, cancel_at;
    xkv_ctx *ctx;
} tricky;

static xkv_status tricky_read(void *user, xkv_ctx *ctx, uint64_t offset, void *dst, size_t size)
{
    tricky *t = user;
    int read = atomic_fetch_add(&t->reads, 1) + 1;

    if (read == t->cancel_at)
        xkv_ctx_cancel(t->ctx);
    return read == t->fail_at ? XKV_ERROR_IO : t->good.read(t->good.user, ctx, offset, dst, size);
}

static void tricky_prefetch(void *user, uint64_t offset, uint64_t size)
{
    const tricky *t = user;

    assert_true(size > 0 && offset <= t->good.size && size <= t->good.size - offset);
}

/* Read all of `input`'s entry; *announced groups were ready. */
static xkv_status read_watched(const subject *u, uint32_t threads, tricky *t, uint32_t stop_at, uint32_t *announced)
{
    xkv_ctx *ctx = new_ctx(threads);
    xkv_input input = {.user = t, .size = t->good.size, .read = tricky_read, .prefetch = tricky_prefetch};
    xkv_read_options o = xkv_read_options_default();
    uint8_t *data = calloc(1, u->s.size);
    xkv_view *views = views_into(&u->s, data);
    xkv_entry *entry = NULL;
    watch w = {.u = u, .data = data, .stop_at = stop_at};
    xkv_status status;

    t->ctx = ctx;
    status = xkv_entry_open(ctx, &input, &entry);
    if (status == XKV_OK && u->dict)
        status = xkv_entry_attach(ctx, entry, u->dict);
    w.entry = entry;
    o.group_ready = ready;
    o.group_ready_user = &w;
    if (status == XKV_OK)
        status = xkv_entry_read(ctx, entry, &o, views);
    *announced = w.announced;
    if (status != XKV_OK && status != XKV_ERROR_IO)
        assert_true(strlen(xkv_ctx_error(ctx)) > 0);
    xkv_entry_close(ctx, entry);
    xkv_ctx_free(ctx);
    free(views);
    free(data);
    return status;
}

static uint32_t group_count(const subject *u)
{
    xkv_entry_info info;

    xkv_entry_get_info(u->p.entry, &info);
    assert_true(info.group_count <= MAX_GROUPS);
    return info.group_count;
}

static void groups_become_ready_in_order(void **state)
{
    (void)state;
    for (profile which = 0; which < PROFILES; which++) {
        subject u = make_subject(which);
        for (uint32_t threads = 1; threads <= 5; threads++) {
            tricky t = {.good = u.p.input};
            uint32_t announced;
            assert_int_equal(read_watched(&u, threads, &t, UINT32_MAX, &announced), XKV_OK);
            assert_int_equal(announced, group_count(&u));
        }
        free_subject(&u);
    }
}

static void every_read_fails_once(void **state)
{
    (void)state;
    for (profile which = 0; which < PROFILES; which++) {
        subject u = make_subject(which);
        for (uint32_t threads = 1; threads <= 4; threads += 3) {
            xkv_status status = XKV_ERROR_IO;
            uint32_t announced = 0, most = 0;
            for (int n = 1; status != XKV_OK; n++) {
                tricky t = {.good = u.p.input, .fail_at = n};
                status = read_watched(&u, threads, &t, UINT32_MAX, &announced);
                assert_true(status == XKV_OK || status == XKV_ERROR_IO);
                if (status != XKV_OK && announced > most)
                    most = announced;
            }
            assert_int_equal(announced, group_count(&u));
            assert_true(most >= group_count(&u) - 3); /* late failures let early groups pass */
            assert_true(most < group_count(&u));
        }
        free_subject(&u);
    }
}

static void cancelled_at_every_read(void **state)
{
    (void)state;
    for (profile which = 0; which < PROFILES; which++) {
        subject u = make_subject(which);
        for (uint32_t threads = 1; threads <= 4; threads += 3) {
            int reads, cancelled = 0;
            tricky all = {.good = u.p.input};
            uint32_t announced;
            assert_int_equal(read_watched(&u, threads, &all, UINT32_MAX, &announced), XKV_OK);
            reads = atomic_load(&all.reads);
            for (int n = 1; n <= reads; n++) {
                tricky t = {.good = u.p.input, .cancel_at = n};
                xkv_status status = read_watched(&u, threads, &t, UINT32_MAX, &announced);
                assert_true(status == XKV_ERROR_CANCELLED || (status == XKV_OK && n > reads - 8));
                cancelled += status == XKV_ERROR_CANCELLED;
            }
            assert_true(cancelled > 20);
        }
        free_subject(&u);
    }
}

static void stopped_by_every_callback(void **state)
{
    (void)state;
    for (profile which = 0; which < PROFILES; which++) {
        subject u = make_subject(which);
        for (uint32_t threads = 1; threads <= 4; threads += 3)
            for (uint32_t group = 0; group < group_count(&u); group++) {
                tricky t = {.good = u.p.input};
                uint32_t announced;
                assert_int_equal(read_watched(&u, threads, &t, group, &announced), XKV_ERROR_CANCELLED);
                assert_int_equal(announced, group + 1);
            }
        free_subject(&u);
    }
}

/* Where the last part of a group that is not empty ends. */
static uint64_t end_of_group(const xkv_entry *entry, uint32_t group)
{
    const xkv_group *g = &entry->c.groups[group];
    uint32_t part = g->part_count - 1;

    while (g->parts[part].size == 0)
        part--;
    return entry->c.payload_offset + g->parts[part].offset + g->parts[part].size;
}

/* One wrong byte at the end of each group: it is not announced, nor are those behind it. */
static void a_damaged_group_is_not_announced(void **state)
{
    (void)state;
    for (profile which = 0; which < PROFILES; which++) {
        subject u = make_subject(which);
        uint8_t *copy = malloc(u.p.m.size);
        memcpy(copy, u.p.m.data, u.p.m.size);
        for (uint32_t group = 0; group < group_count(&u); group++) {
            uint64_t at = end_of_group(u.p.entry, group) - 1;
            copy[at] ^= 4;
            for (uint32_t threads = 1; threads <= 4; threads += 3) {
                tricky t = {.good = xkv_input_from_memory(copy, u.p.m.size)};
                uint32_t announced;
                assert_int_equal(read_watched(&u, threads, &t, UINT32_MAX, &announced), XKV_ERROR_CHECKSUM);
                assert_true(announced <= group);
                assert_true(threads > 1 || announced == group);
            }
            copy[at] ^= 4;
        }
        free(copy);
        free_subject(&u);
    }
}

/* --- Any length --------------------------------------------------------------------------------------------------- */

static void every_first_n_equals_the_whole(void **state)
{
    (void)state;
    for (profile which = 0; which < PROFILES; which++) {
        subject u = make_subject(which);
        xkv_ctx *ctx = new_ctx(2);
        uint8_t *data = malloc(u.s.size);
        xkv_view *views = views_into(&u.s, data);
        size_t plane = u.s.size / u.s.geometry.plane_count, row = plane / TOKENS;
        for (uint32_t n = 1; n <= TOKENS; n++) {
            xkv_read_options o = xkv_read_options_default();
            o.token_count = n;
            memset(data, 0x5a, u.s.size);
            assert_ok(ctx, xkv_entry_read(ctx, u.p.entry, &o, views));
            for (uint32_t p = 0; p < u.s.geometry.plane_count; p++) {
                assert_memory_equal(data + p * plane, u.whole + p * plane, n * row);
                if (n < TOKENS)
                    assert_int_equal(data[p * plane + n * row], 0x5a);
            }
        }
        free(views);
        free(data);
        xkv_ctx_free(ctx);
        free_subject(&u);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(groups_become_ready_in_order),     cmocka_unit_test(every_read_fails_once),
        cmocka_unit_test(cancelled_at_every_read),          cmocka_unit_test(stopped_by_every_callback),
        cmocka_unit_test(a_damaged_group_is_not_announced), cmocka_unit_test(every_first_n_equals_the_whole),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
