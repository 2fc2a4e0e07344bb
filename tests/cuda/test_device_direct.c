/* Chunks that the device reads from the file itself, through a cuFile of the tests' own: the same bytes as by way of
 * the host, whatever of it fails, and the CPU's words for damage. With XKV_GPU_PLUGIN: the genuine one, where there is
 * one. */
#include "device_support.h"

#include "../cuda/fake_cufile.h"
#include "entry_internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { TOKENS = 300, CHUNK = 64 };

static fake_cufile_control *cufile; /* NULL: the genuine one */

/* A device that reads files itself as far as it can; another one does not. */
static xkv_device *asked, *never;

static xkv_device *open_device(xkv_ctx *ctx, uint32_t direct)
{
    xkv_device_options o = xkv_device_options_default();
    xkv_device *d = NULL;

    o.staging_bytes = 1u << 20;
    o.staging_count = 2;
    o.direct = direct;
    assert_ok(ctx, xkv_device_open(ctx, &o, &d));
    return d;
}

static uint64_t direct_bytes(void)
{
    xkv_device_info info;

    xkv_device_get_info(asked, &info);
    return info.direct_bytes;
}

/* --- Samples ------------------------------------------------------------------------------------------------------ */

/* An entry in a file. */
typedef struct subject {
    synthetic s;
    memory trained;
    xkv_dict *dict;
    packed p;
    char path[64];
    xkv_input input;
    xkv_entry *entry;
    cache c;
} subject;

static void write_file(const subject *t)
{
    FILE *f = fopen(t->path, "wb");

    assert_non_null(f);
    assert_int_equal(fwrite(t->p.m.data, 1, t->p.m.size, f), t->p.m.size);
    assert_int_equal(fclose(f), 0);
}

static subject make_subject(xkv_ctx *ctx, uint32_t tokens, uint32_t profile, uint32_t cross)
{
    subject t = {.s = sample(tokens, XKV_BF16, 1), .path = "/tmp/xkv-direct-XXXXXX"};
    xkv_pack_options o = xkv_pack_options_default();

    o.profile = profile;
    o.group_layers = 2;
    o.chunk_tokens = CHUNK;
    o.window = 3;
    if (profile == XKV_PROFILE_DICT) {
        t.dict = train_dict(ctx, &t.s, cross, &t.trained);
        o.dict = t.dict;
        o.quality = 85;
    } else if (profile != XKV_PROFILE_LOSSLESS) {
        o.error = 0.01;
    }
    t.p = pack_planes(ctx, &t.s, &o);
    int fd = mkstemp(t.path);
    assert_true(fd >= 0);
    assert_int_equal(close(fd), 0);
    write_file(&t);
    assert_ok(ctx, xkv_input_open(ctx, t.path, &t.input));
    assert_ok(ctx, xkv_entry_open(ctx, &t.input, &t.entry));
    if (t.dict)
        assert_ok(ctx, xkv_entry_attach(ctx, t.entry, t.dict));
    t.c = make_cache(&t.s, tokens, XKV_BF16, TOKEN_MAJOR, false);
    return t;
}

static void free_subject(xkv_ctx *ctx, subject *t)
{
    xkv_entry_close(ctx, t->entry);
    xkv_input_close(ctx, &t->input);
    assert_int_equal(unlink(t->path), 0);
    free_cache(&t->c);
    free_packed(ctx, &t->p);
    xkv_dict_close(ctx, t->dict);
    memory_free(&t->trained);
    free_synthetic(&t->s);
}

/* What the device that never reads files makes of it. */
static uint8_t *expected_of(xkv_ctx *ctx, subject *t, const xkv_read_options *o)
{
    uint8_t *rows = malloc(t->c.size);

    clear_cache(&t->c);
    assert_ok(ctx, xkv_device_read(ctx, never, t->entry, o, NULL, t->c.views));
    device_copy(rows, t->c.there, t->c.size);
    clear_cache(&t->c);
    return rows;
}

static void assert_rows(subject *t, const uint8_t *expected)
{
    device_copy(t->c.found, t->c.there, t->c.size);
    assert_memory_equal(t->c.found, expected, t->c.size);
    clear_cache(&t->c);
}

/* Bytes of chunks that hold integers, first to last of each group. */
static uint64_t bytes_of_integers(const subject *t)
{
    const xkv_container *k = &t->entry->c;
    uint64_t sum = 0;

    for (uint32_t i = 0; i < k->group_count; i++) {
        const xkv_part *first = &k->groups[i].parts[XKV_PART_CHUNKS], *last = first + k->chunk_count - 1;
        if (k->groups[i].codec != XKV_GROUP_LOSSLESS && k->groups[i].codec != XKV_GROUP_SVD)
            sum += last->offset + last->size - first->offset;
    }
    return sum;
}

