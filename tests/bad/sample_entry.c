#include "sample_entry.h"

#include <stdlib.h>

/* --- Output ----------------------------------------------------------------------------------------------------- */

static xkv_status image_write(void *user, xkv_ctx *ctx, uint64_t offset, const void *src, size_t size)
{
    image *file = user;
    if (offset > sizeof file->data || size > sizeof file->data - offset)
        return xkv_fail(ctx, XKV_ERROR_NO_SPACE, "the image is full");
    memcpy(file->data + offset, src, size);
    file->size = (size_t)xkv_max64(file->size, offset + size);
    return XKV_OK;
}

xkv_output image_output(image *file)
{
    memset(file, 0, sizeof *file);
    return (xkv_output){.user = file, .write = image_write};
}

/* --- Contents --------------------------------------------------------------------------------------------------- */

static void init_geometry(sample *s, uint32_t tokens)
{
    for (uint32_t i = 0; i < SAMPLE_PLANES; i++) {
        bool k = i % 2 == 0;
        s->planes[i] = (xkv_plane){.layer = i / 2,
                                   .kind = k ? XKV_PLANE_K : XKV_PLANE_V,
                                   .dtype = XKV_F16,
                                   .heads = k ? 2 : 1,
                                   .head_dim = k ? 4 : 8,
                                   .rope = k ? 0 : XKV_NO_ROPE};
    }
    s->rope = (xkv_rope){.n_rot = 4, .offset = 0, .style = XKV_ROPE_HALF_SPLIT, .scale = 1, .inv_freq = {1, 0.01}};
    for (uint32_t i = 0; i < tokens; i++) {
        s->positions[i] = (int32_t)(i < 2 ? i : i + 3);
        s->rows[i] = (i + 1) % tokens;
    }
    for (uint32_t i = 0; i <= tokens; i++)
        s->token_ids[i] = (int32_t)(1000 + i / 8);
    s->c.geometry = (xkv_geometry){.layer_count = 2,
                                   .plane_count = SAMPLE_PLANES,
                                   .rope_count = 1,
                                   .token_count = tokens,
                                   .planes = s->planes,
                                   .ropes = &s->rope,
                                   .positions = s->positions,
                                   .token_ids = s->token_ids,
                                   .token_id_count = tokens + 1};
    s->c.chunk_tokens = 32;
    s->c.sinks = tokens == SAMPLE_SMALL ? 1 : 4;
    s->c.window = tokens == SAMPLE_SMALL ? 1 : 2;
}

static void init_framing(sample *s, uint32_t tokens)
{
    uint64_t plane_size = (uint64_t)tokens * SAMPLE_WIDTH * 2, before = tokens == SAMPLE_SMALL ? 17 : 200;
    s->segments[0] = (xkv_segment){.size = before};
    s->segments[1] = (xkv_segment){.size = 2 * plane_size, .first_plane = 0, .plane_count = 2};
    s->segments[2] = (xkv_segment){plane_size, 2, 1, XKV_LAYOUT_HEAD_MAJOR};
    s->segments[3] = (xkv_segment){plane_size, 3, 1, XKV_LAYOUT_DIM_MAJOR};
    s->segments[4] = (xkv_segment){.size = 4};
    memset(s->literals, 'x', sizeof s->literals);
    s->c.has_framing = true;
    s->c.framing = (xkv_framing){.engine = XKV_ENGINE_LLAMA_SEQUENCE,
                                 .segment_count = SAMPLE_SEGMENTS,
                                 .segments = s->segments,
                                 .literals = s->literals,
                                 .literal_size = before + 4,
                                 .source_size = before + 4 + 4 * plane_size,
                                 .rows = s->rows};
    memset(s->c.source_hash, 0x5a, sizeof s->c.source_hash);
}

static void init_values(sample *s)
{
    static char keys[4][16] = {"engine.version", "note.bytes", "note.f64", "writer"};
    static uint8_t version[8] = {4}, bytes[3] = {1, 2, 3}, number[8], writer[] = "test \xc3\xa9";
    xkv_storef64(number, 0.5);
    s->values[0] = (xkv_meta_value){keys[0], 2, 8, version};
    s->values[1] = (xkv_meta_value){keys[1], 4, 3, bytes};
    s->values[2] = (xkv_meta_value){keys[2], 3, 8, number};
    s->values[3] = (xkv_meta_value){keys[3], 1, 7, writer};
    s->c.values = s->values;
    s->c.value_count = 4;
}

