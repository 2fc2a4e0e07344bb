/* container.h - reading and writing the container of spec/container.md: sections and tables, not what parts hold. */
#ifndef XKV_CONTAINER_H
#define XKV_CONTAINER_H

#include "base.h"
#include "xkv/format.h"

#define XKV_ALIGN           64u
#define XKV_TAG(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)
#define XKV_SECTION_GEOM    XKV_TAG('G', 'E', 'O', 'M')
#define XKV_SECTION_TOKN    XKV_TAG('T', 'O', 'K', 'N')
#define XKV_SECTION_FRAM    XKV_TAG('F', 'R', 'A', 'M')
#define XKV_SECTION_META    XKV_TAG('M', 'E', 'T', 'A')
#define XKV_SECTION_GRPS    XKV_TAG('G', 'R', 'P', 'S')
#define XKV_SECTION_PAYL    XKV_TAG('P', 'A', 'Y', 'L')

enum { XKV_METHOD_STORED = 0, XKV_METHOD_ZSTD = 1, XKV_METHOD_CODED = 2 };

/* What a file is (header field `kind`). */
enum { XKV_KIND_ENTRY = 1, XKV_KIND_DICTIONARY = 2 };

/* Bits of the header's required_features: a plane has a dtype of blocks [G13]. */
enum { XKV_FEATURE_BLOCKS = 1, XKV_FEATURES_KNOWN = XKV_FEATURE_BLOCKS };

/* How a group is coded (spec/codec.md, spec/dictionary.md). The BASIS ones are a dictionary's; the CROSS ones, a stage
 * over all groups, hold no planes. */
enum {
    XKV_GROUP_LOSSLESS = 0,
    XKV_GROUP_SVD = 1,
    XKV_GROUP_DICT = 2,
    XKV_GROUP_SCALAR = 3,
    XKV_GROUP_SVDQ = 4,
    XKV_GROUP_BASIS = 5,
    XKV_GROUP_CROSS = 6,
    XKV_GROUP_CROSS_BASIS = 7
};

/* The parts of a group. */
enum { XKV_PART_COMPONENTS = 0, XKV_PART_EXACT = 1, XKV_PART_CHUNKS = 2 };

/* A part before storing: rows x cols elements of `elem` bytes; rows * cols may be 0. With `coded` its size in the file
 * is whatever its entropy coder made of it (method 2). */
typedef struct xkv_shape {
    uint64_t rows, cols;
    uint32_t elem;
    bool coded;
} xkv_shape;

static inline uint64_t xkv_shape_bytes(xkv_shape s)
{
    return s.rows * s.cols * s.elem;
}

/* One part of a group (spec section 10). `offset` counts from the start of PAYL. */
typedef struct xkv_part {
    uint64_t offset;
    uint64_t size;
    uint64_t checksum;
    uint32_t method;
} xkv_part;

typedef struct xkv_group {
    uint32_t codec; /* XKV_GROUP_... */
    uint32_t reason;
    uint32_t plane_count;
    uint32_t rank;
    uint32_t part_count; /* chunk_count + 2 for every codec: components, exact rows, chunks */
    uint32_t width;      /* N; derived on reading */
    double energy, error;
    uint32_t *planes;       /* [plane_count] */
    double *plane_errors;   /* [plane_count] */
    double *plane_energies; /* [plane_count] sums of squares, while packing; NULL when read */
    xkv_part *parts;        /* [part_count] */
} xkv_group;

typedef struct xkv_meta_value {
    char *key;
    uint32_t type;
    uint32_t size;
    uint8_t *bytes; /* `size` value bytes as stored, then a NUL */
} xkv_meta_value;

typedef struct xkv_section {
    uint32_t type, flags;
    uint64_t offset, size, checksum;
} xkv_section;

