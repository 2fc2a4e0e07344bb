/*
 * xkv/codec.h - pack KV caches into entries (.xkv) and restore them.
 *
 * Simple level: xkv_pack_file() and xkv_unpack_file(), file in, file out, atomic.
 * Middle level: open a cache with <xkv/format.h>, xkv_pack() it into any output; xkv_entry_open() any input and
 * xkv_entry_restore() the engine's file.
 * Free level: xkv_pack() planes straight from the caller's memory through views; xkv_entry_read() any range of tokens
 * and groups straight into views.
 *
 * Lossy contract: all profiles but lossless store an approximation whose relative error per plane is measured while
 * packing and kept in the entry. Sinks, planes with NaN or Inf, MLA's rotated key part and everything that is not
 * tensor data are exact. Packed bytes may differ between versions, machines and backends; what they decode to may not
 * (spec/codec.md).
 */
#ifndef XKV_CODEC_H
#define XKV_CODEC_H

#include "xkv/common.h"
#include "xkv/format.h"
#include "xkv/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* --- Packing ------------------------------------------------------------------------------------------------------ */

typedef enum xkv_profile {
    XKV_PROFILE_AUTO = 0,     /* for a ratio or an error the best of dict (when there is one), svd, scalar and lossless:
                                 that of the smallest error, or the smallest entry. A sample of at most 1024 tokens
                                 decides, and all errors are compared in one measure: see `error`. Otherwise svd for
                                 ranks or an energy, dict for a quality or when there is a dictionary, else lossless */
    XKV_PROFILE_LOSSLESS = 1, /* byte planes + zstd */
    XKV_PROFILE_SVD = 2,   /* grouped cross-layer SVD, xKV (arXiv 2503.18893): for ranks or an energy K and V apart and
                              factors at 16 bits, as published; for a ratio or an error K and V together, and both
                              factors quantized and entropy-coded */
    XKV_PROFILE_DICT = 3,  /* trained bases, one quantizer step, rANS */
    XKV_PROFILE_SCALAR = 4 /* the same quantizer and coder on the elements themselves, for want of a dictionary */
} xkv_profile;

/* A trained dictionary (.xkvd). Immutable, may be shared by threads. */
typedef struct xkv_dict xkv_dict;

/* Progress of a call in bytes of raw cache; return non-zero to stop it (XKV_ERROR_CANCELLED). Called on the caller's
 * thread, at least once a group. */
typedef int (*xkv_progress_fn)(void *user, uint64_t done, uint64_t total);

typedef struct xkv_pack_options {
    size_t struct_size;
    uint32_t profile;      /* xkv_profile; default AUTO */
    uint32_t group_layers; /* layers per group, >= 1; default 4. The last group may be smaller */
    uint32_t sinks;        /* exact tokens at the start; default 4; cut to the tokens there are */
    uint32_t window;       /* exact tokens at the end; default 0 */

    /* What it may cost. At most one of: rank_k and rank_v (svd), ratio, error, energy (svd), quality (dict). */
    uint32_t rank_k, rank_v; /* components per full group of K (or latent) and V planes; a smaller last group gets its
                                share by layers, rounded down, at least 1 */
    double ratio;            /* > 1: raw 16-bit bytes / all bytes of the entry */
    double error;  /* 0 < error < 1: relative error of all coded planes together, guaranteed by measurement, and at most
                      4 times that in any one group. Squared errors are taken in units of a plane's standard deviation,
                      of keys times 1.4^2, and are relative to the same sum over what the rows are without their mean;
                      with dict, and with auto when there is a dictionary, in the dictionary's metric. Groups that no
                      step brings to it, and groups with a coefficient beyond 32767 steps, fall back to lossless */
    double energy; /* 0 < energy < 1: svd, each group at 16 bits: share of its sum of squares to keep */

    uint32_t iterations;   /* power iterations, 1 .. 8; default 2 */
    int32_t zstd_level;    /* 1 .. 19; default 4, the lowest level that gives 1.17x on all caches we have */
    uint32_t zstd_factors; /* non-zero: also compress svd factors (a few per cent); default 0: stored, so that they can
                              be mapped and copied to a device */
    uint32_t chunk_tokens; /* default 256 (spec: a power of two, 32 .. 65536) */

    const xkv_model *model; /* for the metadata (fingerprint, names); NULL: none */
    const char *writer;     /* program name and version for the metadata; NULL: libxkv's */
    xkv_progress_fn progress;
    void *progress_user;

    const xkv_dict *dict;  /* opened for packing; required by profile dict */
    double quality;        /* dict: 1 .. 100; each 16 points halve the step; 0: 50, unless there is another target */
    uint32_t half_factors; /* non-zero: svd keeps factors at 16 bits, as published, for a ratio or an error too: ranks
                              K : V = 1 : 1.5 as in the paper, or the smallest whose relative error, of each group by
                              itself and mean included, is at most `error` */
} xkv_pack_options;

static inline xkv_pack_options xkv_pack_options_default(void)
{
    xkv_pack_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.group_layers = 4;
    o.sinks = 4;
    o.iterations = 2;
    o.zstd_level = 4;
    o.chunk_tokens = 256;
    return o;
}

/* What a profile that auto considered would come to, as a sample of at most 1024 tokens tells. */
typedef struct xkv_profile_estimate {
    double bytes; /* of the entry; 0: not considered, or out of reach */
    double error; /* in the measure of error_metric */
} xkv_profile_estimate;

