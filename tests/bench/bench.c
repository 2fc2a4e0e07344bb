/* bench.c - prints one JSON document about the speed of libxkv on this machine: see usage() and README.md. */
#include "bench.h"
#include "synthetic.h"

#include "xkv/kernels.h"

#include <errno.h>
#include <getopt.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* --- Helpers ------------------------------------------------------------------------------------------------------ */

_Noreturn void bench_die(const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    (void)fputs("xkv_bench: ", stderr);
    (void)vfprintf(stderr, fmt, args);
    (void)fputc('\n', stderr);
    va_end(args);
    exit(1);
}

void *bench_alloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size);

    if (!p)
        bench_die("no memory for %zu x %zu bytes", count, size);
    return p;
}

json_t *bench_json(json_t *value)
{
    if (!value)
        bench_die("jansson: no memory, or a number that JSON cannot hold");
    return value;
}

static void print_log(void *user, xkv_log_level level, const char *message)
{
    (void)user;
    if (level <= XKV_LOG_WARNING)
        (void)fprintf(stderr, "xkv_bench: %s\n", message);
}

xkv_ctx *bench_context(uint32_t threads)
{
    xkv_ctx_options o = xkv_ctx_options_default();
    xkv_ctx *ctx;

    o.threads = threads;
    o.log = print_log;
    if (xkv_ctx_create(&o, &ctx) != XKV_OK)
        bench_die("cannot create a context");
    return ctx;
}

void bench_try(const xkv_ctx *ctx, xkv_status status, const char *what)
{
    if (status != XKV_OK)
        bench_die("%s: %s: %s", what, xkv_status_string(status), xkv_ctx_error(ctx));
}

double bench_now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, compare_doubles);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

void bench_goal(bench_plan *plan, const char *what, uint32_t threads, double limit, bool at_least, double found)
{
    json_array_append_new(plan->goals,
                          bench_json(json_pack("{s:s, s:i, s:f, s:f, s:b}", "goal", what, "threads", (int)threads,
                                               at_least ? "at_least" : "at_most", limit, "found", found, "met",
                                               at_least ? found >= limit : found <= limit)));
}

/* --- Threads ------------------------------------------------------------------------------------------------------ */

typedef struct share {
    bench_task_fn task;
    void *user;
    uint32_t worker;
    pthread_t thread;
} share;

static void *run_share(void *arg)
{
    share *s = arg;

    s->task(s->user, s->worker);
    return NULL;
}

void bench_parallel(uint32_t threads, bench_task_fn task, void *user)
{
    share *shares = bench_alloc(threads, sizeof *shares);

    for (uint32_t i = 1; i < threads; i++) {
        shares[i] = (share){.task = task, .user = user, .worker = i};
        if (pthread_create(&shares[i].thread, NULL, run_share, &shares[i]) != 0)
            bench_die("cannot start a thread");
    }
    task(user, 0);
    for (uint32_t i = 1; i < threads; i++)
        pthread_join(shares[i].thread, NULL);
    free(shares);
}

/* --- Machine ------------------------------------------------------------------------------------------------------ */

static void cpu_model(char *text, size_t size)
{
    FILE *f = fopen("/proc/cpuinfo", "r");
    char line[256], *colon;

    (void)snprintf(text, size, "unknown");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "model name", 10) == 0 && (colon = strchr(line, ':'))) {
            (void)snprintf(text, size, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
            break;
        }
    if (f)
        (void)fclose(f);
}

static json_t *machine(void)
{
    char cpu[200], date[32];
    time_t now = time(NULL);
    struct tm utc;
    double load[1] = {-1};

    cpu_model(cpu, sizeof cpu);
    (void)strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &utc));
    (void)getloadavg(load, 1); /* anything near 1 spoils the figures */
    return bench_json(json_pack("{s:s, s:i, s:s, s:s, s:s, s:s, s:s, s:s, s:f}", "cpu", cpu, "cores",
                                (int)sysconf(_SC_NPROCESSORS_ONLN), "compiler", XKV_BENCH_COMPILER, "build",
                                XKV_BENCH_BUILD_TYPE, "blas", xkv_kernels_blas_name(), "kernels",
                                xkv_kernels_cpu_name(), "xkv", xkv_version(), "date", date, "load_average", load[0]));
}

