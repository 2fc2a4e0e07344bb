/* test_container.c - the container's writer and reader against each other, the limits of both, and the worked example
 * of the specification. Broken files are the matter of tests/bad. */
#include "container_parse.h"
#include "sample_entry.h"

#include <ctype.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static int create_ctx(void **state)
{
    return xkv_ctx_create(NULL, (xkv_ctx **)state) == XKV_OK ? 0 : -1;
}

static int free_ctx(void **state)
{
    int leaked = xkv_ctx_memory_used(*state) != 0;
    xkv_ctx_free(*state);
    return leaked;
}

/* --- Round trip --------------------------------------------------------------------------------------------------- */

static void check_geometry(const xkv_geometry *a, const xkv_geometry *b)
{
    assert_int_equal(a->layer_count, b->layer_count);
    assert_int_equal(a->plane_count, b->plane_count);
    assert_int_equal(a->rope_count, b->rope_count);
    assert_int_equal(a->token_count, b->token_count);
    assert_int_equal(a->token_id_count, b->token_id_count);
    assert_memory_equal(a->planes, b->planes, a->plane_count * sizeof *a->planes);
    assert_memory_equal(a->positions, b->positions, 4 * a->token_count);
    assert_memory_equal(a->token_ids, b->token_ids, 4 * a->token_id_count);
    for (uint32_t i = 0; i < a->rope_count; i++) {
        assert_int_equal(a->ropes[i].n_rot, b->ropes[i].n_rot);
        assert_int_equal(a->ropes[i].offset, b->ropes[i].offset);
        assert_int_equal(a->ropes[i].style, b->ropes[i].style);
        assert_true(a->ropes[i].scale == b->ropes[i].scale);
        assert_memory_equal(a->ropes[i].inv_freq, b->ropes[i].inv_freq, 4 * a->ropes[i].n_rot);
    }
}

static void check_framing(const xkv_framing *a, const xkv_framing *b, uint32_t tokens)
{
    assert_int_equal(a->engine, b->engine);
    assert_int_equal(a->segment_count, b->segment_count);
    for (uint32_t i = 0; i < a->segment_count; i++) {
        assert_int_equal(a->segments[i].size, b->segments[i].size);
        assert_int_equal(a->segments[i].first_plane, b->segments[i].first_plane);
        assert_int_equal(a->segments[i].plane_count, b->segments[i].plane_count);
        assert_int_equal(a->segments[i].layout, b->segments[i].layout);
    }
    assert_int_equal(a->literal_size, b->literal_size);
    assert_int_equal(a->source_size, b->source_size);
    assert_memory_equal(a->literals, b->literals, a->literal_size);
    assert_memory_equal(a->rows, b->rows, 4 * tokens);
}

static void check_groups(const xkv_container *a, const xkv_container *b)
{
    assert_int_equal(a->group_count, b->group_count);
    for (uint32_t i = 0; i < a->group_count; i++) {
        const xkv_group *g = &a->groups[i], *h = &b->groups[i];
        assert_int_equal(g->codec, h->codec);
        assert_int_equal(g->reason, h->reason);
        assert_int_equal(g->rank, h->rank);
        assert_int_equal(g->width, h->width);
        assert_true(g->energy == h->energy && g->error == h->error);
        assert_int_equal(g->plane_count, h->plane_count);
        assert_memory_equal(g->planes, h->planes, 4 * g->plane_count);
        assert_memory_equal(g->plane_errors, h->plane_errors, 8 * g->plane_count);
        assert_int_equal(g->part_count, h->part_count);
        for (uint32_t k = 0; k < g->part_count; k++) {
            assert_int_equal(g->parts[k].offset, h->parts[k].offset);
            assert_int_equal(g->parts[k].size, h->parts[k].size);
            assert_int_equal(g->parts[k].checksum, h->parts[k].checksum);
            assert_int_equal(g->parts[k].method, h->parts[k].method);
        }
    }
}

