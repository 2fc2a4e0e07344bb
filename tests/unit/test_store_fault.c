/* test_store_fault.c - every system call of every change of a store fails, or is the last one before the process is
 * killed, one call after another. Whatever happens: the store opens, nothing is wrong in it, what was committed is
 * there, and what was not is not there in part.
 *
 * This program defines the system calls itself, so that also those of LMDB come by here. */
#include "store_support.h"

#include "base.h"
#include "xkv/hook.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* --- System calls ------------------------------------------------------------------------------------------------- */

enum { COUNT, FAIL_ONCE, FAIL_ON, KILL };

static int mode;
static long fail_at, calls; /* fail_at 0: let all pass */
static int fail_with;       /* errno */

/* True when this call shall fail. */
static bool fails(void)
{
    if (fail_at == 0 || (++calls != fail_at && !(mode == FAIL_ON && calls > fail_at)))
        return false;
    if (mode == KILL)
        syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    errno = fail_with;
    return mode != COUNT;
}

#pragma GCC visibility push(default) /* LMDB's library must see them */

#define CALL(number, ...) (fails() ? -1 : (int)syscall(number, __VA_ARGS__))

static mode_t mode_of(int flags, va_list args)
{
    return flags & O_CREAT ? (mode_t)va_arg(args, unsigned) : 0;
}

int open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t m = mode_of(flags, args);
    va_end(args);
    return CALL(SYS_openat, AT_FDCWD, path, flags, m);
}

int openat(int at, const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t m = mode_of(flags, args);
    va_end(args);
    return CALL(SYS_openat, at, path, flags, m);
}

ssize_t pread(int fd, void *dst, size_t size, off_t offset)
{
    return fails() ? -1 : syscall(SYS_pread64, fd, dst, size, offset);
}

ssize_t pwrite(int fd, const void *src, size_t size, off_t offset)
{
    return fails() ? -1 : syscall(SYS_pwrite64, fd, src, size, offset);
}

ssize_t writev(int fd, const struct iovec *list, int count)
{
    return fails() ? -1 : syscall(SYS_writev, fd, list, count);
}

ssize_t write(int fd, const void *src, size_t size)
{
    if (fd <= STDERR_FILENO) /* what the test says */
        return syscall(SYS_write, fd, src, size);
    return fails() ? -1 : syscall(SYS_write, fd, src, size);
}

void *mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset)
{
    if (fd >= 0 && fails()) /* memory for malloc() is another matter */
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, address, size, protection, flags, fd, offset);
}

static ino_t counted; /* a file or folder, how often it is synced */
static int syncs;

int fsync(int fd)
{
    struct stat st;
    syncs += counted != 0 && fstat(fd, &st) == 0 && st.st_ino == counted;
    return CALL(SYS_fsync, fd);
}

int fdatasync(int fd)
{
    return CALL(SYS_fdatasync, fd);
}

int ftruncate(int fd, off_t size)
{
    return CALL(SYS_ftruncate, fd, size);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags)
{
    return CALL(SYS_linkat, from_at, from, to_at, to, flags);
}

int renameat(int from_at, const char *from, int to_at, const char *to)
{
    return CALL(SYS_renameat2, from_at, from, to_at, to, 0);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags)
{
    return CALL(SYS_renameat2, from_at, from, to_at, to, flags);
}

int unlinkat(int at, const char *path, int flags)
{
    return CALL(SYS_unlinkat, at, path, flags);
}

int mkdirat(int at, const char *path, mode_t m)
{
    return CALL(SYS_mkdirat, at, path, m);
}

int flock(int fd, int operation)
{
    return CALL(SYS_flock, fd, operation);
}

int fchmod(int fd, mode_t m)
{
    return CALL(SYS_fchmod, fd, m);
}

#pragma GCC visibility pop

/* --- Changes ------------------------------------------------------------------------------------------------------ */

enum { ENTRIES = 4, SIZE = 40, CHUNK = 32, EXTENDED = 2 * SIZE };

static test_store t;
static xkv_namespace ns;

static xkv_status put_chunked(const int32_t *tokens, uint32_t count, xkv_put_report *report)
{
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_options o = xkv_put_options_default();
    pack.chunk_tokens = CHUNK;
    o.pack = &pack;
    return put_rows(t.ctx, t.store, &ns, tokens, count, &o, report);
}