/* Everything of an entry but its payload. All pointers belong to it. */
typedef struct xkv_container {
    uint32_t kind; /* XKV_KIND_ENTRY or XKV_KIND_DICTIONARY; a writer's 0 means an entry */
    uint32_t write_version, read_version;
    uint32_t required_features; /* XKV_FEATURE_... */
    uint64_t file_size;
    uint8_t content_id[16];
    uint32_t section_count;
    xkv_section *sections;
    uint64_t payload_offset, payload_size;

    xkv_geometry geometry;
    uint32_t chunk_tokens, chunk_count, sinks, window;

    bool has_framing;
    xkv_framing framing; /* literals decoded and checked against literal_hash [F6] */
    uint8_t source_hash[16];

    uint32_t value_count;
    xkv_meta_value *values;

    uint32_t group_count;
    xkv_group *groups; /* the cross stage, if any, is the first group of an entry and the last one of a dictionary */
} xkv_container;

static inline bool xkv_group_is_cross(const xkv_group *g)
{
    return g->codec == XKV_GROUP_CROSS || g->codec == XKV_GROUP_CROSS_BASIS;
}

/* The dtype of the group's planes [D1]; where there are none, that of coefficients. */
static inline uint32_t xkv_group_dtype(const xkv_geometry *geometry, const xkv_group *g)
{
    return g->plane_count > 0 ? geometry->planes[g->planes[0]].dtype : XKV_F16;
}

/* Bytes of `tokens` rows of the group as the engine holds them. */
static inline uint64_t xkv_group_row_bytes(const xkv_geometry *geometry, const xkv_group *g, uint64_t tokens)
{
    return xkv_dtype_bytes(xkv_group_dtype(geometry, g), g->width) * tokens;
}

/* Bytes of what method 1 takes for an element of such rows: a row of blocks is just bytes. */
static inline uint32_t xkv_group_element_size(const xkv_geometry *geometry, const xkv_group *g)
{
    uint32_t dtype = xkv_group_dtype(geometry, g);
    return xkv_dtype_block(dtype) > 1 ? 1 : (uint32_t)xkv_dtype_size(dtype);
}

/* Read and check everything but the payload: every rule of spec/container.md not marked deep, and F6.
 * The container is freed with xkv_container_free(), which accepts a zeroed one. */
XKV_MUST_CHECK xkv_status xkv_container_read(xkv_ctx *ctx, const xkv_input *input, uint32_t kind, xkv_container *c);
void xkv_container_free(xkv_ctx *ctx, xkv_container *c);

/* Where the arrays of a basis group's header lie, and its size (spec/dictionary.md, section 3). */
typedef struct xkv_basis_header {
    uint64_t mu, sigma, d, tables, blocks, size; /* offsets */
} xkv_basis_header;

xkv_basis_header xkv_basis_layout(const xkv_geometry *geometry, const xkv_group *g);

/* The same of a cross basis in a dictionary of `group_count` groups, itself included. */
typedef struct xkv_cross_header {
    uint64_t counts, sigma, d, tables, size;
} xkv_cross_header;

xkv_cross_header xkv_cross_layout(uint32_t group_count, const xkv_group *g);

/* Where the arrays of an svdq group's side part lie (spec/dictionary.md, section 1); the stream of its mean and
 * components starts at `stream`. */
typedef struct xkv_svdq_layout {
    uint64_t scales, mean_step, exponents, tables, component_tables, stream;
} xkv_svdq_layout;

xkv_svdq_layout xkv_svdq_side(const xkv_group *g);

/* What part `part` of a group holds (spec/codec.md, spec/dictionary.md). Needs the geometry, chunks, sinks and window
 * of `c`, and codec, planes, rank and width of `g`. */
xkv_shape xkv_part_shape(const xkv_container *c, const xkv_group *g, uint32_t part);

/* Section FRAM on its own, for a framing that is kept outside of an entry: its bytes, to be released, and back again.
 * `zstd_level` and errors as for the section; the framing that is read belongs to the caller (xkv_framing_release()).
 */
XKV_MUST_CHECK xkv_status xkv_framing_encode(xkv_ctx *ctx, const xkv_geometry *geometry, const xkv_framing *framing,
                                             const uint8_t source_hash[16], int zstd_level, uint8_t **bytes_p,
                                             size_t *size);
