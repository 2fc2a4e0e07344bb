/* hook_cost.c - what a load is expected to take: so much for itself, for each byte and for each token. */
#include "hook_internal.h"

#include <math.h>

#define STEP  0.5         /* how far (in logarithms) one load moves the expectation towards what it took */
#define MOST  8.0         /* one load is taken for at most so many times slower or faster than expected */
#define FADES (1.0 / 256) /* how far a decline moves the parts back to their start */

void xkv_cost_init(xkv_cost *c, double load, double byte, double token)
{
    const double parts[XKV_COST_PARTS] = {load, byte, token};
    memcpy(c->start, parts, sizeof parts);
    memcpy(c->now, parts, sizeof parts);
}

double xkv_cost_expect(const xkv_cost *c, double bytes, double tokens)
{
    return c->now[XKV_COST_LOAD] + c->now[XKV_COST_BYTE] * bytes + c->now[XKV_COST_TOKEN] * tokens;
}

/* One load cannot tell which part was wrong: each is corrected by its share of the expectation. Factors keep all parts
 * positive, and find the right order of magnitude in a few loads. The exponents are such that the expectation moves by
 * STEP whatever the shares. */
void xkv_cost_learn(xkv_cost *c, double bytes, double tokens, double seconds)
{
    const double amount[XKV_COST_PARTS] = {1, bytes, tokens};
    double expected = xkv_cost_expect(c, bytes, tokens), share[XKV_COST_PARTS], squares = 0;
    if (!(seconds > 0))
        seconds = expected / MOST; /* the clock did not move */
    double wrong = log(fmax(1 / MOST, fmin(MOST, seconds / expected)));
    for (int i = 0; i < XKV_COST_PARTS; i++) {
        share[i] = c->now[i] * amount[i] / expected;
        squares += share[i] * share[i];
    }
    for (int i = 0; i < XKV_COST_PARTS; i++)
        c->now[i] *= exp(STEP * wrong * share[i] / squares);
}

void xkv_cost_fade(xkv_cost *c)
{
    for (int i = 0; i < XKV_COST_PARTS; i++)
        c->now[i] *= pow(c->start[i] / c->now[i], FADES);
}