static void what_is_written_is_read(void **state)
{
    static const uint32_t tokens[] = {SAMPLE_LARGE, SAMPLE_SMALL};
    for (int i = 0; i < 2; i++) {
        sample s;
        image f;
        xkv_container c;
        sample_init(&s, tokens[i]);
        assert_int_equal(sample_write(*state, &s, &f), XKV_OK);
        xkv_input input = xkv_input_from_memory(f.data, f.size);
        assert_int_equal(xkv_container_read(*state, &input, XKV_KIND_ENTRY, &c), XKV_OK);
        assert_int_equal(c.write_version, 1);
        assert_int_equal(c.file_size, f.size);
        assert_int_equal(c.chunk_tokens, 32);
        assert_int_equal(c.chunk_count, tokens[i] == SAMPLE_LARGE ? 3 : 1);
        assert_int_equal(c.sinks, s.c.sinks);
        assert_int_equal(c.window, s.c.window);
        assert_memory_equal(c.content_id, s.c.content_id, 16);
        check_geometry(&s.c.geometry, &c.geometry);
        assert_true(c.has_framing);
        check_framing(&s.c.framing, &c.framing, tokens[i]);
        assert_memory_equal(c.source_hash, s.c.source_hash, 16);
        check_groups(&s.c, &c);
        assert_int_equal(c.value_count, 4);
        for (uint32_t k = 0; k < 4; k++) {
            assert_string_equal(c.values[k].key, s.values[k].key);
            assert_int_equal(c.values[k].type, s.values[k].type);
            assert_int_equal(c.values[k].size, s.values[k].size);
            assert_memory_equal(c.values[k].bytes, s.values[k].bytes, s.values[k].size);
            assert_int_equal(c.values[k].bytes[c.values[k].size], 0);
        }
        xkv_container_free(*state, &c);
    }
}

static void positions_that_follow_each_other_take_no_bytes(void **state)
{
    sample s;
    image with, without;
    sample_init(&s, SAMPLE_LARGE);
    assert_int_equal(sample_write(*state, &s, &with), XKV_OK);
    for (int i = 0; i < SAMPLE_LARGE; i++)
        s.positions[i] = INT32_MAX - SAMPLE_LARGE + 1 + i;
    assert_int_equal(sample_write(*state, &s, &without), XKV_OK);
    assert_true(without.size < with.size);
    xkv_container c;
    xkv_input input = xkv_input_from_memory(without.data, without.size);
    assert_int_equal(xkv_container_read(*state, &input, XKV_KIND_ENTRY, &c), XKV_OK);
    assert_memory_equal(c.geometry.positions, s.positions, sizeof s.positions);
    xkv_container_free(*state, &c);
}

static void an_entry_without_tensors_is_an_entry(void **state)
{
    sample s;
    image f;
    sample_init(&s, SAMPLE_SMALL);
    s.c.geometry.layer_count = s.c.geometry.plane_count = s.c.geometry.rope_count = 0;
    s.c.geometry.token_count = s.c.geometry.token_id_count = 0;
    s.c.sinks = s.c.window = s.c.value_count = s.c.group_count = 0;
    s.segments[0].size = s.c.framing.source_size = s.c.framing.literal_size = 100;
    s.c.framing.segment_count = 1;
    s.c.framing.engine = XKV_ENGINE_OPAQUE;
    s.c.framing.rows = NULL;
    assert_int_equal(sample_write(*state, &s, &f), XKV_OK);
    assert_int_equal(sample_check(*state, f.data, f.size), XKV_OK);
    assert_int_equal(s.c.payload_size, 0);
    assert_int_equal(f.size % 64, 0);
}

static void every_byte_is_written(void **state)
{
    /* Into an output that was full of ones: gaps are written too, not left to a fresh file's zeros. */
    static uint8_t ones[SAMPLE_MAX_SIZE];
    sample s;
    image f;
    xkv_container_writer w;
    uint64_t size;
    sample_init(&s, SAMPLE_SMALL);
    assert_int_equal(sample_write(*state, &s, &f), XKV_OK);
    memcpy(ones, f.data, f.size);
    sample_init(&s, SAMPLE_SMALL);
    xkv_output output = image_output(&f);
    memset(f.data, 0xff, sizeof f.data);
    assert_int_equal(xkv_container_begin(*state, &s.c, &output, 3, &w), XKV_OK);
    uint64_t head = xkv_container_head_size(&w);
    for (uint32_t i = 0; i < 2; i++) {
        for (uint32_t k = 0; k < 3; k++) {
            const xkv_part *p = NULL;
            xkv_container c;
            xkv_input input = xkv_input_from_memory(ones, sizeof ones);
            input.size = xkv_load64(ones + 16);
            assert_int_equal(xkv_container_read(*state, &input, XKV_KIND_ENTRY, &c), XKV_OK);
            assert_int_equal(c.payload_offset, head);
            p = &c.groups[i].parts[k];
            assert_int_equal(xkv_container_add_part(*state, &w, &s.parts[i][k], ones + c.payload_offset + p->offset,
                                                    p->size, p->method),
                             XKV_OK);
            xkv_container_free(*state, &c);
        }
    }
    assert_int_equal(xkv_container_finish(*state, &w, &size), XKV_OK);
    assert_memory_equal(f.data, ones, size);
}

