/* test_store_dict.c - entries that need a dictionary, and a dictionary that is damaged, missing, put again, or that
 * nobody needs: the entries are never to blame. */
#include "store_support.h"

#include "store_internal.h"
#include "xkv/hook.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { ENTRIES = 3, TOKENS = 64 };

static test_store t;
static xkv_namespace ns;
static memory dict_file;
static uint8_t dict_id[16];
static xkv_dict *dict;
static uint64_t ids[ENTRIES];

/* Runs once, before the blob of the dictionary is opened: this program defines openat() itself. */
static void (*at_dict)(void);
static _Atomic int dict_opens;

#pragma GCC visibility push(default)

int openat(int at, const char *path, int flags, ...)
{
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list args;
        va_start(args, flags);
        mode = (mode_t)va_arg(args, unsigned);
        va_end(args);
    }
    if (strlen(path) == XKV_BLOB_NAME && strcmp(path + 64, ".0000000000000001") == 0) {
        void (*moment)(void) = at_dict;
        at_dict = NULL;
        dict_opens++;
        if (moment != NULL)
            moment();
    }
    return (int)syscall(SYS_openat, at, path, flags, mode);
}

#pragma GCC visibility pop

static xkv_input dict_input(void)
{
    return xkv_input_from_memory(dict_file.data, dict_file.size);
}

static void put_dictionary(void)
{
    const xkv_input input = dict_input();
    assert_ok(t.ctx, xkv_store_put_dict(t.ctx, t.store, &input, dict_id));
}

/* Put prompt `number`, packed with the dictionary. */
static xkv_status put_number(uint64_t number, xkv_put_report *report)
{
    xkv_put_options o = xkv_put_options_default();
    xkv_pack_options pack = xkv_pack_options_default();
    int32_t tokens[TOKENS];
    synthetic s = small_cache(number + 1);
    make_tokens(number, 50000, tokens, TOKENS);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = TOKENS};
    pack.dict = dict;
    pack.quality = 50;
    o.pack = &pack;
    xkv_status status =
        xkv_store_put_planes(t.ctx, t.store, &ns, &prompt, &s.geometry, s.views, NULL, NULL, 0, &o, report);
    free_synthetic(&s);
    return status;
}

static int setup(void **state)
{
    (void)state;
    synthetic s = small_cache(1);
    const synthetic *list = &s;
    make_store(&t, 0);
    ns = make_namespace(NULL);
    assert_ok(t.ctx, train_on(t.ctx, &list, 1, NULL, &dict_file));
    free_synthetic(&s);
    const xkv_input input = dict_input();
    assert_ok(t.ctx, xkv_dict_open(t.ctx, &input, 1, &dict));
    put_dictionary();
    for (uint64_t i = 0; i < ENTRIES; i++) {
        xkv_put_report report;
        assert_ok(t.ctx, put_number(i, &report));
        ids[i] = report.id;
    }
    reopen_store(&t); /* the dictionary is not in memory */
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    xkv_dict_close(t.ctx, dict);
    dict = NULL;
    remove_folder(&t);
    memory_free(&dict_file);
    memset(&dict_file, 0, sizeof dict_file);
    return 0;
}

static xkv_match match(uint64_t number, xkv_hit **hit)
{
    xkv_match m;
    int32_t tokens[TOKENS];
    make_tokens(number, 50000, tokens, TOKENS);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = TOKENS};
    *hit = NULL;
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, hit));
    return m;
}

static xkv_status read_hit(xkv_hit *hit)
{
    synthetic s = small_cache(1);
    uint8_t *data = malloc(s.size);
    xkv_view *views = views_into(&s, data);
    xkv_status status = xkv_hit_read(t.ctx, hit, NULL, views);
    free(views);
    free(data);
    free_synthetic(&s);
    return status;
}

/* What looking prompt `number` up and restoring it gives. */
static xkv_status look_up(uint64_t number, uint32_t *reason)
{
    xkv_hit *hit;
    *reason = match(number, &hit).reason;
    assert_true((hit != NULL) == (*reason == XKV_MATCH_FOUND));
    xkv_status status = hit != NULL ? read_hit(hit) : XKV_OK;
    xkv_hit_close(t.ctx, hit);
    return status;
}

static void assert_reasons(uint32_t expected)
{
    for (uint64_t i = 0; i < ENTRIES; i++) {
        uint32_t reason;
        assert_ok(t.ctx, look_up(i, &reason));
        assert_int_equal(reason, expected);
    }
}

static xkv_store_stats stats(void)
{
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    return s;
}

/* The dictionary's blob: that with the lowest id. */
static void dict_path(char path[512])
{
    char folder[128];
    uint64_t lowest = UINT64_MAX;
    snprintf(folder, sizeof folder, "%s/blobs", t.path);
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        uint8_t hash[32];
        uint64_t id;
        if (!xkv_blob_name_parse(e->d_name, hash, &id) || id > lowest)
            continue;
        lowest = id;
        snprintf(path, 512, "%s/%s", folder, e->d_name);
    }
    closedir(d);
    assert_int_equal(lowest, 1);
}