XKV_MUST_CHECK xkv_status xkv_framing_decode(xkv_ctx *ctx, const xkv_geometry *geometry, const uint8_t *bytes,
                                             size_t size, xkv_framing *framing, uint8_t source_hash[16]);

/* Whether plane `index` of a geometry that the caller made is one, and whether its view can be used: source and
 * destination alike, its dtype may be another. Errors: ARGUMENT. */
XKV_MUST_CHECK xkv_status xkv_check_plane(xkv_ctx *ctx, const xkv_geometry *g, uint32_t index);
XKV_MUST_CHECK xkv_status xkv_check_view(xkv_ctx *ctx, const xkv_geometry *g, uint32_t index, const xkv_view *view);
/* The same of plane `index` of some geometry. */
XKV_MUST_CHECK xkv_status xkv_check_plane_view(xkv_ctx *ctx, const xkv_plane *p, uint32_t index, const xkv_view *view);

/* Elements between two heads of a view. */
static inline uint32_t xkv_view_head_dim(const xkv_view *view, const xkv_plane *p)
{
    return view->head_dim != 0 ? view->head_dim : p->head_dim;
}

/* required_features of an entry with this geometry. */
uint32_t xkv_geometry_features(const xkv_geometry *g);

/* Whether two rotary embeddings turn rows alike. */
bool xkv_rope_equal(const xkv_rope *a, const xkv_rope *b);

/* Bytes of the longest prefix of `text` that is valid UTF-8 without NUL: what a string value may hold [M6]. */
size_t xkv_utf8_prefix(const void *text, size_t size);

/* Read part `p` of the payload into dst (p->size bytes) and check its checksum [P3]. Thread-safe. */
XKV_MUST_CHECK xkv_status xkv_container_read_part(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c,
                                                  const xkv_part *p, void *dst);
/* Have the input fetch what is read soon: of `g` all but its chunks, and `chunks` of these from first_chunk on. */
void xkv_container_prefetch(const xkv_input *input, const xkv_container *c, const xkv_group *g, uint32_t first_chunk,
                            uint32_t chunks);
/* Check that the gaps between parts are zero [P1]. */
XKV_MUST_CHECK xkv_status xkv_container_check_gaps(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c);

/* --- Writing ------------------------------------------------------------------------------------------------------ */

/* Writes an entry in one pass over the payload: begin() lays out all sections (their sizes are known once groups,
 * planes and part counts are), add_part() appends parts in table order, finish() fills the tables and the header.
 * `c` holds geometry, framing, values and groups and must outlive the writer; parts and errors in c->groups are filled
 * by the writer and the caller before finish(). */
typedef struct xkv_container_writer {
    xkv_container *c;
    const xkv_output *output;
    uint64_t payload_end;           /* bytes of PAYL written so far */
    struct xkv_writer_state *state; /* section table and sizes */
} xkv_container_writer;

/* Encodes and writes the small sections. c->source_hash must be set when has_framing. */
XKV_MUST_CHECK xkv_status xkv_container_begin(xkv_ctx *ctx, xkv_container *c, const xkv_output *output, int zstd_level,
                                              xkv_container_writer *w);
/* Bytes of the file before the payload (for rate control); valid after begin(). */
uint64_t xkv_container_head_size(const xkv_container_writer *w);
/* Append `size` bytes as the next part and fill *part (offset, size, checksum, method). size 0: an empty part. */
XKV_MUST_CHECK xkv_status xkv_container_add_part(xkv_ctx *ctx, xkv_container_writer *w, xkv_part *part,
                                                 const void *data, uint64_t size, uint32_t method);
/* Write GRPS, the section table and the header; *file_size on success. Frees the writer's memory in any case. */
XKV_MUST_CHECK xkv_status xkv_container_finish(xkv_ctx *ctx, xkv_container_writer *w, uint64_t *file_size);
void xkv_container_writer_free(xkv_ctx *ctx, xkv_container_writer *w);

#endif
