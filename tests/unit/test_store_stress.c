/* test_store_stress.c - many processes and threads on one store, and writers that are killed at any moment.
 *
 * The default form takes seconds. With XKV_LONG_TESTS in the environment: 8 processes of 4 threads for 10 minutes, and
 * 2,000 kills (tests/store-long.sh). XKV_TEST_SEED: other moments of the kills. */
#include "store_support.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* SMALL_CAP: room for about a quarter of the prompts. */
enum { NUMBERS = 60, LONGEST = 300, SMALL_CAP = 150000 };

static test_store t;
static xkv_namespace ns;

static bool is_long(void)
{
    return getenv("XKV_LONG_TESTS") != NULL;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static bool some_extend; /* prompts of even numbers share up to 210 tokens, so that some extend others */

/* Prompt `number`: trees of prompts that share beginnings of every length. */
static uint32_t prompt_of(uint32_t number, int32_t tokens[LONGEST])
{
    uint32_t count = 20 + number * 37 % (LONGEST - 20);
    make_tokens(number % 6, 50000, tokens, LONGEST);
    for (uint32_t i = 10 + number % 11 * (some_extend && number % 2 == 0 ? 20 : 1); i < LONGEST; i += 17)
        tokens[i] = (int32_t)(number / 6);
    return count;
}

static xkv_status put_number(xkv_ctx *ctx, xkv_store *store, uint32_t number)
{
    int32_t tokens[LONGEST];
    uint32_t count = prompt_of(number, tokens);
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_options o = xkv_put_options_default();
    pack.chunk_tokens = 32;
    o.pack = &pack;
    return put_rows(ctx, store, &ns, tokens, count, &o, NULL);
}

/* Look the prompt up and restore what is there. -1: what came back is wrong; else the tokens matched. */
static int look_up(xkv_ctx *ctx, xkv_store *store, uint32_t number, xkv_match *m)
{
    int32_t tokens[LONGEST];
    uint32_t count = prompt_of(number, tokens);
    xkv_hit *hit = NULL;
    xkv_status status;
    const xkv_prompt prompt = {.tokens = tokens, .token_count = count};
    if (xkv_store_match(ctx, store, &ns, &prompt, 0, m, &hit) != XKV_OK)
        return -1;
    bool right = hit == NULL || hit_is_right(ctx, hit, m->tokens, tokens, &status);
    xkv_hit_close(ctx, hit);
    return right ? (int)m->tokens : -1;
}

/* --- Mixed load --------------------------------------------------------------------------------------------------- */

typedef struct load {
    xkv_store *store;
    uint64_t seed, cap;
    double until;
    uint64_t hits, puts;
    char wrong[256]; /* "": nothing */
} load;

/* Statuses that a busy store under a cap may give. */
static bool is_fair(xkv_status status)
{
    return status == XKV_OK || status == XKV_ERROR_NOT_FOUND || status == XKV_ERROR_LIMIT;
}

static void one_change(xkv_ctx *ctx, load *l, uint64_t *random)
{
    uint32_t number = (uint32_t)(test_random(random) % NUMBERS);
    xkv_match m = {0};
    xkv_store_stats s = {0};
    xkv_status status = XKV_OK;
    int found = 0;
    switch (test_random(random) % 16) {
    case 0:
    case 1:
    case 2:
        status = put_number(ctx, l->store, number);
        l->puts += status == XKV_OK;
        break;
    case 3:
        found = look_up(ctx, l->store, number, &m);
        if (m.id != 0)
            status = xkv_store_remove(ctx, l->store, &ns, m.id);
        break;
    case 4:
        found = look_up(ctx, l->store, number, &m);
        if (m.id != 0)
            status = xkv_store_pin(ctx, l->store, &ns, m.id, test_random(random) % 4 == 0);
        break;
    case 5:
        status = xkv_store_get_stats(ctx, l->store, &s);
        if (status == XKV_OK && s.bytes > l->cap)
            snprintf(l->wrong, sizeof l->wrong, "%llu bytes above the cap", (unsigned long long)(s.bytes - l->cap));
        if (s.corrupt > 0)
            snprintf(l->wrong, sizeof l->wrong, "%llu entries turned out damaged", (unsigned long long)s.corrupt);
        break;
    case 6:
        if (test_random(random) % 8 == 0)
            status = xkv_store_collect(ctx, l->store, 0, NULL);
        break;
    default:
        found = look_up(ctx, l->store, number, &m);
        l->hits += found > 0;
        break;
    }
    if (found < 0 || !is_fair(status))
        snprintf(l->wrong, sizeof l->wrong, "prompt %u, %s: %.200s", number, found < 0 ? "wrong rows" : "failure",
                 xkv_ctx_error(ctx));
}

static void *run_load(void *user)
{
    load *l = user;
    xkv_ctx *ctx = NULL;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.threads = 1;
    if (xkv_ctx_create(&o, &ctx) != XKV_OK)
        return NULL;
    for (uint64_t random = l->seed; seconds() < l->until && l->wrong[0] == '\0';)
        one_change(ctx, l, &random);
    if (xkv_ctx_memory_used(ctx) != 0)
        snprintf(l->wrong, sizeof l->wrong, "memory was not freed");
    xkv_ctx_free(ctx);
    return NULL;
}

enum { THREADS = 4 };

/* One process; its exit code. */
static int run_process(uint64_t seed, uint64_t cap, double duration)
{
    pthread_t threads[THREADS];
    load loads[THREADS];
    xkv_ctx *ctx = NULL;
    xkv_store *store = NULL;
    int code = 0;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK || xkv_store_open(ctx, t.path, NULL, &store) != XKV_OK) {
        fprintf(stderr, "open: %s\n", xkv_ctx_error(ctx));
        return 1;
    }
    for (uint64_t i = 0; i < THREADS; i++) {
        loads[i] = (load){.store = store, .seed = seed * 100 + i, .cap = cap, .until = seconds() + duration};
        pthread_create(&threads[i], NULL, run_load, &loads[i]);
    }
    for (size_t i = 0; i < THREADS; i++) {
        pthread_join(threads[i], NULL);
        if (loads[i].wrong[0] != '\0')
            fprintf(stderr, "%s\n", loads[i].wrong);
        code |= loads[i].wrong[0] != '\0' || loads[i].hits == 0 || loads[i].puts == 0;
    }
    xkv_store_close(ctx, store);
    xkv_ctx_free(ctx);
    return code;
}

