/* test_store_records.c - an index whose pages are sound and whose records are not: every table of spec/store.md,
 * section 6, with wrong checksums, sizes that its records do not have, and reserved fields that are not 0. LMDB itself
 * writes them here, so that nothing but the records is wrong. */
#include "store_support.h"

#include "store_internal.h"

#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { ENTRIES = 6, SIZE = 48, PAGE = 8, MOST = 512 };

static test_store t;
static xkv_namespace ns;

/* --- A store with records in every table -------------------------------------------------------------------------- */

typedef struct record {
    uint8_t key[XKV_KEY_MAX + 1], value[XKV_VALUE_MAX + 16]; /* the value with its checksum */
    size_t key_size, size;
} record;

static record records[MOST];
static size_t record_count;

static void open_index(MDB_env **env, MDB_txn **txn, MDB_dbi *dbi, bool write)
{
    char path[128];
    snprintf(path, sizeof path, "%s/index", t.path);
    assert_int_equal(mdb_env_create(env), 0);
    assert_int_equal(mdb_env_set_mapsize(*env, 16 << 20), 0);
    assert_int_equal(mdb_env_open(*env, path, MDB_NOSYNC, 0600), 0);
    assert_int_equal(mdb_txn_begin(*env, NULL, write ? 0 : MDB_RDONLY, txn), 0);
    assert_int_equal(mdb_dbi_open(*txn, NULL, 0, dbi), 0);
}

static void load_records(void)
{
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    MDB_cursor *cursor;
    MDB_val k, v;
    open_index(&env, &txn, &dbi, false);
    assert_int_equal(mdb_cursor_open(txn, dbi, &cursor), 0);
    record_count = 0;
    while (mdb_cursor_get(cursor, &k, &v, MDB_NEXT) == 0) {
        record *r = &records[record_count++];
        assert_true(record_count <= MOST && k.mv_size <= XKV_KEY_MAX && v.mv_size <= XKV_VALUE_MAX + 8);
        memset(r, 0, sizeof *r);
        memcpy(r->key, k.mv_data, r->key_size = k.mv_size);
        memcpy(r->value, v.mv_data, r->size = v.mv_size);
    }
    mdb_cursor_close(cursor);
    mdb_txn_abort(txn);
    mdb_env_close(env);
}

enum { ALL = MOST };

/* The index with all records as they were, but without one (ALL: none is missing), or with another one in its place. */
static void write_records(size_t without, const record *instead)
{
    MDB_env *env;
    MDB_txn *txn;
    MDB_dbi dbi;
    open_index(&env, &txn, &dbi, true);
    assert_int_equal(mdb_drop(txn, dbi, 0), 0);
    for (size_t i = 0; i < record_count; i++) {
        const record *r = i == without ? instead : &records[i];
        if (r == NULL)
            continue;
        MDB_val k = {r->key_size, (void *)(uintptr_t)r->key}, v = {r->size, (void *)(uintptr_t)r->value};
        assert_int_equal(mdb_put(txn, dbi, &k, &v, 0), 0);
    }
    assert_int_equal(mdb_txn_commit(txn), 0);
    mdb_env_close(env);
}

static void sign(record *r)
{
    uint8_t bytes[sizeof r->key + sizeof r->value];
    memcpy(bytes, r->key, r->key_size);
    memcpy(bytes + r->key_size, r->value, r->size - 8);
    xkv_store64(r->value + r->size - 8, XXH3_64bits(bytes, r->key_size + r->size - 8));
}

static uint64_t test_clock(void *user)
{
    (void)user;
    return 100 * 1000000u;
}

static xkv_status open_store(void)
{
    xkv_store_options o = xkv_store_options_default();
    o.clock = test_clock;
    return xkv_store_open(t.ctx, t.path, &o, &t.store);
}

static void close_store(void)
{
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
}

static void prompt_tokens(uint64_t number, int32_t tokens[SIZE])
{
    make_tokens(number / 3, 50000, tokens, SIZE); /* three of them share a beginning */
    tokens[SIZE / 2 + number % 3] += (int32_t)(number % 3);
}

