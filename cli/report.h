/* report.h - a page about entries and dictionaries: what xkv-info --report writes. */
#ifndef REPORT_H
#define REPORT_H

#include "cli.h"

#include <stdio.h>

/* Text that is written piece by piece. */
typedef struct report_stream {
    FILE *f;
    char *text;
    size_t size;
} report_stream;

/* The page while it is made. The tables that compare files come first and are known last. */
typedef struct report {
    cli_output output;
    report_stream entries, dictionaries, failures; /* rows of the tables */
    report_stream sections;                        /* one for each file */
    uint32_t entry_count, dictionary_count, failure_count;
    unsigned drawings; /* so far: their ids */
    json_t *fidelity;  /* results of the engine's test; NULL: none */
} report;

/* Begin the page that is to be written to c->output, and read the results at `fidelity` (NULL: none). */
cli_exit report_begin(cli *c, report *r, const char *fidelity);
/* Add a file. The dictionary of an entry is attached if there is one. `verified`: everything has been decoded. */
cli_exit report_add_entry(cli *c, report *r, const char *name, const xkv_entry *entry, bool verified);
void report_add_dictionary(report *r, const char *name, const xkv_dict *dict);
void report_add_failure(report *r, const char *name, const char *problem);
/* Make the page appear, unless there is nothing on it but failures. */
cli_exit report_finish(cli *c, report *r);
void report_free(cli *c, report *r);

/* --- Between the files of the report ------------------------------------------------------------------------------ */

/* A group, as tables and charts show it. */
typedef struct report_group {
    xkv_group_info info;
    uint32_t coded, leading; /* components that are coded; those that the cross stage codes instead */
    double step;             /* 0: none */
    uint64_t side, exact, chunks;
    xkv_component *components; /* [info.rank] of quantized groups; NULL: others */
    const float *sigma;        /* [sigma_count] of the dictionary; NULL: not at hand */
    uint32_t sigma_count;
} report_group;

/* A chart of one group's spectrum, and below it, if the group is that of an entry, bits per token. `steps` of the
 * quantizer [step_count] are drawn with their labels. */
typedef struct report_step {
    double step;
    char label[48];
} report_step;
void report_spectrum(report *r, const xkv_geometry *g, const report_group *group, uint32_t index,
                     const report_step *steps, uint32_t step_count, uint32_t tokens);
/* "Group 3: layers 8-11, K and V" */
cli_text report_group_name(const xkv_geometry *g, const report_group *group, uint32_t index);
/* Bits per token of components in bands of growing width, as a table. */
void report_bands(report *r, const xkv_geometry *g, const report_group *groups, uint32_t count, uint32_t tokens);

/* Bytes by part, group and chunk. */
void report_bytes(report *r, const xkv_entry *entry, const xkv_entry_info *info, const report_group *groups);
/* Errors of planes by layer. */
void report_errors(report *r, const xkv_entry *entry, const report_group *groups, uint32_t count);

/* KL over ratio from results of tests/engine. False: they are not such results. */
bool report_fidelity(report *r, FILE *f);

/* A section of a file and its parts. */
void report_section_begin(report *r, const char *name, const char *what);
void report_section_end(report *r);
/* A row of the tables of all files, that leads to the section. */
void report_row_begin(const report *r, FILE *f, const char *name);
void report_figure_begin(report *r, const char *title, const char *text);
void report_figure_end(report *r);
/* A key of a chart: a sample of `class` and what it is. */
void report_key(report *r, const char *class, const char *text);
/* A large figure with what it is. */
void report_tile(report *r, const char *number, const char *text);
void report_metadata(report *r, uint32_t count, void (*get)(const void *of, uint32_t index, xkv_value *value),
                     const void *of);

#endif
