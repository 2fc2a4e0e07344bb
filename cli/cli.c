/* cli.c - the frame of a tool: options, signals, messages, progress. */
#include "cli.h"

#include "xkv/kernels.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t interrupted;
static xkv_ctx *interrupt_ctx; /* set before the handler is armed, cleared after it is disarmed */

/* --- Text --------------------------------------------------------------------------------------------------------- */

void cli_printable(char *dst, size_t dst_size, const char *src)
{
    size_t n = 0;
    for (; *src != '\0' && n + 5 <= dst_size; src++) {
        unsigned char byte = (unsigned char)*src;
        if (byte < 0x20 || byte == 0x7f)
            n += (size_t)snprintf(dst + n, dst_size - n, "\\x%02x", byte);
        else
            dst[n++] = *src;
    }
    dst[n] = '\0';
}

cli_text cli_size_text(uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    cli_text t;
    double value = (double)bytes;
    size_t unit = 0;
    for (; value >= 1024 && unit + 1 < sizeof units / sizeof *units; unit++)
        value /= 1024;
    snprintf(t.text, sizeof t.text, unit == 0 ? "%.0f %s" : value < 100 ? "%.2f %s" : "%.1f %s", value, units[unit]);
    return t;
}

cli_text cli_hex_text(const uint8_t *bytes, size_t size)
{
    cli_text t = {""};
    for (size_t i = 0; i < size && 2 * i + 3 <= sizeof t.text; i++)
        snprintf(t.text + 2 * i, 3, "%02x", bytes[i]);
    return t;
}

double cli_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- Messages ------------------------------------------------------------------------------------------------------
 */

static void print_message(cli *c, const char *format, va_list args)
{
    char raw[sizeof c->last_error];
    vsnprintf(raw, sizeof raw, format, args);
    cli_printable(c->last_error, sizeof c->last_error, raw);
    cli_progress_end(c);
    fprintf(stderr, "%s: %s\n", c->tool->name, c->last_error);
}

void cli_error(cli *c, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    print_message(c, format, args);
    va_end(args);
}

void cli_note(cli *c, const char *format, ...)
{
    va_list args;
    if (c->verbosity < 1)
        return;
    va_start(args, format);
    print_message(c, format, args);
    va_end(args);
}

static cli_exit exit_code(xkv_status status)
{
    switch (status) {
    case XKV_OK:
        return CLI_OK;
    case XKV_ERROR_ARGUMENT:
        return CLI_USAGE;
    case XKV_ERROR_FORMAT:
    case XKV_ERROR_VERSION:
    case XKV_ERROR_FEATURE:
    case XKV_ERROR_CORRUPT:
    case XKV_ERROR_CHECKSUM:
    case XKV_ERROR_TRUNCATED:
        return CLI_BAD_INPUT;
    case XKV_ERROR_MISMATCH:
        return CLI_MISMATCH;
    case XKV_ERROR_TARGET:
        return CLI_TARGET;
    case XKV_ERROR_LIMIT:
    case XKV_ERROR_MEMORY:
        return CLI_LIMIT;
    case XKV_ERROR_CANCELLED:
        return CLI_INTERRUPTED;
    case XKV_ERROR_NOT_FOUND:
        return CLI_MISS;
    case XKV_ERROR_UNSUPPORTED:
    case XKV_ERROR_IO:
    case XKV_ERROR_EXISTS:
    case XKV_ERROR_NO_SPACE:
    case XKV_ERROR_TIMEOUT:
    case XKV_ERROR_BACKEND:
    case XKV_ERROR_INTERNAL:
        break;
    }
    return CLI_FAILED;
}

/* The library begins some details with the name of the file, which the message has already. */
static const char *without_name(const char *detail, const char *name)
{
    size_t n = strlen(name);
    if (strncmp(detail, name, n) == 0 && strncmp(detail + n, ": ", 2) == 0)
        return detail + n + 2;
    if (strncmp(detail, "/dev/fd/", 8) == 0 && strstr(detail, ": ") != NULL)
        return strstr(detail, ": ") + 2;
    return detail;
}

