/* test_store_damage.c - a wrong bit anywhere in a store, files that are missing, foreign or links, and one bad store
 * for each rule of spec/store.md: never wrong data, never a crash; a miss, a refusal with the rule's number, and a
 * repair.
 * With XKV_LONG_TESTS in the environment every byte of the index is tried. */
#include "store_support.h"

#include "base.h"

#include <dirent.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

enum { ENTRIES = 6, SIZE = 24 };

static test_store t;
static xkv_namespace ns;

/* --- A store, and the bytes of its files -------------------------------------------------------------------------- */

typedef struct saved_file {
    char name[160];
    uint8_t *data;
    size_t size;
} saved_file;

static saved_file saved[ENTRIES + 2];
static size_t saved_count;

static void full_path(const char *name, char path[256])
{
    assert_true((size_t)snprintf(path, 256, "%s/%.160s", t.path, name) < 256);
}

static uint8_t *read_file(const char *name, size_t *size)
{
    char path[256];
    struct stat st;
    full_path(name, path);
    int fd = open(path, O_RDONLY);
    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    uint8_t *data = malloc((size_t)st.st_size + 1);
    assert_int_equal(pread(fd, data, (size_t)st.st_size, 0), st.st_size);
    close(fd);
    *size = (size_t)st.st_size;
    return data;
}

static void write_file(const char *name, const uint8_t *data, size_t size)
{
    char path[256];
    full_path(name, path);
    unlink(path);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, data, size, 0), size);
    close(fd);
}

static void save(const char *name)
{
    saved_file *f = &saved[saved_count++];
    snprintf(f->name, sizeof f->name, "%s", name);
    f->data = read_file(name, &f->size);
}

static void save_blobs(void)
{
    char path[256], name[160];
    full_path("blobs", path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.') {
            snprintf(name, sizeof name, "blobs/%.100s", e->d_name);
            save(name);
        }
    closedir(d);
}

static void close_store(void)
{
    xkv_store_close(t.ctx, t.store);
    t.store = NULL;
}

static void empty_folder(const char *name)
{
    char path[256];
    full_path(name, path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (e->d_name[0] != '.')
            assert_int_equal(unlinkat(dirfd(d), e->d_name, 0), 0);
    closedir(d);
}

/* All files as they were saved; the store is closed. */
static void restore_files(void)
{
    close_store();
    empty_folder("blobs");
    empty_folder("quarantine");
    for (size_t i = 0; i < saved_count; i++)
        write_file(saved[i].name, saved[i].data, saved[i].size);
}

static void prompt_tokens(uint64_t number, int32_t tokens[SIZE])
{
    make_tokens(number / 2, 50000, tokens, SIZE); /* pairs share their first half */
    tokens[SIZE / 2] += (int32_t)(number % 2);
}

static xkv_status put_number(uint64_t number)
{
    int32_t tokens[SIZE];
    prompt_tokens(number, tokens);
    return put_rows(t.ctx, t.store, &ns, tokens, SIZE, NULL, NULL);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

static int setup(void **state)
{
    (void)state;
    make_store(&t, 0);
    ns = make_namespace(NULL);
    for (uint64_t i = 0; i < ENTRIES; i++)
        assert_ok(t.ctx, put_number(i));
    close_store();
    saved_count = 0;
    save("index/data.mdb");
    save("store");
    save_blobs();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    remove_folder(&t);
    for (size_t i = 0; i < saved_count; i++)
        free(saved[i].data);
    return 0;
}

/* What a lookup of entry `number` gives: tokens that were restored and are right. Wrong ones fail the test. */
static uint32_t look_up(uint64_t number, uint32_t *reason)
{
    int32_t tokens[SIZE];
    xkv_match m = {0};
    xkv_hit *hit = NULL;
    xkv_status status = XKV_OK;
    uint32_t matched = 0;
    prompt_tokens(number, tokens);
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    if (xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, &hit) != XKV_OK)
        return 0;
    if (hit != NULL && hit_is_right(t.ctx, hit, m.tokens, tokens, &status))
        matched = m.tokens;
    else if (hit != NULL)
        assert_int_not_equal(status, XKV_OK); /* not: other data than was stored, reported as good */
    xkv_hit_close(t.ctx, hit);
    *reason = m.reason;
    return matched;
}

static uint32_t sound_entries(void)
{
    uint32_t sound = 0, reason;
    for (uint64_t i = 0; i < ENTRIES; i++)
        sound += look_up(i, &reason) == SIZE;
    return sound;
}

static xkv_store_stats stats(void)
{
    xkv_store_stats s;
    assert_ok(t.ctx, xkv_store_get_stats(t.ctx, t.store, &s));
    return s;
}

static xkv_status open_store(void)
{
    return xkv_store_open(t.ctx, t.path, NULL, &t.store);
}

static uint32_t count_blobs(void)
{
    char path[256];
    uint32_t n = 0;
    full_path("blobs", path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

/* Repair finds every blob, and then nothing is wrong. */
static void assert_repairable(void)
{
    xkv_repair_report r;
    xkv_verify_report v;
    close_store();
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, &r));
    assert_int_equal(r.entries, count_blobs());
    assert_ok(t.ctx, open_store());
    assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 1, NULL, NULL, &v));
    assert_string_equal(v.first, "");
    assert_int_equal(v.entries, r.entries);
}

