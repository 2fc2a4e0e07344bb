/* cli_files.c - inputs that may be streams, and outputs that appear whole or not at all. */
#include "cli.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* --- Inputs --------------------------------------------------------------------------------------------------------
 */

/* Copy everything that `fd` gives into an unnamed file, because caches and entries are read at random. */
static cli_exit spool(cli *c, cli_input *input, int fd)
{
    char buffer[1 << 16];
    input->spool = tmpfile();
    if (input->spool == NULL)
        return cli_fail_errno(c, input->name, "cannot make a temporary file");
    for (;;) {
        ssize_t n = read(fd, buffer, sizeof buffer);
        if (n < 0)
            return cli_fail_errno(c, input->name, "cannot read");
        if (n == 0)
            break;
        if (fwrite(buffer, 1, (size_t)n, input->spool) != (size_t)n)
            return cli_fail_errno(c, input->name, "cannot write a temporary copy");
    }
    if (fflush(input->spool) != 0)
        return cli_fail_errno(c, input->name, "cannot write a temporary copy");
    snprintf(input->fd_path, sizeof input->fd_path, "/dev/fd/%d", fileno(input->spool));
    input->path = input->fd_path;
    return CLI_OK;
}

static cli_exit open_standard_input(cli *c, cli_input *input)
{
    input->name = "stdin";
    if (isatty(STDIN_FILENO)) {
        cli_error(c, "stdin: is a terminal; give a file");
        return CLI_USAGE;
    }
    if (fstat(STDIN_FILENO, &input->st) != 0)
        return cli_fail_errno(c, input->name, "cannot read");
    if (!S_ISREG(input->st.st_mode) || lseek(STDIN_FILENO, 0, SEEK_CUR) != 0)
        return spool(c, input, STDIN_FILENO);
    input->path = "/dev/fd/0";
    return CLI_OK;
}

static cli_exit open_named(cli *c, const char *path, cli_input *input)
{
    input->name = input->path = path;
    input->named = true;
    if (stat(path, &input->st) != 0)
        return cli_fail_errno(c, path, "cannot open");
    if (S_ISREG(input->st.st_mode))
        return CLI_OK;
    if (S_ISDIR(input->st.st_mode)) {
        cli_error(c, "%s: is a folder", path);
        return CLI_FAILED;
    }
    input->named = false;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return cli_fail_errno(c, path, "cannot open");
    cli_exit code = spool(c, input, fd);
    close(fd);
    return code;
}

cli_exit cli_input_open(cli *c, const char *path, cli_input *input)
{
    memset(input, 0, sizeof *input);
    return strcmp(path, "-") == 0 ? open_standard_input(c, input) : open_named(c, path, input);
}

void cli_input_close(cli_input *input)
{
    if (input->spool != NULL)
        fclose(input->spool);
    input->spool = NULL;
}

/* Magic and kind, as in the header of spec/container.md. */
static bool is_dictionary(cli *c, const xkv_input *input)
{
    static const uint8_t magic[8] = {0x89, 'X', 'K', 'V', '\r', '\n', 0x1a, '\n'};
    uint8_t header[16];
    return input->size >= sizeof header && input->read(input->user, c->ctx, 0, header, sizeof header) == XKV_OK &&
           memcmp(header, magic, sizeof magic) == 0 && header[12] == 2;
}

cli_exit cli_process_entry(cli *c, const char *path,
                           cli_exit (*process)(cli *c, const cli_input *file, xkv_entry *entry),
                           cli_exit (*describe)(cli *c, const cli_input *file, const xkv_input *dictionary))
{
    cli_input file;
    xkv_input input = {0};
    xkv_entry *entry = NULL;
    cli_exit code = cli_input_open(c, path, &file);
    if (code == CLI_OK) {
        xkv_status status = xkv_input_open(c->ctx, file.path, &input);
        if (status == XKV_OK && describe != NULL && is_dictionary(c, &input)) {
            code = describe(c, &file, &input);
        } else {
            if (status == XKV_OK)
                status = xkv_entry_open(c->ctx, &input, &entry);
            code = status == XKV_OK ? process(c, &file, entry) : cli_fail(c, file.name, status);
        }
        xkv_entry_close(c->ctx, entry);
        if (input.read != NULL)
            xkv_input_close(c->ctx, &input);
    }
    cli_input_close(&file);
    return code;
}

