/* The quantizer, the static tables and rANS against a slow second implementation, written from spec/codec.md alone with
 * the numbers of spec/tables.txt. */
#include "support.h"

#include "rans.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define LANES    32
#define TABLES   240
#define MAX_ROWS 256

/* --- The second implementation ------------------------------------------------------------------------------------ */

typedef struct spec_table {
    int reach, shift;
    unsigned escape, f[128]; /* frequency of the escape, and of u by |u| */
} spec_table;

static spec_table spec_tables[TABLES + 1];

static void read_spec_tables(void)
{
    FILE *file = fopen(XKV_DATA_DIR "/../../spec/tables.txt", "r");
    spec_table base[4][28];
    unsigned shape, rung;

    assert_non_null(file);
    assert_int_equal(fscanf(file, "#%*[^\n]"), 0);
    for (int i = 0; i < 4 * 28; i++) {
        spec_table t = {0};
        assert_int_equal(fscanf(file, "%u %u %d %u", &shape, &rung, &t.reach, &t.escape), 4);
        assert_true(shape == (unsigned)i / 28 && rung == (unsigned)i % 28 && t.reach >= 1 && t.reach <= 127);
        for (int u = 0; u <= t.reach; u++)
            assert_int_equal(fscanf(file, "%u", &t.f[u]), 1);
        base[shape][rung] = t;
    }
    fclose(file);
    for (int i = 1; i <= TABLES; i++) {
        int step = (i - 1) % 60, shift = step < 28 ? 0 : (step - 28) / 4 + 1;
        spec_tables[i] = base[(i - 1) / 60][step < 28 ? step : 24 + step % 4];
        spec_tables[i].shift = shift;
    }
}

/* Symbols in the order of their slots: u = -reach .. reach, then the escape (numbered reach + 1). */
static unsigned spec_frequency(const spec_table *t, int symbol)
{
    return symbol > t->reach ? t->escape : t->f[abs(symbol)];
}

static unsigned spec_start(const spec_table *t, int symbol)
{
    unsigned start = 0;
    for (int s = -t->reach; s < symbol; s++)
        start += spec_frequency(t, s);
    return start;
}

/* What happens to the states and the words, in the order of the decoder. */
typedef struct operation {
    enum { SYMBOL, BITS, WORD } kind;
    unsigned lane, a, b; /* start and frequency; number of bits and bits; the word */
} operation;

typedef struct chunk {
    unsigned rows, components;
    uint8_t tables[8];
    int16_t q[8][MAX_ROWS];
} chunk;

static size_t list_operations(const chunk *c, operation *list)
{
    size_t n = 0;
    for (unsigned i = 0; i < c->components; i++) {
        const spec_table *t = &spec_tables[c->tables[i]];
        for (unsigned first = 0; c->tables[i] != 0 && first < c->rows; first += LANES) {
            unsigned lanes = c->rows - first < LANES ? c->rows - first : LANES;
            for (int step = 0; step < 3; step++) {
                for (unsigned lane = 0; lane < lanes; lane++) {
                    int q = c->q[i][first + lane], scale = 1 << t->shift;
                    int u = (int)floor((q + scale / 2) / (double)scale), escaped = abs(u) > t->reach;
                    int symbol = escaped ? t->reach + 1 : u;
                    if (step == 0)
                        list[n++] = (operation){SYMBOL, lane, spec_start(t, symbol), spec_frequency(t, symbol)};
                    else if (step == 1 && !escaped && t->shift > 0)
                        list[n++] = (operation){BITS, lane, (unsigned)t->shift, (unsigned)(q + scale / 2 - u * scale)};
                    else if (step == 2 && escaped)
                        list[n++] = (operation){WORD, lane, (uint16_t)q, 0};
                }
            }
        }
    }
    return n;
}