/* --- Wrong bits --------------------------------------------------------------------------------------------------- */

/* The saved file with one bit wrong, in a store that is otherwise as it was. */
static void damage(const saved_file *f, size_t at, unsigned bit)
{
    restore_files();
    f->data[at] ^= (uint8_t)(1u << bit);
    write_file(f->name, f->data, f->size);
    f->data[at] ^= (uint8_t)(1u << bit);
}

/* In a blob: at most that entry is lost, it is counted, and the others are there. */
static void a_wrong_bit_in_a_blob(void **state)
{
    (void)state;
    uint64_t random = 1, found = 0;
    for (size_t at = 0; at < saved[2].size; at++) {
        xkv_verify_report v;
        damage(&saved[2], at, test_random(&random) % 8);
        assert_ok(t.ctx, open_store());
        assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 0, NULL, NULL, &v));
        assert_int_equal(v.damaged, 1); /* by its hash */
        uint32_t sound = sound_entries();
        assert_true(sound >= ENTRIES - 1);
        if (sound == ENTRIES)
            continue; /* a gap, which holds nothing */
        found++;
        assert_int_equal(stats().corrupt, 1);
        assert_int_equal(stats().quarantined > 0, 1);
        assert_int_equal(stats().entries, ENTRIES - 1);
        assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 0, NULL, NULL, &v));
        assert_string_equal(v.first, "");
    }
    assert_true(found > saved[2].size / 2);
}

static void damage_blob(uint64_t id)
{
    char path[256];
    full_path("blobs", path);
    DIR *d = opendir(path);
    assert_non_null(d);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        char name[160];
        size_t size = 0;
        if (strlen(e->d_name) != 81 || strtoull(e->d_name + 65, NULL, 16) != id)
            continue;
        snprintf(name, sizeof name, "blobs/%.100s", e->d_name);
        uint8_t *data = read_file(name, &size);
        data[20] ^= 1;
        write_file(name, data, size);
        free(data);
    }
    closedir(d);
}

/* Damage one entry after another; what is then in quarantine beside so large a cap (0: none). */
static xkv_store_stats quarantine_all(uint64_t byte_cap)
{
    restore_files();
    assert_ok(t.ctx, open_store());
    assert_ok(t.ctx, xkv_store_set_cap(t.ctx, t.store, byte_cap, NULL));
    for (uint64_t i = 0; i < 12; i++) {
        uint32_t reason;
        xkv_put_report report;
        int32_t tokens[SIZE];
        prompt_tokens(100 + i, tokens);
        assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, SIZE, NULL, &report));
        damage_blob(report.id);
        (void)look_up(100 + i, &reason);
    }
    assert_int_equal(stats().corrupt, 12);
    return stats();
}

