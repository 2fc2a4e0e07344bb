/* cli.h - what the tools share: the frame of a program, options, exit codes, messages, progress, inputs, outputs.
 *
 * A tool describes itself in a cli_tool and calls cli_main(), which parses the options, then processes one FILE after
 * the other. A failed file does not stop the others; the exit code is that of the first failure. */
#ifndef CLI_H
#define CLI_H

#include "xkv/codec.h"
#include "xkv/format.h"

#include <getopt.h>
#include <jansson.h>
#include <stdbool.h>
#include <sys/stat.h>

/* Exit codes, as in the manual pages. */
typedef enum cli_exit {
    CLI_OK = 0,
    CLI_FAILED = 1,        /* a file could not be read or written, disk full, output exists */
    CLI_USAGE = 2,         /* wrong options or arguments */
    CLI_BAD_INPUT = 3,     /* the input is damaged, foreign, or made by a newer version */
    CLI_MISMATCH = 4,      /* the input belongs to another model, or needs a dictionary that is not there */
    CLI_TARGET = 5,        /* the asked ratio, error or energy cannot be reached */
    CLI_LIMIT = 6,         /* out of memory, or beyond a limit */
    CLI_MISS = 7,          /* nothing stored begins like the prompt, or there is no such entry */
    CLI_INTERRUPTED = 130, /* SIGINT, SIGTERM or SIGHUP */
} cli_exit;

/* Values of options without a letter. */
enum {
    CLI_OPT_RM = 256,
    CLI_OPT_JSON,
    CLI_OPT_MODEL,
    CLI_OPT_FINGERPRINT,
    CLI_OPT_ROPE_BASE,
    CLI_OPT_ROPE_DIM,
    CLI_OPT_ROPE_STYLE,
    CLI_OPT_ROPE_SCALE,
    CLI_OPT_HEAD_DIM,
    CLI_OPT_LOSSLESS,
    CLI_OPT_PROFILE,
    CLI_OPT_GROUP,
    CLI_OPT_RANK_K,
    CLI_OPT_RANK_V,
    CLI_OPT_RATIO,
    CLI_OPT_ERROR,
    CLI_OPT_ENERGY,
    CLI_OPT_QUALITY,
    CLI_OPT_SINKS,
    CLI_OPT_WINDOW,
    CLI_OPT_ITERATIONS,
    CLI_OPT_ZSTD_FACTORS,
    CLI_OPT_HALF_FACTORS,
    CLI_OPT_TOOL /* first value for a tool's own */
};

/* Options by set; a tool concatenates the sets it has with its own and ends with CLI_END_OPTIONS. */
#define CLI_COMMON_LETTERS "qvT:M:hV"
#define CLI_COMMON_OPTIONS                                                                                             \
    {"quiet", no_argument, NULL, 'q'}, {"verbose", no_argument, NULL, 'v'}, {"threads", required_argument, NULL, 'T'}, \
        {"memory", required_argument, NULL, 'M'}, {"json", no_argument, NULL, CLI_OPT_JSON},                           \
        {"help", no_argument, NULL, 'h'},                                                                              \
    {                                                                                                                  \
        "version", no_argument, NULL, 'V'                                                                              \
    }
#define CLI_OUTPUT_LETTERS "o:fck"
#define CLI_OUTPUT_OPTIONS                                                                                             \
    {"output", required_argument, NULL, 'o'}, {"force", no_argument, NULL, 'f'}, {"stdout", no_argument, NULL, 'c'},   \
        {"keep", no_argument, NULL, 'k'},                                                                              \
    {                                                                                                                  \
        "rm", no_argument, NULL, CLI_OPT_RM                                                                            \
    }
#define CLI_MODEL_OPTIONS                                                                                              \
    {"model", required_argument, NULL, CLI_OPT_MODEL},                                                                 \
    {                                                                                                                  \
        "fingerprint", required_argument, NULL, CLI_OPT_FINGERPRINT                                                    \
    }
#define CLI_DICT_LETTERS "D:"
#define CLI_DICT_OPTIONS                                                                                               \
    {                                                                                                                  \
        "dictionary", required_argument, NULL, 'D'                                                                     \
    }