/* The bytes of a chunk, by undoing the operations from the last one on. */
static size_t spec_encode(const chunk *c, uint8_t *out)
{
    operation *list = malloc((8 * MAX_ROWS * 2 + 1) * sizeof *list);
    uint16_t *words = malloc((8 * MAX_ROWS * 2 + 1) * sizeof *words);
    uint64_t state[LANES];
    size_t n = list_operations(c, list), word_count = 0, size = 0;

    for (unsigned i = 0; i < LANES; i++)
        state[i] = 65536;
    for (size_t i = n; i-- > 0;) {
        operation o = list[i];
        uint64_t x = state[o.lane];
        if (o.kind == WORD) {
            words[word_count++] = (uint16_t)o.a;
            continue;
        }
        /* The decoder's state after this operation must come out below 2^32. */
        for (;;) {
            uint64_t before = o.kind == SYMBOL ? x / o.b * 4096 + x % o.b + o.a : x << o.a | o.b;
            if (before < (uint64_t)1 << 32) {
                state[o.lane] = before;
                break;
            }
            words[word_count++] = (uint16_t)x;
            x >>= 16;
        }
    }
    for (unsigned lane = 0; n > 0 && lane < LANES && lane < c->rows; lane++, size += 4)
        for (int b = 0; b < 4; b++)
            out[size + (size_t)b] = (uint8_t)(state[lane] >> 8 * b);
    for (size_t i = word_count; i-- > 0; size += 2) {
        out[size] = (uint8_t)words[i];
        out[size + 1] = (uint8_t)(words[i] >> 8);
    }
    free(words);
    free(list);
    return size;
}

typedef struct spec_reader {
    uint64_t state[LANES];
    const uint8_t *next, *end;
    int failed;
} spec_reader;

static unsigned spec_word(spec_reader *r)
{
    if (r->end - r->next < 2) {
        r->failed = 1;
        return 0;
    }
    r->next += 2;
    return (unsigned)(r->next[-2] | r->next[-1] << 8);
}

static void spec_refill(spec_reader *r, unsigned lane)
{
    if (r->state[lane] < 65536)
        r->state[lane] = r->state[lane] * 65536 + spec_word(r);
}

static int spec_symbol(spec_reader *r, unsigned lane, const spec_table *t)
{
    unsigned slot = (unsigned)(r->state[lane] % 4096), start = 0;
    int symbol = -t->reach;
    while (slot >= start + spec_frequency(t, symbol))
        start += spec_frequency(t, symbol++);
    r->state[lane] = spec_frequency(t, symbol) * (r->state[lane] / 4096) + slot - start;
    return symbol;
}

static void spec_round(spec_reader *r, const spec_table *t, unsigned lanes, int16_t *q)
{
    int symbol[LANES], scale = 1 << t->shift;
    for (unsigned lane = 0; lane < lanes; lane++)
        symbol[lane] = spec_symbol(r, lane, t);
    for (unsigned lane = 0; lane < lanes; lane++)
        spec_refill(r, lane);
    for (unsigned lane = 0; lane < lanes; lane++) {
        if (symbol[lane] > t->reach)
            continue;
        q[lane] = (int16_t)(symbol[lane] * scale + (int)(r->state[lane] % (unsigned)scale) - scale / 2);
        r->state[lane] /= (unsigned)scale;
    }
    for (unsigned lane = 0; lane < lanes; lane++)
        if (symbol[lane] <= t->reach)
            spec_refill(r, lane);
    for (unsigned lane = 0; lane < lanes; lane++)
        if (symbol[lane] > t->reach)
            q[lane] = (int16_t)spec_word(r);
}

/* 1 when `data` is a valid chunk of c's shape; c->q holds its values. */
static int spec_decode(chunk *c, const uint8_t *data, size_t size)
{
    unsigned lanes = c->rows < LANES ? c->rows : LANES, coded = 0;
    spec_reader r = {{0}, data, data + size, 0};

    for (unsigned i = 0; i < c->components; i++)
        coded += c->tables[i] != 0;
    if (coded == 0 || c->rows == 0)
        return size == 0;
    if (size % 2 != 0 || size < 4 * lanes)
        return 0;
    for (unsigned lane = 0; lane < lanes; lane++) {
        r.state[lane] = spec_word(&r);
        r.state[lane] += (uint64_t)spec_word(&r) << 16;
        r.failed |= r.state[lane] < 65536;
    }
    for (unsigned i = 0; i < c->components; i++)
        for (unsigned first = 0; c->tables[i] != 0 && first < c->rows && !r.failed; first += LANES)
            spec_round(&r, &spec_tables[c->tables[i]], c->rows - first < LANES ? c->rows - first : LANES,
                       c->q[i] + first);
    for (unsigned lane = 0; lane < lanes; lane++)
        r.failed |= r.state[lane] != 65536;
    return !r.failed && r.next == r.end;
}