static xkv_status put_number(uint64_t number)
{
    int32_t tokens[SIZE];
    make_tokens(number / 2, 50000, tokens, SIZE); /* pairs share their first half */
    tokens[SIZE / 2] += (int32_t)(number % 2);
    return put_chunked(tokens, SIZE, NULL);
}

/* 1: found and right; 0: not found, or a shorter prefix of another one. */
static int look_up(uint64_t number)
{
    int32_t tokens[SIZE];
    make_tokens(number / 2, 50000, tokens, SIZE);
    tokens[SIZE / 2] += (int32_t)(number % 2);
    return find_rows(t.ctx, t.store, &ns, tokens, SIZE).tokens == SIZE;
}

static xkv_status run_put(void)
{
    return put_number(ENTRIES);
}

static xkv_status run_evicting_put(void)
{
    xkv_store_stats s;
    xkv_status status = xkv_store_get_stats(t.ctx, t.store, &s);
    if (status == XKV_OK)
        status = xkv_store_set_cap(t.ctx, t.store, s.bytes, NULL);
    return status == XKV_OK ? put_number(ENTRIES) : status;
}

static xkv_status run_remove(void)
{
    return xkv_store_remove(t.ctx, t.store, &ns, 2);
}

static xkv_status repair(int compact)
{
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    return xkv_store_repair(t.ctx, t.path, NULL, compact, NULL);
}

/* What was removed does not come back from a blob that could not be deleted. */
static xkv_status run_remove_and_repair(void)
{
    xkv_status status = run_remove();
    if (status == XKV_OK)
        status = repair(0);
    if (status != XKV_OK)
        return status;
    fail_at = 0;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, NULL, &t.store));
    if (look_up(1))
        fail_msg("call %ld: the removed entry is back", calls);
    return XKV_OK;
}

/* --- Entries that extend others ----------------------------------------------------------------------------------- */

/* A prompt that goes on where entry 1 ends, in the chunk before. */
static void extended_tokens(int32_t tokens[EXTENDED])
{
    make_tokens(0, 50000, tokens, SIZE);
    make_tokens(99, 50000, tokens + SIZE, SIZE);
}

static xkv_status run_extend(void)
{
    int32_t tokens[EXTENDED];
    xkv_put_report report;
    extended_tokens(tokens);
    xkv_status status = put_chunked(tokens, EXTENDED, &report);
    if (status == XKV_OK && calls < fail_at) /* nothing has failed so far */
        assert_int_equal(report.base_tokens, CHUNK);
    return status;
}

/* Whatever is found of it is right. */
static uint32_t look_up_extended(void)
{
    int32_t tokens[EXTENDED];
    extended_tokens(tokens);
    return find_rows(t.ctx, t.store, &ns, tokens, EXTENDED).tokens;
}

static xkv_status run_extend_and_evict(void)
{
    xkv_store_stats s;
    xkv_status status = run_extend();
    if (status == XKV_OK)
        status = xkv_store_get_stats(t.ctx, t.store, &s);
    return status == XKV_OK ? xkv_store_set_cap(t.ctx, t.store, s.bytes / 3, NULL) : status;
}

static xkv_status run_extend_and_remove(void)
{
    xkv_status status = run_extend();
    return status == XKV_OK ? xkv_store_remove(t.ctx, t.store, &ns, 1) : status;
}

static xkv_status run_extend_and_repair(void)
{
    xkv_status status = run_extend();
    if (status == XKV_OK)
        status = repair(0);
    if (status != XKV_OK)
        return status;
    fail_at = 0;
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, NULL, &t.store));
    assert_int_equal(look_up_extended(), EXTENDED);
    return XKV_OK;
}

static xkv_status run_collect(void)
{
    return xkv_store_collect(t.ctx, t.store, 1, NULL);
}

static xkv_status run_pin(void)
{
    return xkv_store_pin(t.ctx, t.store, &ns, 1, 1);
}

static xkv_status run_reopen(void)
{
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    return xkv_store_open(t.ctx, t.path, NULL, &t.store);
}

static xkv_status run_repair(void)
{
    return repair(0);
}

static xkv_status run_compact(void)
{
    return repair(1);
}

/* --- Through the hook --------------------------------------------------------------------------------------------- */

static char last_log[256];

static void keep_log(void *user, xkv_log_level level, const char *message)
{
    (void)user;
    (void)level;
    snprintf(last_log, sizeof last_log, "%s", message);
}