static void the_quarantine_is_bounded(void **state)
{
    (void)state;
    xkv_collect_report r;
    xkv_store_stats s = quarantine_all(0);
    assert_int_equal(s.quarantined, 8);
    const uint64_t each = s.quarantined_bytes / 8;
    s = quarantine_all(16 * (3 * each + each / 2));
    assert_int_equal(s.quarantined, 3);
    assert_true(s.quarantined_bytes <= s.byte_cap / 16);
    s = quarantine_all(15 * each); /* less than one: the last one stays */
    assert_int_equal(s.quarantined, 1);
    assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 0, &r));
    assert_true(r.freed_bytes >= s.quarantined_bytes);
    assert_int_equal(stats().quarantined + stats().quarantined_bytes, 0);
}

/* The same when the next entry is put: the tree must not be built on what a damaged blob says. */
static void a_wrong_bit_in_a_neighbour(void **state)
{
    (void)state;
    for (size_t at = 0; at < 400; at += 3) {
        xkv_verify_report v;
        uint32_t reason;
        damage(&saved[2], at, 5);
        assert_ok(t.ctx, open_store());
        for (uint64_t i = 0; i < 8; i++) { /* what shares a prefix with each of the entries */
            int32_t tokens[SIZE];
            prompt_tokens(i, tokens);
            tokens[SIZE - 1] += 7;
            assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, SIZE, NULL, NULL));
        }
        for (uint64_t i = 0; i < ENTRIES; i++) {
            (void)look_up(i, &reason); /* damage of the payload shows now, and the entry goes */
            assert_true(look_up(i, &reason) >= SIZE - 1);
        }
        close_store();
        assert_ok(t.ctx, open_store());
        assert_ok(t.ctx, xkv_store_verify(t.ctx, t.store, 0, NULL, NULL, &v));
        if (v.unreachable + v.missing + v.orphans + v.wrong_sums > 0)
            fail_msg("byte %zu: %s", at, v.first);
    }
}

/* In the index: refused on opening, or found by a record's checksum, or without effect; the blobs rebuild it. */
static void a_wrong_bit_in_the_index(void **state)
{
    (void)state;
    uint64_t random = 1, refused = 0, lost = 0;
    const size_t stride = getenv("XKV_LONG_TESTS") != NULL ? 1 : 11;
    for (size_t at = 0; at < saved[0].size;
         at += at % 4096 < 200 && at < 8192 ? 1 : stride) { /* the meta pages whole */
        xkv_verify_report v;
        damage(&saved[0], at, test_random(&random) % 8);
        xkv_status status = open_store();
        if (status != XKV_OK) {
            assert_true(status == XKV_ERROR_CORRUPT || status == XKV_ERROR_VERSION);
            assert_non_null(strstr(xkv_ctx_error(t.ctx), "index"));
            if (strstr(xkv_ctx_error(t.ctx), " [SI") == NULL)
                fail_msg("byte %zu: no rule: %s", at, xkv_ctx_error(t.ctx));
            refused++;
            if (refused % 50 == 0)
                assert_repairable();
            continue;
        }
        uint32_t sound = sound_entries();
        status = xkv_store_verify(t.ctx, t.store, 0, NULL, NULL, &v);
        if (sound < ENTRIES) {
            lost++;
            if (stats().corrupt == 0)
                fail_msg("byte %zu", at);
        }
        (void)!put_number(30); /* it may fail, for the same reason */
        if (lost % 50 == 1)
            assert_repairable();
    }
    assert_true(refused > 50 && lost > 50);
}

/* --- Files that are not what they should be ----------------------------------------------------------------------- */

static void assert_refused(xkv_status expected, const char *text)
{
    xkv_status status = open_store();
    if (status != expected || strstr(xkv_ctx_error(t.ctx), text) == NULL)
        fail_msg("%s, not %s with %s: %s", xkv_status_string(status), xkv_status_string(expected), text,
                 xkv_ctx_error(t.ctx));
}