/* --- Synthetic cases ---------------------------------------------------------------------------------------------- */

/* One group of 4 layers, K and V. */
typedef struct svd_case {
    uint32_t heads, head_dim, rank_k, rank_v, tokens;
} svd_case;

typedef struct in_memory {
    synthetic source;
    uint8_t *data;
    xkv_view *views;
    bench_subject subject;
    char name[96];
} in_memory;

static void make_in_memory(in_memory *m, const svd_case *c, uint32_t tokens, synthetic_spectrum spectrum)
{
    m->source = synthetic_create(tokens, 4, c->heads, c->head_dim);
    m->data = bench_alloc((size_t)xkv_geometry_raw_bytes(&m->source.geometry), 1);
    m->views = bench_alloc(m->source.geometry.plane_count, sizeof *m->views);
    bench_contiguous_views(&m->source.geometry, m->data, m->views);
    synthetic_fill(&m->source, 4, spectrum, m->views);
    (void)snprintf(m->name, sizeof m->name, "synthetic %s, 4 layers x %u", synthetic_spectrum_name(spectrum),
                   c->heads * c->head_dim);
    m->subject = bench_subject_create(m->name, &m->source.geometry, m->views);
}

static void free_in_memory(in_memory *m)
{
    bench_subject_free(&m->subject);
    synthetic_free(&m->source);
    free(m->data);
    free(m->views);
}

static void measure_case(bench_plan *plan, const svd_case *c, json_t *lossless, json_t *svd, json_t *destinations)
{
    in_memory m;

    make_in_memory(&m, c, plan->tokens ? plan->tokens : c->tokens, SYNTHETIC_ROOT);
    for (int i = 0; i < plan->thread_counts; i++) {
        json_array_append_new(lossless, bench_lossless(plan, &m.subject, plan->threads[i]));
        for (uint32_t q = 1; q <= 2; q++)
            json_array_append_new(svd, bench_svd(plan, &m.subject, c->rank_k, c->rank_v, q, plan->threads[i]));
        for (int coded = 0; coded < 2; coded++)
            json_array_append_new(destinations, bench_destinations(plan, &m.subject,
                                                                   coded ? XKV_PROFILE_SCALAR : XKV_PROFILE_LOSSLESS,
                                                                   plan->threads[i]));
    }
    free_in_memory(&m);
}

static void measure_cases(bench_plan *plan, json_t *lossless, json_t *svd, json_t *destinations)
{
    static const svd_case full[2] = {{3, 64, 76, 115, 16384}, {8, 128, 512, 768, 16384}}, quick = {1, 64, 25, 38, 512};

    if (plan->quick) {
        measure_case(plan, &quick, lossless, svd, destinations);
        return;
    }
    measure_case(plan, &full[0], lossless, svd, destinations);
    measure_case(plan, &full[1], lossless, svd, destinations);
}

/* --- Files -------------------------------------------------------------------------------------------------------- */

/* The paper's share of the row of a group of 4 layers: a tenth for K, 15 % for V. */
static uint32_t group_width(const xkv_geometry *geometry, uint32_t kind)
{
    for (uint32_t i = 0; i < geometry->plane_count; i++)
        if (geometry->planes[i].kind == kind)
            return 4 * geometry->planes[i].heads * geometry->planes[i].head_dim;
    return 0;
}

