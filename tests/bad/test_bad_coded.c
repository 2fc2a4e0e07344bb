/*
 * test_bad_coded.c - one bad file, or several, for each rule of spec/codec.md and spec/dictionary.md, and for [F7]: the
 * rules of what the container holds, which need entries and dictionaries that decode.
 *
 *     test_bad_coded             run the tests
 *     test_bad_coded FOLDER      write the good files there: seeds of the fuzzers
 *
 * Each bad file breaks one rule only: checksums of parts, sections, table and header are made right again.
 */
#include "seal.h"
#include "support.h"

#include <stdio.h>
#include <stdlib.h>

/* --- Good files --------------------------------------------------------------------------------------------------- */

typedef enum base {
    DICT,        /* joint, side part stored, an engine's file around it */
    SCALAR,      /* likewise */
    SVDQ,        /* joint */
    SVD,         /* factors stored */
    LOSSLESS,    /* zstd, an engine's file around it */
    BASIS,       /* the dictionary */
    CROSS,       /* K and V apart, and a cross stage over both; an engine's file around it */
    CROSS_BASIS, /* its dictionary: its last group is the cross basis */
    BASES
} base;

enum { M = 3 }; /* leading coefficients that the cross stage takes of each group */

static xkv_ctx *ctx;
static memory good[BASES];

static xkv_dict *dictionary; /* that of DICT, and good[BASIS] */
static xkv_dict *crossed;    /* that of CROSS, and good[CROSS_BASIS] */
static xkv_dict *narrow;     /* one of fewer elements */
static xkv_dict *uncrossed;  /* that of CROSS without its last stage */
static memory narrow_file, uncrossed_file;

static synthetic sample(uint32_t head_dim, int rope)
{
    return make_synthetic(&(synthetic_options){.layers = 1,
                                               .tokens = 70,
                                               .heads = 1,
                                               .head_dim = head_dim,
                                               .dtype = XKV_F16,
                                               .rank = 2,
                                               .group_layers = 1,
                                               .noise = 0.1,
                                               .rope = rope});
}

static memory pack(const synthetic *s, const xkv_pack_options *o, const xkv_framing *framing, const uint8_t *image,
                   const xkv_view *views)
{
    memory m = {0};
    xkv_output output = memory_output(&m);

    assert_ok(ctx,
              xkv_pack(ctx, &s->geometry, views, framing, image, framing ? framing->source_size : 0, o, &output, NULL));
    return m;
}

/* A safetensors file around the planes. For lossless K is left zero, so that its parts compress. */
static memory pack_framed(const synthetic *s, const xkv_pack_options *o)
{
    xkv_framing *framing = NULL;
    xkv_view views[2];
    memory m;

    assert_ok(ctx, xkv_framing_safetensors(ctx, &s->geometry, XKV_LAYOUT_TOKEN_MAJOR, &framing));
    uint8_t *image = calloc(1, framing->source_size);
    assert_ok(ctx, xkv_framing_views(ctx, framing, &s->geometry, image, views));
    memcpy(image, framing->literals, framing->segments[0].size); /* the header is the only literal in front */
    for (int i = o->profile == XKV_PROFILE_AUTO; i < 2; i++)
        memcpy(views[i].data, s->views[i].data, s->size / 2);
    m = pack(s, o, framing, image, views);
    free(image);
    xkv_framing_free(ctx, framing);
    return m;
}

static xkv_dict *train(const synthetic *s, bool apart, uint32_t cross, memory *m)
{
    xkv_train_options o = xkv_train_options_default();
    xkv_dict *dict = NULL;

    o.apart = apart;
    o.cross = cross;
    assert_ok(ctx, train_on(ctx, &s, 1, &o, m));
    xkv_input input = xkv_input_from_memory(m->data, m->size);
    assert_ok(ctx, xkv_dict_open(ctx, &input, 1, &dict));
    return dict;
}

