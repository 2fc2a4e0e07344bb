/* rans_shuffles.c - see rans_coder.h. */
#include "rans_coder.h"

#include <pthread.h>

xkv_rans_shuffle_tables xkv_rans_shuffles;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void set_word(uint8_t *shuffle, uint32_t to, uint32_t from)
{
    shuffle[2 * to] = (uint8_t)(2 * from);
    shuffle[2 * to + 1] = (uint8_t)(2 * from + 1);
}

static void make_shuffles(void)
{
    memset(&xkv_rans_shuffles, 0x80, sizeof xkv_rans_shuffles); /* a zero byte */
    for (uint32_t mask = 0; mask < 256; mask++) {
        uint32_t rank = 0, count = 0;
        for (uint32_t lane = 0; lane < 8; lane++)
            count += mask >> lane & 1;
        for (uint32_t lane = 0; lane < 8; lane++) {
            if (mask >> lane & 1) {
                set_word(xkv_rans_shuffles.spread[mask], lane, rank);
                set_word(xkv_rans_shuffles.gather[mask], 8 - count + rank, lane);
                rank++;
            }
        }
    }
}

void xkv_rans_make_shuffles(void)
{
    pthread_once(&once, make_shuffles);
}
