/* replay.c - runs a libFuzzer target without libFuzzer, so that its code builds and runs in the default tests.
 *
 *     fuzz_NAME CORPUS_FOLDER_OR_FILE...      XKV_FUZZ_MUTATIONS=N: mutations of each seed (default 1000)
 *
 * Every seed is run as it is, then with mutations from a fixed random sequence: the same ones in every run. */
#include <dirent.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static unsigned long runs;

static uint64_t next_random(uint64_t *state)
{
    /* splitmix64 (Steele, Lea, Flood 2014) */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static void run(const uint8_t *data, size_t size)
{
    /* An exact copy, so that a sanitizer sees the first byte read behind the end. */
    uint8_t *copy = malloc(size ? size : 1);
    if (copy == NULL)
        abort();
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    runs++;
}

/* Values at the edges of what sizes, counts and offsets may be. */
static const uint64_t edges[] = {0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fffffff, 0xffffffff, INT64_MAX, UINT64_MAX};

static size_t mutate(uint8_t *data, size_t size, uint64_t *state)
{
    size_t at = (size_t)(next_random(state) % size);
    size_t left = size - at;
    switch (next_random(state) % 5) {
    case 0: /* a bit */
        data[at] ^= (uint8_t)(1u << next_random(state) % 8);
        return size;
    case 1: /* a byte */
        data[at] = (uint8_t)next_random(state);
        return size;
    case 2: /* an edge value, 4 or 8 bytes wide, aligned */
        at &= ~(size_t)3;
        left = size - at;
        memcpy(data + at, &edges[next_random(state) % (sizeof edges / sizeof *edges)],
               left < 4 ? left : (left < 8 || next_random(state) % 2 ? 4 : 8));
        return size;
    case 3: /* a piece copied to another place */
        left = left < 64 ? left : 64;
        memmove(data + next_random(state) % (size - left + 1), data + at, left);
        return size;
    default: /* cut short */
        return at;
    }
}

static void run_mutations(const uint8_t *seed, size_t size, unsigned long count)
{
    uint8_t *data = malloc(size);
    uint64_t state = size;
    if (data == NULL)
        abort();
    for (unsigned long i = 0; i < count; i++) {
        size_t mutated_size = size;
        memcpy(data, seed, size);
        for (uint64_t n = 1 + next_random(&state) % 3; n > 0 && mutated_size > 0; n--)
            mutated_size = mutate(data, mutated_size, &state);
        run(data, mutated_size);
    }
    free(data);
}

static uint8_t *read_file(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    struct stat st;
    if (f == NULL || fstat(fileno(f), &st) != 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(2);
    }
    *size = (size_t)st.st_size;
    uint8_t *data = malloc(*size ? *size : 1);
    if (data == NULL || fread(data, 1, *size, f) != *size)
        abort();
    fclose(f);
    return data;
}

static void run_seed(const char *path, unsigned long mutations)
{
    size_t size;
    uint8_t *data = read_file(path, &size);
    run(data, size);
    if (size > 0)
        run_mutations(data, size, mutations);
    free(data);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name);
}

static void run_folder(const char *folder, unsigned long mutations)
{
    struct dirent **names;
    int count = scandir(folder, &names, NULL, by_name);
    if (count < 0) {
        fprintf(stderr, "%s: %s\n", folder, strerror(errno));
        exit(2);
    }
    for (int i = 0; i < count; i++) {
        char path[4096];
        if (names[i]->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/%s", folder, names[i]->d_name);
            run_seed(path, mutations);
        }
        free(names[i]);
    }
    free(names);
}

int main(int argc, char **argv)
{
    const char *text = getenv("XKV_FUZZ_MUTATIONS");
    unsigned long mutations = text ? strtoul(text, NULL, 10) : 1000;
    for (int i = 1; i < argc; i++) {
        struct stat st;
        if (stat(argv[i], &st) == 0 && S_ISDIR(st.st_mode))
            run_folder(argv[i], mutations);
        else
            run_seed(argv[i], mutations);
    }
    printf("%lu inputs\n", runs);
    return runs > 0 ? 0 : 1; /* a test without seeds proves nothing */
}