static xkv_status make_hook(xkv_hook **hook)
{
    xkv_ctx_options context = xkv_ctx_options_default();
    xkv_hook_options o = xkv_hook_options_default();
    context.log = keep_log;
    o.context = &context;
    return xkv_hook_create(t.ctx, t.store, &o, hook);
}

/* The put runs in the background, where its failure is logged and counted. */
static xkv_status save_and_wait(xkv_hook *hook)
{
    int32_t tokens[SIZE];
    xkv_hook_counters c;
    make_tokens(ENTRIES / 2, 50000, tokens, SIZE);
    rows *r = make_rows(tokens, SIZE);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    xkv_status status = xkv_hook_save(t.ctx, hook, &ns, &prompt, &r->geometry, r->views, NULL, NULL);
    free(r);
    if (status == XKV_OK)
        status = xkv_hook_flush(t.ctx, hook, XKV_HOOK_FOREVER);
    xkv_hook_get_counters(hook, &c);
    if (status == XKV_OK && c.saves_failed > 0)
        status = xkv_fail(t.ctx, XKV_ERROR_IO, "%s", last_log);
    return status;
}

static xkv_status run_save(void)
{
    xkv_hook *hook = NULL;
    last_log[0] = '\0';
    xkv_status status = make_hook(&hook);
    if (status == XKV_OK)
        status = save_and_wait(hook);
    xkv_hook_close(hook);
    return status;
}

/* A load that says it went well has all rows. */
static xkv_status match_and_load(xkv_hook *hook)
{
    int32_t tokens[SIZE];
    xkv_hook_found f;
    xkv_hook_hit *hit = NULL;
    make_tokens(1, 50000, tokens, SIZE);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    xkv_status status = xkv_hook_match(t.ctx, hook, &ns, &prompt, NULL, &f, &hit);
    if (status != XKV_OK || hit == NULL)
        return status;
    rows *expected = make_rows(tokens, f.tokens), *got = make_rows(NULL, f.tokens);
    status = xkv_hook_load(t.ctx, hit, &got->geometry, got->views, NULL);
    if (status == XKV_OK)
        assert_memory_equal(got->data, expected->data, sizeof got->data);
    free(expected);
    free(got);
    xkv_hook_hit_close(hit);
    return status;
}

static xkv_status run_load(void)
{
    xkv_hook *hook = NULL;
    xkv_status status = make_hook(&hook);
    if (status == XKV_OK)
        status = match_and_load(hook);
    xkv_hook_close(hook);
    return status;
}

typedef struct change {
    const char *name;
    xkv_status (*run)(void);
    uint32_t first_lost, last_lost; /* entries that may be gone afterwards */
    long least;                     /* calls it takes, so that the loop is known to reach the inside */
} change;

static const change changes[] = {
    {"put", run_put, 1, 0, 20},
    {"put that evicts", run_evicting_put, 0, 3, 30},
    {"remove", run_remove, 1, 1, 5},
    {"collect", run_collect, 1, 0, 8},
    {"pin", run_pin, 1, 0, 4},
    {"reopen", run_reopen, 1, 0, 15},
    {"repair", run_repair, 1, 0, 40},
    {"compact", run_compact, 1, 0, 20},
    {"remove and repair", run_remove_and_repair, 1, 1, 40},
    {"save", run_save, 1, 0, 20},
    {"load", run_load, 1, 0, 4},
    {"extend", run_extend, 1, 0, 20},
    {"extend and evict", run_extend_and_evict, 0, 3, 30},
    {"extend and remove", run_extend_and_remove, 0, 0, 30},
    {"extend and repair", run_extend_and_repair, 1, 0, 60},
};

/* --- One attempt -------------------------------------------------------------------------------------------------- */

static void prepare(void)
{
    make_store(&t, 0);
    ns = make_namespace(NULL);
    for (uint64_t i = 0; i < ENTRIES; i++)
        assert_ok(t.ctx, put_number(i));
    look_up(3);
}

static int count_temp(void)
{
    char path[96];
    int n = 0;
    snprintf(path, sizeof path, "%s/tmp", t.path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* Nothing is wrong, and what must be there is. */
static void check(const change *c)
{
    xkv_verify_report r;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &r));
    if (r.first[0] != '\0')
        fail_msg("%s, call %ld: %s", c->name, fail_at, r.first);
    assert_int_equal(r.orphans, 0);
    assert_int_equal(count_temp(), 0);
    for (uint32_t i = 0; i < ENTRIES; i++) {
        if (!look_up(i) && (i < c->first_lost || i > c->last_lost))
            fail_msg("%s: entry %u is lost", c->name, i);
    }
    look_up(ENTRIES);
    look_up_extended();
}

