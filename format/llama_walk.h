/* llama_walk.h - where the parts of a llama.cpp state file are (spec/engines.md, section 1). */
#ifndef XKV_LLAMA_WALK_H
#define XKV_LLAMA_WALK_H

#include "engine_file.h"

/* Lengths of the heads of tensors, {i32 type, u64 row} and, transposed, {i32 type, u32 element, u32 width}, and of a
 * cell without extension, {i32 pos, u32 n_seq_id = 1, i32 seq_id}. */
#define XKV_LLAMA_TENSOR_HEAD 12u
#define XKV_LLAMA_CELL        12u

/* Words of a server's token field beside the ids: -1, version 1 and their number in front, no media behind. */
#define XKV_LLAMA_WRAPPING 4u

/* What the layout has or has not, where neither magic nor version tells. */
typedef struct xkv_llama_form {
    bool streams;       /* memories begin with n_stream */
    uint32_t extension; /* bytes a cell has between n_seq_id and seq_id */
    bool rotations;     /* n_rot_k and n_rot_v follow n_layer */
    bool outputs;       /* sessions: outputs, logits and embeddings come before the memory */
} xkv_llama_form;

/* The rows of one layer's K or V. */
typedef struct xkv_llama_tensor {
    uint64_t head, offset, size; /* of {type, ...} and of the rows, in the file */
    uint32_t width;              /* elements */
    uint32_t dtype;              /* xkv_dtype, if `coded` */
    bool coded;                  /* false: of a type that is not packed, carried as literal bytes */
} xkv_llama_tensor;

/* One KV cache. */
typedef struct xkv_llama_memory {
    uint64_t begin, count, cells, end; /* offsets: the memory, cell_count of the used stream, its cells, behind it */
    uint32_t cell_count, v_trans, layer_count, rot_k;
    bool used; /* a stream has cells, or at least tensors */
    bool has_v;
    bool several_positions;  /* a token has positions of several parts that differ (M-RoPE) */
    xkv_llama_tensor *k, *v; /* [layer_count] */
} xkv_llama_memory;

typedef enum xkv_llama_tail { XKV_TAIL_NONE, XKV_TAIL_CHECKPOINTS, XKV_TAIL_UNKNOWN } xkv_llama_tail;

/* What a walk found. */
typedef struct xkv_llama_state {
    uint32_t engine; /* xkv_engine */
    uint32_t version;
    xkv_llama_form form;
    uint64_t ids; /* offset of the token ids */
    uint32_t id_count;
    bool ids_wrapped;             /* the ids lie in a server's form, between XKV_LLAMA_WRAPPING words */
    bool ids_packed;              /* the token field is not a list of ids */
    uint64_t architecture;        /* sessions: offset of the name's characters */
    uint32_t architecture_size;   /* and how many there are */
    uint64_t outputs;             /* offset of the outputs, or of the first memory */
    xkv_llama_memory memories[2]; /* a second one: of layers with a window */
    uint32_t memory_count;
    xkv_llama_tail tail;
} xkv_llama_state;

/* Why no form fits; status XKV_OK: one does. */
typedef struct xkv_llama_problem {
    xkv_status status;
    bool damaged;    /* the file is understood so far that it must be damaged */
    uint64_t offset; /* in the file */
    char detail[160];
} xkv_llama_problem;

/* The engine of a file that begins with `size` bytes at `data`: XKV_ENGINE_NONE when it is no state file. */
uint32_t xkv_llama_engine(const uint8_t *data, uint64_t size);

/* Whether versions of that engine's files are understood. */
bool xkv_llama_knows_version(uint32_t engine, uint32_t version);

/* Walk a file, or the literals of a framing, in each form it may have; `state` is that of the best walk, also when
 * *problem says that none arrived. Free it with xkv_llama_state_free(). `model` may be NULL.
 * Errors: LIMIT, MEMORY. */
XKV_MUST_CHECK xkv_status xkv_llama_walk_file(xkv_ctx *ctx, const xkv_map *file, const xkv_model *model,
                                              xkv_llama_state *state, xkv_llama_problem *problem);
XKV_MUST_CHECK xkv_status xkv_llama_walk_framing(xkv_ctx *ctx, const xkv_framing *framing, xkv_llama_state *state,
                                                 xkv_llama_problem *problem);
void xkv_llama_state_free(xkv_ctx *ctx, xkv_llama_state *state);

#endif
