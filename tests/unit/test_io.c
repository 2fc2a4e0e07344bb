/* test_io.c - inputs and atomic files, and the same with the n-th system call failing. */
#include "base.h"
#include "io_hooks.h"
#include "xkv/format.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cmocka.h>

static const char old_text[] = "the old contents", new_text[] = "new contents, complete";

static char folder[64], target[96];
static xkv_ctx *ctx;

/* --- A folder per test -------------------------------------------------------------------------------------------- */

static int count_files(void)
{
    int n = 0;
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
    closedir(d);
    return n;
}

static void put(const char *path, const char *text)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static bool holds(const char *path, const char *text)
{
    char bytes[256];
    FILE *f = fopen(path, "rb");
    if (f == NULL)
        return false;
    size_t n = fread(bytes, 1, sizeof bytes, f);
    fclose(f);
    return n == strlen(text) && memcmp(bytes, text, n) == 0;
}

static int setup(void **state)
{
    (void)state;
    const char *base = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%.40s/xkv-io-XXXXXX", base && strlen(base) < 40 ? base : "/tmp");
    if (mkdtemp(folder) == NULL)
        return -1;
    snprintf(target, sizeof target, "%s/target", folder);
    umask(022);
    return xkv_ctx_create(NULL, &ctx) == XKV_OK ? 0 : -1;
}

static int teardown(void **state)
{
    (void)state;
    xkv_io = &xkv_io_real;
    unlink(target);
    int leaked = xkv_ctx_memory_used(ctx) != 0;
    xkv_ctx_free(ctx);
    return rmdir(folder) != 0 || leaked; /* a file that is left makes rmdir fail */
}

/* --- Inputs ------------------------------------------------------------------------------------------------------- */

static void memory_can_be_read(void **state)
{
    (void)state;
    char text[4] = "";
    xkv_input in = xkv_input_from_memory(old_text, sizeof old_text);
    assert_int_equal(in.size, sizeof old_text);
    assert_int_equal(in.read(in.user, ctx, 4, text, 3), XKV_OK);
    assert_string_equal(text, "old");
    xkv_input none = xkv_input_from_memory(NULL, 0);
    assert_int_equal(none.read(none.user, ctx, 0, NULL, 0), XKV_OK);
}

static void files_can_be_read(void **state)
{
    (void)state;
    char text[4] = "";
    xkv_input in;
    put(target, old_text);
    assert_int_equal(xkv_input_open(ctx, target, &in), XKV_OK);
    assert_int_equal(in.size, strlen(old_text));
    assert_string_equal(in.name, target);
    assert_int_equal(in.read(in.user, ctx, 4, text, 3), XKV_OK);
    assert_string_equal(text, "old");
    assert_int_equal(truncate(target, 5), 0);
    assert_int_equal(in.read(in.user, ctx, 4, text, 3), XKV_ERROR_TRUNCATED);
    xkv_input_close(ctx, &in);
    xkv_input_close(ctx, &in);
    xkv_input_close(ctx, NULL);
}

static void only_regular_files_are_inputs(void **state)
{
    (void)state;
    xkv_input in;
    assert_int_equal(xkv_input_open(ctx, target, &in), XKV_ERROR_IO);
    assert_non_null(strstr(xkv_ctx_error(ctx), target));
    assert_int_equal(xkv_input_open(ctx, folder, &in), XKV_ERROR_IO);
    assert_non_null(strstr(xkv_ctx_error(ctx), "not a regular file"));
    assert_int_equal(mkfifo(target, 0600), 0);
    assert_int_equal(xkv_input_open(ctx, target, &in), XKV_ERROR_IO);
}

static ssize_t one_byte_pread(int fd, void *dst, size_t size, off_t offset)
{
    static int turn;
    (void)size;
    if (turn++ % 2 == 0) {
        errno = EINTR;
        return -1;
    }
    return pread(fd, dst, 1, offset);
}

static void short_and_interrupted_reads_go_on(void **state)
{
    (void)state;
    char text[sizeof old_text] = "";
    xkv_input in;
    xkv_io_hooks hooks = xkv_io_real;
    hooks.pread = one_byte_pread;
    xkv_io = &hooks;
    put(target, old_text);
    assert_int_equal(xkv_input_open(ctx, target, &in), XKV_OK);
    assert_int_equal(in.read(in.user, ctx, 0, text, strlen(old_text)), XKV_OK);
    assert_string_equal(text, old_text);
    xkv_input_close(ctx, &in);
}