static int make_good(void **state)
{
    synthetic s = sample(4, 0), small = sample(2, 0);
    xkv_pack_options o[BASES];

    (void)state;
    ctx = new_ctx(1);
    dictionary = train(&s, false, 0, &good[BASIS]);
    crossed = train(&s, true, M, &good[CROSS_BASIS]);
    narrow = train(&small, false, 0, &narrow_file);
    uncrossed = train(&s, true, 0, &uncrossed_file);
    for (int i = 0; i < BASES; i++) {
        o[i] = xkv_pack_options_default();
        o[i].chunk_tokens = 32;
    }
    o[DICT].profile = XKV_PROFILE_DICT;
    o[DICT].dict = dictionary;
    o[CROSS] = o[DICT];
    o[CROSS].dict = crossed;
    o[SCALAR].profile = XKV_PROFILE_SCALAR;
    o[SCALAR].error = 0.1;
    o[SVDQ].profile = XKV_PROFILE_SVD;
    o[SVDQ].error = 0.1;
    o[SVD].rank_k = o[SVD].rank_v = 1;
    good[DICT] = pack_framed(&s, &o[DICT]);
    good[SCALAR] = pack_framed(&s, &o[SCALAR]);
    good[SVDQ] = pack(&s, &o[SVDQ], NULL, NULL, s.views);
    good[SVD] = pack(&s, &o[SVD], NULL, NULL, s.views);
    good[LOSSLESS] = pack_framed(&s, &o[LOSSLESS]);
    good[CROSS] = pack_framed(&s, &o[CROSS]);
    free_synthetic(&s);
    free_synthetic(&small);
    return 0;
}

static int free_good(void **state)
{
    (void)state;
    for (int i = 0; i < BASES; i++)
        memory_free(&good[i]);
    xkv_dict_close(ctx, dictionary);
    xkv_dict_close(ctx, crossed);
    xkv_dict_close(ctx, narrow);
    xkv_dict_close(ctx, uncrossed);
    memory_free(&narrow_file);
    memory_free(&uncrossed_file);
    int leaked = xkv_ctx_memory_used(ctx) != 0;
    xkv_ctx_free(ctx);
    return leaked;
}

/* --- Places in a file --------------------------------------------------------------------------------------------- */

typedef enum place {
    GEOM,   /* sections */
    PLANES, /* of GEOM */
    FRAM,
    GROUP,      /* the first record of GRPS */
    RECORD,     /* of part `index` of the first group */
    PART,       /* its bytes */
    LAST_GROUP, /* the same of the last group */
    LAST_RECORD,
    LAST_PART,
    TABLE,  /* of component `index` in the side part of svdq */
    ROW,    /* basis table of row `index` there */
    STREAM, /* its stream */
    UNIT,   /* key and value in META */
    ID
} place;

static size_t section(const memory *m, uint32_t type)
{
    for (uint32_t i = 0; i < xkv_load32(m->data + 32); i++)
        if (xkv_load32(m->data + 64 + 32 * i) == type)
            return (size_t)xkv_load64(m->data + 64 + 32 * i + 8);
    fail_msg("no such section");
    return 0;
}

static size_t key(const memory *m, const char *name)
{
    for (size_t i = section(m, XKV_SECTION_META); i < m->size; i++)
        if (memcmp(m->data + i, name, strlen(name)) == 0)
            return i;
    fail_msg("no key %s", name);
    return 0;
}

/* Record of a group; the last one where there are fewer. */
static size_t group_record(const memory *m, uint32_t index)
{
    size_t grps = section(m, XKV_SECTION_GRPS), at = grps + 8;
    uint32_t count = xkv_load32(m->data + grps);

    for (uint32_t i = 0; i < index && i + 1 < count; i++)
        at += 48 + 16 * xkv_load32(m->data + at + 8) + 32 * xkv_load32(m->data + at + 16);
    return at;
}

static size_t svdq_offset(const memory *m, place where)
{
    size_t group = section(m, XKV_SECTION_GRPS) + 8;
    xkv_group g = {.plane_count = xkv_load32(m->data + group + 8), .rank = xkv_load32(m->data + group + 12)};
    xkv_svdq_layout at = xkv_svdq_side(&g);

    return (size_t)(where == TABLE ? at.tables : where == ROW ? at.component_tables : at.stream);
}

