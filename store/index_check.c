/* index_check.c - the pages of an LMDB file, looked at before LMDB does.
 *
 * LMDB has no checksums and trusts its file: a wrong bit in a page header, a page number or an offset can make it read
 * beyond the map. So a store walks its file once on opening and refuses it when any page is not what it must be. Of the
 * records, which are read later, those that are not what they must be are only counted: one whose key has changed would
 * otherwise just not be found.
 *
 *     meta page 0 | meta page 1 | pages ...           the meta page with the higher transaction counts
 *     page:  u64 number, u16 pad, u16 flags, u16 lower, u16 upper, u16 offsets of the nodes ... nodes
 *     node:  u16 low, u16 high, u16 flags, u16 key size, key, data
 *
 * A node of a branch page holds the number of its child in low, high and flags; one of a leaf page the size of its data
 * in low and high. Two trees: free pages, by transaction, and the records. */
#include "index.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define META_MAGIC    0xbeefc0deu
#define META_VERSION  1u
#define META_BYTES    152u /* of a meta page that are looked at */
#define HEADER        16u
#define NODE_HEADER   8u
#define MAX_DEPTH     32u
#define MAX_PAGE_SIZE 32768u
#define UNWRITTEN     (1u << 20) /* more pages than a transaction can allocate and not write */
#define NO_PAGE       UINT64_MAX

enum { BRANCH = 0x01, LEAF = 0x02, OVERFLOW = 0x04, META = 0x08 }; /* flags of pages */
enum { BIG_DATA = 0x01 };                                          /* of nodes */
enum { INTEGER_KEYS = 0x08 };                                      /* of trees */
enum { FREE_TREE, RECORD_TREE };

typedef struct tree {
    uint16_t flags, depth;
    uint64_t branch_pages, leaf_pages, overflow_pages, entries, root;
} tree;

typedef struct meta_page {
    uint32_t page_size;
    uint64_t last_page, txn_id;
    tree trees[2];
} meta_page;

typedef struct walk {
    xkv_ctx *ctx;
    const char *path;
    const uint8_t *map;
    uint64_t pages; /* whole ones in the file */
    meta_page meta;
    uint8_t *used;        /* a bit for each page up to the last one */
    int kind;             /* FREE_TREE or RECORD_TREE */
    tree found;           /* counted in the tree being walked */
    const uint8_t *last;  /* node of the last record, NULL: none yet */
    const uint8_t *least; /* branch node whose key the next one must not be below */
    uint64_t damaged;     /* records that are not what they must be */
} walk;

static xkv_status fail_page(const walk *w, uint64_t page, const char *what)
{
    return xkv_fail(w->ctx, XKV_ERROR_CORRUPT, "the index %s, which repair rebuilds: page %llu: %s [SI1]", w->path,
                    (unsigned long long)page, what);
}

/* --- Meta pages --------------------------------------------------------------------------------------------------- */

static void load_tree(const uint8_t *p, tree *t)
{
    t->flags = xkv_load16(p + 4);
    t->depth = xkv_load16(p + 6);
    t->branch_pages = xkv_load64(p + 8);
    t->leaf_pages = xkv_load64(p + 16);
    t->overflow_pages = xkv_load64(p + 24);
    t->entries = xkv_load64(p + 32);
    t->root = xkv_load64(p + 40);
}

static xkv_status load_meta(xkv_ctx *ctx, const char *path, const uint8_t *p, uint64_t number, meta_page *m)
{
    const walk w = {.ctx = ctx, .path = path};
    if (xkv_load64(p) != number || xkv_load16(p + 10) != META || xkv_load32(p + 16) != META_MAGIC)
        return fail_page(&w, number, "not a meta page");
    if (xkv_load32(p + 20) != META_VERSION)
        return xkv_fail(ctx, XKV_ERROR_VERSION, "the index %s has the LMDB format %u [SI1]", path, xkv_load32(p + 20));
    m->page_size = xkv_load32(p + 40);
    load_tree(p + 40, &m->trees[FREE_TREE]);
    load_tree(p + 88, &m->trees[RECORD_TREE]);
    m->last_page = xkv_load64(p + 136);
    m->txn_id = xkv_load64(p + 144);
    if (m->page_size < 512 || m->page_size > MAX_PAGE_SIZE || (m->page_size & (m->page_size - 1)) != 0)
        return fail_page(&w, number, "impossible page size");
    return XKV_OK;
}