/* --- Helpers ------------------------------------------------------------------------------------------------------ */

static const xkv_coder *coders[2];

static int set_up(void **state)
{
    (void)state;
    read_spec_tables();
    coders[0] = xkv_coder_cpu_generic();
    coders[1] = xkv_coder_cpu();
    if (coders[0] == coders[1])
        print_message("plain C only: no vector code for this processor, or XKV_CPU=generic\n");
    return 0;
}

static xkv_rans_shape shape_of(const chunk *c)
{
    return (xkv_rans_shape){c->rows, c->components, MAX_ROWS, c->tables};
}

static double sigma_of(unsigned table)
{
    return exp2(-3 + (table - 1) % 60 / 4.0);
}

/* Values that fit `table`, with some at the edges of its reach and some far outside. */
static int16_t random_value(unsigned table, uint64_t *state)
{
    const spec_table *t = &spec_tables[table];
    double x = test_normal(state) * sigma_of(table);
    switch (test_random(state) % 64) {
    case 0:
        x = (int)(test_random(state) % 65535) - 32767;
        break;
    case 1: /* the last value inside or the first one outside */
        x = t->reach * (1 << t->shift) + (1 << t->shift) / 2.0 - (double)(test_random(state) % 2);
        x = test_random(state) % 2 ? x : -x;
        break;
    case 2:
        x = test_random(state) % 2 ? 32767 : -32767;
        break;
    default:
        break;
    }
    return (int16_t)fmin(fmax(rint(x), -32767), 32767);
}

static void fill(chunk *c, uint64_t *state)
{
    for (unsigned i = 0; i < c->components; i++)
        for (unsigned t = 0; t < c->rows; t++)
            c->q[i][t] = c->tables[i] ? random_value(c->tables[i], state) : (int16_t)(7000 + i);
}

/* Encode with one coder into memory of exactly the bound, so that a sanitizer sees what is written outside. */
static size_t encode(const xkv_coder *coder, const chunk *c, uint8_t *data)
{
    xkv_rans_shape s = shape_of(c);
    uint8_t *exact = malloc(xkv_rans_bound(&s) + 1);
    size_t size = xkv_rans_encode(coder, &s, c->q[0], exact);
    assert_true(size <= xkv_rans_bound(&s));
    memcpy(data, exact, size);
    free(exact);
    return size;
}

/* Decode an exact copy; whether it was valid. */
static int decode(const xkv_coder *coder, chunk *c, const uint8_t *data, size_t size)
{
    xkv_rans_shape s = shape_of(c);
    uint8_t *exact = malloc(size + 1);
    memcpy(exact, data, size);
    xkv_status status = xkv_rans_decode(NULL, coder, &s, exact, size, "chunk", c->q[0]);
    free(exact);
    assert_true(status == XKV_OK || status == XKV_ERROR_CORRUPT);
    return status == XKV_OK;
}

#define MAX_BYTES (4 * LANES + 4 * 8 * MAX_ROWS)

/* Every coder writes the bytes of the second implementation, and reads them back, leaving other rows alone. */
static void check_round_trip(const chunk *c)
{
    uint8_t expected[MAX_BYTES], data[MAX_BYTES];
    chunk decoded = *c;
    size_t size = spec_encode(c, expected);

    assert_true(spec_decode(&decoded, expected, size));
    assert_memory_equal(decoded.q, c->q, sizeof c->q);
    for (int k = 0; k < 2; k++) {
        assert_int_equal(encode(coders[k], c, data), size);
        assert_memory_equal(data, expected, size);
        for (unsigned i = 0; i < c->components; i++)
            if (c->tables[i] != 0)
                memset(decoded.q[i], 0x55, c->rows * sizeof(int16_t));
        assert_true(decode(coders[k], &decoded, data, size));
        assert_memory_equal(decoded.q, c->q, sizeof c->q);
    }
}

/* --- Tables ------------------------------------------------------------------------------------------------------- */