/* --- What the writer refuses -------------------------------------------------------------------------------------- */

static void refuse(xkv_ctx *ctx, sample *s, const char *rule)
{
    image f;
    xkv_ctx_begin(ctx);
    assert_int_equal(sample_write(ctx, s, &f), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(ctx), rule));
    assert_int_equal(xkv_ctx_memory_used(ctx), 0);
    sample_init(s, SAMPLE_SMALL);
}

static void the_writer_refuses_what_the_reader_would(void **state)
{
    sample s;
    char long_key[300], huge_key[70000];
    memset(long_key, 'k', sizeof long_key);
    long_key[299] = '\0';
    memset(huge_key, 'k', sizeof huge_key);
    huge_key[sizeof huge_key - 1] = '\0';
    sample_init(&s, SAMPLE_SMALL);
    s.c.chunk_tokens = 33;
    refuse(*state, &s, "[G2]");
    s.c.sinks = 3;
    refuse(*state, &s, "[G3]");
    s.planes[0].kind = 256;
    refuse(*state, &s, "[G6]");
    s.planes[1].dtype = 5;
    refuse(*state, &s, "[G6]");
    s.planes[1].dtype = XKV_Q8_0; /* rows of 8 elements */
    refuse(*state, &s, "[G13]");
    s.rope.n_rot = 100000;
    refuse(*state, &s, "[G11]");
    s.positions[2] = 0;
    refuse(*state, &s, "[T3]");
    s.rows[0] = 2;
    refuse(*state, &s, "[F5]");
    s.segments[1].size++;
    refuse(*state, &s, "[F2]");
    for (uint32_t layout = XKV_LAYOUT_DIM_MAJOR; layout <= XKV_LAYOUT_HEAD_MAJOR; layout++) {
        sample_use_blocks(&s);
        s.segments[3].layout = layout;
        refuse(*state, &s, "[F10]");
    }
    s.c.framing.literal_size--;
    refuse(*state, &s, "[F4]");
    s.values[0].key = long_key;
    refuse(*state, &s, "[M2]");
    s.values[0].key = huge_key;
    refuse(*state, &s, "[M2]");
    s.values[0].key = (char[]){"zebra"};
    refuse(*state, &s, "[M3]");
    s.values[3].bytes = (uint8_t[]){"caf\xe9..."};
    refuse(*state, &s, "[M6]");
    s.groups[0].rank = 0;
    refuse(*state, &s, "[R4]");
    s.groups[0].error = -1;
    refuse(*state, &s, "[R6]");
    s.group_planes[1][1] = 2;
    refuse(*state, &s, "[R3]");
    s.groups[1].part_count = 2;
    refuse(*state, &s, "[R5]");
}

static void parts_must_have_their_size(void **state)
{
    sample s;
    image f;
    xkv_container_writer w;
    uint64_t size;
    sample_init(&s, SAMPLE_SMALL);
    xkv_output output = image_output(&f);
    assert_int_equal(xkv_container_begin(*state, &s.c, &output, 3, &w), XKV_OK);
    assert_int_equal(xkv_container_add_part(*state, &w, &s.parts[0][0], "short", 5, XKV_METHOD_STORED), XKV_OK);
    xkv_ctx_begin(*state);
    assert_int_equal(xkv_container_finish(*state, &w, &size), XKV_ERROR_ARGUMENT);
    assert_non_null(strstr(xkv_ctx_error(*state), "[P2]"));
}

/* --- Memory and outputs that fail --------------------------------------------------------------------------------- */

static int allocations_left;

static void *limited_alloc(void *user, size_t size)
{
    (void)user;
    return allocations_left-- > 0 ? malloc(size) : NULL;
}

static void limited_release(void *user, void *ptr)
{
    (void)user;
    free(ptr);
}