static size_t locate(const memory *m, place where, uint32_t index)
{
    bool last = where >= LAST_GROUP && where <= LAST_PART;
    size_t group = group_record(m, last ? UINT32_MAX : 0);
    size_t record = group + 48 + 16 * xkv_load32(m->data + group + 8) + 32 * index;

    switch (where) {
    case GEOM:
        return section(m, XKV_SECTION_GEOM);
    case PLANES:
        return section(m, XKV_SECTION_GEOM) + 32;
    case FRAM:
        return section(m, XKV_SECTION_FRAM);
    case GROUP:
    case LAST_GROUP:
        return group;
    case RECORD:
    case LAST_RECORD:
        return record;
    case PART:
    case LAST_PART:
        return section(m, XKV_SECTION_PAYL) + (size_t)xkv_load64(m->data + record);
    case TABLE:
    case ROW:
    case STREAM:
        return locate(m, PART, 0) + svdq_offset(m, where) + index;
    case UNIT:
        return key(m, "dict.unit");
    case ID:
        return key(m, "dictionary.id");
    }
    return 0;
}

/* --- The bad files ------------------------------------------------------------------------------------------------ */

typedef struct bad_case {
    const char *rule, *what;
    base base;
    place where;
    uint32_t index, offset, size;
    uint64_t value;
    xkv_status status;
    int flip; /* the value is a mask */
} bad_case;

#define BAD         XKV_ERROR_CORRUPT
#define F32_MINUS_1 0xbf800000u
enum {
    F32_NAN = 0x7fc00000,
    F16_NAN = 0x7e00,
    F16_INF = 0x7c00,
    N = 8,                   /* width of the joint groups; that of each group apart is 4 */
    TABLES = 4 * N + 8 * N,  /* in the header of the basis */
    BLOCK = TABLES + N,      /* scale of the first block, then 4 x 4 f16 */
    SCALAR_MEAN = 8 + 4 * 2, /* in the side part */
    SCALAR_TABLES = SCALAR_MEAN + 2 * N,
    CROSS_SIGMA = 2 * 4, /* in the header of the cross basis of two groups, M coefficients each */
    CROSS_D = CROSS_SIGMA + 4 * 2 * M,
    CROSS_TABLES = CROSS_D + 4 * 2 * M,
    MEAN_STEP = 8 + 4 * 2 /* in the side part of svdq */
};