static void tables_are_those_of_the_spec(void **state)
{
    (void)state;
    assert_int_equal(XKV_TABLE_MAX, TABLES);
    for (unsigned i = 1; i <= TABLES; i++) {
        xkv_table t = xkv_table_get(i);
        const spec_table *s = &spec_tables[i];
        unsigned sum = s->escape;
        assert_int_equal(t.base->reach, s->reach);
        assert_int_equal(t.base->escape_frequency, s->escape);
        assert_int_equal(t.shift, s->shift);
        for (int u = 0; u <= s->reach; u++) {
            assert_int_equal(t.base->frequency[u], s->f[u]);
            assert_true(s->f[u] >= 1 && (u == 0 || s->f[u] <= s->f[u - 1]));
            sum += (u == 0 ? 1 : 2) * s->f[u];
        }
        assert_true(sum == 4096 && s->escape >= 1);
    }
}

/* x / f for a state x that symbol `s` may meet. */
static void check_quotient(xkv_symbol s, uint64_t x, uint64_t f)
{
    if (x < XKV_RANS_LOW || x >= f << 20)
        return;
    uint64_t quotient = ((x + (s.packed >> 31)) * s.reciprocal >> 32) >> (s.packed >> 24 & 15);
    assert_int_equal(quotient, x / f);
}

/* Errors grow with x and show at multiples of f first. */
static void reciprocals_divide_exactly(void **state)
{
    uint64_t seed = 8;

    (void)state;
    for (unsigned i = 1; i <= TABLES; i++) {
        const xkv_base_table *base = xkv_table_get(i).base;
        for (unsigned j = 0; j <= 2 * base->reach + 1; j++) {
            uint64_t f = 4096 - (base->encode[j].packed >> 12 & 0xfff);
            for (unsigned n = 0; n < 200; n++) {
                uint64_t k = n < 100 ? (1u << 20) - n : test_random(&seed) % (1u << 20);
                check_quotient(base->encode[j], k * f, f);
                check_quotient(base->encode[j], k * f - 1, f);
            }
        }
    }
}

/* Code length of a rounded Gaussian under its table, against its entropy. */
static void gaussian_tables_are_near_the_entropy(void **state)
{
    (void)state;
    for (unsigned i = 1; i <= 28; i++) {
        const spec_table *t = &spec_tables[i];
        double scale = 1 / (sigma_of(i) * sqrt(2)), entropy = 0, length = 0;
        for (int u = -200; u <= 200; u++) {
            double p = (erf((u + 0.5) * scale) - erf((u - 0.5) * scale)) / 2;
            int escaped = abs(u) > t->reach;
            entropy -= p > 1e-18 ? p * log2(p) : 0;
            length += p * (12 - log2(escaped ? t->escape : t->f[abs(u)]) + (escaped ? 16 : 0));
        }
        assert_true(length < entropy * 1.003 + 0.002);
    }
}

static double spec_cost(unsigned table, const int16_t *q, size_t n)
{
    const spec_table *t = &spec_tables[table];
    double bits = 0;
    for (size_t i = 0; i < n; i++) {
        int u = (int)floor((q[i] + (1 << t->shift) / 2) / (double)(1 << t->shift));
        bits += abs(u) > t->reach ? 28 - log2(t->escape) : 12 - log2(t->f[abs(u)]) + t->shift;
    }
    return bits;
}

/* Gaussian, Laplace or sparse values with a wide tail. */
static void random_component(int16_t *q, size_t n, double sigma, unsigned kind, uint64_t *state)
{
    for (size_t i = 0; i < n; i++) {
        double x = test_normal(state);
        if (kind == 1)
            x = (test_random(state) % 2 ? 1 : -1) * log(1 - test_uniform(state)) / sqrt(2);
        if (kind == 2 && test_random(state) % 50 == 0)
            x *= 30;
        q[i] = (int16_t)fmin(fmax(rint(x * sigma), -32767), 32767);
    }
}