static void each_failing_allocation_is_reported(void **state)
{
    (void)state;
    sample s;
    image f;
    xkv_ctx *ctx = NULL;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.allocator = (xkv_allocator){NULL, limited_alloc, limited_release};
    allocations_left = 1;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_OK);
    for (int reading = 0; reading < 2; reading++) {
        int n = 0;
        for (xkv_status status = XKV_ERROR_MEMORY; status != XKV_OK; n++) {
            sample_init(&s, SAMPLE_LARGE);
            allocations_left = n;
            xkv_ctx_begin(ctx);
            status = reading ? sample_check(ctx, f.data, f.size) : sample_write(ctx, &s, &f);
            assert_true(status == XKV_OK || status == XKV_ERROR_MEMORY);
            assert_int_equal(xkv_ctx_memory_used(ctx), 0);
        }
        assert_true(n > 10);
    }
    xkv_ctx_free(ctx);
}

static void a_memory_limit_is_kept(void **state)
{
    (void)state;
    sample s;
    image f;
    xkv_ctx *ctx = NULL;
    xkv_ctx_options o = xkv_ctx_options_default();
    o.memory_limit = 3000;
    assert_int_equal(xkv_ctx_create(&o, &ctx), XKV_OK);
    sample_init(&s, SAMPLE_LARGE);
    assert_int_equal(sample_write(ctx, &s, &f), XKV_ERROR_LIMIT);
    assert_true(xkv_ctx_memory_peak(ctx) <= 3000);
    xkv_ctx_free(ctx);
}

static int writes_left;

static xkv_status limited_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    (void)user;
    (void)offset;
    (void)src;
    (void)size;
    return writes_left-- > 0 ? XKV_OK : xkv_fail(ctx, XKV_ERROR_NO_SPACE, "full");
}

static void each_failing_write_is_reported(void **state)
{
    xkv_status status = XKV_ERROR_NO_SPACE;
    int n = 0;
    for (; status != XKV_OK; n++) {
        sample s;
        xkv_container_writer w;
        xkv_output output = {.write = limited_write};
        uint64_t size;
        sample_init(&s, SAMPLE_SMALL);
        s.c.has_framing = false;
        s.c.geometry.layer_count = s.c.geometry.plane_count = s.c.geometry.token_count = s.c.geometry.rope_count = 0;
        s.c.sinks = s.c.window = s.c.group_count = 0;
        writes_left = n;
        status = xkv_container_begin(*state, &s.c, &output, 3, &w);
        if (status == XKV_OK)
            status = xkv_container_finish(*state, &w, &size);
        assert_true(status == XKV_OK || status == XKV_ERROR_NO_SPACE);
        assert_int_equal(xkv_ctx_memory_used(*state), 0);
    }
    assert_int_equal(n, 6); /* small sections, GRPS, META again, table, header */
}

/* --- UTF-8 -------------------------------------------------------------------------------------------------------- */

static void utf8_is_told_from_other_bytes(void **state)
{
    /* RFC 3629, section 4: the bounds of each form, and what lies just outside. */
    static const struct {
        const char *text;
        size_t size, valid;
    } texts[] = {
        {"", 0, 0},
        {"abc", 3, 3},
        {"a\0b", 3, 1},
        {"\xc2\x80", 2, 2},
        {"\xdf\xbf", 2, 2},
        {"\xe0\xa0\x80", 3, 3},
        {"\xed\x9f\xbf", 3, 3},
        {"\xee\x80\x80", 3, 3},
        {"\xef\xbf\xbf", 3, 3},
        {"\xf0\x90\x80\x80", 4, 4},
        {"\xf4\x8f\xbf\xbf", 4, 4},
        {"\x80", 1, 0},
        {"\xc1\xbf", 2, 0},
        {"\xe0\x9f\xbf", 3, 0},
        {"\xed\xa0\x80", 3, 0},
        {"\xf0\x8f\xbf\xbf", 4, 0},
        {"\xf4\x90\x80\x80", 4, 0},
        {"\xf5\x80\x80\x80", 4, 0},
        {"\xff", 1, 0},
        {"ok\xc3", 3, 2},
        {"ok\xe2\x82", 4, 2},
        {"\xc3\x28", 2, 0},
    };
    (void)state;
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++)
        assert_int_equal(xkv_utf8_prefix(texts[i].text, texts[i].size), texts[i].valid);
}