static void remove_dict_blob(void)
{
    char path[512];
    dict_path(path);
    assert_int_equal(unlink(path), 0);
}

static void damage_dict_blob(void)
{
    char path[512];
    uint8_t byte;
    struct stat st;
    dict_path(path);
    int fd = open(path, O_RDWR);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(pread(fd, &byte, 1, st.st_size / 2), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, st.st_size / 2), 1);
    close(fd);
}

static void (*const faults[])(void) = {damage_dict_blob, remove_dict_blob};
enum { FAULTS = 2 };

/* Nothing is wrong, and all of the entries need the dictionary. */
static void assert_sound(void)
{
    xkv_verify_report v;
    xkv_collect_report c;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &v));
    assert_string_equal(v.first, "");
    assert_int_equal(v.entries, ENTRIES);
    assert_int_equal(v.dictionaries, 1);
    assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 1, &c));
    assert_int_equal(c.dictionaries, 0); /* it is needed */
    assert_reasons(XKV_MATCH_FOUND);
}

static void entries_come_back_with_their_dictionary(void **state)
{
    (void)state;
    assert_sound();
    for (size_t i = 0; i < ENTRIES; i++)
        assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, ids[i]));
    xkv_collect_report c;
    assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 1, &c));
    assert_int_equal(c.dictionaries, 1);
    assert_int_equal(put_number(0, NULL), XKV_ERROR_MISMATCH);
}

static void repair_keeps_entries_without_their_dictionary(void **state)
{
    for (size_t i = 0; i < FAULTS; i++) {
        xkv_repair_report r;
        if (i > 0) {
            teardown(state);
            setup(state);
        }
        faults[i]();
        xkv_store_close(t.ctx, t.store);
        t.store = NULL;
        assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, &r));
        assert_int_equal(r.entries, ENTRIES);
        assert_int_equal(r.dictionaries, 0);
        assert_int_equal(r.quarantined, i == 0);
        reopen_store(&t);
        assert_reasons(XKV_MATCH_NO_DICTIONARY);
        put_dictionary();
        assert_sound();
    }
}

/* Nothing of the entries is lost, and the dictionary is not there any more. */
static void assert_only_dict_gone(bool damaged)
{
    assert_int_equal(stats().entries, ENTRIES);
    assert_int_equal(stats().dictionaries, 0);
    assert_int_equal(stats().quarantined, damaged);
    assert_int_equal(stats().corrupt, 1);
    assert_reasons(XKV_MATCH_NO_DICTIONARY);
    xkv_match m;
    xkv_hit *hit = NULL;
    assert_ok(t.ctx, xkv_store_get(t.ctx, t.store, &ns, ids[1], &m, &hit));
    assert_int_equal(m.reason, XKV_MATCH_NO_DICTIONARY);
    assert_null(hit);
    assert_int_equal(put_number(7, NULL), XKV_ERROR_MISMATCH);
}

static void a_bad_dictionary_is_no_damage_of_entries(void **state)
{
    for (size_t i = 0; i < FAULTS; i++) {
        uint32_t reason;
        xkv_hit *hit;
        if (i > 0) {
            teardown(state);
            setup(state);
        }
        faults[i]();
        assert_int_equal(match(0, &hit).reason, XKV_MATCH_FOUND);
        assert_int_equal(read_hit(hit), XKV_ERROR_MISMATCH);
        assert_non_null(strstr(xkv_ctx_error(t.ctx), i == 0 ? "hash" : "its blob is missing"));
        xkv_hit_reject(t.ctx, hit); /* as a caller may do when anything fails */
        xkv_hit_close(t.ctx, hit);
        assert_only_dict_gone(i == 0);
        put_dictionary();
        assert_ok(t.ctx, look_up(0, &reason));
        reopen_store(&t);
        assert_sound();
    }
}

static void a_bad_dictionary_is_put_again(void **state)
{
    for (size_t i = 0; i < FAULTS; i++) {
        if (i > 0) {
            teardown(state);
            setup(state);
        }
        put_dictionary();
        assert_int_equal(stats().corrupt, 0); /* it was there */
        faults[i]();
        put_dictionary();
        assert_int_equal(stats().corrupt, 1);
        assert_int_equal(stats().quarantined, i == 0);
        assert_sound();
    }
}

static void verifying_changes_nothing(void **state)
{
    (void)state;
    xkv_verify_report v;
    damage_dict_blob();
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &v));
    assert_true(v.damaged > 0);
    assert_int_equal(stats().entries, ENTRIES);
    assert_int_equal(stats().dictionaries, 1);
    assert_int_equal(stats().corrupt + stats().quarantined, 0);
}