static void choice_equals_the_exhaustive_search(void **state)
{
    enum { N = 400 };
    int16_t q[N];
    uint64_t seed = 1;

    (void)state;
    for (unsigned i = 0; i < 1500; i++) {
        double bits, best = INFINITY;
        random_component(q, N, exp2(-4 + i % 240 / 14.0), i % 3, &seed);
        unsigned chosen = xkv_table_choose(q, N, &bits);
        for (unsigned t = 1; t <= TABLES; t++)
            best = fmin(best, spec_cost(t, q, N));
        if (chosen == 0) {
            for (unsigned t = 0; t < N; t++)
                assert_int_equal(q[t], 0);
            assert_true(bits == 0);
            continue;
        }
        assert_true(fabs(bits - spec_cost(chosen, q, N)) < 0.01);
        assert_true(fabs(bits - xkv_table_cost(chosen, q, N)) < 1e-9);
        assert_true(bits <= best * 1.0005 + 0.01);
    }
}

static void choice_takes_extremes(void **state)
{
    int16_t q[100] = {0};
    double bits;

    (void)state;
    assert_int_equal(xkv_table_choose(q, 0, &bits), 0);
    assert_int_equal(xkv_table_choose(q, 100, &bits), 0);
    for (int i = 0; i < 100; i++)
        q[i] = i % 2 ? 32767 : -32767;
    unsigned chosen = xkv_table_choose(q, 100, &bits);
    assert_in_range(chosen, 1, TABLES);
    assert_true(bits < 100 * 28);
    memset(q, 0, sizeof q);
    q[50] = -1;
    assert_int_not_equal(xkv_table_choose(q, 100, &bits), 0);
}

/* --- Quantizer ---------------------------------------------------------------------------------------------------- */

static void quantizer_rounds_to_even(void **state)
{
    const float y[] = {0.25f, 0.75f, -0.25f, -0.75f, 1.25f, 0.74f, -1.0f, 16383.5f, -16383.5f, 0.0f, -0.0f};
    const int16_t expected[] = {0, 2, 0, -2, 2, 1, -2, 32767, -32767, 0, 0};
    enum { N = sizeof y / sizeof *y };
    int16_t q[N];
    float back[N];

    (void)state;
    for (int k = 0; k < 2; k++) {
        assert_true(xkv_quantize(coders[k], y, N, 0.5f, q));
        assert_memory_equal(q, expected, sizeof expected);
        xkv_dequantize(coders[k], q, N, 0.5f, back);
        for (int i = 0; i < N; i++)
            assert_true(back[i] == (float)expected[i] * 0.5f);
    }
}

static void quantizer_refuses_what_does_not_fit(void **state)
{
    const float bad[] = {32767.5f, -32768.0f, 1e9f, -3e38f, INFINITY, -INFINITY, NAN};

    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        for (size_t at = 0; at < 19; at++) {
            float y[19] = {0};
            int16_t q[19];
            y[at] = bad[i];
            for (int k = 0; k < 2; k++)
                assert_false(xkv_quantize(coders[k], y, 19, 1.0f, q));
        }
    }
}

static void quantizers_agree(void **state)
{
    enum { N = 4099 };
    static float y[N], a[N], b[N];
    static int16_t qa[N], qb[N];
    uint64_t seed = 2;

    (void)state;
    for (int i = 0; i < N; i++)
        y[i] = (float)(test_normal(&seed) * exp2((double)(test_random(&seed) % 12)));
    assert_true(xkv_quantize(coders[0], y, N, 0.731f, qa) && xkv_quantize(coders[1], y, N, 0.731f, qb));
    assert_memory_equal(qa, qb, sizeof qa);
    for (int i = 0; i < N; i++)
        assert_true(fabs(y[i] / 0.731f - qa[i]) <= 0.5001);
    xkv_dequantize(coders[0], qa, N, 0.731f, a);
    xkv_dequantize(coders[1], qa, N, 0.731f, b);
    assert_memory_equal(a, b, sizeof a);
}

/* --- rANS --------------------------------------------------------------------------------------------------------- */