static void bad_properties(void **state)
{
    (void)state;
    saved_file *f = &saved[1];
    char path[256];
    restore_files();
    full_path("store", path);
    assert_int_equal(unlink(path), 0);
    assert_refused(XKV_ERROR_FORMAT, "[SO1]");
    write_file("store", (const uint8_t *)"xkvstorf, or something else that is not a store", 47);
    assert_refused(XKV_ERROR_FORMAT, "[SO1]");
    f->data[10] = 3;
    write_file("store", f->data, f->size);
    assert_refused(XKV_ERROR_CHECKSUM, "[SO3]");
    for (uint8_t version = 1; version <= 3; version += 2) { /* an older and a newer one */
        f->data[10] = version;
        xkv_store64(f->data + 56, XXH3_64bits(f->data, 56));
        write_file("store", f->data, f->size);
        assert_refused(XKV_ERROR_VERSION, "[SO2]");
        assert_int_equal(xkv_store_repair(t.ctx, t.path, NULL, 0, NULL), XKV_ERROR_VERSION);
    }
    f->data[10] = 2;
    xkv_store64(f->data + 56, XXH3_64bits(f->data, 56));
    write_file("store", f->data, f->size - 1);
    assert_refused(XKV_ERROR_CHECKSUM, "[SO3]");
    f->data[30] = 1;
    write_file("store", f->data, f->size);
    assert_refused(XKV_ERROR_CHECKSUM, "[SO3]");
    xkv_store64(f->data + 56, XXH3_64bits(f->data, 56));
    write_file("store", f->data, f->size);
    assert_refused(XKV_ERROR_FEATURE, "[SO3]");
    f->data[30] = 0;
    xkv_store32(f->data + 12, 0);
    xkv_store64(f->data + 56, XXH3_64bits(f->data, 56));
    write_file("store", f->data, f->size);
    assert_refused(XKV_ERROR_CORRUPT, "[SO3]");
    xkv_store32(f->data + 12, 256);
    f->data[8] = 9; /* written by a newer program, which says that this one may read it */
    xkv_store64(f->data + 56, XXH3_64bits(f->data, 56));
    write_file("store", f->data, f->size);
    assert_ok(t.ctx, open_store());
}

/* A store of other properties, with prompts of one block and of several. */
static void make_other_store(uint32_t block_tokens, const uint8_t *key)
{
    xkv_store_properties p = xkv_store_properties_default();
    xkv_store_options o = xkv_store_options_default();
    p.block_tokens = block_tokens;
    p.byte_cap = 123456789;
    p.key = o.key = key;
    snprintf(t.path, sizeof t.path, "%s/other", t.folder);
    assert_ok(t.ctx, xkv_store_create(t.ctx, t.path, &p));
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
    for (uint64_t i = 0; i < ENTRIES; i++) {
        int32_t tokens[SIZE];
        prompt_tokens(i, tokens);
        assert_ok(t.ctx, put_rows(t.ctx, t.store, &ns, tokens, (uint32_t)(SIZE - 3 * i), NULL, NULL));
    }
    close_store();
}

/* The repair finds what the file has said: the very bytes. */
static void assert_made_anew(const uint8_t *key, const uint8_t *expected)
{
    xkv_repair_report r;
    size_t size = 0;
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, key, 0, &r));
    assert_int_equal(r.lost_properties, 1);
    assert_int_equal(r.entries, ENTRIES);
    uint8_t *now = read_file("store", &size);
    assert_int_equal(size, 64);
    assert_memory_equal(now, expected, 64);
    free(now);
}

static void lost_properties_are_made_anew(void **state)
{
    (void)state;
    static const uint32_t blocks[] = {1, 7, 20, 23, 256};
    static const uint8_t key[32] = {1, 2, 3}, wrong[32] = {4};
    char before[sizeof t.path], file[256];
    restore_files();
    memcpy(before, t.path, sizeof before);
    for (size_t i = 0; i < 2 * 5; i++) {
        const uint8_t *with = i % 2 == 0 ? NULL : key;
        size_t size = 0;
        make_other_store(blocks[i / 2], with);
        uint8_t *bytes = read_file("store", &size);
        for (size_t bit = 0; bit < 8 * size; bit += i < 2 ? 1 : 37) {
            bytes[bit / 8] = (uint8_t)(bytes[bit / 8] ^ 1u << bit % 8);
            write_file("store", bytes, size);
            bytes[bit / 8] = (uint8_t)(bytes[bit / 8] ^ 1u << bit % 8);
            assert_refused(XKV_ERROR_CHECKSUM, "repair makes it anew [SO3]");
            if (with != NULL) {
                assert_int_equal(xkv_store_repair(t.ctx, t.path, wrong, 0, NULL), XKV_ERROR_MISMATCH);
                assert_int_equal(xkv_store_repair(t.ctx, t.path, NULL, 0, NULL), XKV_ERROR_MISMATCH);
            }
            assert_made_anew(with, bytes);
        }
        full_path("store", file);
        assert_int_equal(unlink(file), 0);
        assert_made_anew(with, bytes);
        free(bytes);
        nftw(t.path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
        memcpy(t.path, before, sizeof before);
    }
}

/* A pipe in place of a file is refused without waiting for who writes to it. */
static void pipes_are_no_files(void **state)
{
    (void)state;
    int32_t tokens[SIZE];
    xkv_match m;
    xkv_status status = XKV_OK;
    const xkv_prompt prompt = {.tokens = tokens, .token_count = SIZE};
    restore_files();
    for (size_t i = 2; i < saved_count; i++) {
        char path[256];
        full_path(saved[i].name, path);
        assert_int_equal(unlink(path), 0);
        assert_int_equal(mkfifo(path, 0600), 0);
    }
    assert_ok(t.ctx, open_store());
    prompt_tokens(0, tokens);
    status = xkv_store_match(t.ctx, t.store, &ns, &prompt, 0, &m, NULL);
    assert_int_equal(status, XKV_ERROR_IO);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "is not a regular file [SO5]"));
}