static const bad_case cases[] = {
    {"Q1", "rank of a scalar group", SCALAR, GROUP, 0, 12, 4, N - 1, BAD, 0},
    {"Q2", "stored chunk", DICT, RECORD, 2, 24, 4, 0, BAD, 0},
    {"Q2", "chunk of method 1", SCALAR, RECORD, 3, 24, 4, 1, BAD, 0},
    {"Q2", "fewer bytes than lanes have", DICT, RECORD, 2, 8, 8, 111, BAD, 0},
    {"Q2", "components of a dictionary stored", BASIS, RECORD, 1, 24, 4, 0, BAD, 0},
    {"Q2", "stored side part", SVDQ, RECORD, 0, 24, 4, 0, BAD, 0},
    {"Q2", "stored chunk", SVDQ, RECORD, 2, 24, 4, 0, BAD, 0},
    {"Q2", "side part that ends before its stream", SVDQ, RECORD, 0, 8, 8, 23, BAD, 0},
    {"P2", "empty side part", SVDQ, RECORD, 0, 8, 8, 0, BAD, 0},
    {"Q3", "step infinite", SVDQ, PART, 0, 0, 4, 0x7f800000, BAD, 0},
    {"Q3", "reserved behind the step", SVDQ, PART, 0, 4, 4, 1, BAD, 0},
    {"Q3", "scale of a plane negative", SVDQ, PART, 0, 12, 4, F32_MINUS_1, BAD, 0},
    {"Q3", "step of the mean 0", SVDQ, PART, 0, MEAN_STEP, 4, 0, BAD, 0},
    {"Q3", "step of the mean NaN", SVDQ, PART, 0, MEAN_STEP, 4, F32_NAN, BAD, 0},
    {"Q3", "step of the mean so large that it overflows", SVDQ, PART, 0, MEAN_STEP, 4, 0x7f7fffff, BAD, 0},
    {"Q4", "table of a component", SVDQ, TABLE, 0, 0, 1, 241, BAD, 0},
    {"E1", "table of the mean", SVDQ, ROW, 0, 0, 1, 255, BAD, 0},
    {"E1", "basis table of a component", SVDQ, ROW, 1, 0, 1, 241, BAD, 0},
    {"E2", "state below 2^16", SVDQ, STREAM, 0, 0, 4, 0xffff, BAD, 0},
    {"E3", "state that does not end at 2^16", SVDQ, STREAM, 0, 1, 1, 1, BAD, 1},
    {"Q3", "step 0", DICT, PART, 0, 0, 4, 0, BAD, 0},
    {"Q3", "step NaN", DICT, PART, 0, 0, 4, F32_NAN, BAD, 0},
    {"Q3", "step negative", SCALAR, PART, 0, 0, 4, F32_MINUS_1, BAD, 0},
    {"Q3", "reserved behind the step", DICT, PART, 0, 4, 4, 1, BAD, 0},
    {"Q3", "scale of a plane 0", SCALAR, PART, 0, 8, 4, 0, BAD, 0},
    {"Q3", "mean infinite", SCALAR, PART, 0, SCALAR_MEAN + 2 * (N - 1), 2, F16_INF, BAD, 0},
    {"Q4", "table", DICT, PART, 0, 8 + N - 1, 1, 241, BAD, 0},
    {"Q4", "table", SCALAR, PART, 0, SCALAR_TABLES, 1, 255, BAD, 0},
    {"Q5", "no dictionary.id", DICT, ID, 0, 12, 1, 'e', BAD, 0},
    {"Q5", "other dictionary", DICT, ID, 0, 13, 1, 1, XKV_ERROR_MISMATCH, 1},
    {"D1", "dtypes", DICT, PLANES, 0, 24 + 5, 1, XKV_BF16, BAD, 0},
    {"D1", "K-rope in an svd group", SVD, PLANES, 0, 24 + 4, 1, XKV_PLANE_K_ROPE, BAD, 0},
    {"D1", "K-rope in a dict group", DICT, PLANES, 0, 24 + 4, 1, XKV_PLANE_K_ROPE, BAD, 0},
    {"D2", "size of a frame", LOSSLESS, PART, 2, 0, 4, 1, BAD, 1},
    {"D2", "size of the last frame", LOSSLESS, PART, 2, 4, 4, 1, BAD, 1},
    {"D2", "magic of a frame", LOSSLESS, PART, 2, 8, 1, 1, BAD, 1},
    {"D2", "content size", LOSSLESS, PART, 2, 8 + 5, 1, 1, BAD, 1},
    {"D3", "component NaN", SVD, PART, 0, 2, 2, F16_NAN, BAD, 0},
    {"D3", "component infinite", SVD, PART, 0, 6, 2, F16_INF, BAD, 0},
    {"D3", "scale negative", SVD, PART, 0, 8, 4, F32_MINUS_1, BAD, 0},
    {"D3", "scale NaN", SVD, PART, 0, 8, 4, F32_NAN, BAD, 0},
    {"D3", "coefficient NaN", SVD, PART, 3, 10, 2, F16_NAN, BAD, 0},
    {"E1", "table of a component", BASIS, PART, 0, TABLES, 1, 241, BAD, 0},
    {"E2", "state below 2^16", DICT, PART, 2, 0, 4, 0xffff, BAD, 0},
    {"E2", "state below 2^16", SCALAR, PART, 4, 4, 4, 0, BAD, 0},
    {"E2", "state below 2^16", BASIS, PART, 1, 0, 4, 0, BAD, 0},
    {"E3", "state that does not end at 2^16", DICT, PART, 2, 1, 1, 1, BAD, 1},
    {"E3", "word", SCALAR, PART, 2, 4 * 28 + 1, 1, 0x10, BAD, 1},
    {"Y1", "tokens", BASIS, GEOM, 0, 12, 4, 5, BAD, 0},
    {"Y2", "mean NaN", BASIS, PART, 0, 0, 4, F32_NAN, BAD, 0},
    {"Y2", "sigma negative", BASIS, PART, 0, 4 * N, 4, F32_MINUS_1, BAD, 0},
    {"Y2", "d 0", BASIS, PART, 0, 8 * N, 4, 0, BAD, 0},
    {"Y2", "d so large that components overflow", BASIS, PART, 0, 8 * N, 4, 0x7f7fffff, BAD, 0},
    {"Y2", "block not symmetric", BASIS, PART, 0, BLOCK + 4 + 2, 2, 0x2c00, BAD, 0},
    {"Y2", "block not positive definite", BASIS, PART, 0, BLOCK, 4, F32_MINUS_1, BAD, 0},
    {"Y2", "block singular", BASIS, PART, 0, BLOCK, 4, 0, BAD, 0},
    {"Y2", "block NaN", BASIS, PART, 0, BLOCK + 4, 2, F16_NAN, BAD, 0},
    {"Y3", "no dict.unit", BASIS, UNIT, 0, 8, 1, 's', BAD, 0},
    {"Y3", "dict.unit 0", BASIS, UNIT, 0, 9, 8, 0, BAD, 0},
    {"Y3", "dict.unit infinite", BASIS, UNIT, 0, 9, 8, 0x7ff0000000000000, BAD, 0},
    {"P1", "gap between the parts of a dictionary", BASIS, PART, 0, BLOCK + 2 * 36, 1, 1, BAD, 0},
    {"Q2", "stored chunk", CROSS, RECORD, 2, 24, 4, 0, BAD, 0},
    {"Q3", "step infinite", CROSS, PART, 0, 0, 4, 0x7f800000, BAD, 0},
    {"Q4", "table", CROSS, PART, 0, 8 + 2 * M - 1, 1, 241, BAD, 0},
    {"Q5", "no dictionary.id", CROSS, ID, 0, 12, 1, 'e', BAD, 0},
    {"E1", "table of a component", CROSS_BASIS, LAST_PART, 0, CROSS_TABLES, 1, 241, BAD, 0},
    {"E2", "state below 2^16", CROSS, PART, 2, 0, 4, 1, BAD, 0},
    {"E2", "state below 2^16", CROSS_BASIS, LAST_PART, 1, 0, 4, 0, BAD, 0},
    {"E3", "state that does not end at 2^16", CROSS, PART, 3, 1, 1, 1, BAD, 1},
    {"R2", "reason of a cross stage", CROSS, GROUP, 0, 4, 4, 1, BAD, 0},
    {"R3", "cross stage with planes", CROSS, GROUP, 0, 8, 4, 1, BAD, 0},
    {"R3", "dict group that says it is a cross stage", CROSS, LAST_GROUP, 0, 0, 4, XKV_GROUP_CROSS, BAD, 0},
    {"R4", "rank 0", CROSS, GROUP, 0, 12, 4, 0, BAD, 0},
    {"R4", "rank beyond all widths", CROSS_BASIS, LAST_GROUP, 0, 12, 4, 262145, BAD, 0},
    {"R6", "energy of a cross stage", CROSS, GROUP, 0, 24, 8, 0x3ff0000000000000, BAD, 0},
    {"Y2", "sigma NaN", CROSS_BASIS, LAST_PART, 0, CROSS_SIGMA, 4, F32_NAN, BAD, 0},
    {"Y2", "d negative", CROSS_BASIS, LAST_PART, 0, CROSS_D, 4, F32_MINUS_1, BAD, 0},
    {"Y2", "d so large that components overflow", CROSS_BASIS, LAST_PART, 0, CROSS_D, 4, 0x7f7fffff, BAD, 0},
    {"Y4", "more coefficients than the group has", CROSS_BASIS, LAST_PART, 0, 0, 4, 5, BAD, 0},
    {"Y4", "so many that the sum overflows", CROSS_BASIS, LAST_PART, 0, 4, 4, 0xffffffff, BAD, 0},
    {"Y4", "fewer coefficients than components", CROSS_BASIS, LAST_PART, 0, 4, 4, 2, BAD, 0},
    {"R2", "unknown codec", DICT, GROUP, 0, 0, 4, 8, XKV_ERROR_FEATURE, 0},
    {"R2", "codec of dictionaries", DICT, GROUP, 0, 0, 4, XKV_GROUP_BASIS, XKV_ERROR_FEATURE, 0},
    {"D1", "K-rope in an svdq group", SVDQ, PLANES, 0, 24 + 4, 1, XKV_PLANE_K_ROPE, BAD, 0},
    {"F7", "hash of the engine's file", LOSSLESS, FRAM, 0, 16, 1, 1, XKV_ERROR_CHECKSUM, 1},
};
enum { CASE_COUNT = sizeof cases / sizeof *cases };