/* --- Outputs -------------------------------------------------------------------------------------------------------
 */

/* The library writes an unnamed file, which is copied out when it is complete. */
static cli_exit open_stream(cli *c, cli_output *output)
{
    if (isatty(output->fd) && !c->force) {
        cli_error(c, "%s: is a terminal; use -o, or -f to write there all the same", output->name);
        return CLI_USAGE;
    }
    xkv_status status = xkv_file_create(c->ctx, NULL, 0, &output->file);
    return status == XKV_OK ? CLI_OK : cli_fail(c, output->name, status);
}

bool cli_distinct(cli *c, const cli_input *input, const char *path)
{
    struct stat st;
    if (stat(path, &st) != 0 || st.st_dev != input->st.st_dev || st.st_ino != input->st.st_ino)
        return true;
    cli_error(c, "%s: is the input as well", path);
    return false;
}

static cli_exit open_file(cli *c, const cli_input *input, cli_output *output)
{
    struct stat st;
    if (!cli_distinct(c, input, output->path))
        return CLI_USAGE;
    if (stat(output->path, &st) == 0) {
        if (S_ISDIR(st.st_mode)) {
            cli_error(c, "%s: is a folder", output->name);
            return CLI_FAILED;
        }
        if (!S_ISREG(st.st_mode)) { /* a device or a pipe must not be replaced by a file */
            output->fd = open(output->path, O_WRONLY | O_CLOEXEC);
            if (output->fd < 0)
                return cli_fail_errno(c, output->name, "cannot open");
            return open_stream(c, output);
        }
    }
    xkv_status status = xkv_file_create(c->ctx, output->path, c->force, &output->file);
    return status == XKV_OK ? CLI_OK : cli_fail(c, output->name, status);
}

cli_exit cli_output_open(cli *c, const cli_input *input, const char *default_path, cli_output *output)
{
    memset(output, 0, sizeof *output);
    output->fd = -1;
    const char *path = c->output;
    bool streamed = path == NULL && input->path != input->name; /* a stream in, a stream out */
    if (streamed && (c->input_count > 1 || c->json)) {
        cli_error(c, "%s: has no name to derive that of the output from; use -o", input->name);
        return CLI_USAGE;
    }
    if (c->to_stdout || streamed || (path != NULL && strcmp(path, "-") == 0)) {
        output->name = "stdout";
        output->fd = STDOUT_FILENO;
        return open_stream(c, output);
    }
    if (path == NULL)
        path = default_path;
    if (path == NULL) {
        cli_error(c, "%s: the name does not end in .xkv; use -o", input->name);
        return CLI_USAGE;
    }
    output->path = strdup(path);
    output->name = output->path;
    if (output->path == NULL)
        return cli_fail(c, input->name, XKV_ERROR_MEMORY);
    return open_file(c, input, output);
}

cli_exit cli_output_commit(cli *c, const cli_input *input, cli_output *output)
{
    xkv_status status;
    if (output->fd >= 0) {
        status = xkv_file_copy_to_fd(c->ctx, output->file, output->fd);
    } else {
        status = xkv_file_commit(c->ctx, output->file);
        output->file = NULL;
    }
    if (status != XKV_OK)
        return cli_fail(c, output->name, status);
    if (c->remove && input->named && output->fd < 0 && unlink(input->path) != 0)
        return cli_fail_errno(c, input->name, "cannot remove");
    return CLI_OK;
}

void cli_output_abort(cli *c, cli_output *output)
{
    xkv_file_abort(c->ctx, output->file);
    if (output->fd > STDERR_FILENO)
        close(output->fd);
    free(output->path);
    memset(output, 0, sizeof *output);
}