static void assert_sound(void)
{
    xkv_verify_report r;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &r));
    if (r.first[0] != '\0')
        fail_msg("%s", r.first);
    assert_int_equal(r.orphans, 0);
}

static void processes_and_threads_share_a_store(void **state)
{
    (void)state;
    const int processes = is_long() ? 8 : 3;
    pid_t children[8];
    some_extend = true;
    make_store(&t, 0);
    ns = make_namespace(NULL);
    xkv_store_stats s;
    for (uint32_t i = 0; i < NUMBERS; i++)
        assert_ok(t.ctx, put_number(t.ctx, t.store, i));
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    const uint64_t cap = s.bytes / 3;
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, cap, NULL));
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    for (int i = 0; i < processes; i++) {
        children[i] = fork();
        assert_true(children[i] >= 0);
        if (children[i] == 0)
            _exit(run_process((uint64_t)i + 1, cap, is_long() ? 600 : 3));
    }
    for (int i = 0; i < processes; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, 0), children[i]);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
    }
    reopen_store(&t);
    assert_sound();
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_true(s.evictions > 0 && s.hits > 0 && s.corrupt == 0);
    some_extend = false;
    remove_folder(&t);
}

static int change_caps(uint64_t first)
{
    xkv_ctx *ctx = NULL;
    xkv_store *store = NULL;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK || xkv_store_open(ctx, t.path, NULL, &store) != XKV_OK)
        return 1;
    for (uint64_t i = 0; i < 500; i++) {
        if (xkv_store_set_cap(ctx, store, first + i, NULL) != XKV_OK) {
            fprintf(stderr, "%s\n", xkv_ctx_error(ctx));
            return 2;
        }
    }
    xkv_store_close(ctx, store);
    xkv_ctx_free(ctx);
    return 0;
}