/* --- Files -------------------------------------------------------------------------------------------------------- */

static xkv_status write_text(xkv_file *file)
{
    /* Back to front: any order is allowed. */
    xkv_output out = xkv_file_output(file);
    XKV_TRY(out.write(out.user, ctx, 4, new_text + 4, strlen(new_text) - 4));
    return out.write(out.user, ctx, 0, new_text, 4);
}

static xkv_status map_text(xkv_file *file)
{
    uint8_t *data;
    XKV_TRY(xkv_file_map(ctx, file, strlen(new_text), &data));
    memcpy(data, new_text, strlen(new_text));
    return XKV_OK;
}

static xkv_status make_target(int overwrite, xkv_status (*fill)(xkv_file *file))
{
    xkv_file *file = NULL;
    XKV_TRY(xkv_file_create(ctx, target, overwrite, &file));
    xkv_status status = fill(file);
    if (status == XKV_OK)
        return xkv_file_commit(ctx, file);
    xkv_file_abort(ctx, file);
    return status;
}

static mode_t mode_of(const char *path)
{
    struct stat st;
    assert_int_equal(stat(path, &st), 0);
    return st.st_mode & 07777;
}

static void a_file_appears_when_complete(void **state)
{
    (void)state;
    xkv_file *file = NULL;
    assert_int_equal(xkv_file_create(ctx, target, 0, &file), XKV_OK);
    assert_int_equal(write_text(file), XKV_OK);
    assert_int_equal(access(target, F_OK), -1);
    assert_int_equal(count_files(), 1);
    assert_int_equal(xkv_file_commit(ctx, file), XKV_OK);
    assert_true(holds(target, new_text));
    assert_int_equal(count_files(), 1);
    assert_int_equal(mode_of(target), 0644);
}

static void a_replaced_file_keeps_its_permissions(void **state)
{
    (void)state;
    put(target, old_text);
    assert_int_equal(chmod(target, 0640), 0);
    assert_int_equal(make_target(1, map_text), XKV_OK);
    assert_true(holds(target, new_text));
    assert_int_equal(mode_of(target), 0640);
}

static void an_existing_file_is_not_replaced(void **state)
{
    (void)state;
    xkv_file *file = NULL;
    put(target, old_text);
    assert_int_equal(xkv_file_create(ctx, target, 0, &file), XKV_ERROR_EXISTS);
    unlink(target);
    /* One that appears later is not either. */
    assert_int_equal(xkv_file_create(ctx, target, 0, &file), XKV_OK);
    put(target, old_text);
    assert_int_equal(xkv_file_commit(ctx, file), XKV_ERROR_EXISTS);
    assert_true(holds(target, old_text));
    assert_int_equal(count_files(), 1);
}

static int no_rename_new(const char *from, const char *to)
{
    (void)from;
    (void)to;
    errno = EINVAL;
    return -1;
}

static void filesystems_without_renameat2_get_a_link(void **state)
{
    (void)state;
    xkv_io_hooks hooks = xkv_io_real;
    hooks.rename_new = no_rename_new;
    xkv_io = &hooks;
    assert_int_equal(make_target(0, write_text), XKV_OK);
    assert_true(holds(target, new_text));
    assert_int_equal(count_files(), 1);
    unlink(target);

    xkv_file *file = NULL;
    assert_int_equal(xkv_file_create(ctx, target, 0, &file), XKV_OK);
    put(target, old_text);
    assert_int_equal(xkv_file_commit(ctx, file), XKV_ERROR_EXISTS);
    assert_true(holds(target, old_text));
}

static void an_aborted_file_leaves_nothing(void **state)
{
    (void)state;
    xkv_file *file = NULL;
    put(target, old_text);
    assert_int_equal(xkv_file_create(ctx, target, 1, &file), XKV_OK);
    assert_int_equal(map_text(file), XKV_OK);
    xkv_file_abort(ctx, file);
    xkv_file_abort(ctx, NULL);
    assert_true(holds(target, old_text));
    assert_int_equal(count_files(), 1);
}

static void bad_targets_are_refused(void **state)
{
    (void)state;
    xkv_file *file = NULL;
    char path[128];
    assert_int_equal(xkv_file_create(ctx, "", 1, &file), XKV_ERROR_ARGUMENT);
    snprintf(path, sizeof path, "%s/", folder);
    assert_int_equal(xkv_file_create(ctx, path, 1, &file), XKV_ERROR_ARGUMENT);
    assert_int_equal(xkv_file_create(ctx, folder, 1, &file), XKV_ERROR_IO);
    assert_int_equal(xkv_file_create(ctx, folder, 0, &file), XKV_ERROR_EXISTS);
    snprintf(path, sizeof path, "%s/none/target", folder);
    assert_int_equal(xkv_file_create(ctx, path, 1, &file), XKV_ERROR_IO);
    assert_int_equal(xkv_file_create(ctx, "/dev/null", 1, &file), XKV_ERROR_IO);
    assert_null(file);
}

