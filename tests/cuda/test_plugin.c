/* Loading a plug-in, and everything that can be wrong with it, its driver and its devices. Each case is a process of
 * its own, since a process loads a plug-in once. */
#include "emulated.h"

#include <stdio.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

/* What a process finds. */
typedef struct finding {
    xkv_backend_info info;
    xkv_status opened;
    char error[512];
    uint32_t logged;
} finding;

typedef struct world {
    const char *plugin, *backend; /* environment; NULL: not set */
    void (*arrange)(fake_cuda_control *c);
    void (*more)(xkv_ctx *ctx, xkv_device *device, fake_cuda_control *c);
    xkv_device_options options;
} world;

static void count_log(void *user, xkv_log_level level, const char *message)
{
    finding *f = user;
    (void)message;
    f->logged += level == XKV_LOG_ERROR;
}

static void set(const char *name, const char *value)
{
    if (value != NULL)
        setenv(name, value, 1);
    else
        unsetenv(name);
}

static void live(const world *w, finding *f)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    fake_cuda_control *c = emulated_control();
    xkv_device *device = NULL;
    xkv_ctx *ctx;

    set("XKV_CUDA_PLUGIN", w->plugin);
    set("XKV_BACKEND", w->backend);
    if (w->arrange)
        w->arrange(c);
    xkv_backend_get_info(&f->info);
    o.log = count_log;
    o.log_user = f;
    if (xkv_ctx_create(&o, &ctx) != XKV_OK)
        abort();
    f->opened = xkv_device_open(ctx, w->options.struct_size ? &w->options : NULL, &device);
    snprintf(f->error, sizeof f->error, "%s", xkv_ctx_error(ctx));
    if (f->opened == XKV_OK && w->more)
        w->more(ctx, device, c);
    xkv_device_close(ctx, device);
    if (xkv_ctx_memory_used(ctx) != 0)
        abort();
    xkv_ctx_free(ctx);
    if (c->blocks != 0 && (f->opened != XKV_OK || !w->arrange)) /* giving back may be what fails */
        _exit(3);
}

static finding find(const world *w)
{
    finding *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), found;
    int state = 0;
    pid_t child;

    assert_true(shared != MAP_FAILED);
    memset(shared, 0, sizeof *shared);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        live(w, shared);
        _exit(0);
    }
    assert_true(waitpid(child, &state, 0) == child);
    assert_int_equal(state, 0);
    found = *shared;
    munmap(shared, sizeof *shared);
    return found;
}

static void assert_cpu(const finding *f, const char *reason)
{
    assert_int_equal(f->info.backend, XKV_BACKEND_CPU);
    assert_int_equal(f->info.device_count, 0);
    assert_int_equal(f->opened, XKV_ERROR_UNSUPPORTED);
    if (strstr(f->info.reason, reason) == NULL || strstr(f->error, reason) == NULL)
        fail_msg("'%s', '%s': neither may lack '%s'", f->info.reason, f->error, reason);
}

/* --- Plug-ins ----------------------------------------------------------------------------------------------------- */

static void test_no_plugin(void **state)
{
    (void)state;
    world w = {.plugin = "/nowhere/libxkv_cuda.so"};
    finding f = find(&w);
    assert_cpu(&f, "no plug-in: /nowhere/libxkv_cuda.so");
}

static void test_other_version(void **state)
{
    (void)state;
    world w = {.plugin = XKV_OTHER_PLUGIN};
    finding f = find(&w);
    assert_cpu(&f, "plug-in version 999, this library needs 5");
}

static void test_other_library(void **state)
{
    (void)state;
    world w = {.plugin = XKV_NO_PLUGIN};
    finding f = find(&w);
    assert_cpu(&f, "is no plug-in of xkv");
}

/* --- Driver and devices ------------------------------------------------------------------------------------------- */

static void no_driver(fake_cuda_control *c)
{
    c->count_error = cudaErrorInsufficientDriver;
}

static void no_device(fake_cuda_control *c)
{
    c->devices = 0;
}

static void old_device(fake_cuda_control *c)
{
    c->capability = 7;
}

static void test_no_driver(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .arrange = no_driver};
    finding f = find(&w);
    assert_cpu(&f, "driver version is insufficient");
}

static void test_no_device(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .arrange = no_device};
    finding f = find(&w);
    assert_cpu(&f, "the driver has no device");
}

static void test_old_device(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .arrange = old_device};
    finding f = find(&w);
    assert_int_equal(f.opened, XKV_ERROR_UNSUPPORTED);
    assert_non_null(strstr(f.error, "compute capability 7.x"));
}

/* --- Choice ------------------------------------------------------------------------------------------------------- */