/* How to pack: cli_pack_option(). */
#define CLI_PACK_LETTERS "1::2::3::4::5::6::7::8::9::" /* -19: letter 1, value 9 */
#define CLI_PACK_OPTIONS                                                                                               \
    {"lossless", no_argument, NULL, CLI_OPT_LOSSLESS}, {"profile", required_argument, NULL, CLI_OPT_PROFILE},          \
        {"group", required_argument, NULL, CLI_OPT_GROUP}, {"rank-k", required_argument, NULL, CLI_OPT_RANK_K},        \
        {"rank-v", required_argument, NULL, CLI_OPT_RANK_V}, {"ratio", required_argument, NULL, CLI_OPT_RATIO},        \
        {"error", required_argument, NULL, CLI_OPT_ERROR}, {"energy", required_argument, NULL, CLI_OPT_ENERGY},        \
        {"quality", required_argument, NULL, CLI_OPT_QUALITY}, {"sinks", required_argument, NULL, CLI_OPT_SINKS},      \
        {"window", required_argument, NULL, CLI_OPT_WINDOW},                                                           \
        {"iterations", required_argument, NULL, CLI_OPT_ITERATIONS},                                                   \
        {"zstd-factors", no_argument, NULL, CLI_OPT_ZSTD_FACTORS},                                                     \
    {                                                                                                                  \
        "half-factors", no_argument, NULL, CLI_OPT_HALF_FACTORS                                                        \
    }
#define CLI_END_OPTIONS                                                                                                \
    {                                                                                                                  \
        NULL, 0, NULL, 0                                                                                               \
    }

typedef struct cli_tool cli_tool;

/* State of a run. */
typedef struct cli {
    const cli_tool *tool;
    void *user; /* the tool's own state */
    xkv_ctx *ctx;
    int verbosity; /* 0 quiet: errors only; 1: and warnings and results; 2, 3: more */
    bool json, force, to_stdout, remove;
    const char *output; /* -o; NULL: none */
    uint32_t threads;
    uint64_t memory_limit;
    const char *model_path;    /* --model; NULL: none */
    bool has_fingerprint;      /* --fingerprint */
    uint8_t fingerprint[16];   /* of --fingerprint */
    const char *dict_path;     /* -D, else $XKV_DICT_PATH: a dictionary or a folder of them; NULL: none */
    bool dict_given;           /* by -D */
    xkv_dict *dict;            /* the one last used */
    bool reported;             /* the result that is no success is in JSON already */
    uint32_t input_count;      /* named inputs */
    char **arguments;          /* [input_count] the same, or "-" */
    const char *subject;       /* of a tool with process_all, set by its check; NULL: the output */
    const char *progress_name; /* file whose progress is shown */
    bool progress_shown;
    double progress_time; /* of the last update */
    char last_error[1024];
} cli;

struct cli_tool {
    const char *name;
    const char *usage; /* one line */
    const char *help;  /* the options */
    const char *letters;
    const struct option *options;
    /* Take an option that cli_main() does not know. False: a usage error, already reported. May be NULL. */
    bool (*option)(cli *c, int option, const char *value);
    /* Check the options together. False: as above. May be NULL. */
    bool (*check)(cli *c);
    /* Once before and after all files. May be NULL. */
    cli_exit (*begin)(cli *c);
    void (*end)(cli *c);
    /* One input, "-" for standard input; failures have been reported. */
    cli_exit (*process)(cli *c, const char *path);
    /* In place of `process`: all inputs together. */
    cli_exit (*process_all)(cli *c, uint32_t count, char **paths);
    /* After all inputs, unless interrupted: what comes of them together. May be NULL. */
    cli_exit (*finish)(cli *c);
};

int cli_main(const cli_tool *tool, void *user, int argc, char **argv);

/* --- Messages (standard error; control characters of hostile files are not passed on) ----------------------------- */

void cli_error(cli *c, const char *format, ...) XKV_PRINTF(2, 3);
/* Shown unless -q. */
void cli_note(cli *c, const char *format, ...) XKV_PRINTF(2, 3);
/* Report why `name` failed, from the status and the context's detail, and return the exit code. */
cli_exit cli_fail(cli *c, const char *name, xkv_status status);
/* Report errno. */
cli_exit cli_fail_errno(cli *c, const char *name, const char *what);

/* xkv_progress_fn with the cli as user: a line on a terminal, at most six times a second. */
int cli_progress(void *user, uint64_t done, uint64_t total);
void cli_progress_end(cli *c);

double cli_seconds(void); /* monotonic clock */

/* "11.3 MiB" */
typedef struct cli_text {
    char text[64];
} cli_text;
cli_text cli_size_text(uint64_t bytes);
cli_text cli_hex_text(const uint8_t *bytes, size_t size);

/* Copy of a string with control characters and invalid bytes made visible; cut to fit. */
void cli_printable(char *dst, size_t dst_size, const char *src);

/* --- Option values: false after a message that names the option ----------------------------------------------------
 */