static void init_groups(sample *s, uint32_t tokens)
{
    for (uint32_t i = 0; i < 2; i++) {
        s->group_planes[i][0] = i;
        s->group_planes[i][1] = i + 2;
        s->groups[i] = (xkv_group){.codec = 1 - i,
                                   .plane_count = 2,
                                   .rank = i == 0 ? SAMPLE_RANK : 0,
                                   .part_count = (tokens + 31) / 32 + 2,
                                   .width = 2 * SAMPLE_WIDTH,
                                   .planes = s->group_planes[i],
                                   .plane_errors = s->plane_errors[i],
                                   .parts = s->parts[i]};
    }
    s->groups[0].energy = 100;
    s->groups[0].error = 0.25;
    s->plane_errors[0][0] = 0.125;
    s->c.groups = s->groups;
    s->c.group_count = 2;
}

void sample_init(sample *s, uint32_t tokens)
{
    memset(s, 0, sizeof *s);
    init_geometry(s, tokens);
    init_framing(s, tokens);
    init_values(s);
    init_groups(s, tokens);
}

void sample_use_blocks(sample *s)
{
    uint64_t tokens = s->c.geometry.token_count;
    for (uint32_t i = 1; i < SAMPLE_PLANES; i += 2)
        s->planes[i] = (xkv_plane){i / 2, XKV_PLANE_V, XKV_Q4_0, 4, 8, XKV_NO_ROPE};
    s->groups[1].width = 2 * 32;
    s->segments[1].size = tokens * (SAMPLE_WIDTH * 2 + 18);
    s->segments[3] = (xkv_segment){tokens * 18, 3, 1, XKV_LAYOUT_TOKEN_MAJOR};
    s->c.framing.source_size = 0;
    for (uint32_t i = 0; i < SAMPLE_SEGMENTS; i++)
        s->c.framing.source_size += s->segments[i].size;
}

/* --- Writing and checking --------------------------------------------------------------------------------------- */

static xkv_status write_part(xkv_ctx *ctx, xkv_container_writer *w, uint32_t group, uint32_t index)
{
    uint8_t bytes[2048];
    sample *s = (sample *)w->c; /* its first member */
    uint64_t size = xkv_shape_bytes(xkv_part_shape(&s->c, &s->groups[group], index));
    uint32_t method = group == 1 && index == 2 ? XKV_METHOD_ZSTD : XKV_METHOD_STORED;
    if (method == XKV_METHOD_ZSTD)
        size = 45;
    for (uint32_t i = 0; i < sizeof bytes; i++)
        bytes[i] = (uint8_t)(1 + (i * 7 + index * 31 + group * 101) % 255);
    return xkv_container_add_part(ctx, w, &s->parts[group][index], bytes, size, method);
}

xkv_status sample_write(xkv_ctx *ctx, sample *s, image *file)
{
    xkv_container_writer w;
    xkv_status status = XKV_OK;
    xkv_output output = image_output(file);
    uint64_t file_size;
    XKV_TRY(xkv_container_begin(ctx, &s->c, &output, 3, &w));
    for (uint32_t i = 0; i < s->c.group_count; i++)
        for (uint32_t k = 0; k < s->groups[i].part_count; k++)
            XKV_TRY_GOTO(write_part(ctx, &w, i, k), out);
    return xkv_container_finish(ctx, &w, &file_size);
out:
    xkv_container_writer_free(ctx, &w);
    return status;
}

static xkv_status check_parts(xkv_ctx *ctx, const xkv_input *input, const xkv_container *c)
{
    for (uint32_t i = 0; i < c->group_count; i++) {
        for (uint32_t k = 0; k < c->groups[i].part_count; k++) {
            const xkv_part *p = &c->groups[i].parts[k];
            void *dst = NULL;
            XKV_TRY(xkv_alloc(ctx, 1, p->size, &dst));
            xkv_status status = xkv_container_read_part(ctx, input, c, p, dst);
            xkv_release(ctx, dst);
            XKV_TRY(status);
        }
    }
    return xkv_container_check_gaps(ctx, input, c);
}

xkv_status sample_check(xkv_ctx *ctx, const void *data, size_t size)
{
    xkv_container c;
    xkv_input input = xkv_input_from_memory(data, size);
    xkv_ctx_begin(ctx);
    XKV_TRY(xkv_container_read(ctx, &input, XKV_KIND_ENTRY, &c));
    xkv_status status = check_parts(ctx, &input, &c);
    xkv_container_free(ctx, &c);
    return status;
}
