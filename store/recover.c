/* recover.c - the properties of a store whose file "store" is damaged or lost, from what the blobs show. */
#include "store_internal.h"

#include <unistd.h>

enum { MOST_BLOCK = 65536, USUAL_BLOCK = 256 };

typedef struct recover {
    xkv_ctx *ctx;
    const xkv_store *store;
    const uint8_t *key;
    uint64_t plain, sealed, opened; /* blobs; `opened`: of the sealed ones, with the key */
    uint32_t block_tokens;          /* 0: no prompt yet whose key tells */
    uint32_t least;                 /* it is not smaller than this */
} recover;

static bool follows(const xkv_blob_head *head, const xkv_symbols *symbols, uint32_t block_tokens)
{
    xkv_namespace ns;
    uint8_t key[32];
    memcpy(ns.id, head->space, 32);
    xkv_chain_last(&ns, symbols, block_tokens, key);
    return memcmp(key, head->key, 32) == 0;
}

/* The size of blocks with which the key follows from the symbols. A prompt of one block tells only that blocks are not
 * shorter; where no size fits, the key is damaged. */
static xkv_status try_blocks(recover *r, const xkv_blob_head *head, const xkv_symbols *symbols)
{
    if (head->tokens <= MOST_BLOCK && follows(head, symbols, MOST_BLOCK)) {
        r->least = head->tokens > r->least ? head->tokens : r->least;
        return XKV_OK;
    }
    if (follows(head, symbols, USUAL_BLOCK)) {
        r->block_tokens = USUAL_BLOCK;
        return XKV_OK;
    }
    for (uint32_t n = 1; n <= MOST_BLOCK && n < head->tokens; n++) {
        if (n % 256 == 0)
            XKV_TRY(xkv_check_cancel(r->ctx));
        if (follows(head, symbols, n)) {
            r->block_tokens = n;
            return XKV_OK;
        }
    }
    return XKV_OK;
}

static xkv_status look_at_entry(recover *r, const xkv_input *file, const xkv_blob_head *head)
{
    uint32_t count = head->symbols, *list = NULL;
    XKV_TRY(xkv_blob_read_body(r->ctx, file, head, &count, &list, NULL));
    const xkv_symbols symbols = {.data = list, .count = head->symbols, .tokens = head->tokens};
    xkv_status status = try_blocks(r, head, &symbols);
    xkv_release(r->ctx, list);
    return status;
}

static xkv_status look_at_blob(recover *r, const int *fd)
{
    xkv_input raw;
    xkv_blob b;
    bool sealed = false;
    XKV_TRY(xkv_blob_file(r->ctx, fd, &raw));
    XKV_TRY(xkv_blob_is_sealed(r->ctx, &raw, &sealed));
    r->sealed += sealed;
    if (sealed && r->key == NULL)
        return XKV_OK;
    XKV_TRY(xkv_blob_read(r->ctx, sealed ? r->key : NULL, fd, &b));
    r->opened += sealed;
    r->plain += !sealed;
    bool tells = b.head.kind == XKV_BLOB_ENTRY && r->block_tokens == 0 && b.head.tokens > r->least;
    return tells ? look_at_entry(r, &b.file, &b.head) : XKV_OK;
}

/* Damaged ones are a matter for the repair. */
static xkv_status look_at_file(void *user, const char *text)
{
    recover *r = user;
    xkv_blob_name name;
    uint8_t hash[32];
    uint64_t id;
    int fd = -1;
    xkv_ctx_begin(r->ctx); /* of one file after the other */
    XKV_TRY(xkv_check_cancel(r->ctx));
    if (!xkv_blob_name_parse(text, hash, &id))
        return XKV_OK;
    name = xkv_blob_name_of(hash, id);
    xkv_status status = xkv_blob_open(r->ctx, &r->store->folders, &name, false, &fd);
    if (status == XKV_OK)
        status = look_at_blob(r, &fd);
    if (fd >= 0)
        close(fd);
    return xkv_is_damage(status) || xkv_is_newer(status) ? XKV_OK : status;
}

xkv_status xkv_properties_recover(xkv_ctx *ctx, const xkv_store *store, const uint8_t *key, xkv_properties *p)
{
    recover r = {.ctx = ctx, .store = store, .key = key};
    XKV_TRY(xkv_seal_begin(ctx));
    XKV_TRY(xkv_folder_list(ctx, store->folders.blobs, look_at_file, &r));
    xkv_ctx_begin(ctx); /* what was damaged is no error of this call */
    if (key != NULL && r.sealed > 0 && r.opened == 0)
        return xkv_fail(ctx, XKV_ERROR_MISMATCH, "%s is encrypted with another key [SO6]", store->path);
    *p = (xkv_properties){.block_tokens = r.block_tokens};
    if (p->block_tokens == 0)
        p->block_tokens = r.least > USUAL_BLOCK ? r.least : USUAL_BLOCK;
    p->encrypted = r.sealed > 0 || (key != NULL && r.plain == 0);
    if (p->encrypted && key != NULL)
        xkv_seal_id(key, p->key_id);
    return XKV_OK;
}