/* Replace NAME by a link to the same thing elsewhere. */
static void link_away(const char *name)
{
    char path[256], away[256];
    full_path(name, path);
    snprintf(away, sizeof away, "%s/away", t.folder);
    assert_int_equal(rename(path, away), 0);
    assert_int_equal(symlink(away, path), 0);
}

static void link_back(const char *name)
{
    char path[256], away[256];
    full_path(name, path);
    snprintf(away, sizeof away, "%s/away", t.folder);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rename(away, path), 0);
}

static void links_are_refused(void **state)
{
    (void)state;
    static const char *const names[] = {"store", "blobs", "tmp", "quarantine", "index", "index/data.mdb"};
    char link[256];
    restore_files();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        link_away(names[i]);
        assert_int_equal(open_store(), XKV_ERROR_IO);
        link_back(names[i]);
    }
    snprintf(link, sizeof link, "%s/link", t.folder);
    assert_int_equal(symlink(t.path, link), 0);
    assert_int_equal(xkv_store_open(t.ctx, link, NULL, &t.store), XKV_ERROR_IO);
    link_away(saved[2].name); /* a blob */
    assert_ok(t.ctx, open_store());
    assert_int_equal(sound_entries(), ENTRIES - 1);
}

/* A folder beside the store with files that LMDB would take for its own. */
static void check_link(const char *name, const char *target)
{
    static const char *const others[] = {"data.mdb", "lock.mdb"};
    char folder[256], path[300], link[256];
    struct stat st;
    snprintf(folder, sizeof folder, "%s/other", t.folder);
    assert_int_equal(mkdir(folder, 0700), 0);
    for (size_t i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, others[i]);
        int fd = open(path, O_WRONLY | O_CREAT, 0600);
        assert_true(fd >= 0);
        assert_int_equal(pwrite(fd, "precious", 8, 0), 8);
        close(fd);
    }
    snprintf(path, sizeof path, "%s/%s", folder, target);
    full_path(name, link);
    assert_int_equal(symlink(path, link), 0);
    bool is_new = strcmp(name, "index.new") == 0; /* what nobody needs goes */
    for (int compact = 0; compact < 2; compact++) {
        xkv_status status = xkv_store_repair(t.ctx, t.path, NULL, compact, NULL);
        assert_int_equal(status, is_new ? XKV_OK : XKV_ERROR_IO);
    }
    assert_int_equal(open_store(), is_new ? XKV_OK : XKV_ERROR_IO);
    close_store();
    for (size_t i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, others[i]);
        assert_int_equal(lstat(path, &st), 0);
        assert_int_equal(st.st_size, 8);
        assert_int_equal(unlink(path), 0);
    }
    assert_int_equal(rmdir(folder), 0);
    if (!is_new)
        assert_int_equal(unlink(link), 0);
}