/* Rules whose bad files have a test of their own below. */
static const char *const tested_below[] = {"Q6"};

static void put(memory *m, size_t at, uint32_t size, uint64_t value, int flip)
{
    for (uint32_t i = 0; i < size; i++) {
        uint8_t byte = (uint8_t)(value >> 8 * i);
        m->data[at + i] = flip ? m->data[at + i] ^ byte : byte;
    }
}

static memory make_bad(const bad_case *b)
{
    memory m = {.data = malloc(good[b->base].size), .size = good[b->base].size};

    memcpy(m.data, good[b->base].data, m.size);
    put(&m, locate(&m, b->where, b->index) + (size_t)(int32_t)b->offset, b->size, b->value, b->flip);
    seal((span){m.data, m.size});
    return m;
}

static xkv_status check_dict(const memory *m)
{
    xkv_input input = xkv_input_from_memory(m->data, m->size);
    xkv_dict *dict = NULL;
    xkv_status status = xkv_dict_open(ctx, &input, 1, &dict);

    xkv_dict_close(ctx, dict);
    return status;
}

static xkv_status check_entry(const memory *m, const xkv_dict *dict)
{
    return open_entry(ctx, dict, m->data, m->size);
}

static xkv_status check(const memory *m, base kind)
{
    if (kind == BASIS || kind == CROSS_BASIS)
        return check_dict(m);
    return check_entry(m, kind == DICT ? dictionary : kind == CROSS ? crossed : NULL);
}