static xkv_status read_meta(xkv_ctx *ctx, const char *path, int fd, uint64_t number, uint32_t page_size, uint8_t *bytes)
{
    ssize_t n = pread(fd, bytes, META_BYTES, (off_t)(number * page_size));
    if (n != (ssize_t)META_BYTES)
        return xkv_fail(ctx, n < 0 ? XKV_ERROR_IO : XKV_ERROR_CORRUPT,
                        "cannot read meta page %llu of the index %s [SI1]", (unsigned long long)number, path);
    return XKV_OK;
}

/* The bytes of both meta pages at one moment: other processes commit meanwhile, and a page may be read while it is
 * written, so that they are read until nothing has moved. */
static xkv_status read_both(xkv_ctx *ctx, const char *path, int fd, uint32_t page_size, uint8_t both[2][META_BYTES])
{
    uint8_t before[2][META_BYTES] = {{0}};
    for (int attempt = 0; attempt < 1000; attempt++) {
        XKV_TRY(read_meta(ctx, path, fd, 0, page_size, both[0]));
        XKV_TRY(read_meta(ctx, path, fd, 1, page_size, both[1]));
        if (memcmp(before, both, sizeof before) == 0)
            break;
        memcpy(before, both, sizeof before);
    }
    return XKV_OK;
}

/* Both meta pages. */
static xkv_status read_metas(xkv_ctx *ctx, const char *path, int fd, uint64_t file_size, meta_page metas[2])
{
    const walk w = {.ctx = ctx, .path = path};
    uint8_t both[2][META_BYTES];
    XKV_TRY(read_meta(ctx, path, fd, 0, 0, both[0]));
    XKV_TRY(load_meta(ctx, path, both[0], 0, &metas[0])); /* the size of pages, which never changes */
    XKV_TRY(read_both(ctx, path, fd, metas[0].page_size, both));
    XKV_TRY(load_meta(ctx, path, both[0], 0, &metas[0]));
    XKV_TRY(load_meta(ctx, path, both[1], 1, &metas[1]));
    for (uint64_t i = 0; i < 2; i++) {
        if (metas[i].page_size != metas[0].page_size)
            return fail_page(&w, i, "the meta pages differ in their page size");
        if (metas[i].trees[FREE_TREE].flags != INTEGER_KEYS || metas[i].trees[RECORD_TREE].flags != 0)
            return fail_page(&w, i, "flags that a store has not");
        if (metas[i].last_page < 1 || metas[i].last_page > file_size / metas[i].page_size + UNWRITTEN)
            return fail_page(&w, i, "its last page is beyond the file");
    }
    /* Transactions alternate. A number that is wrong would bring back what was before the last one, as if it were
     * sound. */
    uint64_t a = metas[0].txn_id, b = metas[1].txn_id;
    if ((a != 0 || b != 0) && (a % 2 != 0 || (a + 1 != b && b + 1 != a)))
        return fail_page(&w, 0, "the transactions of the two meta pages do not follow each other");
    return XKV_OK;
}

