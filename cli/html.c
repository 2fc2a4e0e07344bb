/* html.c - see html.h. */
#include "html.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>

/* --- Text --------------------------------------------------------------------------------------------------------- */

/* Bytes of the well-formed UTF-8 character at `s` and its code point; 0 if there is none. */
static size_t decode(const unsigned char *s, uint32_t *code)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t n = s[0] < 0x80 ? 1 : s[0] < 0xc2 ? 0 : s[0] < 0xe0 ? 2 : s[0] < 0xf0 ? 3 : s[0] < 0xf5 ? 4 : 0;
    *code = n < 2 ? s[0] : s[0] & (0x7fu >> n);
    for (size_t i = 1; i < n; i++) {
        if ((s[i] & 0xc0) != 0x80)
            return 0;
        *code = *code << 6 | (s[i] & 0x3fu);
    }
    bool surrogate = *code >= 0xd800 && *code < 0xe000;
    return n > 1 && (*code < least[n] || surrogate || *code > 0x10ffff) ? 0 : n;
}

/* Control characters, those that turn the direction of what follows, and what XML does not allow. */
static bool is_visible(uint32_t code)
{
    bool control = code < 0x20 || (code >= 0x7f && code < 0xa0);
    bool turning = (code >= 0x200e && code <= 0x200f) || (code >= 0x2028 && code <= 0x202e) ||
                   (code >= 0x2066 && code <= 0x2069) || code == 0x61c;
    return !control && !turning && (code & 0xfffe) != 0xfffe;
}

static const char *entity(uint32_t code)
{
    switch (code) {
    case '&':
        return "&amp;";
    case '<':
        return "&lt;";
    case '>':
        return "&gt;";
    case '"':
        return "&quot;";
    case '\'':
        return "&#39;";
    default:
        return NULL;
    }
}

void html_text(FILE *f, const char *text)
{
    const unsigned char *s = (const unsigned char *)text;
    while (*s != '\0') {
        uint32_t code;
        size_t n = decode(s, &code);
        if (n == 0)
            fprintf(f, "\\x%02x", *s);
        else if (!is_visible(code))
            fprintf(f, code < 0x80 ? "\\x%02x" : "\\u%04x", code);
        else if (entity(code) != NULL)
            fputs(entity(code), f);
        else
            fwrite(s, 1, n, f);
        s += n > 0 ? n : 1;
    }
}

static void format_text(FILE *f, const char *format, va_list args)
{
    char text[1024];
    vsnprintf(text, sizeof text, format, args);
    html_text(f, text);
}

void html_format(FILE *f, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    format_text(f, format, args);
    va_end(args);
}

/* --- Numbers ------------------------------------------------------------------------------------------------------ */

cli_text html_count(uint64_t n)
{
    char digits[24];
    cli_text t;
    size_t length = (size_t)snprintf(digits, sizeof digits, "%" PRIu64, n), out = 0;
    for (size_t i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0)
            t.text[out++] = ',';
        t.text[out++] = digits[i];
    }
    t.text[out] = '\0';
    return t;
}

cli_text html_share(double part, double whole)
{
    cli_text t = {"0 %"};
    double percent = whole > 0 ? 100 * part / whole : 0;
    if (percent > 0 && percent < 0.1)
        snprintf(t.text, sizeof t.text, "< 0.1 %%");
    else if (percent > 0)
        snprintf(t.text, sizeof t.text, "%.1f %%", percent);
    return t;
}

cli_text html_number(double x)
{
    cli_text t = {"0"};
    if (!isfinite(x))
        snprintf(t.text, sizeof t.text, "-");
    else if (fabs(x) >= 1000 && fabs(x) < 1e15)
        return html_count((uint64_t)llround(fabs(x)));
    else if (x != 0 && (fabs(x) < 1e-4 || fabs(x) >= 1e15))
        snprintf(t.text, sizeof t.text, "%.2e", x);
    else if (x != 0)
        snprintf(t.text, sizeof t.text, "%.*f", (int)fmax(0, 2 - floor(log10(fabs(x)) + 1e-9)), x);
    return t;
}

/* --- Tables ------------------------------------------------------------------------------------------------------- */

/* The text up to the next '|' goes to `cell`; what follows it, or NULL. */
static const char *next_cell(const char *cells, char *cell, size_t size)
{
    size_t n = strcspn(cells, "|");
    snprintf(cell, size, "%.*s", (int)n, cells);
    return cells[n] == '|' ? cells + n + 1 : NULL;
}

void html_table_begin(FILE *f, const char *caption, const char *headings)
{
    char cell[128];
    fputs("<div class=\"scroll\"><table><caption>", f);
    html_text(f, caption);
    fputs("</caption><thead><tr>", f);
    while (headings != NULL) {
        headings = next_cell(headings, cell, sizeof cell);
        bool text = cell[0] == '<';
        fprintf(f, "<th scope=\"col\"%s>", text ? " class=\"text\"" : "");
        html_text(f, cell + text);
        fputs("</th>", f);
    }
    fputs("</tr></thead><tbody>\n", f);
}

void html_table_end(FILE *f)
{
    fputs("</tbody></table></div>\n", f);
}

void html_row_begin(FILE *f, const char *name)
{
    fputs("<tr><th scope=\"row\">", f);
    html_text(f, name);
    fputs("</th>", f);
}

void html_cell(FILE *f, const char *text)
{
    char *end;
    /* What begins with a letter is text, and stands on the left. */
    bool number = strcmp(text, "-") == 0 || text[0] == '<' || (strtod(text, &end), end != text);
    fputs(number ? "<td>" : "<td class=\"text\">", f);
    html_text(f, text);
    fputs("</td>", f);
}

void html_row_end(FILE *f)
{
    fputs("</tr>\n", f);
}

void html_row(FILE *f, const char *format, ...)
{
    char cells[1024], cell[256];
    va_list args;
    va_start(args, format);
    vsnprintf(cells, sizeof cells, format, args);
    va_end(args);
    const char *rest = next_cell(cells, cell, sizeof cell);
    html_row_begin(f, cell);
    while (rest != NULL) {
        rest = next_cell(rest, cell, sizeof cell);
        html_cell(f, cell);
    }
    html_row_end(f);
}

void html_fact(FILE *f, const char *name, const char *format, ...)
{
    va_list args;
    fputs("<div><dt>", f);
    html_text(f, name);
    fputs("</dt><dd>", f);
    va_start(args, format);
    format_text(f, format, args);
    va_end(args);
    fputs("</dd></div>\n", f);
}