/* --- Tests -------------------------------------------------------------------------------------------------------- */

static void good_files_are_accepted(void **state)
{
    (void)state;
    for (int i = 0; i < BASES; i++)
        assert_ok(ctx, check(&good[i], (base)i));
}

static void each_bad_file_is_refused(void **state)
{
    int failures = 0;

    (void)state;
    for (int i = 0; i < CASE_COUNT; i++) {
        const bad_case *b = &cases[i];
        memory m = make_bad(b);
        xkv_status status = check(&m, b->base);
        char number[8];
        (void)snprintf(number, sizeof number, "[%s]", b->rule);
        if (status != b->status || !strstr(xkv_ctx_error(ctx), number)) {
            print_error("%s %s: expected \"%s\", got \"%s\": %s\n", number, b->what, xkv_status_string(b->status),
                        xkv_status_string(status), xkv_ctx_error(ctx));
            failures++;
        }
        memory_free(&m);
    }
    assert_int_equal(failures, 0);
}

/* The entry `of` names `dict`, which does not fit it. */
static void assert_does_not_fit(base of, const xkv_dict *dict)
{
    xkv_dict_info info;
    memory m = {.data = malloc(good[of].size), .size = good[of].size};

    xkv_dict_get_info(dict, &info);
    memcpy(m.data, good[of].data, m.size);
    memcpy(m.data + locate(&m, ID, 0) + strlen("dictionary.id"), info.id, 16);
    seal((span){m.data, m.size});
    assert_int_equal(check_entry(&m, dict), XKV_ERROR_CORRUPT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "[Q6]"));
    memory_free(&m);
}

/* Its planes are of another width; it has no cross stage. */
static void dictionaries_that_do_not_fit(void **state)
{
    (void)state;
    assert_does_not_fit(DICT, narrow);
    assert_does_not_fit(CROSS, uncrossed);
}

