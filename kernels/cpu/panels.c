/* cpu/panels.c - the inner product of kernels/panels.h for each instruction set. This file is compiled with
 * multiplications and additions fused where the processor can, which changes bits: no other one is. */
#include "ops.h"

#include "panels.h"

/* Sanitizers would check each of the loads, and take ten times as long; of the plain one they do, in test_panels.c. */
#define UNCHECKED __attribute__((no_sanitize("address", "thread", "undefined")))

#define TILE      xkv_generic_add_tile
#define TILE_TARGET
#define TILE_VECTOR 16
#define TILE_ROWS   4
#define TILE_COLS   XKV_GENERIC_COLS
#include "panel_tile.h"

#if defined(__aarch64__)
#define TILE        xkv_neon_add_tile
#define TILE_TARGET UNCHECKED
#define TILE_VECTOR 16
#define TILE_ROWS   4
#define TILE_COLS   XKV_NEON_COLS
#include "panel_tile.h"
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define TILE        xkv_avx2_add_tile
#define TILE_TARGET UNCHECKED __attribute__((target("avx2,fma")))
#define TILE_VECTOR 32
#define TILE_ROWS   6
#define TILE_COLS   XKV_AVX2_COLS
#include "panel_tile.h"

#define TILE        xkv_avx512_add_tile
#define TILE_TARGET UNCHECKED __attribute__((target("avx512f")))
#define TILE_VECTOR 64
#define TILE_ROWS   12
#define TILE_COLS   XKV_AVX512_COLS
#include "panel_tile.h"
#endif