static void maps_of_any_size(void **state)
{
    (void)state;
    uint8_t *data = NULL;
    xkv_file *file = NULL;
    assert_int_equal(xkv_file_create(ctx, target, 0, &file), XKV_OK);
    assert_int_equal(xkv_file_map(ctx, file, (uint64_t)INT64_MAX + 1, &data), XKV_ERROR_LIMIT);
    assert_int_equal(xkv_file_map(ctx, file, 0, &data), XKV_OK);
    assert_non_null(data);
    assert_int_equal(xkv_file_map(ctx, file, 100000, &data), XKV_OK);
    for (int i = 0; i < 100000; i++)
        assert_int_equal(data[i], 0);
    assert_int_equal(xkv_file_map(ctx, file, 5, &data), XKV_ERROR_ARGUMENT);
    xkv_file_abort(ctx, file);
}

static void a_file_size_limit_is_no_space(void **state)
{
    (void)state;
    struct rlimit old, low;
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    low = old;
    low.rlim_cur = 10;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    xkv_status written = make_target(0, write_text), mapped = make_target(0, map_text);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    signal(SIGXFSZ, handler);
    assert_int_equal(written, XKV_ERROR_NO_SPACE);
    assert_int_equal(mapped, XKV_ERROR_NO_SPACE);
    assert_int_equal(count_files(), 0);
}

static void an_unnamed_file_can_be_copied_out(void **state)
{
    (void)state;
    xkv_file *file = NULL;
    int ends[2];
    char text[64] = "";
    assert_int_equal(pipe(ends), 0);
    assert_int_equal(xkv_file_create(ctx, NULL, 0, &file), XKV_OK);
    assert_int_equal(write_text(file), XKV_OK);
    assert_int_equal(xkv_file_copy_to_fd(ctx, file, ends[1]), XKV_OK);
    assert_int_equal(read(ends[0], text, sizeof text), strlen(new_text));
    assert_string_equal(text, new_text);
    assert_int_equal(xkv_file_commit(ctx, file), XKV_OK);
    close(ends[0]);

    void (*handler)(int) = signal(SIGPIPE, SIG_IGN);
    assert_int_equal(xkv_file_create(ctx, NULL, 0, &file), XKV_OK);
    assert_int_equal(map_text(file), XKV_OK);
    assert_int_equal(xkv_file_copy_to_fd(ctx, file, ends[1]), XKV_ERROR_IO);
    xkv_file_abort(ctx, file);
    signal(SIGPIPE, handler);
    close(ends[1]);
}

/* --- The n-th call fails ------------------------------------------------------------------------------------------ */

/* unlink, close and munmap are left out: they are the cleaning up, and what they fail at cannot be undone. */
static int calls_until_failure, failure;
static bool renamed;

static bool fails_now(void)
{
    return --calls_until_failure == 0;
}

#define FAILING(type, name, parameters, arguments)                                                                     \
    static type failing_##name parameters                                                                              \
    {                                                                                                                  \
        if (!fails_now())                                                                                              \
            return xkv_io_real.name arguments;                                                                         \
        errno = failure;                                                                                               \
        return (type)-1;                                                                                               \
    }

FAILING(int, open, (const char *path, int flags, mode_t mode), (path, flags, mode))
FAILING(int, fstat, (int fd, struct stat *st), (fd, st))
FAILING(int, lstat, (const char *path, struct stat *st), (path, st))
FAILING(ssize_t, pread, (int fd, void *dst, size_t size, off_t offset), (fd, dst, size, offset))
FAILING(ssize_t, pwrite, (int fd, const void *src, size_t size, off_t offset), (fd, src, size, offset))
FAILING(void *, mmap, (void *a, size_t size, int p, int flags, int fd, off_t o), (a, size, p, flags, fd, o))
FAILING(int, msync, (void *address, size_t size, int flags), (address, size, flags))
FAILING(int, fchmod, (int fd, mode_t mode), (fd, mode))
FAILING(int, fsync, (int fd), (fd))
FAILING(int, link, (const char *from, const char *to), (from, to))

