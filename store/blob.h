/* blob.h - the files of a store: written under a temporary name, given their final one, opened for reading, removed
 * (spec/store.md, section 2). All names are relative to folders held open, and symbolic links are never followed. */
#ifndef XKV_BLOB_H
#define XKV_BLOB_H

#include "chain.h"
#include "hasher.h"
#include "seal.h"

enum { XKV_BLOB_HEAD = 256, XKV_BLOB_NAME = 64 + 1 + 16, XKV_PAGE_KEY_BYTES = 40 };

enum { XKV_BLOB_ENTRY = 1, XKV_BLOB_DICT = 2 };

/* The folders. -1: not open. */
typedef struct xkv_folders {
    int root, blobs, temp, quarantine;
} xkv_folders;

/* Name of a blob: its hash, a dot, the id of its entry. */
typedef struct xkv_blob_name {
    char text[XKV_BLOB_NAME + 1];
} xkv_blob_name;
xkv_blob_name xkv_blob_name_of(const uint8_t hash[32], uint64_t id);
/* False when `text` is no such name. */
bool xkv_blob_name_parse(const char *text, uint8_t hash[32], uint64_t *id);

/* Head of a blob file. */
typedef struct xkv_blob_head {
    uint32_t kind;
    uint32_t tokens, symbols, names;
    uint64_t file_size, payload_offset, payload_size;
    uint64_t created, expires, raw_bytes;
    uint64_t body_checksum; /* of the checksums of what lies between head and payload */
    uint8_t dict[16];       /* entry: the dictionary it needs, or zero; dictionary: its id */
    uint8_t space[32], key[32];
    bool extends;    /* it goes on where another entry ends: xkv_blob_read_link() */
    bool whole_only; /* of its tokens only all can be restored */
    bool sealed;     /* encrypted; then with */
    uint8_t nonce[XKV_SEAL_NONCE];
} xkv_blob_head;

/* Where an entry that extends another goes on, and the framing of the whole (spec/store.md, section 11). */
typedef struct xkv_blob_link {
    uint64_t parent;  /* id of the entry that it extends, when this was written: a repair may have given it another */
    uint8_t blob[32]; /* hash of its blob, which tells for sure */
    uint32_t base;    /* tokens that it takes from there */
    uint32_t fram_size;
    const uint8_t *fram; /* section FRAM [fram_size]; 0 bytes: no framing */
} xkv_blob_link;

/* --- Writing --- */

typedef struct xkv_blob_writer {
    const xkv_folders *folders;
    const uint8_t *key;           /* NULL: not encrypted */
    const xkv_blob_link *link;    /* NULL: it extends no other one */
    int fd, plain;                /* `plain`: what is to be encrypted, in memory; else fd */
    char temp[XKV_BLOB_NAME + 1]; /* its present name in the folder of temporary files; "": none */
    uint64_t payload_offset, payload_size;
    xkv_hasher *hasher; /* of the file */
    uint8_t hash[32];
    bool linked;        /* it has its final name */
    xkv_blob_name name; /* that one */
} xkv_blob_writer;

/* Begin a file that will hold the symbols, the page keys, the link (NULL: none; it must outlive the writer) and then a
 * payload, encrypted unless `key` is NULL. */
XKV_MUST_CHECK xkv_status xkv_blob_begin(xkv_ctx *ctx, const xkv_folders *folders, const uint8_t *key, uint32_t symbols,
                                         uint32_t names, const xkv_blob_link *link, xkv_blob_writer *w);
/* The payload goes here, in any order; and can be read back. */
xkv_output xkv_blob_output(xkv_blob_writer *w);
xkv_input xkv_blob_payload(xkv_blob_writer *w);
/* Write the rest, sync, hash. Sets the sizes and the checksum in `head`. */
XKV_MUST_CHECK xkv_status xkv_blob_finish(xkv_ctx *ctx, xkv_blob_writer *w, xkv_blob_head *head,
                                          const uint32_t *symbols, const xkv_page_key *names);
/* Give it its final name, sync the folder, and keep it from eviction until xkv_blob_end(); may be called again. */
XKV_MUST_CHECK xkv_status xkv_blob_publish(xkv_ctx *ctx, xkv_blob_writer *w, uint64_t id);
/* Close; `committed` false: the file goes away. */
void xkv_blob_end(xkv_ctx *ctx, xkv_blob_writer *w, bool committed);

/* --- Reading --- */

/* Open a blob and, with `lock`, keep it from eviction while the descriptor is open. NOT_FOUND without a message: it is
 * not there, or about to be removed. */
XKV_MUST_CHECK xkv_status xkv_blob_open(xkv_ctx *ctx, const xkv_folders *folders, const xkv_blob_name *name, bool lock,
                                        int *fd);
/* What an opened blob file holds, decrypted unless `key` is NULL; all must outlive `plain`. CHECKSUM, TRUNCATED [SB7].
 */
XKV_MUST_CHECK xkv_status xkv_blob_plain(xkv_ctx *ctx, const uint8_t *key, const xkv_input *file, xkv_sealed *sealed,
                                         xkv_input *plain);