static json_t *measure_file(bench_plan *plan, const char *path, const xkv_model *model, const xkv_dict *dict)
{
    xkv_ctx *ctx = bench_context(1);
    xkv_cache *cache;
    bench_subject s;
    json_t *all = bench_json(json_array());
    const char *name = strrchr(path, '/');
    uint32_t k, v;

    bench_try(ctx, xkv_cache_open(ctx, path, model, &cache), path);
    if (xkv_cache_geometry(cache)->plane_count == 0)
        bench_die("%s: not a cache that this version understands", path);
    if (plan->query_heads > 0) {
        json_decref(all);
        all = bench_attention(plan, &(bench_attention_case){name ? name + 1 : path, xkv_cache_geometry(cache),
                                                            xkv_cache_views(cache), dict, plan->query_heads});
        xkv_cache_free(ctx, cache);
        xkv_ctx_free(ctx);
        return all;
    }
    s = bench_subject_create(name ? name + 1 : path, xkv_cache_geometry(cache), xkv_cache_views(cache));
    k = group_width(s.geometry, XKV_PLANE_K);
    k = k ? k : group_width(s.geometry, XKV_PLANE_LATENT);
    v = group_width(s.geometry, XKV_PLANE_V);
    if (plan->restore && dict)
        json_array_append_new(all, bench_restore(plan, &s, dict));
    for (int i = 0; i < plan->thread_counts && !plan->restore; i++) {
        json_array_append_new(all, bench_lossless(plan, &s, plan->threads[i]));
        json_array_append_new(all, bench_svd(plan, &s, k / 10, (v ? v : k) * 15 / 100, 2, plan->threads[i]));
        if (dict)
            json_array_append_new(all, bench_dict(plan, &s, dict, 16, plan->threads[i]));
    }
    bench_subject_free(&s);
    xkv_cache_free(ctx, cache);
    xkv_ctx_free(ctx);
    return all;
}

static xkv_model *load_model(xkv_ctx *ctx, const char *path)
{
    xkv_model *model;

    bench_try(ctx, xkv_model_from_gguf(ctx, path, NULL, &model), path);
    return model;
}

static xkv_dict *load_dict(xkv_ctx *ctx, const char *path)
{
    xkv_input input;
    xkv_dict *dict;

    bench_try(ctx, xkv_input_open(ctx, path, &input), path);
    bench_try(ctx, xkv_dict_open(ctx, &input, 1, &dict), path);
    xkv_input_close(ctx, &input);
    return dict;
}

/* --- Command line ------------------------------------------------------------------------------------------------- */

static void usage(FILE *out)
{
    (void)fputs("usage: xkv_bench [--quick] [--only-files] [--restore] [--tokens N] [--threads N] [--repeats N]\n"
                "                 [[--model GGUF] [--dict XKVD] FILE...]\n"
                "Prints one JSON document: machine, ceilings, lossless and svd speed and attention on synthetic\n"
                "caches, scaling over 1k .. 32k tokens, and the same figures for each engine file given.\n"
                "  --quick      tiny sizes, once: tells whether the benchmark works, not how fast anything is\n"
                "  --only-files the ceilings and the engine files alone\n"
                "  --restore    of the engine files: restoring 256 .. 32k tokens from a file, with the dictionary\n"
                "  --tokens N   tokens of the synthetic caches; with --restore, the most\n"
                "  --threads N  largest number of threads (default: processors online)\n"
                "  --repeats N  each time is the median of N (default 3)\n"
                "  --model GGUF the model of the files that follow\n"
                "  --dict XKVD  its dictionary: pack these files with it to 16x as well\n"
                "  --attend N   measure attention of N query heads over these files, and nothing else\n"
                "  --json       accepted; there is no other output\n",
                out);
}

static uint32_t number(const char *text, uint32_t largest)
{
    char *end;
    unsigned long n;

    errno = 0;
    n = strtoul(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || n < 1 || n > largest)
        bench_die("expected a number, 1 .. %u, found '%s'", largest, text);
    return (uint32_t)n;
}

/* Files, models and dictionaries, in the order given; everything else into the plan. */
typedef struct argument {
    enum { ARGUMENT_FILE, ARGUMENT_MODEL, ARGUMENT_DICT } kind;
    const char *path;
} argument;

