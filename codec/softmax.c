#include "softmax.h"

#include "base.h"
#include "xkv/codec.h"

#include <math.h>

/* e^x for |x| <= 87, within 2 ulp, in a form that compilers vectorize: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]
 * (Cephes, expf). Adding the constant rounds to a whole n, whose low bits are then those of the sum. */
static inline float exp_inside(float x)
{
    const float whole = 12582912.0f; /* 1.5 * 2^23 */
    float z = x * 1.44269504f + whole, n = z - whole, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    uint32_t exponent, bits;

    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1;
    memcpy(&exponent, &z, 4);
    memcpy(&bits, &y, 4);
    bits += exponent << 23;
    memcpy(&y, &bits, 4);
    return y + 0 * x; /* a NaN stays */
}

static inline float clamp(float x, float least, float most)
{
    x = x < least ? least : x;
    return x > most ? most : x; /* a NaN stays */
}

/* By tanh itself: a form by exp loses scores that are small beside the cap. */
void xkv_softcap(float *scores, size_t n, float cap)
{
    for (size_t i = 0; i < n; i++)
        scores[i] = cap * tanhf(scores[i] / cap);
}

float xkv_softmax_add(xkv_softmax *row, float *scores, size_t n, float *added)
{
    float largest = row->largest, factor = 1, sum = 0;

    for (size_t i = 0; i < n; i++)
        largest = scores[i] > largest ? scores[i] : largest;
    if (largest == -INFINITY) /* all are hidden, or NaN */
        largest = 0;
    for (size_t i = 0; i < n; i++) {
        float x = scores[i] - largest;
        scores[i] = x < -87 ? 0 : exp_inside(clamp(x, -87, 0));
    }
    for (size_t i = 0; i < n; i++)
        sum += scores[i];
    *added = sum;
    if (sum == 0)
        return 1;
    if (row->sum != 0 && largest != row->largest) {
        factor = row->largest - largest < -87 ? 0 : expf(row->largest - largest);
        row->sum *= (double)factor;
    }
    row->largest = largest;
    row->sum += (double)sum;
    return factor;
}

float xkv_softmax_lse(const xkv_softmax *row)
{
    return row->sum == 0 ? -INFINITY : row->largest + (float)log(row->sum);
}

/* --- Merging ------------------------------------------------------------------------------------------------------ */

/* Elements that are merged at a time. */
#define MERGE_BLOCK 64u

/* How much a state has seen of what all have: NaN where there is one. */
static double share(const xkv_attention_state *state, uint64_t row, float lse)
{
    return lse == -INFINITY ? 0 : exp((double)state->lse[row] - (double)lse);
}

static float merge_lse(const xkv_attention_state *states, uint32_t count, uint64_t row)
{
    float largest = -INFINITY;
    double sum = 0;

    for (uint32_t i = 0; i < count; i++) {
        if (isnan(states[i].lse[row]))
            return states[i].lse[row];
        largest = fmaxf(largest, states[i].lse[row]);
    }
    for (uint32_t i = 0; i < count; i++)
        sum += share(&states[i], row, largest);
    return sum == 0 ? -INFINITY : largest + (float)log(sum);
}

static void merge_block(const xkv_attention_state *states, uint32_t count, uint64_t row, float lse, uint64_t at,
                        size_t n, float *output)
{
    double sums[MERGE_BLOCK] = {0}, total = 0;

    for (uint32_t i = 0; i < count; i++) {
        double weight = share(&states[i], row, lse);
        total += weight;
        for (size_t d = 0; d < n && weight != 0; d++)
            sums[d] += weight * (double)states[i].output[at + d];
    }
    for (size_t d = 0; d < n; d++)
        output[at + d] = total == 0 ? 0 : (float)(sums[d] / total);
}

void xkv_attention_merge(const xkv_attention_state *states, uint32_t state_count, uint64_t rows, uint32_t dim,
                         float *output, float *lse)
{
    for (uint64_t row = 0; row < rows; row++) {
        float merged = merge_lse(states, state_count, row);
        for (uint32_t d = 0; d < dim; d += MERGE_BLOCK)
            merge_block(states, state_count, row, merged, row * dim + d, (size_t)xkv_min64(dim - d, MERGE_BLOCK),
                        output);
        lse[row] = merged;
    }
}