static void repair_follows_no_links(void **state)
{
    (void)state;
    static const char *const names[] = {"index/data.mdb", "index/lock.mdb", "index"};
    char path[256], away[256];
    restore_files();
    assert_ok(t.ctx, open_store()); /* with a lock file */
    close_store();
    check_link("index.new", ".");
    snprintf(away, sizeof away, "%s/away", t.folder);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        full_path(names[i], path);
        assert_int_equal(rename(path, away), 0);
        check_link(names[i], i < 2 ? names[i] + 6 : ".");
        assert_int_equal(rename(away, path), 0);
    }
    assert_ok(t.ctx, open_store());
    assert_int_equal(sound_entries(), ENTRIES);
}

static void folders_of_others_are_refused(void **state)
{
    (void)state;
    static const char *const names[] = {".", "blobs", "tmp", "quarantine", "index"};
    char path[256];
    restore_files();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        full_path(names[i], path);
        assert_int_equal(chmod(path, 0720), 0);
        assert_refused(XKV_ERROR_IO, "[SO5]");
        assert_int_equal(chmod(path, 0700), 0);
    }
    assert_ok(t.ctx, open_store());
}

static void a_missing_index_is_not_made_anew(void **state)
{
    (void)state;
    char path[256];
    restore_files();
    full_path("index/data.mdb", path);
    assert_int_equal(unlink(path), 0);
    assert_refused(XKV_ERROR_CORRUPT, "[SO4]");
    write_file("index/data.mdb", (const uint8_t *)"", 0);
    assert_refused(XKV_ERROR_CORRUPT, "[SO4]");
    assert_repairable();
}

/* A process that has the store open until it is told to end by the pipe. */
static pid_t other_user(int *until)
{
    int ready[2], end[2];
    char byte = 0;
    assert_int_equal(pipe(ready) + pipe(end), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(end[1]);
        byte = open_store() == XKV_OK;
        bool told = write(ready[1], &byte, 1) == 1 && read(end[0], &byte, 1) == 0;
        _exit(told ? 0 : 1);
    }
    close(ready[1]);
    close(end[0]);
    assert_int_equal(read(ready[0], &byte, 1), 1);
    assert_int_equal(byte, 1);
    close(ready[0]);
    *until = end[1];
    return child;
}

static void end_other_user(pid_t child, int until)
{
    int status;
    close(until);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

/* Made anew while nobody has the store open; otherwise there would be two sets of locks. */
static void a_lost_lock_file(void **state)
{
    (void)state;
    char path[256];
    int until;
    restore_files();
    full_path("index/lock.mdb", path);
    assert_int_equal(unlink(path), 0);
    assert_ok(t.ctx, open_store());
    assert_int_equal(sound_entries(), ENTRIES);
    close_store();
    pid_t child = other_user(&until);
    assert_ok(t.ctx, open_store()); /* with the file, both may */
    close_store();
    assert_int_equal(xkv_store_repair(t.ctx, t.path, NULL, 0, NULL), XKV_ERROR_IO);
    assert_int_equal(unlink(path), 0);
    assert_refused(XKV_ERROR_IO, "index/lock.mdb was removed while the store is in use");
    end_other_user(child, until);
    assert_ok(t.ctx, open_store());
    assert_int_equal(sound_entries(), ENTRIES);
}

static int remove_file(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)ftw;
    const char *name = strrchr(path, '/') + 1;
    bool lock =
        type == FTW_F && strstr(path, "/blobs/") == NULL && strcmp(name, "data.mdb") != 0 && strcmp(name, "store") != 0;
    return lock ? unlink(path) : 0;
}

/* Whoever has the store open keeps others from replacing the index, whatever files are deleted. */
static void locks_survive_their_files(void **state)
{
    (void)state;
    int until;
    restore_files();
    pid_t child = other_user(&until);
    assert_int_equal(nftw(t.path, remove_file, 16, FTW_PHYS), 0);
    assert_int_equal(xkv_store_repair(t.ctx, t.path, NULL, 0, NULL), XKV_ERROR_IO);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "in use"));
    end_other_user(child, until);
    assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, NULL));
    assert_ok(t.ctx, open_store());
    assert_int_equal(sound_entries(), ENTRIES);
}

/* --- One bad blob for each rule ----------------------------------------------------------------------------------- */