/* The group behind the cross stage is one, too. */
static void a_cross_stage_that_is_not_first(void **state)
{
    memory m = {.data = malloc(good[CROSS].size), .size = good[CROSS].size};

    (void)state;
    memcpy(m.data, good[CROSS].data, m.size);
    memcpy(m.data + group_record(&m, 1), m.data + group_record(&m, 0), 48);
    seal((span){m.data, m.size});
    assert_int_equal(check_entry(&m, crossed), XKV_ERROR_CORRUPT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "is group 1, expected 0 [R3]"));
    memory_free(&m);
}

static void without_its_dictionary(void **state)
{
    (void)state;
    assert_int_equal(check_entry(&good[DICT], NULL), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(ctx), "[Q5]"));
}

/* All tables 0, but chunks that hold something; and the reverse: empty chunks of coded components. */
static void chunks_that_disagree_with_the_tables(void **state)
{
    memory m = {.data = malloc(good[DICT].size), .size = good[DICT].size};

    (void)state;
    memcpy(m.data, good[DICT].data, m.size);
    memset(m.data + locate(&m, PART, 0) + 8, 0, N);
    seal((span){m.data, m.size});
    assert_int_equal(check_entry(&m, dictionary), XKV_ERROR_CORRUPT);
    assert_non_null(strstr(xkv_ctx_error(ctx), "[E2]"));
    memory_free(&m);
}

static bool is_listed(const char *rule)
{
    for (int i = 0; i < CASE_COUNT; i++)
        if (strcmp(cases[i].rule, rule) == 0)
            return true;
    for (size_t i = 0; i < sizeof tested_below / sizeof *tested_below; i++)
        if (strcmp(tested_below[i], rule) == 0)
            return true;
    return false;
}

/* Rules of spec/container.md are those of test_bad. */
static int missing_rules(const char *path, int *found)
{
    FILE *spec = fopen(path, "r");
    int c, missing = 0;

    assert_non_null(spec);
    while ((c = getc(spec)) != EOF) {
        char rule[8];
        if (c != '[')
            continue;
        do {
            if (fscanf(spec, " %1[A-Z]%3[0-9]", rule, rule + 1) != 2)
                break;
            if (!strchr("DEQY", rule[0]))
                continue;
            ++*found;
            if (!is_listed(rule)) {
                print_error("%s: rule [%s] has no bad file\n", path, rule);
                missing++;
            }
        } while (getc(spec) == ',');
    }
    fclose(spec);
    return missing;
}

static void each_rule_of_the_specifications_has_a_bad_file(void **state)
{
    int found = 0, missing = missing_rules(XKV_SPEC_DIR "/codec.md", &found);

    (void)state;
    missing += missing_rules(XKV_SPEC_DIR "/dictionary.md", &found);
    assert_int_equal(missing, 0);
    assert_true(found > 15);
}

static int save_all(const char *folder)
{
    static const char *const names[BASES] = {"dict.xkv",     "scalar.xkv", "svdq.xkv",  "svd.xkv",
                                             "lossless.xkv", "joint.xkvd", "cross.xkv", "cross.xkvd"};

    (void)make_good(NULL);
    for (int i = 0; i < BASES; i++) {
        char path[4096];
        (void)snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        FILE *file = fopen(path, "wb");
        if (!file || fwrite(good[i].data, 1, good[i].size, file) != good[i].size || fclose(file) != 0) {
            perror(path);
            return 1;
        }
    }
    return free_good(NULL);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_files_are_accepted),
        cmocka_unit_test(each_bad_file_is_refused),
        cmocka_unit_test(dictionaries_that_do_not_fit),
        cmocka_unit_test(a_cross_stage_that_is_not_first),
        cmocka_unit_test(without_its_dictionary),
        cmocka_unit_test(chunks_that_disagree_with_the_tables),
        cmocka_unit_test(each_rule_of_the_specifications_has_a_bad_file),
    };

    return argc > 1 ? save_all(argv[1]) : cmocka_run_group_tests(tests, make_good, free_good);
}
