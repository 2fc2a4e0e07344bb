/* report.c - the frame of the page: tables of all files first, then a section for each. */
#include "report.h"

#include "html.h"
#include "info.h"
#include "report_css.h"

#include <stdlib.h>

/* --- Streams ------------------------------------------------------------------------------------------------------ */

static bool open_stream(report_stream *s)
{
    s->f = open_memstream(&s->text, &s->size);
    return s->f != NULL;
}

/* False: out of memory at some point. */
static bool close_stream(report_stream *s)
{
    bool failed = s->f != NULL && (ferror(s->f) != 0 || fflush(s->f) != 0);
    if (s->f != NULL)
        failed |= fclose(s->f) != 0;
    s->f = NULL;
    return !failed;
}

static void free_stream(report_stream *s)
{
    close_stream(s);
    free(s->text);
    s->text = NULL;
}

/* --- Parts of a section ------------------------------------------------------------------------------------------- */

void report_section_begin(report *r, const char *name, const char *what)
{
    FILE *f = r->sections.f;
    fprintf(f, "<section id=\"f%u\"><h2><bdi>", r->entry_count + r->dictionary_count);
    html_text(f, name);
    fprintf(f, "</bdi> <small>%s</small></h2>\n", what);
}

void report_row_begin(const report *r, FILE *f, const char *name)
{
    fprintf(f, "<tr><th scope=\"row\"><a href=\"#f%u\"><bdi>", r->entry_count + r->dictionary_count);
    html_text(f, name);
    fputs("</bdi></a></th>", f);
}

void report_section_end(report *r)
{
    fputs("</section>\n", r->sections.f);
}

void report_figure_begin(report *r, const char *title, const char *text)
{
    FILE *f = r->sections.f;
    fprintf(f, "<figure><figcaption><h3>%s</h3><p>", title);
    html_text(f, text);
    fputs("</p></figcaption>\n", f);
}

void report_figure_end(report *r)
{
    fputs("</figure>\n", r->sections.f);
}

void report_key(report *r, const char *class, const char *text)
{
    FILE *f = r->sections.f;
    fprintf(f, "<span class=\"key\"><svg viewBox=\"0 0 24 12\" aria-hidden=\"true\">");
    if (strncmp(class, "curve", 5) == 0 || strncmp(class, "rule", 4) == 0)
        fprintf(f, "<path class=\"%s\" d=\"M1 6H23\"/>", class);
    else
        fprintf(f, "<rect class=\"%s\" x=\"5\" width=\"14\" height=\"12\"/>", class);
    fputs("</svg>", f);
    html_text(f, text);
    fputs("</span>\n", f);
}

void report_tile(report *r, const char *number, const char *text)
{
    fputs("<div><strong>", r->sections.f);
    html_text(r->sections.f, number);
    fputs("</strong><span>", r->sections.f);
    html_text(r->sections.f, text);
    fputs("</span></div>\n", r->sections.f);
}

void report_metadata(report *r, uint32_t count, void (*get)(const void *of, uint32_t index, xkv_value *value),
                     const void *of)
{
    FILE *f = r->sections.f;
    if (count == 0)
        return;
    fprintf(f, "<details><summary>Metadata, %u values</summary>\n", count);
    html_table_begin(f, "Metadata as stored", "<Key|<Value");
    for (uint32_t i = 0; i < count; i++) {
        char text[512];
        xkv_value value;
        get(of, i, &value);
        if (value.type == XKV_VALUE_STRING)
            snprintf(text, sizeof text, "%s", (const char *)value.bytes);
        else
            info_value_text(text, sizeof text, &value);
        html_row_begin(f, value.key);
        fputs("<td class=\"text\">", f);
        html_text(f, text);
        fprintf(f, "%s</td>", value.type == XKV_VALUE_STRING && value.size >= sizeof text ? " ..." : "");
        html_row_end(f);
    }
    html_table_end(f);
    fputs("</details>\n", f);
}

/* --- The page ----------------------------------------------------------------------------------------------------- */

static cli_exit read_fidelity(cli *c, report *r, const char *path)
{
    json_error_t error;
    if (path == NULL)
        return CLI_OK;
    r->fidelity = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (r->fidelity != NULL)
        return CLI_OK;
    cli_error(c, "%s: line %d: %s", path, error.line, error.text);
    return error.line < 0 ? CLI_FAILED : CLI_BAD_INPUT;
}