typedef struct xkv_pack_report {
    uint64_t raw_bytes;   /* of the cache's tensors as the engine holds them */
    uint64_t raw16_bytes; /* the same at 16 bits an element: the numerator of `ratio` */
    uint64_t entry_bytes; /* whole file */
    double ratio;         /* raw16_bytes / entry_bytes */
    double error[4];      /* by xkv_plane_kind: relative error over all planes of the kind (spec/codec.md, section 4) */
    uint32_t group_count; /* that hold planes: a cross stage is none */
    uint32_t lossless_groups;          /* of them, stored lossless */
    uint32_t fallback_groups;          /* of those, because loss would not have shrunk them, or not within the error */
    uint32_t nonfinite_planes;         /* planes holding NaN or Inf */
    double step;                       /* the quantizer's step; 0 where there is none */
    double error_metric;               /* likewise: the relative error as of xkv_pack_options.error */
    uint32_t components;               /* likewise: components that were coded, over all groups */
    uint32_t component_total;          /* of so many */
    uint32_t profile;                  /* xkv_profile that was used: not AUTO */
    xkv_profile_estimate estimates[8]; /* by xkv_profile: why auto used that one; else zero */
} xkv_pack_report;

/* Pack planes. `views` [geometry->plane_count] are the sources. `framing` (may be NULL) is the engine file around them
 * and `source`/`source_size` (then required) that whole file, for its hash. `report` may be NULL. Memory: two groups in
 * f32, twice the svd block, 32 MiB, and for a ratio or an error a sample of 1024 tokens in f32 and, with svd, the
 * components of all groups; the entry is written as it is made. Errors: ARGUMENT (options out of range, two targets at
 * once), TARGET (ratio out of reach), LIMIT, MEMORY, CANCELLED, BACKEND, and
 * what `output` returns. On error the output's contents are of no use. */
XKV_API XKV_MUST_CHECK xkv_status xkv_pack(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_view *views,
                                           const xkv_framing *framing, const void *source, uint64_t source_size,
                                           const xkv_pack_options *options, const xkv_output *output,
                                           xkv_pack_report *report);

/* xkv_pack() of a cache opened from an engine file. */
XKV_API XKV_MUST_CHECK xkv_status xkv_pack_cache(xkv_ctx *ctx, const xkv_cache *cache, const xkv_pack_options *options,
                                                 const xkv_output *output, xkv_pack_report *report);

/* Engine file to entry, atomically. `options` and `report` may be NULL. Errors: those of xkv_cache_open(), xkv_pack()
 * and xkv_file_create(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_pack_file(xkv_ctx *ctx, const char *engine_path, const char *entry_path,
                                                int overwrite, const xkv_pack_options *options,
                                                xkv_pack_report *report);

/* --- Entries ------------------------------------------------------------------------------------------------------ */

/* An opened entry. Opening checks header, tables and all sections but the payload (every rule of spec/container.md that
 * is not marked deep). Immutable afterwards: may be read by several threads at once, each with its own context. */
typedef struct xkv_entry xkv_entry;

/* Open. `input` is copied and must stay readable. Errors: FORMAT, VERSION, FEATURE, TRUNCATED, CHECKSUM, CORRUPT,
 * LIMIT, MEMORY, and what `input` returns. */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_open(xkv_ctx *ctx, const xkv_input *input, xkv_entry **entry_p);
XKV_API void xkv_entry_close(xkv_ctx *ctx, xkv_entry *entry);

XKV_API const xkv_geometry *xkv_entry_geometry(const xkv_entry *entry);
XKV_API const xkv_framing *xkv_entry_framing(const xkv_entry *entry); /* NULL when packed from memory */

typedef struct xkv_entry_info {
    uint64_t file_size;
    uint64_t raw_bytes, raw16_bytes; /* as in xkv_pack_report */
    uint64_t payload_bytes;
    uint64_t framing_bytes, token_bytes; /* of those sections */
    uint8_t content_id[16];
    uint8_t source_hash[16]; /* XXH3-128 of the engine's file; zero without framing */
    uint32_t write_version, read_version;
    uint32_t sinks, window, chunk_tokens, chunk_count;
    uint32_t group_count;
    uint32_t lossless;         /* non-zero when every group is */
    uint32_t needs_dict;       /* non-zero when a group is coded with a dictionary */
    uint8_t dictionary_id[16]; /* its content id; zero when needs_dict is 0 */
} xkv_entry_info;
XKV_API void xkv_entry_get_info(const xkv_entry *entry, xkv_entry_info *info);

typedef enum xkv_group_codec {
    XKV_CODEC_LOSSLESS = 0,
    XKV_CODEC_SVD = 1,
    XKV_CODEC_DICT = 2,
    XKV_CODEC_SCALAR = 3,
    XKV_CODEC_SVDQ = 4, /* svd with quantized factors */
    XKV_CODEC_CROSS = 6 /* a dictionary's stage over all groups: holds no planes, and is the first group */
} xkv_group_codec;
typedef enum xkv_lossless_reason {
    XKV_REASON_ASKED = 0,
    XKV_REASON_NO_GAIN = 1, /* svd would not shrink it, or its basis does not fit its rows */
    XKV_REASON_NONFINITE = 2,
    XKV_REASON_EXACT_KIND = 3,
    XKV_REASON_NO_TOKENS = 4,
    XKV_REASON_NOT_TRAINED = 5 /* the dictionary has no basis for these planes */
} xkv_lossless_reason;