/* The example of spec/codec.md, section 8. */
static void worked_example(void **state)
{
    static const uint8_t bytes[] = {0x4d, 0xfb, 0x32, 0x42, 0x3c, 0xe9, 0x6b, 0x00, 0xdd, 0xc0, 0xb9, 0x3a, 0x2c, 0x01};
    chunk c = {.rows = 3, .components = 3, .tables = {13, 0, 29}, .q = {{1, 0, -2}, {0}, {300, -5, 40}}};
    uint8_t data[MAX_BYTES];

    (void)state;
    size_t size = spec_encode(&c, data);
    assert_int_equal(size, sizeof bytes);
    assert_memory_equal(data, bytes, sizeof bytes);
    check_round_trip(&c);
}

static void every_table_round_trips(void **state)
{
    static const unsigned rows[] = {1, 31, 32, 33, 70, 256};
    uint64_t seed = 3;

    (void)state;
    for (unsigned t = 1; t <= TABLES; t++) {
        chunk c = {.rows = rows[t % 6], .components = 2, .tables = {(uint8_t)t, (uint8_t)t}};
        fill(&c, &seed);
        check_round_trip(&c);
    }
}

static void every_row_count_round_trips(void **state)
{
    uint64_t seed = 4;

    (void)state;
    for (unsigned rows = 0; rows <= 70; rows++) {
        chunk c = {.rows = rows, .components = 5};
        for (unsigned i = 0; i < c.components; i++)
            c.tables[i] = (uint8_t)(i == 2 ? 0 : 1 + test_random(&seed) % TABLES);
        fill(&c, &seed);
        check_round_trip(&c);
    }
}

static void nothing_coded_is_empty(void **state)
{
    chunk c = {.rows = 100, .components = 4};
    uint8_t data[MAX_BYTES] = {0};

    (void)state;
    for (int k = 0; k < 2; k++) {
        assert_int_equal(encode(coders[k], &c, data), 0);
        assert_true(decode(coders[k], &c, data, 0));
        assert_false(decode(coders[k], &c, data, 2));
    }
}

/* The longest output there is: every value escapes, from the table with the rarest escape. */
static void escapes_only(void **state)
{
    (void)state;
    for (unsigned t = 1; t <= TABLES; t += 17) {
        chunk c = {.rows = MAX_ROWS, .components = 8};
        for (unsigned i = 0; i < 8; i++) {
            c.tables[i] = (uint8_t)t;
            for (unsigned row = 0; row < MAX_ROWS; row++)
                c.q[i][row] = row % 2 ? 32767 : -32767;
        }
        check_round_trip(&c);
    }
}

static void size_is_within_one_percent(void **state)
{
    enum { COMPONENTS = 300, TOKENS = 1024, CHUNK = 256 };
    int16_t(*q)[TOKENS] = malloc(COMPONENTS * sizeof *q);
    uint8_t tables[COMPONENTS];
    double bits, ideal = 0, states = 0, coded = 0;
    uint64_t seed = 5;

    (void)state;
    for (unsigned i = 0; i < COMPONENTS; i++) {
        random_component(q[i], TOKENS, 50 * pow(0.005, sqrt(i / (double)COMPONENTS)), i % 3, &seed);
        tables[i] = (uint8_t)xkv_table_choose(q[i], TOKENS, &bits);
        ideal += spec_cost(tables[i], q[i], TOKENS);
    }
    for (unsigned t = 0; t < TOKENS; t += CHUNK) {
        xkv_rans_shape s = {CHUNK, COMPONENTS, TOKENS, tables};
        uint8_t *out = malloc(xkv_rans_bound(&s));
        coded += 8 * (double)xkv_rans_encode(coders[1], &s, q[0] + t, out);
        states += 32 * LANES;
        free(out);
    }
    print_message("%.3f bits a symbol, coded %+.3f %%, without the states %+.3f %%\n", ideal / (COMPONENTS * TOKENS),
                  100 * (coded / ideal - 1), 100 * ((coded - states) / ideal - 1));
    assert_true(coded < 1.01 * ideal);
    assert_true(coded > ideal); /* else the ideal length is wrong */
    free(q);
}

/* --- Bad input ---------------------------------------------------------------------------------------------------- */

static chunk sample(unsigned rows)
{
    chunk c = {.rows = rows, .components = 6, .tables = {1, 13, 40, 0, 90, 240}};
    uint64_t seed = 6;
    fill(&c, &seed);
    return c;
}