cli_exit report_begin(cli *c, report *r, const char *fidelity)
{
    cli_input none = {.name = c->output, .path = c->output};
    cli_exit code = read_fidelity(c, r, fidelity);
    if (code == CLI_OK)
        code = cli_output_open(c, &none, NULL, &r->output);
    if (code != CLI_OK)
        return code;
    bool open = open_stream(&r->entries) && open_stream(&r->dictionaries) && open_stream(&r->failures) &&
                open_stream(&r->sections);
    return open ? CLI_OK : cli_fail(c, r->output.name, XKV_ERROR_MEMORY);
}

void report_add_failure(report *r, const char *name, const char *problem)
{
    r->failure_count++;
    html_row_begin(r->failures.f, name);
    fputs("<td class=\"text\">", r->failures.f);
    html_text(r->failures.f, problem);
    fputs("</td>", r->failures.f);
    html_row_end(r->failures.f);
}

static void print_head(FILE *f)
{
    fputs("<!DOCTYPE html>\n<html lang=\"en\" xmlns=\"http://www.w3.org/1999/xhtml\"><head><meta charset=\"utf-8\"/>\n"
          "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n"
          "<meta name=\"color-scheme\" content=\"light dark\"/>\n"
          "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n"
          "<title>xkv report</title>\n<style>\n",
          f);
    fwrite(report_css, 1, sizeof report_css, f);
    fputs("</style></head><body>\n<header><h1>xkv report</h1><p>Packed KV caches and dictionaries, as ", f);
    html_format(f, "xkv-info %s", xkv_version());
    fputs(" reads them.</p></header>\n<main>\n", f);
}

static void print_table(FILE *f, const report_stream *rows, const char *caption, const char *headings)
{
    html_table_begin(f, caption, headings);
    fwrite(rows->text, 1, rows->size, f);
    html_table_end(f);
}

static void print_tables(const report *r, FILE *f)
{
    uint32_t count = r->entry_count + r->dictionary_count;
    if (count + r->failure_count < 2)
        return;
    fputs("<section><h2>Files</h2>\n", f);
    if (r->entry_count > 0)
        print_table(f, &r->entries, "Entries",
                    "<File|<Model|<Codec|Tokens|Raw|Packed|Ratio|Error K|Error V|Bits an element");
    if (r->dictionary_count > 0)
        print_table(f, &r->dictionaries, "Dictionaries",
                    "<File|<Model|Layers|Groups|Components|Cross stage|Training tokens|Size");
    if (r->failure_count > 0)
        print_table(f, &r->failures, "Files that could not be read", "<File|<Problem");
    fputs("</section>\n", f);
}

static bool print_page(cli *c, report *r, FILE *f)
{
    print_head(f);
    print_tables(r, f);
    fwrite(r->sections.text, 1, r->sections.size, f);
    if (r->fidelity != NULL && !report_fidelity(r, f)) {
        cli_error(c, "--fidelity: these are no results of tests/engine");
        return false;
    }
    fputs("</main></body></html>\n", f);
    return true;
}

static cli_exit write_page(cli *c, report *r, const report_stream *page)
{
    const char *name = r->output.name;
    cli_input none = {.name = name, .path = name};
    xkv_output file = xkv_file_output(r->output.file);
    xkv_status status = file.write(file.user, c->ctx, 0, page->text, page->size);
    return status == XKV_OK ? cli_output_commit(c, &none, &r->output) : cli_fail(c, name, status);
}

cli_exit report_finish(cli *c, report *r)
{
    report_stream page = {0};
    cli_exit code = CLI_OK;
    if (r->entry_count + r->dictionary_count == 0)
        return CLI_OK;
    bool whole = close_stream(&r->entries) && close_stream(&r->dictionaries) && close_stream(&r->failures) &&
                 close_stream(&r->sections) && open_stream(&page);
    if (whole && !print_page(c, r, page.f))
        code = CLI_BAD_INPUT;
    if (!close_stream(&page) || !whole)
        code = cli_fail(c, r->output.name, XKV_ERROR_MEMORY);
    if (code == CLI_OK)
        code = write_page(c, r, &page);
    free_stream(&page);
    return code;
}

void report_free(cli *c, report *r)
{
    cli_output_abort(c, &r->output);
    free_stream(&r->entries);
    free_stream(&r->dictionaries);
    free_stream(&r->failures);
    free_stream(&r->sections);
    json_decref(r->fidelity);
}