typedef struct xkv_group_info {
    uint32_t codec;  /* xkv_group_codec */
    uint32_t reason; /* xkv_lossless_reason, lossless groups only */
    uint32_t plane_count;
    const uint32_t *planes; /* [plane_count] indices into the geometry, ascending; lives as long as the entry */
    const double *errors;   /* [plane_count] relative error of each plane */
    uint32_t rank;
    uint32_t width; /* N: elements of the group's row */
    uint64_t raw_bytes;
    uint64_t packed_bytes; /* sum of its parts */
    double energy, error;
} xkv_group_info;
/* `group` < group_count. */
XKV_API void xkv_entry_get_group(const xkv_entry *entry, uint32_t group, xkv_group_info *info);

/* How a group of codec dict, cross, scalar or svdq is quantized. */
typedef struct xkv_group_coding {
    double step;
    uint32_t coded; /* of the group's `rank` components */
} xkv_group_coding;
/* Read it; the dictionary is not needed. `group` < group_count. Zero for other codecs.
 * Errors: CHECKSUM, CORRUPT, MEMORY, and what the input returns. */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_read_coding(xkv_ctx *ctx, const xkv_entry *entry, uint32_t group,
                                                        xkv_group_coding *coding);

/* Bytes of part `part` of a group: 0 the side part, 1 the exact rows, 2 + c chunk c (spec/codec.md, section 1, and
 * spec/dictionary.md, section 1). `group` < group_count, `part` < chunk_count + 2. */
XKV_API uint64_t xkv_entry_part_size(const xkv_entry *entry, uint32_t group, uint32_t part);

/* One component of a group of codec dict, cross, scalar or svdq over all coded tokens. */
typedef struct xkv_component {
    double bits;      /* exact code length of its integers (spec/codec.md, section 7); 0 where it is not coded */
    double deviation; /* root mean square of its coefficients as decoded; 0 likewise */
    uint32_t table;   /* 0: not coded */
} xkv_component;
/* Decode the integers of a group, for which the dictionary is not needed, and describe components[rank], in the order
 * of the group: that of the dictionary, by falling singular value (svdq), or that of the row's elements (scalar).
 * Coefficients that the cross stage codes in a group's stead are in the stage's own group. Memory: one chunk.
 * `group` < group_count. Errors: ARGUMENT (another codec), CHECKSUM, CORRUPT, MEMORY, CANCELLED, and what the input
 * returns; `components` is of no use then. */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_read_components(xkv_ctx *ctx, const xkv_entry *entry, uint32_t group,
                                                            xkv_component *components);

typedef enum xkv_value_type {
    XKV_VALUE_STRING = 1,
    XKV_VALUE_U64 = 2,
    XKV_VALUE_F64 = 3,
    XKV_VALUE_BYTES = 4
} xkv_value_type;
typedef struct xkv_value {
    const char *key; /* NUL-terminated */
    uint32_t type;   /* xkv_value_type */
    uint64_t u64;
    double f64;
    const uint8_t *bytes; /* STRING (NUL-terminated as well) and BYTES */
    uint32_t size;
} xkv_value;
XKV_API uint32_t xkv_entry_value_count(const xkv_entry *entry);
XKV_API void xkv_entry_get_value(const xkv_entry *entry, uint32_t index, xkv_value *value);
/* 1 and *value when there is `key`, else 0. */
XKV_API int xkv_entry_find_value(const xkv_entry *entry, const char *key, xkv_value *value);

/* Check that the entry was made by `model`: fingerprints when both have one, else layer count and widths.
 * Errors: MISMATCH with both values in the detail text. */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_check_model(xkv_ctx *ctx, const xkv_entry *entry, const xkv_model *model);

/* Give an entry the dictionary it was packed with, which must outlive it; needed before anything is decoded. Not to be
 * called while another thread uses the entry. Errors: MISMATCH naming both ids; ARGUMENT when the entry needs none. */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_attach(xkv_ctx *ctx, xkv_entry *entry, const xkv_dict *dict);

typedef struct xkv_read_options {
    size_t struct_size;
    uint32_t first_token, token_count; /* tokens [first, first+count); count 0: to the end. Default: all */
    uint32_t first_group, group_count; /* groups [first, first+count); count 0: to the end. Default: all */
    /* Called on the caller's thread when all asked tokens of a group are in their views, in ascending order of groups;
     * return non-zero to stop. To poll instead, have it raise an atomic counter. NULL: none. */
    int (*group_ready)(void *user, uint32_t group);
    void *group_ready_user;
    xkv_progress_fn progress;
    void *progress_user;
    /* [token_count, filled in] RoPE positions that K is to be rotated for, of any order and distance that an int32_t
     * holds; NULL: those it was computed at. Rows that are stored exactly turn once more, in f32. */
    const int32_t *positions;
    /* KV heads [first, first+count) of each plane; count 0: to the end. Default: all. Head `first_head` is head 0 of
     * the views. What all heads share (MLA's latent and rotated key part) is restored whole. */
    uint32_t first_head, head_count;
} xkv_read_options;