/* With page keys, and every other one with a time to live. */
static xkv_status put_number(uint64_t number)
{
    int32_t tokens[SIZE];
    xkv_page_key names[SIZE / PAGE];
    xkv_put_options o = xkv_put_options_default();
    prompt_tokens(number, tokens);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, SIZE, PAGE, names));
    o.keys = names;
    o.key_count = SIZE / PAGE;
    o.ttl = number % 2 == 0 ? 1000 : 0;
    return put_rows(t.ctx, t.store, &ns, tokens, SIZE, &o, NULL);
}

/* An entry, and one that extends it. */
static void put_line(void)
{
    int32_t tokens[80];
    xkv_pack_options pack = xkv_pack_options_default();
    xkv_put_options o = xkv_put_options_default();
    xkv_put_report report = {.parent = 0};
    pack.chunk_tokens = 32;
    o.pack = &pack;
    make_tokens(900, 50000, tokens, 80);
    for (uint32_t count = 40; count <= 80; count += 40)
        assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, count, &o, &report));
    assert_true(report.parent != 0);
}

static void put_dictionary(void)
{
    synthetic s = small_cache(1);
    const synthetic *list = &s;
    memory file = {0};
    assert_ok(t.ctx, train_on(t.ctx, &list, 1, NULL, &file));
    const xkv_input input = xkv_input_from_memory(file.data, file.size);
    assert_ok(t.ctx, xkv_store_put_dict(t.ctx, t.store, &input, NULL));
    memory_free(&file);
    free_synthetic(&s);
}

/* A deletion that was committed and done, but for its record. */
static void add_trash(void)
{
    record *r = &records[record_count++];
    xkv_key key = xkv_key_id(XKV_TABLE_TRASH, 99);
    memset(r, 0, sizeof *r);
    memcpy(r->key, key.bytes, r->key_size = key.size);
    r->size = 32 + 8;
    sign(r);
}

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    close_store();
    ns = make_namespace(NULL);
    assert_ok(t.ctx, open_store());
    for (uint64_t i = 0; i < ENTRIES; i++)
        assert_ok(t.ctx, put_number(i));
    put_line();
    put_dictionary();
    close_store();
    load_records();
    add_trash();
    write_records(ALL, NULL);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    remove_folder(&t);
    return 0;
}

/* Tokens of the prompt that were found and are right; wrong ones fail the test. */
static uint32_t look_up(uint64_t number)
{
    int32_t tokens[SIZE];
    prompt_tokens(number, tokens);
    return find_rows(t.ctx, t.store, &ns, tokens, SIZE).tokens;
}

static uint32_t look_up_keys(uint64_t number)
{
    int32_t tokens[SIZE];
    xkv_page_key names[SIZE / PAGE];
    uint8_t keys[SIZE / PAGE][32];
    xkv_match m;
    prompt_tokens(number, tokens);
    assert_ok(t.ctx, xkv_chain_sglang(t.ctx, tokens, SIZE, PAGE, names));
    for (size_t i = 0; i < SIZE / PAGE; i++)
        memcpy(keys[i], names[i].key, 32);
    assert_ok(t.ctx, xkv_store_match_keys(t.ctx, t.store, &ns, (const uint8_t(*)[32])keys, SIZE / PAGE, &m, NULL));
    return m.keys;
}

static int ignore(void *user, const xkv_store_item *item)
{
    (void)user;
    (void)item;
    return 0;
}

/* Everything that reads records; what fails does so because of a record, and says what helps. */
static void use_everything(void)
{
    xkv_verify_report v;
    xkv_collect_report c;
    const xkv_status status[] = {xkv_store_list(t.ctx, t.store, &ns, ignore, NULL),
                                 xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &v),
                                 put_number(20),
                                 put_number(3),
                                 xkv_store_remove(t.ctx, t.store, &ns, 2),
                                 xkv_store_set_cap(t.ctx, t.store, 30000, NULL),
                                 xkv_store_collect(t.ctx, t.store, 1, &c)};
    for (size_t i = 0; i < sizeof status / sizeof *status; i++)
        assert_true(status[i] == XKV_OK || status[i] == XKV_ERROR_CORRUPT || status[i] == XKV_ERROR_NOT_FOUND);
    for (uint64_t i = 0; i < ENTRIES; i++) {
        (void)look_up(i);
        (void)look_up_keys(i);
    }
}

/* --- Sizes and reserved fields ------------------------------------------------------------------------------------ */

enum { SHORT_VALUE, LONG_VALUE, SHORT_KEY, LONG_KEY, OTHER_TABLE, WAYS };