/* With the n-th call failing; true when none failed any more. */
static bool attempt_failing(const change *c, long n)
{
    prepare();
    calls = 0;
    fail_at = n;
    xkv_status status = c->run();
    fail_at = 0;
    if (status != XKV_OK && xkv_ctx_error(t.ctx)[0] == '\0')
        fail_msg("%s, call %ld: no message for %s", c->name, n, xkv_status_string(status));
    if (t.store == NULL)
        assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, NULL, &t.store));
    assert_ok(t.ctx, put_number(10)); /* it goes on working */
    reopen_store(&t);
    assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 0, NULL)); /* what could not be deleted */
    check(c);
    assert_true(look_up(10));
    remove_folder(&t);
    return calls < n;
}

/* The process is killed at the n-th call; true when it was not. */
static bool attempt_killed(const change *c, long n)
{
    int status;
    prepare();
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (xkv_store_open(t.ctx, t.path, NULL, &t.store) != XKV_OK)
            _exit(1);
        look_up(2); /* a use to be written */
        calls = 0;
        fail_at = n;
        (void)!c->run();
        fail_at = 0;
        _exit(calls < n ? 0 : 2);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFSIGNALED(status))
        assert_int_equal(WEXITSTATUS(status), 0);
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, NULL, &t.store));
    check(c);
    remove_folder(&t);
    return !WIFSIGNALED(status);
}

static void try_all(bool (*attempt)(const change *c, long n))
{
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        long n = 1;
        while (!attempt(&changes[i], n))
            n++;
        if (n < changes[i].least)
            fail_msg("%s takes only %ld calls", changes[i].name, n);
    }
}

static void calls_fail_once(void **state)
{
    (void)state;
    mode = FAIL_ONCE;
    fail_with = EIO;
    try_all(attempt_failing);
}

static void the_disk_is_full(void **state)
{
    (void)state;
    mode = FAIL_ON;
    fail_with = ENOSPC;
    try_all(attempt_failing);
}

static void the_process_is_killed(void **state)
{
    (void)state;
    mode = KILL;
    try_all(attempt_killed);
}

/* A put is killed at its n-th call while another process has the store open, whose next put may take the same id; then
 * the store is repaired. True when it was not killed. */
static bool attempt_same_id(long n, bool lose_index)
{
    static const change none = {.name = "two puts", .first_lost = 1};
    char path[128];
    int status;
    prepare();
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        if (xkv_store_open(t.ctx, t.path, NULL, &t.store) != XKV_OK)
            _exit(1);
        calls = 0;
        fail_at = n;
        (void)!put_number(ENTRIES);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_ok(t.ctx, put_number(10));
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
    snprintf(path, sizeof path, "%s/index/data.mdb", t.path);
    if (lose_index)
        assert_int_equal(unlink(path), 0);
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, NULL, &t.store));
    check(&none);
    assert_true(look_up(10));
    remove_folder(&t);
    return !WIFSIGNALED(status);
}

static void ids_of_killed_puts_are_taken_again(void **state)
{
    (void)state;
    mode = KILL;
    for (int lose_index = 0; lose_index < 2; lose_index++) {
        long n = 1;
        while (!attempt_same_id(n, lose_index))
            n++;
        assert_true(n > 20);
    }
}

/* A put that makes room also takes note of what the one before it has deleted: one sync is enough for both. */
static void a_put_syncs_the_blobs_once(void **state)
{
    (void)state;
    char path[96];
    struct stat st;
    xkv_store_stats s;
    prepare();
    snprintf(path, sizeof path, "%s/blobs", t.path);
    assert_int_equal(stat(path, &st), 0);
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, s.bytes, NULL));
    counted = st.st_ino;
    for (uint64_t i = 0; i < 5; i++) {
        syncs = 0;
        assert_ok(t.ctx, put_number(20 + i));
        assert_int_equal(syncs, 1);
    }
    syncs = 0;
    reopen_store(&t); /* nothing is put, and deletions are noted */
    assert_int_equal(syncs, 1);
    counted = 0;
    remove_folder(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(calls_fail_once),
        cmocka_unit_test(the_disk_is_full),
        cmocka_unit_test(the_process_is_killed),
        cmocka_unit_test(ids_of_killed_puts_are_taken_again),
        cmocka_unit_test(a_put_syncs_the_blobs_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