static inline xkv_read_options xkv_read_options_default(void)
{
    xkv_read_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

/* Restore tokens of groups into views[plane_count] (only planes of the asked groups are touched): token first_token
 * goes to row(0) of each view. Only the chunks that hold asked tokens are read; every part is checked before any of its
 * elements is handed out. On one machine the bits of a row do not depend on the range or the number of threads.
 * `options` may be NULL. Groups stream in: while chunks of one are decoded, the next is opened and fetched from its
 * input, and threads that find no more chunks go on to it. Memory: the components of two groups in f32, up to 32 MiB of
 * those of more, one chunk per thread, and the integers of the cross stage, if there is one: 2 bytes for each asked
 * token and coded component of it. Of some heads only their columns of the basis are multiplied; their rows agree with
 * the whole's as spec/codec.md, section 3 demands of two decoders. On error the views' contents are undefined and must
 * not be used, but for those of groups that were announced before. Errors: ARGUMENT (range, heads, positions, a view
 * that cannot be used), UNSUPPORTED (other positions for a K whose RoPE the entry does not know), CHECKSUM, CORRUPT,
 * TRUNCATED, LIMIT, MEMORY, CANCELLED, and what the input returns. */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_read(xkv_ctx *ctx, const xkv_entry *entry, const xkv_read_options *options,
                                                 const xkv_view *views);

/* --- Restoring into a device's memory (<xkv/kernels.h>) -------------------------------------------------------------
 */

/* The bases of a dictionary in a device's memory: 4 bytes an element, 8 when it was opened for packing. Read-only, for
 * any number of calls on the device. */
typedef struct xkv_device_dict xkv_device_dict;

/* Copy them; `dict` must outlive them. Errors: MEMORY (the device's is used up), BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_dict_create(xkv_ctx *ctx, xkv_device *device, const xkv_dict *dict,
                                                         xkv_device_dict **dict_p);
XKV_API void xkv_device_dict_free(xkv_ctx *ctx, xkv_device_dict *dict); /* before the device is closed; accepts NULL */

/* What a call works with on the device. */
typedef struct xkv_device_target {
    size_t struct_size;
    /* A cudaStream_t of the device; NULL: its default stream. The work comes behind what is on it. */
    void *stream;
    /* Device memory that is the call's until it returns, aligned to 256 bytes; at least the least that
     * xkv_device_read_size() or xkv_device_pack_size() says. NULL: the call allocates it, less where memory is short.
     */
    void *workspace;
    uint64_t workspace_size; /* bytes */
    /* The dictionary of the entry. NULL, where one is needed: the call copies its bases first. */
    const xkv_device_dict *dict;
} xkv_device_target;

static inline xkv_device_target xkv_device_target_default(void)
{
    xkv_device_target t;
    memset(&t, 0, sizeof t);
    t.struct_size = sizeof t;
    return t;
}

/* Workspace of xkv_device_read() with the same options, in bytes: what it needs at least, and beyond what more does not
 * help. 0 and 0 when the device has nothing to compute. Errors: as xkv_entry_read(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_read_size(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry,
                                                       const xkv_read_options *options, uint64_t *least,
                                                       uint64_t *best);

/* xkv_entry_read() into views of the device's memory, `rows` included, with elements of f32, f16 or bf16 at addresses
 * that are multiples of their size, or blocks (q8_0, q4_0) anywhere. Groups are decoded by the device while the next
 * bytes are read and copied, or read by the device itself (xkv_device_options.direct); what it does not decode (zstd,
 * sinks and window, lossless rows that change their dtype or position, groups with a chunk larger than a staging
 * buffer) comes from the CPU. The call returns, and group_ready is called, when rows are in place and checked; other
 * streams may use them at once. Rows agree with those of xkv_entry_read() as spec/codec.md, section 3 demands of two
 * decoders. Without enough memory on the device the call takes smaller tiles, then the CPU for everything, and says so
 * in the log. Of an entry that extends another each part is such a read; `dict` is that of one of them, others are
 * copied. `target` may be NULL for defaults. Errors: those of xkv_entry_read(); ARGUMENT (alignment, workspace),
 * UNSUPPORTED (another dtype), BACKEND (the device: see xkv_device_get_info()). */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_read(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry,
                                                  const xkv_read_options *options, const xkv_device_target *target,
                                                  const xkv_view *views);

/* A restore that can be put on a stream again: everything that it needs of the host has been done, and lies in device
 * memory. For engines that capture their work into CUDA graphs, and for prefixes that are restored over and over. */
typedef struct xkv_device_replay xkv_device_replay;

/* xkv_device_read() once, into the views, and keep what it put on its streams. Device memory that it takes (see
 * xkv_device_replay_bytes()) is about the packed size of the groups that the device decodes, the raw size of those that
 * the CPU does (zstd), and the workspace. A workspace or dictionary of `target` is the replay's until it is freed, and
 * so are the device and the memory that views and `rows` point to; entry, options and views need not be kept. Without a
 * dictionary of the target the replay keeps a copy of the entry's; copies of those of entries that it extends are made
 * again by each run. Errors: those of xkv_device_read(); MEMORY also when it is the device's. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_replay_create(xkv_ctx *ctx, xkv_device *device, const xkv_entry *entry,
                                                           const xkv_read_options *options,
                                                           const xkv_device_target *target, const xkv_view *views,
                                                           xkv_device_replay **replay_p);
/* Wait for what runs before. Accepts NULL. */
XKV_API void xkv_device_replay_free(xkv_ctx *ctx, xkv_device_replay *replay);
/* Device memory that it has allocated, bytes, without its copy of a dictionary. */
XKV_API uint64_t xkv_device_replay_bytes(const xkv_device_replay *replay);

/* Put the restore on `stream` (a cudaStream_t; NULL: the default one): kernels and copies within the device's memory,
 * of which the caller's stream may be capturing a graph. Nothing is allocated or waited for, and nothing of the host is
 * read. Rows go where the views say; `rows` of paged ones are read when it runs, so that pages may have changed since.
 * One run at a time: they share the workspace. Errors: BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_replay_run(xkv_ctx *ctx, xkv_device_replay *replay, void *stream);

/* --- Packing from a device's memory ------------------------------------------------------------------------------- */

/* Workspace of xkv_device_pack() with the same options, in bytes: what it needs at least, and beyond what more does not
 * help. 0 and 0 when the device has nothing to compute: see there. Errors: as xkv_pack(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_pack_size(xkv_ctx *ctx, xkv_device *device, const xkv_geometry *geometry,
                                                       const xkv_pack_options *options, uint64_t *least,
                                                       uint64_t *best);

/* xkv_pack() of planes in a device's memory, `rows` of the views included, with elements of f32, f16 or bf16 at
 * addresses that are multiples of their size; without framing. With profile dict the device does all that grows with
 * the tokens: gathering and un-rotating rows, coefficients, quantizer, counts for the choice of tables, rANS and the
 * measured error; only streams, exact rows and, for a ratio or an error, a sample of 1,024 tokens come to the host.
 * Of equal coefficients the integers and the bytes are those of xkv_pack(). Coefficients are products of numbers in two
 * bf16 halves, 16 bits of them, so that some integers are rounded to a neighbour (in tests one of 60,000); errors in
 * the metric are measured with products in TF32. With profile svd and fixed ranks it decomposes each group (products of
 * the iterations in bf16), rounds the coefficients and measures what the factors restore: these come to the host, and
 * all rows only of a group whose columns are dependent or too large or small for the device, which the CPU decomposes.
 * That takes 4 (width + 1.5 rank) bytes a token of the widest group, all at once, beside what does not grow with them.
 * Groups that are stored lossless, and everything with other profiles or targets, are packed by the CPU from a copy of
 * their rows. Without enough memory on the device the call takes smaller tiles, which factors do not have, then the CPU
 * for everything, and says so in the log. Returns when the entry is written. `target`, whose dict is that
 * of the options, may be NULL for defaults. Errors: those of xkv_pack(); ARGUMENT (alignment, workspace), UNSUPPORTED
 * (another dtype), BACKEND (the device: see xkv_device_get_info()). */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_pack(xkv_ctx *ctx, xkv_device *device, const xkv_geometry *geometry,
                                                  const xkv_view *views, const xkv_pack_options *options,
                                                  const xkv_device_target *target, const xkv_output *output,
                                                  xkv_pack_report *report);

/* --- Checking and rebuilding -------------------------------------------------------------------------------------- */

/* Check every rule, the deep ones included: all checksums and gaps, and decode everything; all-lossless entries must
 * give back the source's hash. Errors: as xkv_entry_read(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_verify(xkv_ctx *ctx, const xkv_entry *entry, xkv_progress_fn progress,
                                                   void *progress_user);

/* Rebuild the engine's file for the first `token_count` tokens (0: all) at `image` [image_size], whose size is what
 * xkv_entry_restored_size() says. The framing is checked against its hash, and a complete restore of an all-lossless
 * entry against the hash of the source. Errors: ARGUMENT, UNSUPPORTED (no framing; engine that cannot be cut), and as
 * xkv_entry_read(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_restored_size(xkv_ctx *ctx, const xkv_entry *entry, uint32_t token_count,
                                                          uint64_t *size);
XKV_API XKV_MUST_CHECK xkv_status xkv_entry_restore(xkv_ctx *ctx, const xkv_entry *entry, uint32_t token_count,
                                                    xkv_progress_fn progress, void *progress_user, uint8_t *image,
                                                    uint64_t image_size);

/* Entry to engine file, atomically. */
XKV_API XKV_MUST_CHECK xkv_status xkv_unpack_file(xkv_ctx *ctx, const char *entry_path, const char *engine_path,
                                                  int overwrite, uint32_t token_count);

/* --- Appending ---------------------------------------------------------------------------------------------------- */

typedef struct xkv_append_options {
    size_t struct_size;
    int32_t zstd_level; /* 1 .. 19; default 4 */
    const char *writer; /* for the metadata; NULL: libxkv's */
    xkv_progress_fn progress;
    void *progress_user;
} xkv_append_options;

static inline xkv_append_options xkv_append_options_default(void)
{
    xkv_append_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.zstd_level = 4;
    return o;
}

/* Make an entry of a cache whose first tokens are those of `base`, without packing these again: bases, scales, step,
 * tables and full chunks of `base` stay as they are, and the tokens behind its last full chunk are coded with them. Its
 * codecs, chunk size, sinks and window stay too. Arguments are those of xkv_pack(), all of the whole cache. Errors of
 * the new tokens are measured and joined with those that `base` tells, for which the energy of all rows is taken from
 * the views; svd projects new rows on components that were made for others, so that their error may be larger. If
 * `base` is all lossless, and there is a framing, its rows must be those of the views. A base of codec dict needs its
 * dictionary attached, opened for packing. report->error_metric is that of codec dict. Errors: ARGUMENT (fewer tokens
 * than `base`), MISMATCH (other planes, RoPE, positions, token ids or rows), UNSUPPORTED (a base that extends another
 * entry; a NaN, or a value too large for its step or scale, in a group that is not lossless: pack the whole cache), as
 * xkv_entry_read() of `base`, and as xkv_pack(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_append(xkv_ctx *ctx, const xkv_entry *base, const xkv_geometry *geometry,
                                             const xkv_view *views, const xkv_framing *framing, const void *source,
                                             uint64_t source_size, const xkv_append_options *options,
                                             const xkv_output *output, xkv_pack_report *report);

/* xkv_append() of a cache opened from an engine file. */
XKV_API XKV_MUST_CHECK xkv_status xkv_append_cache(xkv_ctx *ctx, const xkv_entry *base, const xkv_cache *cache,
                                                   const xkv_append_options *options, const xkv_output *output,
                                                   xkv_pack_report *report);

/* --- Attention without restoring ---------------------------------------------------------------------------------- */

/* Attention of a layer over the packed form, for when memory is short: README, "Attend without restoring". Keys are
 * rebuilt tile by tile; values are weighted as coefficients and multiplied by their basis once, at the end. */

/* What an attention holds in memory between calls. */
typedef enum xkv_hold {
    XKV_HOLD_AUTO = 0,         /* the fastest for `calls` that `memory` allows */
    XKV_HOLD_NOTHING = 1,      /* each call reads and decodes the chunks of its layer */
    XKV_HOLD_COEFFICIENTS = 2, /* decoded once for all layers, in 8 or 16 bits each */
    XKV_HOLD_ROWS = 3          /* restored, in the planes' dtype, with the rounding of xkv_entry_read() */
} xkv_hold;

typedef struct xkv_attention_options {
    size_t struct_size;
    uint32_t first_token, token_count; /* rows [first, first+count); count 0: to the end. Default: all */
    uint32_t first_layer, layer_count; /* layers [first, first+count); count 0: to the end. Default: all */
    const int32_t *positions;          /* [token_count, filled in] as in xkv_read_options; copied */
    uint32_t hold;                     /* xkv_hold; default AUTO */
    uint32_t calls;  /* AUTO: how often xkv_attend() will be called for each layer; 0: often. Default 0 */
    uint64_t memory; /* AUTO: bytes that may be held; 0: any number. Default 0 */
} xkv_attention_options;

static inline xkv_attention_options xkv_attention_options_default(void)
{
    xkv_attention_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

/* Rows and layers of an entry, ready to be attended to. Immutable: may be used by several threads at once, each with
 * its own context. */
typedef struct xkv_attention xkv_attention;

/* Open. `entry`, with its dictionary, must outlive it; `options` may be NULL. Errors: ARGUMENT (range, hold),
 * UNSUPPORTED (other positions for a K whose RoPE the entry does not know), MISMATCH (no dictionary), and as
 * xkv_entry_read(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_attention_open(xkv_ctx *ctx, const xkv_entry *entry,
                                                     const xkv_attention_options *options, xkv_attention **attention_p);
XKV_API void xkv_attention_close(xkv_ctx *ctx, xkv_attention *attention);

typedef struct xkv_attention_info {
    uint32_t hold; /* xkv_hold that is in use: not AUTO */
    uint32_t token_count, first_layer, layer_count;
    uint64_t held_bytes; /* coefficients or rows */
} xkv_attention_info;
XKV_API void xkv_attention_get_info(const xkv_attention *attention, xkv_attention_info *info);

/* Queries of one layer, after RoPE, as the engine has them. Element (query i, head h, dim d) is the f32 at
 *     data + i * query_stride + h * head_stride + 4 * d         (bytes)
 * Query head h attends to KV head h / (heads / KV heads). For MLA queries are in absorbed form: the head's query times
 * the key part of the up-projection, [latent_dim], then its rotated part, [rope_dim]. */
typedef struct xkv_queries {
    const void *data;
    uint32_t count, heads;             /* heads: a multiple of the layer's KV heads (MLA: any number) */
    int64_t query_stride, head_stride; /* 0: contiguous, [count][heads][dim] */
    const int32_t *positions;          /* [count]; NULL: unknown, for attention without `causal` */
} xkv_queries;

typedef struct xkv_attend_options {
    size_t struct_size;
    uint32_t causal;  /* non-zero: a query sees rows whose position is at most its own. Default 0: all rows */
    uint32_t window;  /* with causal: only those fewer than so many positions before its own; 0: no limit (default) */
    double scale;     /* > 0: of the scores; 0: 1 / sqrt(head_dim of K) (default). MLA has no default */
    double softcap;   /* > 0: scores become softcap * tanh(score / softcap); 0: not (default) */
    uint32_t rebuild; /* non-zero: rebuild V too, tile by tile. Default 0: when that is less arithmetic, from some 20
                         queries on */
} xkv_attend_options;

static inline xkv_attend_options xkv_attend_options_default(void)
{
    xkv_attend_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    return o;
}

/* softmax(scale * Q K^T) V of one layer: output [count][heads][head_dim of V] (MLA: [latent_dim], to be multiplied by
 * the value part of the up-projection) and lse [count][heads], the natural logarithm of the sum of exp(score), for
 * xkv_attention_merge(). A query that sees no row gets zeros and -inf. Arithmetic is in f32; coefficients that a cross
 * stage adds to are rounded to 16 bits of the largest one in their chunk, which costs up to 1e-4 of the result. On one
 * machine the bits do not depend on the number of threads. Queries and rows should be finite: a NaN or Inf makes
 * results NaN, also of queries that the row is hidden from, or hides a row. `options` may be NULL. Memory: for each
 * thread one chunk of coefficients, a tile of K, and count * heads * (coded components + head_dim + 64) f32; and an
 * output for each task, of which there are about 16, and one for each entry that others extend. Errors: ARGUMENT
 * (layer, heads, options, no positions), UNSUPPORTED (a layer without both K and V), LIMIT, MEMORY, CANCELLED and,
 * unless coefficients or rows are held, as xkv_entry_read(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_attend(xkv_ctx *ctx, const xkv_attention *attention, uint32_t layer,
                                             const xkv_queries *queries, const xkv_attend_options *options,
                                             float *output, float *lse);

/* What attention over a part of the rows gave. */
typedef struct xkv_attention_state {
    const float *output; /* [rows][dim] */
    const float *lse;    /* [rows] */
} xkv_attention_state;

/* Attention over all rows from that over parts of them: output [rows][dim] and lse [rows], either of which may be that
 * of a state. No states, or none that saw a row: zeros and -inf. Any thread. */
XKV_API void xkv_attention_merge(const xkv_attention_state *states, uint32_t state_count, uint64_t rows, uint32_t dim,
                                 float *output, float *lse);

/* --- Attention on a device (<xkv/kernels.h>) -----------------------------------------------------------------------
 */

/* An attention's rows in a device's memory. Immutable: any number of calls, one at a time on a device. */
typedef struct xkv_device_attention xkv_device_attention;

/* Copy what `attention` holds, XKV_HOLD_COEFFICIENTS (in 8 or 16 bits each, as they are there) or XKV_HOLD_ROWS, and
 * the cosines and sines of its positions; wait for it. `attention` may be closed afterwards, its entry, and `dict`,
 * must outlive the copy. `dict`, on the same device: the bases of the entry's dictionary, or NULL to copy them. Errors:
 * ARGUMENT (nothing is held; another dictionary), UNSUPPORTED (heads of more than 640 elements), MEMORY (the device's
 * is used up), BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_attention_create(xkv_ctx *ctx, xkv_device *device,
                                                              const xkv_attention *attention,
                                                              const xkv_device_dict *dict,
                                                              xkv_device_attention **copy_p);
XKV_API void xkv_device_attention_free(xkv_ctx *ctx, xkv_device_attention *copy); /* accepts NULL */

typedef struct xkv_device_attention_info {
    uint64_t held_bytes;      /* of the device, bases of dictionaries that were copied included */
    uint64_t workspace_bytes; /* that xkv_device_attend() takes, whatever it is asked */
} xkv_device_attention_info;
XKV_API void xkv_device_attention_get_info(const xkv_device_attention *copy, xkv_device_attention_info *info);

/* xkv_attend() in the device's memory: queries->data, queries->positions, output and lse are there, at multiples of 4
 * bytes, and so is workspace[workspace_bytes], aligned to 256, which is the call's until its work is done. The work is
 * put behind what is on `stream`, a cudaStream_t of the device (NULL: its default stream), and the call returns; it
 * allocates nothing and waits for nothing, so that it can be captured into a graph. Rows are cut into splits whatever
 * the device, and merged in order. V is always weighted as coefficients: options->rebuild does not matter. Results are
 * within 1e-5 of those of xkv_attend(). Errors: ARGUMENT, UNSUPPORTED, as xkv_attend(); BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_attend(xkv_ctx *ctx, const xkv_device_attention *copy, uint32_t layer,
                                                    const xkv_queries *queries, const xkv_attend_options *options,
                                                    void *stream, void *workspace, float *output, float *lse);

/* The rows of all layers that the attention has, restored from what is held: into views [plane_count] of the device's
 * memory, `rows` included, as xkv_device_read() takes them; those of planes of other layers are not looked at. Token i
 * of the attention goes to row(i). The work, one kernel for each plane, is put behind what is on `stream` (NULL: the
 * default stream), and the call returns; it takes no workspace, allocates, copies and waits for nothing, so that it can
 * be captured into a graph together with what uses the rows. A graph keeps addresses and strides of the views; what the
 * arrays `rows` hold in the device's memory, a paged cache's slots, is read at each launch and may change in between.
 * Rows are those of xkv_entry_read() at the attention's positions, as spec/codec.md, section 3 demands of two decoders;
 * but coefficients that a cross stage adds to are held in 16 bits of the largest of a chunk, and XKV_HOLD_ROWS rounds
 * to the planes' dtype before. It is f32 arithmetic, as that of attention:
 * xkv_device_read() is what to restore once with. Errors: ARGUMENT (views, alignment), UNSUPPORTED (another dtype;
 * heads of more than 640 elements; blocks that reach over heads), BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_attention_restore(xkv_ctx *ctx, const xkv_device_attention *copy,
                                                               void *stream, const xkv_view *views);

/* xkv_attention_merge() of states in the device's memory, on a stream, likewise. Errors: ARGUMENT (more than 16
 * states), BACKEND. */
XKV_API XKV_MUST_CHECK xkv_status xkv_device_attention_merge(xkv_ctx *ctx, xkv_device *device,
                                                             const xkv_attention_state *states, uint32_t state_count,
                                                             uint64_t rows, uint32_t dim, void *stream, float *output,
                                                             float *lse);

/* --- Dictionaries ------------------------------------------------------------------------------------------------- */

/* Open a dictionary, decode its bases and fold its metric into them. `for_packing` 0 leaves out what only packing needs
 * (half of the memory: about 8 bytes an element of every basis, then 4; of the cross stage's, 12 and 8). `input` is not
 * kept.
 * Errors: as xkv_entry_open(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_dict_open(xkv_ctx *ctx, const xkv_input *input, int for_packing,
                                                xkv_dict **dict_p);
XKV_API void xkv_dict_close(xkv_ctx *ctx, xkv_dict *dict);

typedef struct xkv_dict_info {
    uint8_t id[16]; /* content id */
    uint64_t file_size;
    uint32_t layer_count;
    uint32_t group_count;      /* the last one is the cross stage, if there is one */
    uint32_t component_count;  /* of the groups that hold planes */
    double unit;               /* root mean square deviation of a coefficient: the unit of quality */
    uint64_t tokens;           /* training rows */
    double max_quality;        /* finest quality its rounding was made for */
    uint8_t fingerprint[16];   /* of the model; zero when unknown */
    uint32_t cross_components; /* of the cross stage; 0: it has none */
} xkv_dict_info;
XKV_API void xkv_dict_get_info(const xkv_dict *dict, xkv_dict_info *info);

