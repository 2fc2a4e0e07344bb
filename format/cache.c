/* cache.c - opening an engine file: mapping it, finding out what it is, and what all readers share. */
#include "engine_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* --- Mapping ------------------------------------------------------------------------------------------------------ */

static xkv_status map_descriptor(xkv_ctx *ctx, const char *path, int fd, xkv_map *map)
{
    struct stat st;
    if (fstat(fd, &st) != 0)
        return xkv_fail(ctx, XKV_ERROR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        return xkv_fail(ctx, XKV_ERROR_IO, "%s: not a regular file", path);
    *map = (xkv_map){NULL, (uint64_t)st.st_size};
    if (map->size == 0)
        return XKV_OK;
    void *data = mmap(NULL, (size_t)map->size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        return xkv_fail(ctx, XKV_ERROR_IO, "%s: cannot map: %s", path, strerror(errno));
    map->data = data;
    return XKV_OK;
}

xkv_status xkv_map_file(xkv_ctx *ctx, const char *path, xkv_map *map)
{
    /* O_NONBLOCK: a FIFO must be refused, not waited for */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return xkv_fail(ctx, XKV_ERROR_IO, "%s: %s", path, strerror(errno));
    xkv_status status = map_descriptor(ctx, path, fd, map);
    close(fd);
    return status;
}

void xkv_unmap_file(xkv_map *map)
{
    if (map->data)
        munmap((void *)map->data, (size_t)map->size);
    *map = (xkv_map){0};
}

/* --- What readers share ------------------------------------------------------------------------------------------- */

static int compare_u64(const void *a, const void *b)
{
    uint64_t x, y;
    memcpy(&x, a, sizeof x);
    memcpy(&y, b, sizeof y);
    return (x > y) - (x < y);
}

/* order[i]: the row of the i-th token. The row number in the low half of the sort key keeps equal positions in order.
 */
static xkv_status sort_rows(xkv_ctx *ctx, const int32_t *positions, uint32_t count, uint32_t **order_p)
{
    uint64_t *keys = NULL;
    uint32_t *order = NULL;
    xkv_status status;
    XKV_TRY_GOTO(XKV_NEW(ctx, count, &keys), out);
    XKV_TRY_GOTO(XKV_NEW(ctx, count, &order), out);
    for (uint32_t i = 0; i < count; i++)
        keys[i] = (uint64_t)((int64_t)positions[i] - INT32_MIN) << 32 | i;
    qsort(keys, count, sizeof *keys, compare_u64);
    for (uint32_t i = 0; i < count; i++)
        order[i] = (uint32_t)keys[i];
    *order_p = order;
out:
    xkv_release(ctx, keys);
    return status;
}

xkv_status xkv_cache_set_positions(xkv_ctx *ctx, xkv_cache *cache, const int32_t *positions, uint32_t count)
{
    bool ordered = true;
    for (uint32_t i = 1; i < count; i++)
        ordered = ordered && positions[i - 1] <= positions[i];
    uint32_t *order = NULL;
    if (!ordered)
        XKV_TRY(sort_rows(ctx, positions, count, &order));
    cache->framing.rows = order;
    int32_t *sorted;
    XKV_TRY(XKV_NEW(ctx, count, &sorted));
    for (uint32_t i = 0; i < count; i++)
        sorted[i] = positions[order ? order[i] : i];
    cache->geometry.positions = sorted;
    cache->geometry.token_count = count;
    return XKV_OK;
}

xkv_status xkv_cache_set_ropes(xkv_ctx *ctx, xkv_cache *cache, const xkv_rope *ropes, uint32_t count)
{
    bool used = false;
    for (uint32_t i = 0; i < cache->geometry.plane_count; i++)
        used = used || cache->geometry.planes[i].rope != XKV_NO_ROPE;
    if (!used)
        return XKV_OK;
    xkv_rope *copy;
    XKV_TRY(XKV_NEW(ctx, count, &copy));
    memcpy(copy, ropes, count * sizeof *copy);
    cache->geometry.ropes = copy;
    cache->geometry.rope_count = count;
    return XKV_OK;
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

/* Carry the whole file as one literal, which is the file itself: no copy. */
static xkv_status open_opaque(xkv_ctx *ctx, xkv_cache *cache)
{
    xkv_segment *segment;
    XKV_TRY(XKV_NEW(ctx, 1, &segment));
    *segment = (xkv_segment){.size = cache->file.size};
    cache->framing = (xkv_framing){.engine = XKV_ENGINE_OPAQUE,
                                   .segment_count = 1,
                                   .segments = segment,
                                   .literals = cache->file.data,
                                   .literal_size = cache->file.size,
                                   .source_size = cache->file.size};
    return XKV_OK;
}

static xkv_status open_content(xkv_ctx *ctx, xkv_cache *cache, const xkv_model *model)
{
    if (cache->file.size == 0)
        return xkv_fail(ctx, XKV_ERROR_TRUNCATED, "%s: the file is empty [LS1]", cache->name);
    bool understood = false;
    XKV_TRY(xkv_llama_open(ctx, cache, model, &understood));
    if (!understood)
        XKV_TRY(xkv_safetensors_open(ctx, cache, model, &understood));
    if (!understood)
        XKV_TRY(open_opaque(ctx, cache));
    XKV_TRY(XKV_NEW_ZERO(ctx, cache->geometry.plane_count, &cache->views));
    /* views over a cache are only read through, so that the constness of the file may be dropped here */
    return xkv_framing_views(ctx, &cache->framing, &cache->geometry, (uint8_t *)cache->file.data, cache->views);
}

static xkv_status finish_open(xkv_ctx *ctx, xkv_cache *cache, const char *name, const xkv_model *model,
                              xkv_cache **cache_p)
{
    cache->name = name ? name : "cache";
    xkv_status status = open_content(ctx, cache, model);
    cache->name = NULL;
    if (status != XKV_OK) {
        xkv_cache_free(ctx, cache);
        return status;
    }
    *cache_p = cache;
    return XKV_OK;
}

xkv_status xkv_cache_open(xkv_ctx *ctx, const char *path, const xkv_model *model, xkv_cache **cache_p)
{
    xkv_ctx_begin(ctx);
    xkv_cache *cache;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &cache));
    xkv_status status = xkv_map_file(ctx, path, &cache->file);
    if (status != XKV_OK) {
        xkv_release(ctx, cache);
        return status;
    }
    cache->mapped = true;
    return finish_open(ctx, cache, path, model, cache_p);
}

xkv_status xkv_cache_from_memory(xkv_ctx *ctx, const void *data, size_t size, const char *name, const xkv_model *model,
                                 xkv_cache **cache_p)
{
    xkv_ctx_begin(ctx);
    xkv_cache *cache;
    XKV_TRY(XKV_NEW_ZERO(ctx, 1, &cache));
    cache->file = (xkv_map){data, size};
    return finish_open(ctx, cache, name, model, cache_p);
}

void xkv_cache_free(xkv_ctx *ctx, xkv_cache *cache)
{
    if (!cache)
        return;
    if (cache->framing.literals == cache->file.data)
        cache->framing.literals = NULL; /* an opaque file's literal is the file */
    xkv_framing_release(ctx, &cache->framing);
    xkv_release(ctx, (void *)cache->geometry.planes);
    xkv_release(ctx, (void *)cache->geometry.ropes);
    xkv_release(ctx, (void *)cache->geometry.positions);
    xkv_release(ctx, (void *)cache->geometry.token_ids);
    xkv_release(ctx, cache->views);
    if (cache->mapped)
        xkv_unmap_file(&cache->file);
    xkv_release(ctx, cache);
}

const xkv_geometry *xkv_cache_geometry(const xkv_cache *cache)
{
    return &cache->geometry;
}

const xkv_framing *xkv_cache_framing(const xkv_cache *cache)
{
    return &cache->framing;
}

const xkv_view *xkv_cache_views(const xkv_cache *cache)
{
    return cache->views;
}

const uint8_t *xkv_cache_data(const xkv_cache *cache, uint64_t *size)
{
    *size = cache->file.size;
    return cache->file.data;
}