/* --- Tests -------------------------------------------------------------------------------------------------------- */

static void test_codecs(void **state)
{
    const struct {
        uint32_t profile, cross;
    } list[] = {{XKV_PROFILE_DICT, 0},
                {XKV_PROFILE_DICT, 6},
                {XKV_PROFILE_SCALAR, 0},
                {XKV_PROFILE_SVD, 0},
                {XKV_PROFILE_LOSSLESS, 0}};
    xkv_ctx *ctx = logging_ctx();

    (void)state;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        subject t = make_subject(ctx, TOKENS, list[i].profile, list[i].cross);
        uint8_t *expected = expected_of(ctx, &t, NULL);
        uint64_t before = direct_bytes();
        assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views));
        assert_rows(&t, expected);
        assert_int_equal(direct_bytes() - before, bytes_of_integers(&t));
        free(expected);
        free_subject(ctx, &t);
    }
    assert_int_equal(warnings_logged, 0);
    xkv_ctx_free(ctx);
}

/* Any first and last token, and lengths whose last chunks are too short to be checked by the device, or empty. */
static void test_ranges(void **state)
{
    const uint32_t lengths[] = {9, 12, 65, 70, 129, 260, 263};
    xkv_ctx *ctx = logging_ctx();
    uint64_t seed = 5;

    (void)state;
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        subject t = make_subject(ctx, lengths[i], XKV_PROFILE_DICT, i % 2 ? 6 : 0);
        for (int round = 0; round < 8; round++) {
            xkv_read_options o = xkv_read_options_default();
            o.first_token = (uint32_t)(test_random(&seed) % lengths[i]);
            o.token_count = 1 + (uint32_t)(test_random(&seed) % (lengths[i] - o.first_token));
            o.first_group = round % 3 == 0;
            uint8_t *expected = expected_of(ctx, &t, &o);
            assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, &o, NULL, t.c.views));
            assert_rows(&t, expected);
            free(expected);
        }
        free_subject(ctx, &t);
    }
    assert_int_equal(warnings_logged, 0);
    xkv_ctx_free(ctx);
}

/* Several batches, and places that are used again while the stream lags behind. */
static void test_many_batches(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 3000, XKV_PROFILE_DICT, 6);
    uint8_t *expected = expected_of(ctx, &t, NULL);
    uint64_t least, best;
    xkv_device_target target = xkv_device_target_default();

    (void)state;
    assert_ok(ctx, xkv_device_read_size(ctx, asked, t.entry, NULL, &least, &best));
    target.workspace = device_alloc(least);
    target.workspace_size = least;
    uint64_t before = direct_bytes();
    assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, &target, t.c.views));
    assert_rows(&t, expected);
    assert_true(direct_bytes() > before);
    device_free(target.workspace);
    free(expected);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Nothing to read from, or nobody who may. */
static void test_without(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, TOKENS, XKV_PROFILE_DICT, 0);
    uint8_t *expected = expected_of(ctx, &t, NULL);
    uint64_t before = direct_bytes();

    (void)state;
    assert_ok(ctx, xkv_device_read(ctx, asked, t.p.entry, NULL, NULL, t.c.views)); /* in memory */
    assert_rows(&t, expected);
    assert_int_equal(warnings_logged, 0);
    if (cufile) {
        cufile->register_error = 5027;
        assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views));
        cufile->register_error = 0;
        assert_rows(&t, expected);
        assert_int_equal(warnings_logged, 1);
        xkv_device *automatic = open_device(ctx, XKV_DIRECT_AUTO); /* and there is no nvidia-fs */
        assert_ok(ctx, xkv_device_read(ctx, automatic, t.entry, NULL, NULL, t.c.views));
        assert_rows(&t, expected);
        assert_int_equal(warnings_logged, 1);
        xkv_device_close(ctx, automatic);
    }
    assert_int_equal(direct_bytes(), before);
    free(expected);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Reads that bring less than was asked for, fail, or bring something else: each of them in turn. */