typedef struct bad_blob {
    const char *rule;
    size_t at;       /* a byte of the head or the body ... */
    uint8_t value;   /* ... and what it becomes */
    bool head, body; /* which checksums are made right again */
} bad_blob;

static const bad_blob bad_blobs[] = {
    {"[SB1]", 3, 'A', false, false},  {"[SB1]", 250, 1, false, false},  {"[SB2]", 10, 0, true, false},
    {"[SB2]", 24, 1, true, false},    {"[SB2]", 170, 1, true, false},   {"[SB3]", 12, 3, true, false},
    {"[SB3]", 16, 1, true, false},    {"[SB4]", 32, 0, true, false},    {"[SB4]", 35, 0xff, true, false},
    {"[SB4]", 39, 0xff, true, false}, {"[SB4]", 40, 65, true, false},   {"[SB4]", 48, 1, true, false},
    {"[SB5]", 259, 1, true, false},   {"[SB5]", 275, 0x80, true, true}, {"[SB6]", 28, 23, true, false},
    {"[SB6]", 104, 1, true, false},   {"[SB6]", 136, 1, true, false},   {"[SB6]", 88, 1, true, false},
};

static char logged[1024];

static void keep_log(void *user, xkv_log_level level, const char *message)
{
    (void)user;
    (void)level;
    snprintf(logged, sizeof logged, "%s", message);
}

static void make_bad(const bad_blob *b, uint8_t *data)
{
    data[b->at] = b->value;
    if (b->body) { /* one run of symbols, no page keys */
        xkv_store64(data + 256, XXH3_64bits(data + 272, 4 * SIZE));
        xkv_store64(data + 80, XXH3_64bits(data + 256, 16));
    }
    if (b->head)
        xkv_store64(data + 248, XXH3_64bits(data, 248));
}

static void blobs_that_break_a_rule(void **state)
{
    (void)state;
    xkv_ctx_options o = xkv_ctx_options_default();
    xkv_ctx *plain = t.ctx;
    o.log = keep_log;
    o.threads = 1;
    for (size_t i = 0; i < sizeof bad_blobs / sizeof *bad_blobs; i++) {
        restore_files();
        size_t size = saved[2].size;
        uint8_t *data = malloc(size);
        memcpy(data, saved[2].data, size);
        make_bad(&bad_blobs[i], data);
        write_file(saved[2].name, data, size);
        free(data);
        logged[0] = '\0';
        assert_int_equal(xkv_ctx_create(&o, &t.ctx), XKV_OK);
        assert_ok(t.ctx, open_store());
        assert_int_equal(sound_entries(), ENTRIES - 1);
        if (strstr(logged, bad_blobs[i].rule) == NULL)
            fail_msg("%s was not quoted: %s", bad_blobs[i].rule, logged);
        assert_non_null(strstr(logged, "quarantine"));
        close_store();
        xkv_ctx_free(t.ctx);
        t.ctx = plain;
    }
}

/* What a newer program has written is neither found nor harmed. */
static void blobs_of_a_newer_program_stay(void **state)
{
    (void)state;
    static const bad_blob newer[] = {{"version", 10, 2, true, false}, {"features", 24, 8, true, false}};
    for (size_t i = 0; i < 2; i++) {
        const saved_file *f = &saved[2];
        xkv_repair_report r;
        xkv_collect_report c;
        uint8_t *data = malloc(f->size);
        uint32_t misses = 0;
        restore_files();
        memcpy(data, f->data, f->size);
        make_bad(&newer[i], data);
        write_file(f->name, data, f->size);
        free(data);
        assert_ok(t.ctx, open_store());
        for (uint64_t number = 0; number < ENTRIES; number++) {
            uint32_t reason;
            int32_t tokens[SIZE];
            uint32_t found = look_up(number, &reason);
            if (found == SIZE)
                continue;
            assert_int_equal(reason, found > 0 ? XKV_MATCH_FOUND : XKV_MATCH_NEWER); /* another one may serve */
            prompt_tokens(number, tokens);
            tokens[SIZE - 1] += 7;
            xkv_status status = put_rows(t.ctx, t.store, &ns, tokens, SIZE, NULL, NULL);
            assert_int_equal(status, i == 0 ? XKV_ERROR_VERSION : XKV_ERROR_FEATURE);
            assert_non_null(strstr(xkv_ctx_error(t.ctx), newer[i].rule));
            misses++;
        }
        assert_int_equal(misses, 1);
        assert_int_equal(stats().corrupt + stats().quarantined, 0);
        assert_int_equal(stats().entries, ENTRIES);
        close_store();
        assert_ok(t.ctx, xkv_store_repair(t.ctx, t.path, NULL, 0, &r));
        assert_int_equal(r.entries, ENTRIES - 1);
        assert_int_equal(r.quarantined, 0);
        assert_int_equal(r.newer, 1);
        assert_ok(t.ctx, open_store());
        assert_ok(t.ctx, xkv_store_collect(t.ctx, t.store, 0, &c));
        assert_int_equal(c.orphans, 0);
        assert_int_equal(count_blobs(), ENTRIES);
    }
}