/* A number with an optional suffix K, M, G (also KB, KiB ...), all powers of 1024. */
bool cli_parse_u64(cli *c, const char *option, const char *text, uint64_t min, uint64_t max, uint64_t *value);
bool cli_parse_u32(cli *c, const char *option, const char *text, uint32_t min, uint32_t max, uint32_t *value);
/* A number between min and max, both excluded. */
bool cli_parse_double(cli *c, const char *option, const char *text, double min, double max, double *value);
/* A number from 1 to 100. */
bool cli_parse_quality(cli *c, const char *option, const char *text, double *value);
/* Index of `text` in `names` (NULL-terminated). */
bool cli_parse_choice(cli *c, const char *option, const char *text, const char *const *names, uint32_t *value);
bool cli_parse_hex16(cli *c, const char *option, const char *text, uint8_t bytes[16]);

/* --- How to pack (cli_pack.c) --------------------------------------------------------------------------------------
 */

/* By xkv_profile; ends with NULL. */
extern const char *const cli_profiles[];
/* Take an option of CLI_PACK_LETTERS and CLI_PACK_OPTIONS. */
bool cli_pack_option(cli *c, int option, const char *value, xkv_pack_options *o);
/* What is wrong with them together; NULL: nothing. */
const char *cli_pack_problem(const cli *c, const xkv_pack_options *o);
/* Whether they ask for a codec. */
bool cli_pack_asks(const xkv_pack_options *o);
/* Whether there has to be a dictionary. One that only the environment names must not make lossless packing lossy. */
bool cli_pack_needs_dict(const cli *c, const xkv_pack_options *o);

/* --- Inputs and outputs --------------------------------------------------------------------------------------------
 */

typedef struct cli_input {
    const char *name; /* for messages */
    const char *path; /* to be opened by the library: the given one, or a descriptor's */
    char fd_path[32];
    FILE *spool; /* unnamed copy of what cannot be mapped (a pipe); NULL: none */
    struct stat st;
    bool named; /* a file that has a name, so that it can be removed */
} cli_input;

/* Open what the user named; messages have been given on failure. */
cli_exit cli_input_open(cli *c, const char *path, cli_input *input);
void cli_input_close(cli_input *input);

/* Open the entry at `path`, hand it to `process`, close it. A dictionary is handed to `describe` instead, unless that
 * is NULL: then it is refused. */
cli_exit cli_process_entry(cli *c, const char *path,
                           cli_exit (*process)(cli *c, const cli_input *file, xkv_entry *entry),
                           cli_exit (*describe)(cli *c, const cli_input *file, const xkv_input *dictionary));

typedef struct cli_output {
    const char *name; /* for messages */
    char *path;       /* NULL: a stream */
    int fd;           /* of the stream */
    xkv_file *file;
} cli_output;

/* Report, and return false, when the output `path` is the file of `input`. */
bool cli_distinct(cli *c, const cli_input *input, const char *path);
/* Begin the output for `input`: -o, -c, or `default_path` (NULL: the name does not tell, and -o is asked for). */
cli_exit cli_output_open(cli *c, const cli_input *input, const char *default_path, cli_output *output);
/* Make the output appear, then remove the input if --rm was given. */
cli_exit cli_output_commit(cli *c, const cli_input *input, cli_output *output);
/* Forget it; harmless after the commit. */
void cli_output_abort(cli *c, cli_output *output);

/* --- JSON ----------------------------------------------------------------------------------------------------------
 */

/* Print one object on a line of its own and drop it. */
void cli_json_print(json_t *object);
/* A string value; bytes that are not UTF-8 are made visible first. */
json_t *cli_json_string(const char *text);

/* --- Models --------------------------------------------------------------------------------------------------------
 */

/* Read the file of --model, and put --fingerprint in place of its own. *model_p is NULL without --model. `rope` may be
 * NULL. Free with xkv_model_free(). */
cli_exit cli_model_load(cli *c, const xkv_rope_options *rope, xkv_model **model_p);
/* Put the value of --fingerprint, if given, into `model`. */
void cli_model_mark(const cli *c, xkv_model *model);
/* What is known of the model without a file: NULL, or `bare` with nothing but the fingerprint. */
const xkv_model *cli_model_bare(const cli *c, xkv_model *bare);

/* --- Dictionaries (cli_dict.c) -------------------------------------------------------------------------------------
 */

/* Have c->dict be the dictionary to pack a cache of `layer_count` layers with: the file of -D, or the one of its folder
 * that was trained on `model` (may be NULL), or else the only one of as many layers. Without `required` a folder in
 * which none or several fit leaves c->dict NULL. */
cli_exit cli_dict_choose(cli *c, const char *name, const xkv_model *model, uint32_t layer_count, bool required);
/* Give the entry the dictionary that it needs, if any; `for_packing`: to append to the entry. */
cli_exit cli_dict_attach(cli *c, const char *name, xkv_entry *entry, bool for_packing);
void cli_dict_close(cli *c);
/* Groups that hold planes: not the cross stage. */
uint32_t cli_dict_groups(const xkv_dict_info *info);

#endif