/* Open the data file; *fd is -1 when there is none, or an empty one. */
static xkv_status open_data(xkv_ctx *ctx, const char *path, int *fd, uint64_t *size)
{
    char name[4096];
    struct stat st;
    if ((size_t)snprintf(name, sizeof name, "%s/data.mdb", path) >= sizeof name)
        return xkv_fail(ctx, XKV_ERROR_ARGUMENT, "the path is too long: %s", path);
    *fd = open(name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (*fd < 0 && errno == ENOENT)
        return XKV_OK;
    if (*fd < 0 || fstat(*fd, &st) != 0 || !S_ISREG(st.st_mode)) {
        bool opened = *fd >= 0;
        int error = errno;
        if (opened)
            close(*fd);
        *fd = -1;
        return opened ? xkv_fail(ctx, XKV_ERROR_IO, "%s is not a regular file [SO5]", name)
                      : xkv_fail(ctx, XKV_ERROR_IO, "cannot open %s: %s", name, strerror(error));
    }
    *size = (uint64_t)st.st_size;
    if (*size == 0) {
        close(*fd);
        *fd = -1;
    }
    return XKV_OK;
}

xkv_status xkv_index_check_meta(xkv_ctx *ctx, const char *path)
{
    meta_page metas[2] = {{0}};
    uint64_t size = 0;
    int fd;
    XKV_TRY(open_data(ctx, path, &fd, &size));
    if (fd < 0)
        return XKV_OK;
    xkv_status status = read_metas(ctx, path, fd, size, metas);
    close(fd);
    return status;
}

/* --- Pages -------------------------------------------------------------------------------------------------------- */

/* Count `page` as used; once. */
static xkv_status use_page(walk *w, uint64_t page)
{
    if (page < 2 || page > w->meta.last_page)
        return fail_page(w, page, "not a page of this file");
    if (w->used[page / 8] >> page % 8 & 1)
        return fail_page(w, page, "used twice");
    w->used[page / 8] = (uint8_t)(w->used[page / 8] | 1u << page % 8);
    return XKV_OK;
}

/* A page that is read: with its bytes in the file. */
static xkv_status take_page(walk *w, uint64_t page, uint64_t count, const uint8_t **bytes)
{
    if (count == 0 || page > w->pages || count > w->pages - page)
        return fail_page(w, page, "beyond the end of the file");
    for (uint64_t i = 0; i < count; i++)
        XKV_TRY(use_page(w, page + i));
    *bytes = w->map + page * w->meta.page_size;
    return XKV_OK;
}

/* Node i of a page, which lies inside it, header, key and data; nodes begin at even offsets. */
static xkv_status take_node(const walk *w, uint64_t page, const uint8_t *p, uint32_t i, bool leaf, const uint8_t **node,
                            uint32_t *size)
{
    uint32_t upper = xkv_load16(p + 14), offset = xkv_load16(p + HEADER + 2 * i);
    if (offset < upper || offset % 2 != 0 || offset + NODE_HEADER > w->meta.page_size)
        return fail_page(w, page, "a node lies outside the page");
    const uint8_t *n = p + offset;
    uint64_t bytes = NODE_HEADER + xkv_load16(n + 6);
    if (leaf && xkv_load16(n + 4) == BIG_DATA)
        bytes += 8;
    else if (leaf)
        bytes += xkv_load16(n) | (uint64_t)xkv_load16(n + 2) << 16;
    bytes = xkv_align64(bytes, 2);
    if (offset + bytes > w->meta.page_size)
        return fail_page(w, page, "a node reaches beyond the page");
    *node = n;
    *size = (uint32_t)bytes;
    return XKV_OK;
}

/* LMDB moves nodes by what their sizes say: they must fill the upper part of the page without gap or overlap. They do
 * when the lowest begins where that part does, each ends where another one begins or the page ends, no two begin
 * together, and their sizes add up. */
static xkv_status check_tiling(const walk *w, uint64_t page, const uint8_t *p, uint32_t keys, bool leaf)
{
    uint8_t starts[MAX_PAGE_SIZE / 16 + 1] = {0}; /* a bit for each even offset, and the end of the page */
    uint32_t upper = xkv_load16(p + 14), end = w->meta.page_size, sum = 0, size = 0;
    const uint8_t *node = NULL;
    for (uint32_t i = 0; i < keys; i++) {
        uint32_t unit = xkv_load16(p + HEADER + 2 * i) / 2;
        XKV_TRY(take_node(w, page, p, i, leaf, &node, &size));
        if (starts[unit / 8] >> unit % 8 & 1)
            return fail_page(w, page, "two nodes begin together");
        starts[unit / 8] = (uint8_t)(starts[unit / 8] | 1u << unit % 8);
        sum += size;
    }
    starts[end / 16] = (uint8_t)(starts[end / 16] | 1u << end / 2 % 8);
    bool tiled = sum == end - upper && (starts[upper / 16] >> upper / 2 % 8 & 1) != 0;
    for (uint32_t i = 0; tiled && i < keys; i++) {
        uint32_t offset = xkv_load16(p + HEADER + 2 * i);
        XKV_TRY(take_node(w, page, p, i, leaf, &node, &size));
        uint32_t unit = (offset + size) / 2;
        tiled = (starts[unit / 8] >> unit % 8 & 1) != 0;
    }
    return tiled ? XKV_OK : fail_page(w, page, "its nodes overlap or leave gaps");
}

/* Whether the key of one node comes before that of another, or with `equal` is the same. */
static bool in_order(const walk *w, const uint8_t *before, const uint8_t *node, bool equal)
{
    size_t a = xkv_load16(before + 6), b = xkv_load16(node + 6);
    if (w->kind == FREE_TREE) {
        uint64_t x = xkv_load64(before + NODE_HEADER), y = xkv_load64(node + NODE_HEADER);
        return x < y || (equal && x == y);
    }
    int order = memcmp(before + NODE_HEADER, node + NODE_HEADER, a < b ? a : b);
    return order < 0 || (order == 0 && (a < b || (equal && a == b)));
}

/* Keys ascend over the whole tree, and the key of a branch node parts what is left of it from what is below it; else a
 * search could go astray, and one that goes on from key to key never end. */
static xkv_status check_order(walk *w, uint64_t page, const uint8_t *node, bool leaf)
{
    if (w->kind == FREE_TREE && xkv_load16(node + 6) != 8)
        return fail_page(w, page, "a key of the free pages has not 8 bytes");
    if ((w->last != NULL && !in_order(w, w->last, node, false)) ||
        (w->least != NULL && !in_order(w, w->least, node, true)))
        return fail_page(w, page, "keys do not ascend");
    w->least = leaf ? NULL : node;
    if (leaf)
        w->last = node;
    return XKV_OK;
}

static xkv_status check_header(const walk *w, uint64_t page, const uint8_t *p, uint32_t *keys)
{
    uint32_t flags = xkv_load16(p + 10), lower = xkv_load16(p + 12), upper = xkv_load16(p + 14);
    uint32_t least = flags == BRANCH && w->kind == RECORD_TREE ? 2 : 1;
    if (xkv_load64(p) != page || (flags != BRANCH && flags != LEAF))
        return fail_page(w, page, "its number or its kind is wrong");
    if (lower < HEADER || lower > upper || upper > w->meta.page_size || lower % 2 != 0)
        return fail_page(w, page, "its bounds are wrong");
    *keys = (lower - HEADER) / 2;
    return *keys >= least ? XKV_OK : fail_page(w, page, "it has too few keys");
}

/* A list of free pages: their count, then their numbers. */
static xkv_status check_free_list(walk *w, uint64_t page, const uint8_t *list, uint64_t size)
{
    if (size < 8 || xkv_load64(list) > size / 8 - 1)
        return fail_page(w, page, "a list of free pages is too long");
    for (uint64_t i = 1; i <= xkv_load64(list); i++)
        XKV_TRY(use_page(w, xkv_load64(list + 8 * i)));
    return XKV_OK;
}

static xkv_status check_big_data(walk *w, uint64_t page, const uint8_t *node, uint64_t size, const uint8_t **data)
{
    uint64_t first = xkv_load64(node + NODE_HEADER + xkv_load16(node + 6));
    uint64_t count = xkv_ceil_div(HEADER + size, w->meta.page_size);
    const uint8_t *p = NULL;
    XKV_TRY(take_page(w, first, count, &p));
    if (xkv_load64(p) != first || xkv_load16(p + 10) != OVERFLOW || xkv_load32(p + 12) != count)
        return fail_page(w, page, "it refers to a page that is no such data");
    w->found.overflow_pages += count;
    *data = p + HEADER;
    return XKV_OK;
}

static xkv_status check_leaf_node(walk *w, uint64_t page, const uint8_t *node)
{
    uint64_t size = xkv_load16(node) | (uint64_t)xkv_load16(node + 2) << 16;
    uint32_t flags = xkv_load16(node + 4), key_size = xkv_load16(node + 6);
    const uint8_t *data = node + NODE_HEADER + key_size;
    w->found.entries++;
    if (key_size == 0 || flags > BIG_DATA || (w->kind == RECORD_TREE && flags != 0))
        return fail_page(w, page, "a record is of no known kind");
    if (flags == BIG_DATA)
        XKV_TRY(check_big_data(w, page, node, size, &data));
    if (w->kind == FREE_TREE)
        return check_free_list(w, page, data, size);
    w->damaged += xkv_stored_problem(node + NODE_HEADER, key_size, data, size) != NULL;
    return XKV_OK;
}

static uint64_t child_of(const uint8_t *node)
{
    return xkv_load16(node) | (uint64_t)xkv_load16(node + 2) << 16 | (uint64_t)xkv_load16(node + 4) << 32;
}

static xkv_status check_page(walk *w, uint64_t page, uint32_t depth)
{
    const uint8_t *p = NULL, *node = NULL;
    uint32_t keys = 0;
    XKV_TRY(take_page(w, page, 1, &p));
    XKV_TRY(check_header(w, page, p, &keys));
    bool leaf = xkv_load16(p + 10) == LEAF;
    if (leaf != (depth == w->meta.trees[w->kind].depth))
        return fail_page(w, page, "its depth is wrong");
    w->found.leaf_pages += leaf;
    w->found.branch_pages += !leaf;
    XKV_TRY(check_tiling(w, page, p, keys, leaf));
    for (uint32_t i = 0; i < keys; i++) {
        uint32_t size;
        XKV_TRY(take_node(w, page, p, i, leaf, &node, &size));
        if (leaf || i > 0) /* the first key of a branch page is not looked at by LMDB either */
            XKV_TRY(check_order(w, page, node, leaf));
        XKV_TRY(leaf ? check_leaf_node(w, page, node) : check_page(w, child_of(node), depth + 1));
    }
    return XKV_OK;
}

static xkv_status check_tree(walk *w, int kind)
{
    const tree *t = &w->meta.trees[kind];
    w->kind = kind;
    w->last = w->least = NULL;
    memset(&w->found, 0, sizeof w->found);
    if (t->depth > MAX_DEPTH || (t->root == NO_PAGE) != (t->depth == 0))
        return fail_page(w, t->root, "impossible root");
    if (t->root != NO_PAGE)
        XKV_TRY(check_page(w, t->root, 1));
    if (w->found.branch_pages != t->branch_pages || w->found.leaf_pages != t->leaf_pages ||
        w->found.overflow_pages != t->overflow_pages || w->found.entries != t->entries)
        return fail_page(w, t->root, "the tree below it has not as many pages or records as its root says");
    return XKV_OK;
}

static xkv_status check_mapped(walk *w)
{
    XKV_TRY(XKV_NEW_ZERO(w->ctx, w->meta.last_page / 8 + 1, &w->used));
    xkv_status status = check_tree(w, RECORD_TREE);
    if (status == XKV_OK)
        status = check_tree(w, FREE_TREE);
    xkv_release(w->ctx, w->used);
    return status;
}

/* Find the meta page of the snapshot and walk what it describes. */
static xkv_status check_snapshot(walk *w, int fd, uint64_t size, uint64_t txn_id)
{
    meta_page metas[2] = {{0}};
    XKV_TRY(read_metas(w->ctx, w->path, fd, size, metas));
    if (metas[0].txn_id != txn_id && metas[1].txn_id != txn_id)
        return XKV_ERROR_NOT_FOUND;
    w->meta = metas[metas[0].txn_id != txn_id];
    w->pages = size / w->meta.page_size;
    void *map = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return xkv_fail(w->ctx, XKV_ERROR_IO, "cannot map the index %s: %s", w->path, strerror(errno));
    w->map = map;
    xkv_status status = check_mapped(w);
    munmap(map, (size_t)size);
    return status;
}

xkv_status xkv_index_check_file(xkv_ctx *ctx, const char *path, uint64_t txn_id, uint64_t *damaged)
{
    walk w = {.ctx = ctx, .path = path};
    uint64_t size = 0;
    int fd;
    XKV_TRY(open_data(ctx, path, &fd, &size));
    if (fd < 0)
        return XKV_OK;
    xkv_status status = check_snapshot(&w, fd, size, txn_id);
    close(fd);
    *damaged = w.damaged;
    return status;
}
