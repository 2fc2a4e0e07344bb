/* test_hasher.c - the hash that names a blob: values from another implementation (Python's hashlib), and the same ones
 * whatever the order of writing and however many threads hash. */
#include "store_support.h"

#include "base.h"
#include "hasher.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { MOST = 9 * XKV_HASH_PIECE + 5 };

/* Of the bytes of fill(). */
static const struct {
    size_t size;
    const char *hash;
} known[] = {
    {1, "1406e05881e299367766d313e26c05564ec91bf721d31726bd6e46e60689539a"},
    {XKV_HASH_PIECE, "3f1c24976b852bdd593556cd75925dd101290194cfaf64f4c787a8661040d291"},
    {XKV_HASH_PIECE + 1, "d6f46a4153dca1ea35a441ab0246dc50d536d1eade33850c41b8960793dfb906"},
    {3 * XKV_HASH_PIECE + 11, "9d9eac82b3ad508a620a7630774c7f89e5e38b657eabffc106ee2e6807ddfdf6"},
    {MOST, "6413e82b435508fbf8951e77a774e6b899de80a5188d735bce8b18f16182ded1"},
};

static uint8_t bytes[MOST];

static void fill(void)
{
    for (uint64_t i = 0; i < MOST; i++)
        bytes[i] = (uint8_t)((i * i + 7 * i) >> 3);
}

static void assert_hash(const uint8_t hash[32], const char *expected)
{
    char text[65];
    for (size_t i = 0; i < 32; i++)
        snprintf(text + 2 * i, 3, "%02x", hash[i]);
    assert_string_equal(text, expected);
}

/* --- Writing files --------------------------------------------------------------------------------------------------
 */

typedef struct writing {
    xkv_ctx *ctx;
    int fd;
    xkv_hasher *hasher;
} writing;

static writing begin(uint32_t threads)
{
    writing w = {.ctx = NULL};
    xkv_ctx_options o = xkv_ctx_options_default();
    char path[] = "/tmp/xkv-hasher-XXXXXX";
    o.threads = threads;
    assert_int_equal(xkv_ctx_create(&o, &w.ctx), XKV_OK);
    w.fd = mkstemp(path);
    assert_true(w.fd >= 0);
    unlink(path);
    assert_ok(w.ctx, xkv_hasher_create(w.ctx, w.fd, &w.hasher));
    return w;
}

static void put(const writing *w, const uint8_t *src, size_t offset, size_t size)
{
    assert_int_equal(pwrite(w->fd, src, size, (off_t)offset), size);
    assert_ok(w->ctx, xkv_hasher_note(w->ctx, w->hasher, offset, size));
}

static void end(writing *w, const char *expected)
{
    uint8_t hash[32];
    assert_ok(w->ctx, xkv_hasher_finish(w->ctx, w->hasher, hash));
    assert_hash(hash, expected);
    xkv_hasher_free(w->ctx, w->hasher);
    close(w->fd);
    xkv_ctx_free(w->ctx);
}

/* --- Tests ----------------------------------------------------------------------------------------------------------
 */

static void test_known_values(void **state)
{
    xkv_ctx *ctx = NULL;
    (void)state;
    assert_int_equal(xkv_ctx_create(NULL, &ctx), XKV_OK);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        const xkv_input input = xkv_input_from_memory(bytes, known[i].size);
        uint8_t hash[32];
        assert_ok(ctx, xkv_hash_input(ctx, &input, hash));
        assert_hash(hash, known[i].hash);
    }
    xkv_ctx_free(ctx);
}

static void test_forwards(void **state)
{
    (void)state;
    for (uint32_t threads = 1; threads <= 2; threads++) {
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            writing w = begin(threads);
            for (size_t at = 0; at < known[i].size; at += 100000)
                put(&w, bytes + at, at, (size_t)xkv_min64(known[i].size - at, 100000));
            end(&w, known[i].hash);
        }
    }
}

/* As a container is written: the front last; here in small steps from the end too. */
static void test_backwards(void **state)
{
    (void)state;
    writing w = begin(2);
    for (size_t at = MOST; at > 0;) {
        size_t n = (size_t)xkv_min64(at, 70001);
        at -= n;
        put(&w, bytes + at, at, n);
    }
    end(&w, known[4].hash);
}