cli_exit cli_fail(cli *c, const char *name, xkv_status status)
{
    const char *detail = without_name(xkv_ctx_error(c->ctx), name);
    if (status == XKV_ERROR_CANCELLED)
        cli_error(c, "%s: interrupted", name);
    else if (status == XKV_ERROR_EXISTS)
        cli_error(c, "%s: already exists; use -f to overwrite it", name);
    else if (detail[0] != '\0')
        cli_error(c, "%s: %s: %s", name, xkv_status_string(status), detail);
    else
        cli_error(c, "%s: %s", name, xkv_status_string(status));
    return exit_code(status);
}

cli_exit cli_fail_errno(cli *c, const char *name, const char *what)
{
    int code = errno;
    if (code == EINTR && interrupted)
        return cli_fail(c, name, XKV_ERROR_CANCELLED);
    cli_error(c, "%s: %s: %s", name, what, strerror(code));
    return CLI_FAILED;
}

static void on_log(void *user, xkv_log_level level, const char *message)
{
    cli *c = user;
    /* Errors come back as a status and are reported with the file's name. */
    if (c->verbosity >= (level == XKV_LOG_ERROR ? 2 : (int)level - 1))
        cli_error(c, "%s", message);
}

int cli_progress(void *user, uint64_t done, uint64_t total)
{
    cli *c = user;
    double now = cli_seconds();
    if (c->verbosity < 1 || c->progress_name == NULL || !isatty(STDERR_FILENO) || now - c->progress_time < 1.0 / 6)
        return 0;
    char name[64];
    cli_printable(name, sizeof name, c->progress_name);
    int percent = total == 0 ? 100 : (int)(100 * (double)done / (double)total);
    static const char bar[] = "####################";
    fprintf(stderr, "\r\033[K%s  [%-20.*s] %3d %% of %s", name, percent / 5, bar, percent, cli_size_text(total).text);
    c->progress_shown = true;
    c->progress_time = now;
    return 0;
}

void cli_progress_end(cli *c)
{
    if (c->progress_shown)
        fputs("\r\033[K", stderr);
    c->progress_shown = false;
}

void cli_json_print(json_t *object)
{
    json_dumpf(object, stdout, JSON_COMPACT | JSON_REAL_PRECISION(9));
    putchar('\n');
    fflush(stdout);
    json_decref(object);
}

json_t *cli_json_string(const char *text)
{
    json_t *value = json_string(text); /* NULL when it is not UTF-8 */
    if (value != NULL)
        return value;
    size_t size = 4 * strlen(text) + 1;
    char *visible = malloc(size);
    if (visible == NULL)
        return NULL;
    size_t n = 0;
    for (; *text != '\0'; text++)
        n += (size_t)snprintf(visible + n, size - n, (unsigned char)*text < 0x80 ? "%c" : "\\x%02x",
                              (unsigned char)*text);
    value = json_string(visible);
    free(visible);
    return value;
}

/* --- Option values -------------------------------------------------------------------------------------------------
 */

/* The factor of a suffix (1 for none), 0 for an unknown one. */
static uint64_t suffix_factor(const char *suffix)
{
    static const char letters[] = "KMGT";
    if (suffix[0] == '\0')
        return 1;
    const char *letter = strchr(letters, toupper((unsigned char)suffix[0]));
    if (letter == NULL || (suffix[1] != '\0' && strcmp(suffix + 1, "B") != 0 && strcmp(suffix + 1, "iB") != 0))
        return 0;
    return (uint64_t)1 << 10 * (letter - letters + 1);
}