/* The properties stay a store's, and say the same as the index. */
static void processes_change_the_cap(void **state)
{
    (void)state;
    pid_t children[2];
    xkv_store_stats before, after;
    make_store(&t, 0);
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    for (uint64_t i = 0; i < 2; i++) {
        children[i] = fork();
        assert_true(children[i] >= 0);
        if (children[i] == 0)
            _exit(change_caps((i + 1) << 40));
    }
    for (size_t i = 0; i < 2; i++) {
        int status;
        assert_int_equal(waitpid(children[i], &status, 0), children[i]);
        assert_int_equal(status, 0);
    }
    reopen_store(&t);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &before));
    char path[128];
    snprintf(path, sizeof path, "%s/index/data.mdb", t.path);
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_int_equal(unlink(path), 0); /* so that a repair takes it from the properties */
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
    reopen_store(&t);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &after));
    assert_int_equal(after.byte_cap, before.byte_cap);
    remove_folder(&t);
}

/* --- Kills -------------------------------------------------------------------------------------------------------- */

enum { GONE, COMMITTED, COMING, LEAVING };

/* What the writers have been promised, in memory that outlives them. */
static _Atomic uint8_t *promised;

/* Under a cap only pinned entries are promised to stay. */
static bool is_pinned(uint32_t number)
{
    return number % 8 < 2;
}

static xkv_status put_promise(xkv_ctx *ctx, xkv_store *store, uint32_t number)
{
    int32_t tokens[LONGEST];
    uint32_t count = prompt_of(number, tokens);
    xkv_put_options o = xkv_put_options_default();
    o.pin = is_pinned(number);
    return put_rows(ctx, store, &ns, tokens, count, &o, NULL);
}

/* Each of two writers has the numbers of its own, so that what one promises the other does not change; but for what it
 * evicts. */
static void write_until_killed(uint64_t random, uint32_t part, bool capped)
{
    xkv_ctx *ctx = NULL;
    xkv_store *store = NULL;
    xkv_match m;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK || xkv_store_open(ctx, t.path, NULL, &store) != XKV_OK)
        _exit(1);
    for (;;) {
        uint32_t number = (uint32_t)(test_random(&random) % (NUMBERS / 2)) * 2 + part;
        if (test_random(&random) % 64 == 0 && !is_fair(xkv_store_collect(ctx, store, 0, NULL)))
            _exit(4);
        if (test_random(&random) % 3 > 0) {
            if (promised[number] == COMMITTED && !capped)
                continue;
            promised[number] = COMING;
            xkv_status status = put_promise(ctx, store, number);
            if (!is_fair(status))
                _exit(3);
            promised[number] = status == XKV_OK ? COMMITTED : GONE;
            continue;
        }
        if (look_up(ctx, store, number, &m) < 0)
            _exit(2);
        int32_t tokens[LONGEST];
        if (m.entry_tokens != prompt_of(number, tokens) || m.tokens != m.entry_tokens)
            continue; /* another one serves it */
        promised[number] = LEAVING;
        xkv_status status = xkv_store_remove(ctx, store, &ns, m.id);
        if (status == XKV_OK || status == XKV_ERROR_NOT_FOUND)
            promised[number] = GONE;
    }
}

static void maintain_until_killed(uint64_t random)
{
    xkv_ctx *ctx = NULL;
    if (xkv_ctx_create(NULL, &ctx) != XKV_OK)
        _exit(1);
    for (;;) {
        if (xkv_store_repair(ctx, t.path, NULL, test_random(&random) % 2, NULL) != XKV_OK)
            _exit(3);
    }
}

/* Bytes of all files of a folder. */
static uint64_t folder_bytes(const char *name, int *count)
{
    char path[128];
    struct stat st;
    uint64_t bytes = 0;
    snprintf(path, sizeof path, "%s/%s", t.path, name);
    DIR *d = opendir(path);
    assert_non_null(d);
    *count = 0;
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.' || fstatat(dirfd(d), e->d_name, &st, 0) != 0)
            continue;
        bytes += (uint64_t)st.st_size;
        ++*count;
    }
    closedir(d);
    return bytes;
}

