/* test_store_race.c - what another process does to a store at the worst moment of a call of this one: between what it
 * reads and what it does because of that.
 *
 * The moments are those at which the library asks for the time, and at which it opens a blob: for the latter this
 * program defines openat() itself. */
#include "store_support.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <lmdb.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SIZE = 40 };

static test_store t;
static xkv_namespace ns;
static uint64_t now;           /* seconds */
static void (*at_clock)(void); /* runs once, when the time is asked for the second time */
static void (*at_blob)(void);  /* runs once, before a blob is opened */
static bool no_memory;
static int clock_calls;
static char logged[4096]; /* all messages */

#pragma GCC visibility push(default)

int openat(int at, const char *path, int flags, ...)
{
    mode_t mode = 0;
    void (*moment)(void) = at_blob;
    if (flags & O_CREAT) {
        va_list args;
        va_start(args, flags);
        mode = (mode_t)va_arg(args, unsigned);
        va_end(args);
    }
    if (moment != NULL && strlen(path) == 81) {
        at_blob = NULL;
        moment();
    }
    return (int)syscall(SYS_openat, at, path, flags, mode);
}

/* For want of memory. */
int mdb_get(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *value)
{
    int (*real)(MDB_txn *, MDB_dbi, MDB_val *, MDB_val *);
    *(void **)&real = dlsym(RTLD_NEXT, "mdb_get");
    return no_memory ? ENOMEM : real(txn, dbi, key, value);
}

#pragma GCC visibility pop

static uint64_t test_clock(void *user)
{
    void (*moment)(void) = at_clock;
    (void)user;
    if (moment != NULL && ++clock_calls == 2) {
        at_clock = NULL;
        moment();
    }
    return now * 1000000u;
}

static void keep_log(void *user, xkv_log_level level, const char *message)
{
    size_t used = strlen(logged);
    (void)user;
    (void)level;
    snprintf(logged + used, sizeof logged - used, "%s\n", message);
}

static void open_store(uint32_t access)
{
    xkv_store_options o = xkv_store_options_default();
    o.clock = test_clock;
    o.access = access;
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
}

static int setup(void **state)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    (void)state;
    make_folder(&t);
    xkv_ctx_free(t.ctx);
    o.threads = 1;
    o.log = keep_log;
    assert_int_equal(xkv_ctx_create(&o, &t.ctx), XKV_OK);
    ns = make_namespace(NULL);
    now = 100;
    clock_calls = 0;
    logged[0] = '\0';
    assert_ok(t.ctx, xkv_store_create(t.ctx, t.path, NULL));
    open_store(XKV_STORE_READ_WRITE);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    at_clock = at_blob = NULL;
    remove_folder(&t);
    return 0;
}

static void put(uint64_t seed, uint64_t ttl)
{
    int32_t tokens[SIZE];
    xkv_put_options o = xkv_put_options_default();
    o.ttl = ttl;
    make_tokens(seed, 50000, tokens, SIZE);
    assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, SIZE, &o, NULL));
}

static xkv_match look_up(uint64_t seed)
{
    int32_t tokens[SIZE];
    xkv_match m;
    xkv_hit *hit = NULL;
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    make_tokens(seed, 50000, tokens, SIZE);
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, &hit));
    xkv_hit_close(t.ctx, hit);
    return m;
}

/* A child that opens the store, at a time of its own, and does something. */
static void in_another_process(uint64_t time, void (*what)(void))
{
    int status;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        now = time;
        t.store = NULL;
        open_store(XKV_STORE_READ_WRITE);
        what();
        xkv_store_close(t.ctx, t.store);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

/* --- Expiry ------------------------------------------------------------------------------------------------------- */

static void put_again(void)
{
    put(1, 1000);
}

static void renew(void)
{
    in_another_process(105, put_again);
}

/* The lookup has seen that the entry is expired; by the time it may remove it, the entry is not. */
static void a_renewed_entry_does_not_expire(void **state)
{
    (void)state;
    xkv_store_stats s;
    put(1, 10);
    now = 120;
    at_clock = renew;
    assert_int_equal(look_up(1).reason, XKV_MATCH_FOUND);
    assert_null(at_clock);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.expirations, 0);
    assert_int_equal(s.entries, 1);
}

/* --- Eviction ----------------------------------------------------------------------------------------------------- */

static void remove_all(void)
{
    assert_ok(t.ctx, xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
}

static void evict(void)
{
    in_another_process(100, remove_all);
}

/* The lookup has found the entry in the index; by the time it opens the blob, it is gone. That is no damage. */
static void what_goes_meanwhile_is_a_plain_miss(void **state)
{
    (void)state;
    static const uint32_t accesses[] = {XKV_STORE_READ_WRITE, XKV_STORE_READ_ONLY};
    for (size_t i = 0; i < 2; i++) {
        xkv_store_stats s;
        open_store(XKV_STORE_READ_WRITE);
        put(1, 0);
        open_store(accesses[i]);
        logged[0] = '\0';
        at_blob = evict;
        uint32_t reason = look_up(1).reason;
        assert_null(at_blob);
        assert_true(reason == XKV_MATCH_NONE || reason == XKV_MATCH_GONE);
        assert_string_equal(logged, "");
        assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
        assert_int_equal(s.corrupt, 0);
    }
}

/* --- Readers ------------------------------------------------------------------------------------------------------ */

/* A process that is killed while it reads the index. */
static void kill_a_reader(void)
{
    char path[128], ready;
    int ends[2], status;
    snprintf(path, sizeof path, "%s/index", t.path);
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        MDB_env *env = NULL;
        MDB_txn *txn = NULL;
        bool reads = mdb_env_create(&env) == 0 && mdb_env_open(env, path, MDB_NOTLS, 0600) == 0 &&
                     mdb_txn_begin(env, NULL, MDB_RDONLY, &txn) == 0;
        (void)!write(ends[1], reads ? "y" : "n", 1);
        for (;;)
            pause();
    }
    assert_int_equal(read(ends[0], &ready, 1), 1);
    assert_int_equal(ready, 'y');
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, &status, 0), child);
    close(ends[0]);
    close(ends[1]);
}

/* Pages that it could still have read are used again before the map grows. */
static void killed_readers_hold_no_pages(void **state)
{
    (void)state;
    xkv_store_options o = xkv_store_options_default();
    xkv_store_stats s;
    o.map_size = 256 * 1024;
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
    put(0, 0);
    kill_a_reader();
    for (uint64_t i = 1; i < 100; i++) {
        put(i, 0);
        assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, i + 1));
    }
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_int_equal(s.map_bytes, o.map_size);
}

/* A lookup that fails is no miss: nothing is said of what is stored. */
static void failures_of_the_machine_are_no_misses(void **state)
{
    int32_t tokens[SIZE];
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    xkv_match m;
    xkv_hit *hit = NULL;
    (void)state;
    put(1, 0);
    put(2, 0);
    make_tokens(1, 50000, tokens, SIZE);
    no_memory = true;
    xkv_status status = xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, &hit);
    no_memory = false;
    assert_int_equal(status, XKV_ERROR_MEMORY);
    assert_null(hit);
    assert_ok(t.ctx, xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL));
    assert_int_equal(m.tokens, SIZE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(a_renewed_entry_does_not_expire, setup, teardown),
        cmocka_unit_test_setup_teardown(what_goes_meanwhile_is_a_plain_miss, setup, teardown),
        cmocka_unit_test_setup_teardown(killed_readers_hold_no_pages, setup, teardown),
        cmocka_unit_test_setup_teardown(failures_of_the_machine_are_no_misses, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