/* --- The worked example ------------------------------------------------------------------------------------------- */

/* The bytes of the lines "oooo  hh hh ..." behind the heading "Worked example". */
static size_t read_example(uint8_t *bytes, size_t capacity)
{
    char line[512];
    size_t size = 0;
    bool found = false;
    FILE *spec = fopen(XKV_SPEC_FILE, "r");
    assert_non_null(spec);
    while (fgets(line, sizeof line, spec) != NULL) {
        unsigned offset, value;
        int used;
        found = found || strstr(line, ". Worked example") != NULL;
        if (!found || sscanf(line, "%4x  %n%2x", &offset, &used, &value) != 2 || used != 6)
            continue;
        assert_int_equal(offset, size);
        for (char *p = line + used; isxdigit(p[0]) && isxdigit(p[1]) && isspace(p[2]); p += 3) {
            assert_true(size < capacity);
            bytes[size++] = (uint8_t)strtoul((char[]){p[0], p[1], '\0'}, NULL, 16);
        }
    }
    fclose(spec);
    return size;
}

static void the_worked_example_is_an_entry(void **state)
{
    static const uint16_t k[] = {0x3c00, 0xbc00, 0x3800, 0x0000, 0x4000, 0xc000, 0x3c00, 0x0000};
    uint8_t bytes[1024], part[16];
    xkv_container c;
    size_t size = read_example(bytes, sizeof bytes);
    assert_int_equal(size, 848);
    xkv_input input = xkv_input_from_memory(bytes, size);
    assert_int_equal(sample_check(*state, bytes, size), XKV_OK);
    assert_int_equal(xkv_container_read(*state, &input, XKV_KIND_ENTRY, &c), XKV_OK);

    const xkv_geometry *g = &c.geometry;
    assert_int_equal(c.section_count, 4);
    assert_int_equal(g->layer_count, 1);
    assert_int_equal(g->plane_count, 2);
    assert_int_equal(g->rope_count, 0);
    assert_int_equal(g->token_count, 2);
    assert_int_equal(c.chunk_tokens, 256);
    assert_int_equal(c.sinks + c.window, 0);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(g->planes[i].kind, i);
        assert_int_equal(g->planes[i].dtype, XKV_F16);
        assert_int_equal(g->planes[i].heads, 1);
        assert_int_equal(g->planes[i].head_dim, 4);
        assert_int_equal(g->planes[i].rope, XKV_NO_ROPE);
    }
    assert_int_equal(g->token_id_count, 2);
    assert_int_equal(g->token_ids[0], 17);
    assert_int_equal(g->token_ids[1], 4660);
    assert_int_equal(g->positions[0], 0);
    assert_int_equal(g->positions[1], 1);
    assert_false(c.has_framing);
    assert_int_equal(c.group_count, 2);
    assert_int_equal(c.payload_offset, 768);
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(c.groups[i].codec, 0);
        assert_int_equal(c.groups[i].planes[0], i);
        assert_int_equal(c.groups[i].part_count, 3);
        assert_int_equal(c.groups[i].parts[2].offset, 64 * i);
        assert_int_equal(c.groups[i].parts[2].size, 16);
        assert_int_equal(xkv_container_read_part(*state, &input, &c, &c.groups[i].parts[2], part), XKV_OK);
        for (uint32_t j = 0; j < 8; j++)
            assert_int_equal(xkv_load16(part + 2 * j), i == 0 ? k[j] : 0x3c00 + j);
    }
    xkv_container_free(*state, &c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_is_read),
        cmocka_unit_test(positions_that_follow_each_other_take_no_bytes),
        cmocka_unit_test(an_entry_without_tensors_is_an_entry),
        cmocka_unit_test(every_byte_is_written),
        cmocka_unit_test(the_writer_refuses_what_the_reader_would),
        cmocka_unit_test(parts_must_have_their_size),
        cmocka_unit_test(each_failing_allocation_is_reported),
        cmocka_unit_test(a_memory_limit_is_kept),
        cmocka_unit_test(each_failing_write_is_reported),
        cmocka_unit_test(utf8_is_told_from_other_bytes),
        cmocka_unit_test(the_worked_example_is_an_entry),
    };
    return cmocka_run_group_tests(tests, create_ctx, free_ctx);
}