/* The same from the tables of a dictionary, without decoding its bases: to choose among many.
 * Errors: as xkv_entry_open(). */
XKV_API XKV_MUST_CHECK xkv_status xkv_dict_read_info(xkv_ctx *ctx, const xkv_input *input, xkv_dict_info *info);

/* Planes of a dictionary, without tokens, and its groups: in xkv_group_info `planes` index that geometry, codec is that
 * of the entries' groups (dict or cross), and bytes of rows, energy and errors are 0. `group` < group_count. All lives
 * as long as the dictionary. */
XKV_API const xkv_geometry *xkv_dict_geometry(const xkv_dict *dict);
XKV_API void xkv_dict_get_group(const xkv_dict *dict, uint32_t group, xkv_group_info *info);
/* Its metadata, as of an entry. `index` < the count. */
XKV_API uint32_t xkv_dict_value_count(const xkv_dict *dict);
XKV_API void xkv_dict_get_value(const xkv_dict *dict, uint32_t index, xkv_value *value);

/* Standard deviations of the coefficients of a group in training, by falling size: sigma[*count]. */
XKV_API const float *xkv_dict_sigma(const xkv_dict *dict, uint32_t group, uint32_t *count);

/* How many leading coefficients of a group the cross stage codes in its stead; 0 without one. */
XKV_API uint32_t xkv_dict_leading(const xkv_dict *dict, uint32_t group);