/* What was hashed already, or is just being hashed, is written again. */
static void test_written_again(void **state)
{
    static const uint8_t other[1000] = {1};
    uint64_t seed = 1;
    (void)state;
    for (int round = 0; round < 20; round++) {
        writing w = begin(2);
        size_t places[64];
        for (size_t at = 0, n = 0; at < MOST; at += XKV_HASH_PIECE / 2, n++)
            put(&w, bytes + at, at, (size_t)xkv_min64(MOST - at, XKV_HASH_PIECE / 2));
        for (size_t i = 0; i < 64; i++) {
            places[i] = (size_t)(test_random(&seed) % (MOST - sizeof other));
            put(&w, other, places[i], sizeof other);
        }
        for (size_t i = 0; i < 64; i++)
            put(&w, bytes + places[i], places[i], sizeof other);
        end(&w, known[4].hash);
    }
}

/* The file is not there any more when the writer comes to its end. */
static void test_unreadable(void **state)
{
    uint8_t hash[32];
    (void)state;
    for (uint32_t threads = 1; threads <= 2; threads++) {
        writing w = begin(threads);
        put(&w, bytes, 0, MOST);
        assert_int_equal(ftruncate(w.fd, 100), 0);
        assert_ok(w.ctx, xkv_hasher_note(w.ctx, w.hasher, 0, MOST));
        assert_int_equal(xkv_hasher_finish(w.ctx, w.hasher, hash), XKV_ERROR_IO);
        xkv_hasher_free(w.ctx, w.hasher);
        close(w.fd);
        xkv_ctx_free(w.ctx);
    }
}

static void test_given_up(void **state)
{
    (void)state;
    writing w = begin(2);
    put(&w, bytes, 0, MOST);
    xkv_hasher_free(w.ctx, w.hasher);
    close(w.fd);
    xkv_ctx_free(w.ctx);
}

/* A cache of some MiB: its blob is hashed while it is packed, or sealed, and has the hash that its bytes have. */
static void test_large_put(void **state)
{
    static const uint8_t key[32] = {3};
    const synthetic_options shape = {
        .layers = 4, .tokens = 512, .heads = 4, .head_dim = 64, .dtype = XKV_F16, .noise = 1, .seed = 1};
    synthetic s = make_synthetic(&shape);
    int32_t tokens[512];
    const xkv_prompt prompt = {.tokens = tokens, .token_count = 512};
    const xkv_namespace ns = make_namespace(NULL);
    (void)state;
    make_tokens(1, 50000, tokens, 512);
    for (int sealed = 0; sealed < 2; sealed++) {
        xkv_store_properties p = xkv_store_properties_default();
        xkv_store_options o = xkv_store_options_default();
        xkv_ctx_options c = xkv_ctx_options_default();
        xkv_put_report report;
        xkv_verify_report v;
        test_store t = {.store = NULL};
        xkv_ctx *ctx = NULL;
        c.threads = 2;
        assert_int_equal(xkv_ctx_create(&c, &ctx), XKV_OK);
        make_folder(&t);
        p.key = o.key = sealed ? key : NULL;
        assert_ok(ctx, xkv_store_create(ctx, t.path, &p));
        assert_ok(ctx, xkv_store_open(ctx, t.path, &o, &t.store));
        assert_ok(ctx,
                  xkv_store_put_planes(ctx, t.store, &ns, &prompt, &s.geometry, s.views, NULL, NULL, 0, NULL, &report));
        assert_true(report.bytes > 6 * XKV_HASH_PIECE);
        assert_ok(ctx, xkv_store_verify(ctx, t.store, 1, NULL, NULL, &v));
        assert_int_equal(v.entries, 1);
        assert_int_equal(v.damaged + v.missing + v.wrong_sums + v.bad_records, 0);
        xkv_store_close(ctx, t.store);
        t.store = NULL;
        assert_int_equal(xkv_ctx_memory_used(ctx), 0);
        xkv_ctx_free(ctx);
        remove_folder(&t);
    }
    free_synthetic(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_values),  cmocka_unit_test(test_forwards),   cmocka_unit_test(test_backwards),
        cmocka_unit_test(test_written_again), cmocka_unit_test(test_unreadable), cmocka_unit_test(test_given_up),
        cmocka_unit_test(test_large_put),
    };
    fill();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