static void loads_of_the_hook_do_not_blame_the_entry(void **state)
{
    (void)state;
    xkv_hook *hook = NULL;
    xkv_hook_hit *hit = NULL;
    xkv_hook_found f;
    xkv_hook_counters c;
    int32_t tokens[TOKENS];
    synthetic s = small_cache(1);
    make_tokens(0, 50000, tokens, TOKENS);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = TOKENS};
    damage_dict_blob();
    assert_ok(t.ctx, xkv_hook_create(t.ctx, t.store, NULL, &hook));
    assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, NULL, &f, &hit));
    assert_int_equal(f.reason, XKV_MATCH_FOUND);
    assert_int_equal(xkv_hook_load(t.ctx, hit, &s.geometry, s.views, NULL), XKV_ERROR_MISMATCH);
    xkv_hook_hit_close(hit);
    assert_only_dict_gone(true);
    assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, NULL, &f, &hit));
    assert_int_equal(f.reason, XKV_MATCH_NO_DICTIONARY);
    put_dictionary();
    assert_ok(t.ctx, xkv_hook_match(t.ctx, hook, &ns, &prompt, NULL, &f, &hit));
    assert_int_equal(f.reason, XKV_MATCH_FOUND);
    assert_ok(t.ctx, xkv_hook_load(t.ctx, hit, &s.geometry, s.views, NULL));
    xkv_hook_hit_close(hit);
    xkv_hook_get_counters(hook, &c);
    assert_int_equal(c.loads_refused, 1);
    assert_int_equal(c.loads_damaged, 0);
    assert_int_equal(c.misses_no_dictionary, 1);
    xkv_hook_close(hook);
    free_synthetic(&s);
}

/* --- Threads ------------------------------------------------------------------------------------------------------ */

enum { READERS = 6 };

static void *ask_stats(void *user)
{
    xkv_store_stats s;
    xkv_ctx *ctx = new_ctx(1);
    *(xkv_status *)user = xkv_store_get_stats(ctx, t.store, &s);
    xkv_ctx_free(ctx);
    return NULL;
}

static void *open_first(void *user)
{
    xkv_match m;
    xkv_hit *hit = NULL;
    const xkv_entry *entry = NULL;
    xkv_ctx *ctx = new_ctx(1);
    xkv_status status = xkv_store_get(ctx, t.store, &ns, ids[0], &m, &hit);
    if (status == XKV_OK && hit != NULL)
        status = xkv_hit_entry(ctx, hit, &entry);
    xkv_hit_close(ctx, hit);
    xkv_ctx_free(ctx);
    *(xkv_status *)user = status;
    return NULL;
}

/* While the dictionary is decoded: a thread that needs nothing of it goes on; those that need it too wait, which they
 * do until this returns. */
static pthread_t readers[READERS];
static xkv_status reader_status[READERS], stats_status;
static int stats_joined;

static void others_come(void)
{
    pthread_t asker;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    assert_int_equal(pthread_create(&asker, NULL, ask_stats, &stats_status), 0);
    stats_joined = pthread_timedjoin_np(asker, NULL, &until);
    for (size_t i = 0; i < READERS && stats_joined == 0; i++)
        assert_int_equal(pthread_create(&readers[i], NULL, open_first, &reader_status[i]), 0);
}

static void nobody_else_waits_for_a_dictionary(void **state)
{
    (void)state;
    xkv_hit *hit;
    assert_int_equal(match(0, &hit).reason, XKV_MATCH_FOUND);
    dict_opens = 0;
    at_dict = others_come;
    assert_ok(t.ctx, read_hit(hit));
    assert_null(at_dict);
    assert_int_equal(stats_joined, 0);
    assert_ok(t.ctx, stats_status);
    for (size_t i = 0; i < READERS; i++) {
        pthread_join(readers[i], NULL);
        assert_int_equal(reader_status[i], XKV_OK);
    }
    assert_int_equal(dict_opens, 1); /* decoded once */
    xkv_hit_close(t.ctx, hit);
}

/* One after another finds that it is of no use; it goes once. */
static void all_who_wait_hear_of_a_bad_dictionary(void **state)
{
    (void)state;
    xkv_hit *hit;
    assert_int_equal(match(0, &hit).reason, XKV_MATCH_FOUND);
    damage_dict_blob();
    at_dict = others_come;
    assert_int_equal(read_hit(hit), XKV_ERROR_MISMATCH);
    assert_int_equal(stats_joined, 0);
    for (size_t i = 0; i < READERS; i++) {
        pthread_join(readers[i], NULL);
        assert_true(reader_status[i] == XKV_ERROR_MISMATCH || reader_status[i] == XKV_OK);
    }
    xkv_hit_close(t.ctx, hit);
    assert_int_equal(stats().corrupt, 1);
    assert_int_equal(stats().entries, ENTRIES);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(entries_come_back_with_their_dictionary),
        TEST(repair_keeps_entries_without_their_dictionary),
        TEST(a_bad_dictionary_is_no_damage_of_entries),
        TEST(a_bad_dictionary_is_put_again),
        TEST(verifying_changes_nothing),
        TEST(loads_of_the_hook_do_not_blame_the_entry),
        TEST(nobody_else_waits_for_a_dictionary),
        TEST(all_who_wait_hear_of_a_bad_dictionary),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
