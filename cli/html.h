/* html.h - text, numbers and tables of a page. Everything that comes from a file goes through html_text(). The pages
 * are XML as well, so that any tool reads them. */
#ifndef HTML_H
#define HTML_H

#include "cli.h"

#include <stdio.h>

/* Text with markup escaped, and with what is not UTF-8, control characters and those that turn the direction of the
 * text made visible. */
void html_text(FILE *f, const char *text);
/* The same of a format. At most 1,023 bytes. */
void html_format(FILE *f, const char *format, ...) XKV_PRINTF(2, 3);

/* "1,048,576" */
cli_text html_count(uint64_t n);
/* "12.3 %" of `whole` */
cli_text html_share(double part, double whole);
/* Three significant digits: "0.0123", "1.50", "12,300". */
cli_text html_number(double x);

/* A table: caption, headings (separated by '|'; '<' before one: its column is text, not numbers), rows. */
void html_table_begin(FILE *f, const char *caption, const char *headings);
void html_table_end(FILE *f);
/* A row of cells, separated by '|' as printed; the first one names the row. Not for text from files, which html_cell()
 * is for. */
void html_row(FILE *f, const char *format, ...) XKV_PRINTF(2, 3);
/* The same in steps: what comes from files is escaped, `name` heads the row. */
void html_row_begin(FILE *f, const char *name);
void html_cell(FILE *f, const char *text);
void html_row_end(FILE *f);

/* A line of a list of facts. */
void html_fact(FILE *f, const char *name, const char *format, ...) XKV_PRINTF(3, 4);

#endif
