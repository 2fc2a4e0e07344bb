/* cpu/panel_tile.h - the inner product of panels.h for one instruction set. Included once for each, with
 *   TILE        the function's name
 *   TILE_TARGET its target attribute
 *   TILE_VECTOR bytes of a vector register
 *   TILE_ROWS and TILE_COLS
 * of which TILE_ROWS * TILE_COLS sums, TILE_COLS elements of B and one of A are kept in registers. */

TILE_TARGET void TILE(const xkv_tile_product *p)
{
    enum { LANES = TILE_VECTOR / sizeof(float), VECTORS = TILE_COLS / LANES, LINE = 64 / sizeof(float), PACE = 8 };
    typedef float vector __attribute__((vector_size(TILE_VECTOR), aligned(sizeof(float)), may_alias));
    const float *restrict b = p->b;
    const uint32_t *restrict pick = p->pick;
    size_t fetched = 0;

    for (size_t row = 0; row < p->rows; row += TILE_ROWS) {
        const float *restrict a = p->a + row;
        vector sums[TILE_ROWS][VECTORS] = {0};

        for (size_t i = 0; i < TILE_ROWS; i++)
            __builtin_prefetch(p->c + (row + i) * p->ldc, 1);
        for (size_t k = 0, end = PACE; k < p->depth; end += PACE) {
            if (fetched < p->next_count) { /* at a pace that the memory can follow */
                for (size_t i = 0; i < TILE_COLS; i += LINE)
                    __builtin_prefetch(p->next + (size_t)p->next_pick[fetched] * TILE_COLS + i, 0, 2);
                fetched++;
            }
            for (end = end < p->depth ? end : p->depth; k < end; k++, a += XKV_STRIP) {
                const vector *y = (const vector *)(b + (size_t)pick[k] * TILE_COLS);
#pragma GCC unroll 16
                for (size_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 16
                    for (size_t v = 0; v < VECTORS; v++)
                        sums[i][v] += y[v] * a[i];
            }
        }
#pragma GCC unroll 16
        for (size_t i = 0; i < TILE_ROWS; i++)
#pragma GCC unroll 16
            for (size_t v = 0; v < VECTORS; v++)
                ((vector *)(p->c + (row + i) * p->ldc))[v] += sums[i][v];
    }
}

#undef TILE
#undef TILE_TARGET
#undef TILE_VECTOR
#undef TILE_ROWS
#undef TILE_COLS