/* Write what it holds as an unencrypted blob file of plain->size bytes. */
XKV_MUST_CHECK xkv_status xkv_blob_copy_plain(xkv_ctx *ctx, const xkv_input *plain, const xkv_output *output);
/* Whether the head of a blob file, which nobody has authenticated, says that it is encrypted. FORMAT, CHECKSUM,
 * TRUNCATED [SB1]. */
XKV_MUST_CHECK xkv_status xkv_blob_is_sealed(xkv_ctx *ctx, const xkv_input *file, bool *sealed);
/* Read and check the head of an open blob, or of an exported one. CORRUPT [SB1 - SB4]. */
XKV_MUST_CHECK xkv_status xkv_blob_read_head(xkv_ctx *ctx, const xkv_input *file, xkv_blob_head *head);
/* Read the first *count symbols, or all if there are fewer, and check them; more may come, as *count then says. With
 * names_p everything up to the payload, or to the link, is read and checked. CORRUPT, CHECKSUM [SB5]. Release both. */
XKV_MUST_CHECK xkv_status xkv_blob_read_body(xkv_ctx *ctx, const xkv_input *file, const xkv_blob_head *head,
                                             uint32_t *count, uint32_t **symbols_p, xkv_page_key **names_p);
/* Read and check the link of a blob that extends another. `link` points into *bytes_p, which is to be released.
 * CORRUPT, CHECKSUM [SB8]. */
XKV_MUST_CHECK xkv_status xkv_blob_read_link(xkv_ctx *ctx, const xkv_input *file, const xkv_blob_head *head,
                                             xkv_blob_link *link, uint8_t **bytes_p);
/* A whole blob file as an input; `fd`, which stays open, must outlive it. */
XKV_MUST_CHECK xkv_status xkv_blob_file(xkv_ctx *ctx, const int *fd, xkv_input *file);
/* A part of an input; both structs must outlive it. */
typedef struct xkv_window {
    const xkv_input *input;
    uint64_t offset;
} xkv_window;
xkv_input xkv_input_window(xkv_window *w, const xkv_input *input, uint64_t offset, uint64_t size);
/* An output from an offset on; both structs must outlive it. */
typedef struct xkv_shift {
    const xkv_output *output;
    uint64_t offset;
} xkv_shift;
xkv_output xkv_output_from(xkv_shift *s, const xkv_output *output, uint64_t offset);
/* An opened blob and what it holds; not to be copied. */
typedef struct xkv_blob {
    xkv_input raw; /* the file as it lies there */
    xkv_sealed sealed;
    xkv_input file; /* decrypted */
    xkv_blob_head head;
    xkv_window window;
    xkv_input payload;
} xkv_blob;
/* Read the head of the blob file `fd`, which stays open and must outlive `b`, as `key`. Errors: those of
 * xkv_blob_plain() and xkv_blob_read_head(); `raw` is there, unless the file cannot even be examined (IO). */
XKV_MUST_CHECK xkv_status xkv_blob_read(xkv_ctx *ctx, const uint8_t *key, const int *fd, xkv_blob *b);
/* The blob at `offset` (below file->size) of an exported file, which is a row of them. FORMAT, TRUNCATED [SB1, SB3]. */
XKV_MUST_CHECK xkv_status xkv_blob_next(xkv_ctx *ctx, const xkv_input *file, uint64_t offset, xkv_window *window,
                                        xkv_input *blob);
/* Whether two inputs hold the same bytes. */
XKV_MUST_CHECK xkv_status xkv_input_equal(xkv_ctx *ctx, const xkv_input *a, const xkv_input *b, bool *equal);
/* All of an input to an output. */
XKV_MUST_CHECK xkv_status xkv_input_copy(xkv_ctx *ctx, const xkv_input *from, const xkv_output *to);
/* Compare its hash with that of its name or record. CHECKSUM [SB6]. */
XKV_MUST_CHECK xkv_status xkv_blob_check_hash(xkv_ctx *ctx, const xkv_input *file, const uint8_t expected[32]);

/* --- Removing --- */

/* Lock a blob against readers; *locked is false while somebody reads it, or when it cannot be opened. *fd is -1 when it
 * is not there. Errors: IO (no descriptor is left). */
XKV_MUST_CHECK xkv_status xkv_blob_try_lock(xkv_ctx *ctx, const xkv_folders *folders, const xkv_blob_name *name,
                                            bool *locked, int *fd);
/* True when it is not there any more; else whoever opens or collects the store next tries again. */
bool xkv_blob_unlink(const xkv_folders *folders, const xkv_blob_name *name);
/* Move it to the quarantine, which keeps the last one, and of the seven before it those that fit with it into a
 * sixteenth of the byte cap (0: none). */
void xkv_blob_quarantine(const xkv_folders *folders, const xkv_blob_name *name, uint64_t byte_cap);

/* Call `name` for every file of a folder, until it returns other than XKV_OK. */
XKV_MUST_CHECK xkv_status xkv_folder_list(xkv_ctx *ctx, int folder, xkv_status (*name)(void *user, const char *name),
                                          void *user);

#endif