/* The record with a size that it cannot have; false: not in this way. */
static bool missize(int way, const record *from, record *r)
{
    *r = *from;
    if ((way == SHORT_VALUE && from->size == 8) || (way == SHORT_KEY && from->key_size == 1))
        return false;
    switch (way) {
    case SHORT_VALUE:
        r->size--;
        break;
    case LONG_VALUE:
        r->size++;
        break;
    case SHORT_KEY:
        r->key_size--;
        break;
    case LONG_KEY:
        r->key_size++;
        break;
    default:
        r->key[0] = 'A';
        break;
    }
    sign(r);
    return true;
}

static uint64_t corrupt_count(void)
{
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    return s.corrupt;
}

/* Open the store with a record that is wrong: it is counted, or refused where there is no other way. */
static void assert_counted(size_t number, const record *r)
{
    write_records(number, r);
    xkv_status status = open_store();
    if (records[number].key[0] == XKV_TABLE_META) {
        assert_int_equal(status, XKV_ERROR_CORRUPT);
        return;
    }
    if (status != XKV_OK)
        fail_msg("table %c: %s", records[number].key[0], xkv_ctx_error(t.ctx));
    if (corrupt_count() != 1)
        fail_msg("table %c: not counted", records[number].key[0]);
    use_everything();
    close_store();
}

/* A copy of the store, since everything that is tried changes it. */
static void copy_store(const char *from, const char *to)
{
    char command[512];
    snprintf(command, sizeof command, "rm -rf %s && cp -r %s %s", to, from, to);
    assert_int_equal(system(command), 0);
}

static void sizes_are_those_of_the_table(void **state)
{
    (void)state;
    char saved[sizeof t.path + 8];
    snprintf(saved, sizeof saved, "%s.saved", t.path);
    copy_store(t.path, saved);
    for (size_t i = 0; i < record_count; i++) {
        for (int way = 0; way < WAYS; way++) {
            record r;
            bool again = i > 0 && records[i].key[0] == records[i - 1].key[0] && i % 7 != 0;
            if (again || !missize(way, &records[i], &r))
                continue; /* a few of each table */
            copy_store(saved, t.path);
            assert_counted(i, &r);
        }
    }
}

static void reserved_fields_are_refused(void **state)
{
    (void)state;
    static const struct {
        uint8_t table;
        size_t at;
        uint8_t value;
    } fields[] = {{XKV_TABLE_EDGE, 20, 1},  {XKV_TABLE_EDGE, 23, 1},  {XKV_TABLE_NODE, 12, 1},
                  {XKV_TABLE_ITEM, 68, 2},  {XKV_TABLE_ITEM, 71, 1},  {XKV_TABLE_ITEM, 80, 2},
                  {XKV_TABLE_ITEM, 208, 2}, {XKV_TABLE_ITEM, 212, 1}, {XKV_TABLE_ITEM, 215, 128}};
    char saved[sizeof t.path + 8];
    snprintf(saved, sizeof saved, "%s.saved", t.path);
    copy_store(t.path, saved);
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++) {
        size_t i = 0;
        while (records[i].key[0] != fields[f].table)
            i++;
        record r = records[i];
        r.value[fields[f].at] = fields[f].value;
        sign(&r);
        copy_store(saved, t.path);
        assert_counted(i, &r);
    }
}

/* --- Damage ------------------------------------------------------------------------------------------------------- */

/* Verification looks at all tables: what is wrong is told, whatever can be read. */
static void assert_found(size_t number, const char *what)
{
    xkv_verify_report v;
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 0, NULL, NULL, &v));
    if (v.first[0] == '\0' || v.damaged + v.missing + v.unreachable + v.wrong_sums + v.bad_records == 0)
        fail_msg("record %zu, of table %c, is %s: not found", number, records[number].key[0], what);
}

static void assert_repairable(void)
{
    xkv_verify_report v;
    close_store();
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
    assert_ok(t.ctx, open_store());
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &v));
    assert_string_equal(v.first, "");
}

/* A change that meets the damaged record: done, or refused with what helps. Records that only follow from others must
 * not be in the way. */
static void assert_stepped_over(size_t number, const char *what, xkv_status status)
{
    uint8_t table = records[number].key[0];
    if (status == XKV_OK)
        return;
    if (strchr("cdfhklqxz", table) != NULL || status != XKV_ERROR_CORRUPT ||
        strstr(xkv_ctx_error(t.ctx), "repair") == NULL)
        fail_msg("record %zu, of table %c: %s: %s", number, table, what, xkv_ctx_error(t.ctx));
}