/* The quantizer's step of a quality: 2/3 * unit * 2^((50 - quality) / 16). */
XKV_API double xkv_dict_step(const xkv_dict *dict, double quality);
/* The quality of a step: the inverse. */
XKV_API double xkv_dict_quality(const xkv_dict *dict, double step);

typedef struct xkv_train_options {
    size_t struct_size;
    uint32_t group_layers; /* default 4 */
    uint32_t apart;        /* non-zero: K and V in groups of their own; default 0: jointly, which is 3 times better */
    uint32_t sinks;        /* tokens at the start of each cache to leave out; default 4 */
    double max_quality;    /* finest quality the components are rounded for; default 85, which is beyond 8x */
    int32_t zstd_level;    /* default 19 */
    /* What errors cost. NULL: planes are divided by their standard deviation, and keys weigh 1.4. */
    const xkv_metric *metric;
    const xkv_model *model; /* for the metadata */
    const char *writer;
    xkv_progress_fn progress;
    void *progress_user;
    uint32_t cross; /* leading coefficients of each group that a stage over all groups codes together; 0: no such stage.
                       Default 192: a third off the divergence at 20x, at 1.4 times the restore time */
} xkv_train_options;

static inline xkv_train_options xkv_train_options_default(void)
{
    xkv_train_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.group_layers = 4;
    o.sinks = 4;
    o.max_quality = 85;
    o.zstd_level = 19;
    o.cross = 192;
    return o;
}

/* Train a dictionary on caches of one model: PCA of all planes of a group together, in the metric (spec/dictionary.md,
 * section 3), then of the groups' leading coefficients (section 4). The caches are read group by group, tile by tile:
 * memory is four matrices of the widest group, whatever the number of caches. Errors: ARGUMENT (no rows, a NaN or Inf,
 * caches of different geometry), MISMATCH (a metric of other layers, heads or head_dim), LIMIT, MEMORY, CANCELLED,
 * BACKEND, and what `output` returns. */
XKV_API XKV_MUST_CHECK xkv_status xkv_train(xkv_ctx *ctx, const xkv_cache *const *caches, uint32_t cache_count,
                                            const xkv_train_options *options, const xkv_output *output);

#ifdef __cplusplus
}
#endif
#endif