static void test_environment(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .backend = "cuda"};
    finding f = find(&w);
    assert_int_equal(f.info.backend, XKV_BACKEND_CUDA);
    assert_int_equal(f.info.device_count, 1);
    assert_string_equal(f.info.reason, "");
    assert_int_equal(f.opened, XKV_OK);

    w.backend = "cpu";
    f = find(&w);
    assert_int_equal(f.info.backend, XKV_BACKEND_CPU);
    assert_string_equal(f.info.reason, "XKV_BACKEND=cpu");
    assert_int_equal(f.opened, XKV_ERROR_UNSUPPORTED);

    w.backend = "gpu";
    f = find(&w);
    assert_int_equal(f.info.backend, XKV_BACKEND_CPU);
    assert_int_equal(f.opened, XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(f.error, "XKV_BACKEND"));
}

static void test_options(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .backend = "cpu", .options = xkv_device_options_default()};
    w.options.backend = XKV_BACKEND_CUDA; /* the program's word is worth more than the environment's */
    assert_int_equal(find(&w).opened, XKV_OK);
    w.options.index = 1;
    assert_int_equal(find(&w).opened, XKV_ERROR_ARGUMENT);
    w.options = xkv_device_options_default();
    w.options.backend = XKV_BACKEND_CPU;
    assert_int_equal(find(&w).opened, XKV_ERROR_UNSUPPORTED);
    w.options.backend = 3;
    assert_int_equal(find(&w).opened, XKV_ERROR_ARGUMENT);
    w.options.backend = XKV_BACKEND_AUTO;
    w.options.staging_count = 5;
    assert_int_equal(find(&w).opened, XKV_ERROR_ARGUMENT);
    w.options.staging_count = 2;
    w.options.staging_bytes = 1000;
    assert_int_equal(find(&w).opened, XKV_ERROR_ARGUMENT);
    w.options = xkv_device_options_default();
    w.options.direct = XKV_DIRECT_ON + 1;
    assert_int_equal(find(&w).opened, XKV_ERROR_ARGUMENT);
}

/* --- Failures ----------------------------------------------------------------------------------------------------- */

static uint64_t fail_at;
static cudaError_t fail_with;

static void fail_once(fake_cuda_control *c)
{
    c->fail_at = fail_at;
    c->error = fail_with;
}

/* Whichever call of the runtime fails while a device is opened, the status says so and nothing is left behind. */
static void test_failing_calls(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .arrange = fail_once};
    fail_with = cudaErrorMemoryAllocation;
    uint32_t failures = 0;
    for (fail_at = 3; fail_at < 200; fail_at++) { /* the first two count the devices */
        finding f = find(&w);
        if (f.opened == XKV_OK)
            break;
        assert_int_equal(f.opened, XKV_ERROR_MEMORY);
        assert_non_null(strstr(f.error, "cud"));
        failures++;
    }
    assert_in_range(failures, 10, 150);
}

static void small_device(fake_cuda_control *c)
{
    c->memory = 1u << 20;
}

static void test_small_device(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .arrange = small_device};
    finding f = find(&w);
    assert_int_equal(f.opened, XKV_ERROR_MEMORY);
    assert_non_null(strstr(f.error, "out of memory"));
}

/* An error that breaks the context: logged once, and every call after it fails. */
static void break_it(xkv_ctx *ctx, xkv_device *device, fake_cuda_control *c)
{
    xkv_device_info info;
    xkv_staging *s;

    xkv_device_get_info(device, &info);
    if (info.broken || strcmp(info.name, "emulated device") != 0 || info.major != 9)
        abort();
    c->fail_at = c->calls + 2;
    c->error = cudaErrorIllegalAddress;
    if (xkv_staging_get(ctx, device, &s) != XKV_OK || xkv_staging_put(ctx, device, s, NULL) != XKV_ERROR_BACKEND)
        abort();
    for (int i = 0; i < 3; i++)
        if (xkv_staging_put(ctx, device, s, NULL) != XKV_ERROR_BACKEND)
            abort();
    if (strstr(xkv_ctx_error(ctx), "cannot be used any more") == NULL)
        abort();
    xkv_device_get_info(device, &info);
    if (!info.broken)
        abort();
    _exit(0); /* a broken context frees nothing */
}

static void test_broken_device(void **state)
{
    (void)state;
    world w = {.plugin = XKV_EMULATED_PLUGIN, .more = break_it};
    finding f = find(&w);
    assert_int_equal(f.opened, XKV_OK);
    assert_int_equal(f.logged, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_no_plugin),    cmocka_unit_test(test_other_version), cmocka_unit_test(test_other_library),
        cmocka_unit_test(test_no_driver),    cmocka_unit_test(test_no_device),     cmocka_unit_test(test_old_device),
        cmocka_unit_test(test_environment),  cmocka_unit_test(test_options),       cmocka_unit_test(test_failing_calls),
        cmocka_unit_test(test_small_device), cmocka_unit_test(test_broken_device),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