/* What one number must be now, and is promised from now on. */
static void check_promise(uint32_t number, bool capped)
{
    xkv_match m;
    int32_t tokens[LONGEST];
    int found = look_up(t.ctx, t.store, number, &m);
    bool whole = found == (int)prompt_of(number, tokens);
    assert_true(found >= 0);
    if (promised[number] == COMMITTED && !whole && (!capped || is_pinned(number)))
        fail_msg("entry %u is lost", number);
    whole = whole && m.entry_tokens == m.tokens;
    if (promised[number] == GONE && whole)
        fail_msg("entry %u is back", number);
    promised[number] = whole ? COMMITTED : GONE;
}

/* Nothing promised is lost, nothing removed comes back, nothing is wrong, no space is leaked. */
static void check_after_kill(int kills, bool capped)
{
    xkv_store_stats s;
    int files;
    (void)folder_bytes("tmp", &files);
    assert_true(files <= kills);
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, NULL, &t.store));
    assert_sound();
    for (uint32_t i = 0; i < NUMBERS; i++)
        check_promise(i, capped);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.corrupt, 0);
    assert_int_equal(folder_bytes("blobs", &files), s.bytes);
    assert_int_equal(files, s.entries);
    assert_int_equal(folder_bytes("tmp", &files), 0);
    assert_int_equal(files, 0);
    if (s.byte_cap > 0 && s.bytes > s.byte_cap)
        fail_msg("%llu bytes above the cap", (unsigned long long)(s.bytes - s.byte_cap));
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
}

/* Let two writers, or now and then one that repairs and compacts, work for a moment, and kill them. How many. */
static int kill_some(uint64_t *random, bool maintain, bool capped)
{
    const struct timespec pause = {0, (long)(test_random(random) % 30000000)};
    const int count = maintain ? 1 : 2;
    pid_t children[2] = {0};
    for (int j = 0; j < count; j++) {
        uint64_t seed = test_random(random);
        children[j] = fork();
        assert_true(children[j] >= 0);
        if (children[j] == 0 && maintain)
            maintain_until_killed(seed);
        if (children[j] == 0)
            write_until_killed(seed, (uint32_t)j, capped);
        if (j == 0)
            nanosleep(&pause, NULL); /* the second one opens what the first one is writing to */
    }
    nanosleep(&pause, NULL);
    for (int j = 0; j < count; j++) {
        int status;
        kill(children[j], SIGKILL);
        assert_int_equal(waitpid(children[j], &status, 0), children[j]);
        if (!WIFSIGNALED(status))
            fail_msg("a writer ended with %d", WEXITSTATUS(status));
    }
    return count;
}

static void kill_writers(uint64_t cap)
{
    const char *seed = getenv("XKV_TEST_SEED");
    uint64_t random = seed != NULL ? strtoull(seed, NULL, 10) : 5;
    const int rounds = is_long() ? 2000 : 60;
    promised = mmap(NULL, NUMBERS, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    assert_true(promised != MAP_FAILED);
    make_store(&t, cap);
    ns = make_namespace(NULL);
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    for (int i = 0; i < rounds; i++) {
        int kills = kill_some(&random, i % 5 == 4, cap > 0);
        if (i % 3 == 0) /* what was removed does not come back from blobs that are still there, either */
            assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
        check_after_kill(kills, cap > 0);
    }
    munmap((void *)(uintptr_t)promised, NUMBERS);
    remove_folder(&t);
}

static void killed_writers_lose_nothing(void **state)
{
    (void)state;
    kill_writers(0);
}

/* Each put evicts, and what is pinned stays. */
static void killed_writers_under_a_cap(void **state)
{
    (void)state;
    kill_writers(SMALL_CAP);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(processes_and_threads_share_a_store),
        cmocka_unit_test(processes_change_the_cap),
        cmocka_unit_test(killed_writers_lose_nothing),
        cmocka_unit_test(killed_writers_under_a_cap),
    };
    if (argc > 1) /* only the test of this name */
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