static int parse(int argc, char **argv, bench_plan *plan, argument *arguments)
{
    static const struct option options[] = {
        {"quick", no_argument, NULL, 'q'},         {"only-files", no_argument, NULL, 'o'},
        {"restore", no_argument, NULL, 'R'},       {"json", no_argument, NULL, 'j'},
        {"tokens", required_argument, NULL, 't'},  {"threads", required_argument, NULL, 'T'},
        {"repeats", required_argument, NULL, 'r'}, {"model", required_argument, NULL, 'm'},
        {"dict", required_argument, NULL, 'd'},    {"attend", required_argument, NULL, 'a'},
        {"help", no_argument, NULL, 'h'},          {NULL, 0, NULL, 0}};
    int c, count = 0;

    while ((c = getopt_long(argc, argv, "-h", options, NULL)) != -1) {
        if (c == 'q')
            plan->quick = true;
        else if (c == 'o')
            plan->only_files = true;
        else if (c == 'R')
            plan->only_files = plan->restore = true;
        else if (c == 't')
            plan->tokens = number(optarg, 1u << 20);
        else if (c == 'T')
            plan->threads[1] = number(optarg, 1024);
        else if (c == 'a')
            plan->query_heads = number(optarg, 1024);
        else if (c == 'r')
            plan->repeats = (int)number(optarg, 99);
        else if (c == 'm' || c == 'd' || c == 1)
            arguments[count++] = (argument){c == 'm'   ? ARGUMENT_MODEL
                                            : c == 'd' ? ARGUMENT_DICT
                                                       : ARGUMENT_FILE,
                                            optarg};
        else if (c != 'j') {
            usage(c == 'h' ? stdout : stderr);
            exit(c == 'h' ? 0 : 1);
        }
    }
    for (; optind < argc; optind++)
        arguments[count++] = (argument){ARGUMENT_FILE, argv[optind]};
    return count;
}

static json_t *measure_files(bench_plan *plan, const argument *arguments, int count)
{
    xkv_ctx *ctx = bench_context(1);
    xkv_model *model = NULL;
    xkv_dict *dict = NULL;
    json_t *all = bench_json(json_array());

    for (int i = 0; i < count; i++) {
        const char *path = arguments[i].path;
        if (arguments[i].kind == ARGUMENT_MODEL) {
            xkv_model_free(ctx, model);
            xkv_dict_close(ctx, dict);
            dict = NULL;
            model = load_model(ctx, path);
        } else if (arguments[i].kind == ARGUMENT_DICT) {
            xkv_dict_close(ctx, dict);
            dict = load_dict(ctx, path);
        } else {
            json_array_extend(all, measure_file(plan, path, model, dict));
        }
    }
    xkv_model_free(ctx, model);
    xkv_dict_close(ctx, dict);
    xkv_ctx_free(ctx);
    return all;
}

static json_t *measure_all(bench_plan *plan, const argument *arguments, int count)
{
    json_t *description = machine();                                                     /* with the load before ours */
    json_t *scaling = plan->only_files ? bench_json(json_array()) : bench_scaling(plan); /* while we are small */
    json_t *ceilings = bench_ceilings(plan), *lossless = bench_json(json_array()), *svd = bench_json(json_array());
    json_t *attention = plan->only_files ? bench_json(json_array()) : bench_attention_synthetic(plan);
    json_t *files, *destinations = bench_json(json_array());

    if (!plan->only_files)
        measure_cases(plan, lossless, svd, destinations);
    files = measure_files(plan, arguments, count);
    return bench_json(json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "benchmark", "xkv", "machine",
                                description, "ceilings", ceilings, "lossless", lossless, "svd", svd, "destinations",
                                destinations, "scaling", scaling, "attention", attention, "files", files, "goals",
                                plan->goals));
}

int main(int argc, char **argv)
{
    bench_plan plan = {.repeats = 0, .goals = bench_json(json_array())};
    argument *arguments = bench_alloc((size_t)argc, sizeof *arguments);
    int count = parse(argc, argv, &plan, arguments);
    json_t *document;

    plan.threads[0] = 1;
    if (plan.threads[1] == 0)
        plan.threads[1] = (uint32_t)sysconf(_SC_NPROCESSORS_ONLN);
    plan.thread_counts = plan.threads[1] > 1 ? 2 : 1;
    if (plan.repeats == 0)
        plan.repeats = plan.quick ? 1 : 3;
    document = measure_all(&plan, arguments, count);
    if (json_dumpf(document, stdout, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) != 0 || fputc('\n', stdout) == EOF ||
        fflush(stdout) != 0)
        bench_die("cannot write to standard output");
    json_decref(document);
    free(arguments);
    return 0;
}