static void test_bad_reads(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, TOKENS, XKV_PROFILE_DICT, 6);
    uint8_t *expected = expected_of(ctx, &t, NULL);
    uint64_t reads = cufile->reads;

    (void)state;
    cufile->most = 100;
    assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views));
    cufile->most = 0;
    assert_rows(&t, expected);
    assert_true(cufile->reads - reads > 10);
    assert_int_equal(warnings_logged, 0);
    reads = cufile->reads;
    assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views));
    assert_rows(&t, expected);
    reads = cufile->reads - reads;
    assert_int_equal(reads, t.entry->c.group_count);
    for (uint64_t at = 1; at <= 2 * reads; at++) {
        uint64_t *spoilt = at % 2 ? &cufile->fail_at : &cufile->flip_at;
        *spoilt = cufile->reads + (at + 1) / 2;
        warnings_logged = 0;
        assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views));
        *spoilt = 0;
        assert_rows(&t, expected);
        assert_int_equal(warnings_logged, 1);
        assert_int_equal(cufile->open_files, 0);
    }
    free(expected);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* A bit of any chunk: as the CPU has it, and no group is announced that is not right. */
static void test_damaged_files(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, TOKENS, XKV_PROFILE_DICT, 6);
    const xkv_container *k = &t.entry->c;
    uint64_t seed = 3;

    (void)state;
    for (uint32_t i = 0; i < k->group_count; i++)
        for (uint32_t j = 0; j < k->chunk_count; j++) {
            const xkv_part *part = &k->groups[i].parts[XKV_PART_CHUNKS + j];
            uint8_t *byte = &t.p.m.data[k->payload_offset + part->offset + test_random(&seed) % part->size];
            char words[256];
            *byte ^= 16;
            write_file(&t);
            assert_int_equal(xkv_entry_read(ctx, t.entry, NULL, t.c.host_views), XKV_ERROR_CHECKSUM);
            snprintf(words, sizeof words, "%s", xkv_ctx_error(ctx));
            assert_int_equal(xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views), XKV_ERROR_CHECKSUM);
            assert_string_equal(xkv_ctx_error(ctx), words);
            *byte ^= 16;
        }
    write_file(&t);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

/* Whichever call of the runtime fails: a status, or the right rows, which the CPU may have had to make, and no file
 * stays open. */
static void test_failing_calls(void **state)
{
    xkv_ctx *ctx = logging_ctx();
    subject t = make_subject(ctx, 150, XKV_PROFILE_DICT, 6);
    uint8_t *expected = expected_of(ctx, &t, NULL);
    uint64_t calls;

    (void)state;
    assert_ok(ctx, xkv_entry_read(ctx, t.entry, NULL, t.c.host_views));
    calls = control->calls;
    assert_ok(ctx, xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views));
    assert_rows(&t, expected);
    calls = control->calls - calls;
    for (uint64_t at = 1; at <= calls; at++) {
        control->error = at % 2 ? cudaErrorInvalidValue : cudaErrorMemoryAllocation;
        control->fail_at = control->calls + at;
        xkv_status status = xkv_device_read(ctx, asked, t.entry, NULL, NULL, t.c.views);
        control->fail_at = 0;
        if (status == XKV_OK) {
            device_copy(t.c.found, t.c.there, t.c.size);
            assert_true(memcmp(t.c.found, expected, t.c.size) == 0 || memcmp(t.c.found, t.c.host, t.c.size) == 0);
            clear_cache(&t.c);
        }
        assert_int_equal(cufile->open_files, 0);
    }
    free(expected);
    free_subject(ctx, &t);
    xkv_ctx_free(ctx);
}

int main(void)
{
    const struct CMUnitTest everywhere[] = {
        cmocka_unit_test(test_codecs),  cmocka_unit_test(test_ranges),        cmocka_unit_test(test_many_batches),
        cmocka_unit_test(test_without), cmocka_unit_test(test_damaged_files),
    };
    const struct CMUnitTest told_to_fail[] = {
        cmocka_unit_test(test_bad_reads),
        cmocka_unit_test(test_failing_calls),
    };
    xkv_ctx *ctx;
    int failed;

    if (!find_device())
        return 77;
    if (control == NULL && dlopen("libcufile.so.0", RTLD_NOW | RTLD_LOCAL) == NULL) {
        print_message("SKIP: %s\n", dlerror());
        return 77;
    }
    ctx = new_ctx(1);
    if (control != NULL)
        cufile = dlsym(dlopen(XKV_EMULATED_PLUGIN, RTLD_NOW | RTLD_LOCAL), "fake_cufile");
    asked = open_device(ctx, XKV_DIRECT_ON);
    device = never = open_device(ctx, XKV_DIRECT_OFF);
    failed = cmocka_run_group_tests_name("everywhere", everywhere, NULL, NULL);
    if (control != NULL)
        failed += cmocka_run_group_tests_name("told to fail", told_to_fail, NULL, NULL);
    xkv_device_close(ctx, asked);
    xkv_device_close(ctx, never);
    xkv_ctx_free(ctx);
    return failed;
}
