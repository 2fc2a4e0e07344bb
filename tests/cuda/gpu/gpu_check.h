/* gpu_check.h - what the files of gpu_check share: gpu_check.c, gpu_check_graph.c, gpu_check_pack.c,
 * gpu_check_product.c, gpu_check_svd.c. */
#ifndef XKV_GPU_CHECK_H
#define XKV_GPU_CHECK_H

#include "gpu_support.h"

/* Count a check; what failed is printed, with three numbers for `format`. */
XKV_PRINTF(2, 0) void check(bool good, const char *format, uint32_t a, uint32_t b, uint32_t c);
/* Free a block, and check that its guards are whole. */
void release(gpu *g, gpu_block *b, const char *what);

/* The operations of plugin_pack.h, and of plugin_svd.h. */
void check_pack(gpu *g);
void check_svd(gpu *g);
/* Products, of restoring and of packing. */
void check_products(gpu *g);
/* Operations in graphs, and restoring what is held. */
void check_graphs(gpu *g);

#endif