static void truncation_is_found(void **state)
{
    (void)state;
    for (unsigned rows = 3; rows <= 99; rows += 48) {
        chunk c = sample(rows), decoded = c;
        uint8_t data[MAX_BYTES + 2] = {0};
        size_t size = encode(coders[0], &c, data);
        for (int k = 0; k < 2; k++) {
            for (size_t cut = 0; cut < size; cut++)
                assert_false(decode(coders[k], &decoded, data, cut));
            assert_false(decode(coders[k], &decoded, data, size + 1));
            assert_false(decode(coders[k], &decoded, data, size + 2));
            assert_true(decode(coders[k], &decoded, data, size));
        }
    }
}

/* All implementations say the same about `data`. */
static int check_agreement(const chunk *c, const uint8_t *data, size_t size)
{
    chunk expected = *c;
    int valid = spec_decode(&expected, data, size);
    for (int k = 0; k < 2; k++) {
        chunk decoded = *c;
        assert_int_equal(decode(coders[k], &decoded, data, size), valid);
        if (valid)
            assert_memory_equal(decoded.q, expected.q, sizeof expected.q);
    }
    return valid;
}

/* A flip in an escaped value, in low bits, or between symbols of equal frequency leaves the states as they were: it is
 * for the checksum of the part. No implementation takes it for the same values. */
static void bit_flips_are_found(void **state)
{
    chunk c = sample(99), decoded = c;
    uint8_t data[MAX_BYTES];
    size_t size = encode(coders[0], &c, data), unseen = 0;

    (void)state;
    for (size_t bit = 0; bit < 8 * size; bit++) {
        data[bit / 8] ^= (uint8_t)(1 << bit % 8);
        if (check_agreement(&c, data, size)) {
            assert_true(decode(coders[0], &decoded, data, size));
            assert_memory_not_equal(decoded.q, c.q, sizeof c.q);
            unseen++;
        }
        data[bit / 8] ^= (uint8_t)(1 << bit % 8);
    }
    assert_true(unseen < 8 * size / 2); /* the last two tables hold 9 low bits of some 18 */
}

static void garbage_is_refused(void **state)
{
    uint64_t seed = 7;
    uint8_t data[MAX_BYTES];

    (void)state;
    for (unsigned i = 0; i < 3000; i++) {
        chunk c = {.rows = 1 + (unsigned)(test_random(&seed) % MAX_ROWS), .components = 8};
        size_t size = test_random(&seed) % (sizeof data - 1);
        for (unsigned j = 0; j < 8; j++)
            c.tables[j] = (uint8_t)(test_random(&seed) % (TABLES + 1));
        for (size_t j = 0; j < size; j++)
            data[j] = (uint8_t)(test_random(&seed) | (j < 128 && j % 4 == 2));
        assert_false(check_agreement(&c, data, size));
    }
}

static void unknown_table_is_refused(void **state)
{
    chunk c = sample(64);
    uint8_t data[MAX_BYTES];
    size_t size = encode(coders[0], &c, data);

    (void)state;
    for (unsigned t = TABLES + 1; t <= 255; t++) {
        c.tables[4] = (uint8_t)t;
        assert_false(decode(coders[0], &c, data, size));
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tables_are_those_of_the_spec),
        cmocka_unit_test(reciprocals_divide_exactly),
        cmocka_unit_test(gaussian_tables_are_near_the_entropy),
        cmocka_unit_test(choice_equals_the_exhaustive_search),
        cmocka_unit_test(choice_takes_extremes),
        cmocka_unit_test(quantizer_rounds_to_even),
        cmocka_unit_test(quantizer_refuses_what_does_not_fit),
        cmocka_unit_test(quantizers_agree),
        cmocka_unit_test(worked_example),
        cmocka_unit_test(every_table_round_trips),
        cmocka_unit_test(every_row_count_round_trips),
        cmocka_unit_test(nothing_coded_is_empty),
        cmocka_unit_test(escapes_only),
        cmocka_unit_test(size_is_within_one_percent),
        cmocka_unit_test(truncation_is_found),
        cmocka_unit_test(bit_flips_are_found),
        cmocka_unit_test(garbage_is_refused),
        cmocka_unit_test(unknown_table_is_refused),
    };
    return cmocka_run_group_tests(tests, set_up, NULL);
}