static xkv_status put_beside(uint64_t number)
{
    int32_t tokens[SIZE];
    prompt_tokens(number, tokens);
    tokens[SIZE - 1] += 7;
    return put_rows(t.ctx, t.store, &ns, tokens, SIZE, NULL, NULL);
}

static void damaged_records_are_stepped_over(void **state)
{
    (void)state;
    char saved[sizeof t.path + 8];
    snprintf(saved, sizeof saved, "%s.saved", t.path);
    copy_store(t.path, saved);
    for (size_t i = 0; i < record_count; i++) {
        record r = records[i];
        r.value[r.size - 1] ^= 1;
        copy_store(saved, t.path);
        write_records(i, &r);
        if (r.key[0] == XKV_TABLE_META) {
            assert_int_equal(open_store(), XKV_ERROR_CORRUPT);
            assert_non_null(strstr(xkv_ctx_error(t.ctx), "repair"));
            continue;
        }
        assert_ok(t.ctx, open_store());
        assert_found(i, "damaged");
        for (uint64_t n = 0; n < ENTRIES; n++) {
            assert_stepped_over(i, "put again", put_number(n));
            assert_stepped_over(i, "put beside", put_beside(n));
        }
        assert_stepped_over(i, "remove", xkv_store_remove_namespace(t.ctx, t.store, &ns, NULL));
        assert_repairable();
        close_store();
    }
}

/* A damaged page key is nobody's damage: lookups by keys may end early, and all entries stay. */
static void damaged_page_keys_blame_no_entry(void **state)
{
    (void)state;
    xkv_store_stats before, after;
    char saved[sizeof t.path + 8];
    snprintf(saved, sizeof saved, "%s.saved", t.path);
    copy_store(t.path, saved);
    for (size_t i = 0; i < record_count; i++) {
        record r = records[i];
        if (r.key[0] != XKV_TABLE_PAGE)
            continue;
        r.value[r.size - 1] ^= 1;
        copy_store(saved, t.path);
        write_records(i, &r);
        assert_ok(t.ctx, open_store());
        assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &before));
        for (uint64_t n = 0; n < ENTRIES; n++)
            (void)look_up_keys(n);
        assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &after));
        assert_int_equal(after.entries, before.entries);
        close_store();
    }
}

static void missing_records_are_found(void **state)
{
    (void)state;
    char saved[sizeof t.path + 8];
    snprintf(saved, sizeof saved, "%s.saved", t.path);
    copy_store(t.path, saved);
    for (size_t i = 0; i < record_count; i++) {
        uint8_t table = records[i].key[0];
        if (table == XKV_TABLE_META || table == XKV_TABLE_TRASH)
            continue;
        copy_store(saved, t.path);
        write_records(i, NULL);
        assert_ok(t.ctx, open_store());
        assert_found(i, "missing");
        close_store();
    }
}

/* Each number in a record is one more, as if it were of another entry, node or time. */
static void records_that_contradict_others_are_found(void **state)
{
    (void)state;
    char saved[sizeof t.path + 8];
    snprintf(saved, sizeof saved, "%s.saved", t.path);
    copy_store(t.path, saved);
    for (size_t i = 0; i < record_count; i++) {
        static const char bare[] = {XKV_TABLE_CHILD, XKV_TABLE_USED, XKV_TABLE_EXPIRES,
                                    0}; /* their numbers are in the key */
        uint8_t table = records[i].key[0];
        record r = records[i];
        if (table == XKV_TABLE_META || table == XKV_TABLE_TRASH || table == XKV_TABLE_DICT)
            continue;
        if (strchr(bare, table) != NULL)
            r.key[8]++;
        else
            r.value[0] += 100;
        sign(&r);
        copy_store(saved, t.path);
        write_records(i, &r);
        assert_ok(t.ctx, open_store());
        assert_found(i, "another one");
        close_store();
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(sizes_are_those_of_the_table),     TEST(reserved_fields_are_refused),
        TEST(damaged_records_are_stepped_over), TEST(damaged_page_keys_blame_no_entry),
        TEST(missing_records_are_found),        TEST(records_that_contradict_others_are_found),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
