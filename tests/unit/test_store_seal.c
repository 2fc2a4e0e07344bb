/* test_store_seal.c - encrypted stores: what is put comes back, with the right key only; files tell nothing of tokens
 * or rows; whatever is changed in them is found before it is parsed. */
#include "store_support.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { SMALL = 40, LARGE = 2000 }; /* LARGE takes more than one piece of 64 KiB */

static test_store t;
static uint8_t key[32];

static xkv_status open_with(const uint8_t *with)
{
    xkv_store_options o = xkv_store_options_default();
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    o.key = with;
    return xkv_store_open(t.ctx, t.path, &o, &t.store);
}

static int setup(void **state)
{
    (void)state;
    xkv_store_properties p = xkv_store_properties_default();
    for (size_t i = 0; i < sizeof key; i++)
        key[i] = (uint8_t)(7 * i + 1);
    p.key = key;
    make_folder(&t);
    assert_ok(t.ctx, xkv_store_create(t.ctx, t.path, &p));
    assert_ok(t.ctx, open_with(key));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    remove_folder(&t);
    return 0;
}

static uint64_t put(uint64_t seed, uint32_t count)
{
    const xkv_namespace ns = make_namespace(NULL);
    int32_t tokens[STORE_TOKENS];
    xkv_put_report report;
    make_tokens(seed, 50000, tokens, count);
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, count, NULL, &report));
    return report.id;
}

/* Tokens that were found and restored right; whatever else comes back fails the test. */
static uint32_t look_up(uint64_t seed, uint32_t count)
{
    const xkv_namespace ns = make_namespace(NULL);
    int32_t tokens[STORE_TOKENS];
    xkv_match m;
    xkv_hit *hit = NULL;
    xkv_status status = XKV_OK;
    make_tokens(seed, 50000, tokens, count);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, &hit));
    bool right = hit != NULL && hit_is_right(t.ctx, hit, m.tokens, tokens, &status);
    assert_true(hit == NULL || right || status != XKV_OK);
    xkv_hit_close(t.ctx, hit);
    return right ? m.tokens : 0;
}

static void assert_sound(uint64_t entries)
{
    xkv_verify_report r;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &r));
    assert_string_equal(r.first, "");
    assert_int_equal(r.entries, entries);
}

/* The only blob, or the `number`-th. */
static int open_blob(int number, char name[300])
{
    char path[128];
    int fd = -1;
    snprintf(path, sizeof path, "%s/blobs", t.path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.' && number-- == 0) {
            fd = openat(dirfd(d), e->d_name, O_RDWR);
            snprintf(name, 300, "%s/%.100s", path, e->d_name);
        }
    closedir(d);
    assert_true(fd >= 0);
    return fd;
}

static void entries_come_back(void **state)
{
    (void)state;
    put(1, SMALL);
    put(2, LARGE);
    assert_int_equal(look_up(1, SMALL), SMALL);
    assert_int_equal(look_up(2, LARGE), LARGE);
    assert_int_equal(look_up(2, 1500), 1500);
    assert_sound(2);
    assert_ok(t.ctx, open_with(key));
    assert_int_equal(look_up(2, LARGE), LARGE);
}

static void only_the_right_key_opens(void **state)
{
    (void)state;
    uint8_t wrong[32];
    memcpy(wrong, key, sizeof wrong);
    wrong[31] ^= 1;
    put(1, SMALL);
    assert_int_equal(open_with(wrong), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "[SO6]"));
    assert_int_equal(open_with(NULL), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "[SO6]"));
    assert_int_equal(xkv_store_repair(t.ctx, t.path, wrong, 0, NULL), XKV_ERROR_MISMATCH);
    assert_ok(t.ctx, open_with(key));
    assert_int_equal(look_up(1, SMALL), SMALL);
    remove_folder(&t);
    make_store(&t, 0); /* one that is not encrypted takes no key */
    assert_int_equal(open_with(key), XKV_ERROR_MISMATCH);
}

static bool holds(const uint8_t *data, size_t size, const void *what, size_t length)
{
    return memmem(data, size, what, length) != NULL;
}

