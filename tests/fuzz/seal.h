/* seal.h - making the checksums of a damaged file right (spec/container.md, sections 3, 4 and 10), so that what reads
 * it gets behind them. */
#ifndef XKV_TEST_SEAL_H
#define XKV_TEST_SEAL_H

#include "container.h"

#include <xxhash.h>

typedef struct span {
    uint8_t *data;
    size_t size;
} span;

/* [offset, offset + size) of `s`, or nothing when that is not inside. */
static inline span part_of(span s, uint64_t offset, uint64_t size)
{
    if (s.data == NULL || offset > s.size || size > s.size - offset)
        return (span){NULL, 0};
    return (span){s.data + offset, (size_t)size};
}

static inline void seal_parts(span groups, span payload)
{
    uint32_t count = groups.size >= 8 ? xkv_load32(groups.data) : 0;
    uint64_t at = 8;
    for (uint32_t i = 0; i < count; i++) {
        span head = part_of(groups, at, 48);
        if (head.data == NULL)
            return;
        at += 48 + 16 * (uint64_t)xkv_load32(head.data + 8);
        for (uint32_t left = xkv_load32(head.data + 16); left > 0; left--, at += 32) {
            span record = part_of(groups, at, 32);
            if (record.data == NULL)
                return;
            span part = part_of(payload, xkv_load64(record.data), xkv_load64(record.data + 8));
            if (part.size > 0)
                xkv_store64(record.data + 16, XXH3_64bits(part.data, part.size));
        }
    }
}

static inline span find_section(span file, uint32_t count, uint32_t type)
{
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *record = file.data + 64 + 32 * i;
        if (xkv_load32(record) == type)
            return part_of(file, xkv_load64(record + 8), xkv_load64(record + 16));
    }
    return (span){NULL, 0};
}

static inline void seal(span file)
{
    uint32_t count = file.size >= 64 ? xkv_load32(file.data + 32) : 0;
    if (count == 0 || count > 256 || file.size < 64 + 32 * (size_t)count)
        return;
    seal_parts(find_section(file, count, XKV_SECTION_GRPS), find_section(file, count, XKV_SECTION_PAYL));
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *record = file.data + 64 + 32 * i;
        span section = part_of(file, xkv_load64(record + 8), xkv_load64(record + 16));
        if (section.data != NULL && xkv_load32(record) != XKV_SECTION_PAYL)
            xkv_store64(record + 24, XXH3_64bits(section.data, section.size));
    }
    XXH128_canonicalFromHash((XXH128_canonical_t *)(file.data + 40), XXH3_128bits(file.data + 64, 32 * (size_t)count));
    xkv_store64(file.data + 56, XXH3_64bits(file.data, 56));
}

#endif