bool cli_parse_u64(cli *c, const char *option, const char *text, uint64_t min, uint64_t max, uint64_t *value)
{
    char *end;
    errno = 0;
    unsigned long long number = strtoull(text, &end, 10);
    uint64_t factor = suffix_factor(end);
    uint64_t product;
    /* strtoull takes a sign, which wraps around. */
    if (errno != 0 || !isdigit((unsigned char)text[0]) || factor == 0 ||
        __builtin_mul_overflow((uint64_t)number, factor, &product) || product < min || product > max) {
        if (max == UINT64_MAX)
            cli_error(c, "%s: '%s' is not a number of bytes", option, text);
        else
            cli_error(c, "%s: '%s' is not a number from %" PRIu64 " to %" PRIu64, option, text, min, max);
        return false;
    }
    *value = product;
    return true;
}

bool cli_parse_u32(cli *c, const char *option, const char *text, uint32_t min, uint32_t max, uint32_t *value)
{
    uint64_t wide;
    if (!cli_parse_u64(c, option, text, min, max, &wide))
        return false;
    *value = (uint32_t)wide;
    return true;
}

bool cli_parse_double(cli *c, const char *option, const char *text, double min, double max, double *value)
{
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end != '\0' || !(number > min && number < max)) {
        cli_error(c, "%s: '%s' is not a number above %g and below %g", option, text, min, max);
        return false;
    }
    *value = number;
    return true;
}

bool cli_parse_quality(cli *c, const char *option, const char *text, double *value)
{
    char *end;
    double number = strtod(text, &end);
    if (end == text || *end != '\0' || !(number >= 1 && number <= 100)) {
        cli_error(c, "%s: '%s' is not a number from 1 to 100", option, text);
        return false;
    }
    *value = number;
    return true;
}

bool cli_parse_choice(cli *c, const char *option, const char *text, const char *const *names, uint32_t *value)
{
    char list[128] = "";
    for (uint32_t i = 0; names[i] != NULL; i++) {
        size_t n = strlen(list);
        if (strcmp(text, names[i]) == 0) {
            *value = i;
            return true;
        }
        snprintf(list + n, sizeof list - n, "%s%s", i == 0 ? "" : ", ", names[i]);
    }
    cli_error(c, "%s: '%s' is not one of %s", option, text, list);
    return false;
}

bool cli_parse_hex16(cli *c, const char *option, const char *text, uint8_t bytes[16])
{
    static const char digits[] = "0123456789abcdef";
    uint8_t parsed[16] = {0};
    size_t n = 0;
    for (; n < 32 && text[n] != '\0'; n++) {
        const char *digit = strchr(digits, tolower((unsigned char)text[n]));
        if (digit == NULL)
            break;
        parsed[n / 2] = (uint8_t)(parsed[n / 2] << 4 | (digit - digits));
    }
    if (n != 32 || text[n] != '\0') {
        cli_error(c, "%s: '%s' is not 32 hexadecimal digits", option, text);
        return false;
    }
    memcpy(bytes, parsed, sizeof parsed);
    return true;
}

/* --- Models --------------------------------------------------------------------------------------------------------
 */

void cli_model_mark(const cli *c, xkv_model *model)
{
    if (!c->has_fingerprint)
        return;
    memcpy(model->fingerprint, c->fingerprint, sizeof model->fingerprint);
    model->has_fingerprint = 1;
}

cli_exit cli_model_load(cli *c, const xkv_rope_options *rope, xkv_model **model_p)
{
    if (c->model_path == NULL)
        return CLI_OK;
    xkv_status status = xkv_model_from_gguf(c->ctx, c->model_path, rope, model_p);
    if (status != XKV_OK)
        return cli_fail(c, c->model_path, status);
    cli_model_mark(c, *model_p);
    return CLI_OK;
}

const xkv_model *cli_model_bare(const cli *c, xkv_model *bare)
{
    memset(bare, 0, sizeof *bare);
    cli_model_mark(c, bare);
    return c->has_fingerprint ? bare : NULL;
}

/* --- The frame -----------------------------------------------------------------------------------------------------
 */

static void on_signal(int number)
{
    (void)number;
    interrupted = 1;
    xkv_ctx_cancel(interrupt_ctx);
}