/* An exported file whose tokens are not those that its entry knows, though all checksums are right. */
static void changed_tokens_are_not_imported(void **state)
{
    (void)state;
    int32_t tokens[SIZE];
    xkv_put_report report;
    memory m = {0};
    const xkv_output output = memory_output(&m);
    restore_files();
    assert_ok(t.ctx, open_store());
    make_tokens(99, 50000, tokens, SIZE);
    rows *r = make_rows(tokens, SIZE);
    r->geometry.token_ids = tokens;
    r->geometry.token_id_count = SIZE;
    assert_ok(t.ctx,
              xkv_store_put_planes(t.ctx, t.store, &ns, NULL, &r->geometry, r->views, NULL, NULL, 0, NULL, &report));
    free(r);
    assert_ok(t.ctx, xkv_store_export(t.ctx, t.store, &ns, report.id, &output));
    assert_ok(t.ctx, xkv_store_remove(t.ctx, t.store, &ns, report.id));
    const xkv_input input = xkv_input_from_memory(m.data, m.size);
    const bad_blob other = {"", 272 + 4 * 7, (uint8_t)(m.data[272 + 4 * 7] ^ 1), true, true};
    const bad_blob back = {"", 272 + 4 * 7, m.data[272 + 4 * 7], true, true};
    make_bad(&other, m.data);
    assert_int_equal(xkv_store_import(t.ctx, t.store, &input, NULL), XKV_ERROR_MISMATCH);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "token 7 of the prompt"));
    make_bad(&back, m.data);
    assert_ok(t.ctx, xkv_store_import(t.ctx, t.store, &input, NULL));
    memory_free(&m);
}

/* --- Read-only ---------------------------------------------------------------------------------------------------- */

static void read_only_stores_are_left_alone(void **state)
{
    (void)state;
    xkv_store_options o = xkv_store_options_default();
    size_t size;
    o.access = XKV_STORE_READ_ONLY;
    saved[2].data[saved[2].size / 2] ^= 1;
    restore_files();
    assert_ok(t.ctx, xkv_store_open(t.ctx, t.path, &o, &t.store));
    assert_true(sound_entries() >= ENTRIES - 1);
    assert_int_equal(put_number(20), XKV_ERROR_IO);
    assert_non_null(strstr(xkv_ctx_error(t.ctx), "read-only"));
    assert_int_equal(xkv_store_remove(t.ctx, t.store, &ns, 1), XKV_ERROR_IO);
    close_store();
    uint8_t *index = read_file("index/data.mdb", &size);
    assert_int_equal(size, saved[0].size);
    assert_memory_equal(index, saved[0].data, size);
    free(index);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(a_wrong_bit_in_a_blob),
        TEST(a_wrong_bit_in_a_neighbour),
        TEST(the_quarantine_is_bounded),
        TEST(a_wrong_bit_in_the_index),
        TEST(bad_properties),
        TEST(lost_properties_are_made_anew),
        TEST(pipes_are_no_files),
        TEST(links_are_refused),
        TEST(repair_follows_no_links),
        TEST(folders_of_others_are_refused),
        TEST(a_missing_index_is_not_made_anew),
        TEST(a_lost_lock_file),
        TEST(locks_survive_their_files),
        TEST(blobs_that_break_a_rule),
        TEST(blobs_of_a_newer_program_stay),
        TEST(changed_tokens_are_not_imported),
        TEST(read_only_stores_are_left_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