static int failing_fallocate(int fd, off_t offset, off_t size)
{
    return fails_now() ? failure : xkv_io_real.fallocate(fd, offset, size);
}

static int failing_rename(const char *from, const char *to)
{
    errno = failure;
    int result = fails_now() ? -1 : xkv_io_real.rename(from, to);
    renamed = renamed || result == 0;
    return result;
}

static int failing_rename_new(const char *from, const char *to)
{
    errno = failure;
    int result = fails_now() ? -1 : xkv_io_real.rename_new(from, to);
    renamed = renamed || result == 0;
    return result;
}

static xkv_io_hooks failing_hooks(void)
{
    xkv_io_hooks h = xkv_io_real;
    h.open = failing_open;
    h.fstat = failing_fstat;
    h.lstat = failing_lstat;
    h.pread = failing_pread;
    h.pwrite = failing_pwrite;
    h.fallocate = failing_fallocate;
    h.mmap = failing_mmap;
    h.msync = failing_msync;
    h.fchmod = failing_fchmod;
    h.fsync = failing_fsync;
    h.rename = failing_rename;
    h.rename_new = failing_rename_new;
    h.link = failing_link;
    return h;
}

/* Make the target with call n failing, for n = 1, 2, ... until none fails. Afterwards the folder holds what it held
 * before, or the complete new file; never anything else. */
static void fail_each_call(int overwrite, xkv_status (*fill)(xkv_file *file), int error, xkv_status expected)
{
    xkv_io_hooks hooks = failing_hooks();
    int n = 1, failures = 0;
    for (;; n++) {
        unlink(target);
        if (overwrite)
            put(target, old_text);
        calls_until_failure = n;
        failure = error;
        renamed = false;
        xkv_io = &hooks;
        xkv_status status = make_target(overwrite, fill);
        xkv_io = &xkv_io_real;
        bool complete = holds(target, new_text);
        bool as_before = overwrite ? holds(target, old_text) : access(target, F_OK) != 0;
        assert_true(status == XKV_OK || renamed ? complete : as_before);
        assert_int_equal(count_files(), complete || overwrite);
        assert_int_equal(xkv_ctx_memory_used(ctx), 0);
        if (calls_until_failure > 0) {
            assert_int_equal(status, XKV_OK);
            break;
        }
        if (status != XKV_OK) {
            assert_int_equal(status, expected);
            assert_string_not_equal(xkv_ctx_error(ctx), "");
            failures++;
        }
    }
    /* lstat, open, 2 writes or fallocate + mmap, fchmod, 2 fsync, open of the folder, rename */
    assert_true(failures >= 8);
}

static void each_failing_call_leaves_the_old_file(void **state)
{
    (void)state;
    fail_each_call(1, write_text, EIO, XKV_ERROR_IO);
    fail_each_call(1, map_text, ENOSPC, XKV_ERROR_NO_SPACE);
}

static void each_failing_call_leaves_no_file(void **state)
{
    (void)state;
    fail_each_call(0, write_text, EDQUOT, XKV_ERROR_NO_SPACE);
    fail_each_call(0, map_text, EIO, XKV_ERROR_IO);
}

static void interrupted_calls_are_repeated(void **state)
{
    (void)state;
    xkv_io_hooks hooks = xkv_io_real;
    hooks.open = failing_open;
    hooks.pwrite = failing_pwrite;
    hooks.fallocate = failing_fallocate;
    failure = EINTR;
    for (int n = 1; n < 8; n++) {
        xkv_io = &hooks;
        calls_until_failure = n;
        assert_int_equal(make_target(1, n % 2 ? write_text : map_text), XKV_OK);
        xkv_io = &xkv_io_real;
        assert_true(holds(target, new_text));
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(memory_can_be_read),
        TEST(files_can_be_read),
        TEST(only_regular_files_are_inputs),
        TEST(short_and_interrupted_reads_go_on),
        TEST(a_file_appears_when_complete),
        TEST(a_replaced_file_keeps_its_permissions),
        TEST(an_existing_file_is_not_replaced),
        TEST(filesystems_without_renameat2_get_a_link),
        TEST(an_aborted_file_leaves_nothing),
        TEST(bad_targets_are_refused),
        TEST(maps_of_any_size),
        TEST(a_file_size_limit_is_no_space),
        TEST(an_unnamed_file_can_be_copied_out),
        TEST(each_failing_call_leaves_the_old_file),
        TEST(each_failing_call_leaves_no_file),
        TEST(interrupted_calls_are_repeated),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