static void files_tell_nothing(void **state)
{
    (void)state;
    int32_t tokens[LARGE];
    char name[300];
    struct stat st;
    put(3, LARGE);
    int fd = open_blob(0, name);
    assert_int_equal(fstat(fd, &st), 0);
    uint8_t *data = malloc((size_t)st.st_size);
    assert_int_equal(pread(fd, data, (size_t)st.st_size, 0), st.st_size);
    close(fd);
    make_tokens(3, 50000, tokens, LARGE);
    assert_false(holds(data, (size_t)st.st_size, &tokens[10], 8));
    assert_false(holds(data, (size_t)st.st_size, "XKV\r\n", 5));
    assert_false(holds(data, (size_t)st.st_size, "GEOM", 4));
    free(data);
}

/* Every byte counts, gaps too. */
static void every_change_is_found(void **state)
{
    (void)state;
    struct stat st;
    char name[300];
    put(1, SMALL);
    int fd = open_blob(0, name);
    assert_int_equal(fstat(fd, &st), 0);
    uint8_t *good = malloc((size_t)st.st_size);
    assert_int_equal(pread(fd, good, (size_t)st.st_size, 0), st.st_size);
    close(fd);
    for (off_t at = 0; at < st.st_size; at += at < 260 ? 1 : 29) {
        xkv_store_stats s;
        fd = open_blob(0, name);
        uint8_t byte = (uint8_t)(good[at] ^ 16);
        assert_int_equal(pwrite(fd, &byte, 1, at), 1);
        close(fd);
        assert_int_equal(look_up(1, SMALL), 0);
        assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
        assert_int_equal(s.entries, 0);
        put(1, SMALL); /* under a new nonce */
        fd = open_blob(0, name);
        assert_int_equal(pread(fd, good, (size_t)st.st_size, 0), st.st_size);
        close(fd);
    }
    fd = open_blob(0, name);
    assert_int_equal(ftruncate(fd, st.st_size - 16), 0);
    close(fd);
    assert_int_equal(look_up(1, SMALL), 0);
    free(good);
}

/* One that is sealed with the same key but is another entry's, and one that is not sealed. */
static void other_blobs_are_refused(void **state)
{
    (void)state;
    char first[300], second[300];
    put(1, SMALL);
    put(2, SMALL);
    close(open_blob(0, first));
    close(open_blob(1, second));
    assert_int_equal(rename(first, second), 0);
    assert_int_equal(look_up(1, SMALL) + look_up(2, SMALL), 0);
    memory m = {0};
    xkv_output output = memory_output(&m);
    const xkv_namespace ns = make_namespace(NULL);
    uint64_t id = put(3, SMALL);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, id, &output));
    int fd = open_blob(0, first);
    assert_int_equal(pwrite(fd, m.data, m.size, 0), m.size);
    assert_int_equal(ftruncate(fd, (off_t)m.size), 0);
    close(fd);
    assert_int_equal(look_up(3, SMALL), 0);
    memory_free(&m);
}

static void repair_export_and_import(void **state)
{
    (void)state;
    const xkv_namespace ns = make_namespace(NULL);
    memory m = {0};
    xkv_output output = memory_output(&m);
    xkv_repair_report r;
    put(1, SMALL);
    uint64_t id = put(2, LARGE);
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, key, 0, &r));
    assert_int_equal(r.entries, 2);
    assert_int_equal(r.quarantined, 0);
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, key, 1, &r));
    assert_ok(t.ctx, open_with(key));
    assert_sound(2);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, id, &output));
    remove_folder(&t);
    make_store(&t, 0);
    const xkv_input file = xkv_input_from_memory(m.data, m.size);
    assert_ok(t.ctx, xkv_store_import(t.ctx, t.store, &file, NULL));
    assert_int_equal(look_up(2, LARGE), LARGE);
    assert_sound(1);
    memory_free(&m);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(entries_come_back),     TEST(only_the_right_key_opens), TEST(files_tell_nothing),
        TEST(every_change_is_found), TEST(other_blobs_are_refused),  TEST(repair_export_and_import),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