/* Without SA_RESTART, so that a read from a pipe ends. A signal that the caller ignores (nohup) stays ignored. */
static void catch_signals(void (*handler)(int))
{
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP};
    struct sigaction action, old;
    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_handler = handler;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (sigaction(numbers[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            sigaction(numbers[i], &action, NULL);
    }
}

static void print_help(const cli_tool *tool)
{
    printf("%s\n\n%s", tool->usage, tool->help);
}

static bool take_common_option(cli *c, int option, const char *value)
{
    switch (option) {
    case 'q':
        c->verbosity -= c->verbosity > 0;
        return true;
    case 'v':
        c->verbosity++;
        return true;
    case 'T':
        return cli_parse_u32(c, "--threads", value, 0, 1024, &c->threads);
    case 'M':
        return cli_parse_u64(c, "--memory", value, 0, UINT64_MAX, &c->memory_limit);
    case 'o':
        c->output = value;
        return true;
    case 'f':
        c->force = true;
        return true;
    case 'c':
        c->to_stdout = true;
        return true;
    case 'k':
        c->remove = false;
        return true;
    case 'D':
        c->dict_path = value;
        c->dict_given = true;
        return true;
    case CLI_OPT_RM:
        c->remove = true;
        return true;
    case CLI_OPT_JSON:
        c->json = true;
        return true;
    case CLI_OPT_MODEL:
        c->model_path = value;
        return true;
    case CLI_OPT_FINGERPRINT:
        c->has_fingerprint = true;
        return cli_parse_hex16(c, "--fingerprint", value, c->fingerprint);
    default:
        return c->tool->option != NULL && c->tool->option(c, option, value);
    }
}

/* OpenBLAS runs its oldest kernels on processors newer than itself. */
static bool blas_is_slow(void)
{
    return strncmp(xkv_kernels_cpu_name(), "avx", 3) == 0 && strstr(xkv_kernels_blas_name(), "Prescott") != NULL;
}

/* Version, and what does the arithmetic here. */
static void print_version(const cli_tool *tool)
{
    xkv_backend_info backend;
    xkv_backend_get_info(&backend);
    printf("%s %s\n", tool->name, xkv_version());
    printf("CPU: %s, %s\n", xkv_kernels_cpu_name(), xkv_kernels_blas_name());
    if (blas_is_slow())
        printf("     OpenBLAS does not know this processor: set OPENBLAS_CORETYPE=Haswell, which is several times as "
               "fast\n");
    if (backend.device_count > 0)
        printf("CUDA: %u device%s\n", backend.device_count, backend.device_count == 1 ? "" : "s");
    else
        printf("CUDA: not used, %s\n", backend.reason);
}

/* False with *code set when there is nothing more to do. */
static bool parse_options(cli *c, int argc, char **argv, cli_exit *code)
{
    const cli_tool *tool = c->tool;
    char name[32];
    snprintf(name, sizeof name, "%s", tool->name);
    argv[0] = name; /* getopt_long() begins its messages with it */
    for (;;) {
        int option = getopt_long(argc, argv, tool->letters, tool->options, NULL);
        if (option == -1)
            return true;
        *code = CLI_OK;
        if (option == 'h') {
            print_help(tool);
            return false;
        }
        if (option == 'V') {
            print_version(tool);
            return false;
        }
        *code = CLI_USAGE;
        if (option == '?' || !take_common_option(c, option, optarg))
            return false;
    }
}

static bool check_options(cli *c)
{
    bool to_stdout = c->to_stdout || (c->output != NULL && strcmp(c->output, "-") == 0);
    const char *problem = NULL;
    if (c->to_stdout && c->output != NULL)
        problem = "-c and -o exclude each other";
    else if (c->tool->process_all == NULL && c->input_count > 1 && (to_stdout || c->output != NULL))
        problem = "-o and -c take one input";
    else if (c->json && to_stdout)
        problem = "--json and -c both write to standard output";
    else if (c->remove && to_stdout)
        problem = "--rm does not go with standard output";
    if (problem != NULL) {
        cli_error(c, "%s", problem);
        return false;
    }
    return c->tool->check == NULL || c->tool->check(c);
}

/* A failure as JSON too where that is asked for. */
static cli_exit finish_file(cli *c, const char *path, cli_exit code)
{
    cli_progress_end(c);
    if (code != CLI_OK && c->json && !c->reported)
        cli_json_print(json_pack("{s:o, s:b, s:i, s:o}", "file", cli_json_string(path), "ok", 0, "exit_code", (int)code,
                                 "message", cli_json_string(c->last_error)));
    return code;
}

static cli_exit process_file(cli *c, const char *path)
{
    c->progress_name = strcmp(path, "-") == 0 ? "stdin" : path;
    return finish_file(c, path, c->tool->process(c, path));
}

static cli_exit process_together(cli *c, int count, char **paths)
{
    const char *subject = c->subject != NULL ? c->subject : c->output;
    c->progress_name = subject;
    cli_exit code = finish_file(c, subject, c->tool->process_all(c, (uint32_t)count, paths));
    return interrupted ? CLI_INTERRUPTED : code;
}

static cli_exit process_files(cli *c, int count, char **paths)
{
    cli_exit code = CLI_OK;
    for (int i = 0; i < count && !interrupted; i++) {
        cli_exit file_code = process_file(c, paths[i]);
        if (code == CLI_OK)
            code = file_code;
    }
    if (!interrupted && c->tool->finish != NULL) {
        cli_exit last = c->tool->finish(c);
        if (code == CLI_OK)
            code = last;
    }
    return interrupted ? CLI_INTERRUPTED : code;
}

static cli_exit run(cli *c, int count, char **paths)
{
    xkv_ctx_options options = xkv_ctx_options_default();
    options.threads = c->threads;
    options.memory_limit = c->memory_limit;
    options.log = on_log;
    options.log_user = c;
    xkv_status status = xkv_ctx_create(&options, &c->ctx);
    if (status != XKV_OK) {
        cli_error(c, "%s", xkv_status_string(status));
        return exit_code(status);
    }
    interrupt_ctx = c->ctx;
    catch_signals(on_signal);
    signal(SIGXFSZ, SIG_IGN); /* a file-size limit is then an error like a full disk */
    signal(SIGPIPE, SIG_IGN); /* and so is a reader that went away: no output is left half made */

    cli_exit code = c->tool->begin == NULL ? CLI_OK : c->tool->begin(c);
    if (code == CLI_OK)
        code = c->tool->process_all != NULL ? process_together(c, count, paths) : process_files(c, count, paths);
    if (c->tool->end != NULL)
        c->tool->end(c);
    cli_dict_close(c);

    catch_signals(SIG_DFL);
    interrupt_ctx = NULL;
    xkv_ctx_free(c->ctx);
    return code;
}

int cli_main(const cli_tool *tool, void *user, int argc, char **argv)
{
    cli c = {.tool = tool, .user = user, .verbosity = 1};
    char dash[] = "-";
    char *standard_input = dash;
    cli_exit code;
    const char *folder = getenv("XKV_DICT_PATH");
    c.dict_path = folder != NULL && folder[0] != '\0' ? folder : NULL;
    if (parse_options(&c, argc, argv, &code)) {
        int count = argc - optind;
        char **paths = argv + optind;
        c.input_count = (uint32_t)count;
        if (count == 0) {
            count = 1;
            paths = &standard_input;
        }
        c.arguments = paths;
        code = check_options(&c) ? run(&c, count, paths) : CLI_USAGE;
    }
    if (code == CLI_USAGE && c.ctx == NULL)
        fprintf(stderr, "%s\nTry '%s --help'.\n", tool->usage, tool->name);
    if ((fflush(stdout) != 0 || ferror(stdout)) && code == CLI_OK) {
        cli_error(&c, "standard output: %s", strerror(errno));
        code = CLI_FAILED;
    }
    return (int)code;
}
