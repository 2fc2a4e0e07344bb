/* check.c - runs a quick benchmark and checks that it prints a complete JSON document; times are not looked at. */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

static int fail(const char *what)
{
    (void)fprintf(stderr, "bench.smoke: %s\n", what);
    return 1;
}

/* A non-empty array of objects that all have a positive number at object.key. */
static int check_rates(const json_t *document, const char *section, const char *object, const char *key)
{
    const json_t *array = json_object_get(document, section);

    if (json_array_size(array) == 0)
        return fail(section);
    for (size_t i = 0; i < json_array_size(array); i++)
        if (!(json_number_value(json_object_get(json_object_get(json_array_get(array, i), object), key)) > 0))
            return fail(key);
    return 0;
}

static int check_scaling(const json_t *document)
{
    const json_t *profiles = json_object_get(document, "scaling");

    if (json_array_size(profiles) != 2)
        return fail("scaling: expected two profiles");
    for (size_t i = 0; i < 2; i++)
        if (check_rates(json_array_get(profiles, i), "sizes", "pack", "max_rss") != 0)
            return 1;
    return 0;
}

/* Every destination of every case took some time. */
static int check_destinations(const json_t *document)
{
    const json_t *cases = json_object_get(document, "destinations");

    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *list = json_object_get(json_array_get(cases, i), "destinations");
        for (size_t k = 0; k < json_array_size(list); k++)
            if (!(json_number_value(json_object_get(json_array_get(list, k), "seconds")) > 0))
                return fail("seconds of a destination");
        if (json_array_size(list) < 8)
            return fail("destinations");
    }
    return json_array_size(cases) == 0 ? fail("destinations") : 0;
}

static int check_attention(const json_t *document)
{
    const json_t *lengths = json_object_get(document, "attention");

    if (json_array_size(lengths) == 0)
        return fail("attention");
    for (size_t i = 0; i < json_array_size(lengths); i++) {
        const json_t *threads = json_object_get(json_array_get(lengths, i), "threads");
        for (size_t k = 0; k < json_array_size(threads); k++)
            if (check_rates(json_array_get(threads, k), "calls", "layer", "direct_ms") != 0)
                return 1;
    }
    return 0;
}

static int check(const json_t *document)
{
    const json_t *lossless = json_object_get(document, "lossless");

    if (!json_is_object(json_object_get(document, "machine")) ||
        json_array_size(json_object_get(document, "ceilings")) == 0 ||
        json_array_size(json_object_get(document, "goals")) == 0 || !json_is_array(json_object_get(document, "files")))
        return fail("machine, ceilings, goals or files missing");
    for (size_t i = 0; i < json_array_size(lossless); i++)
        if (!json_is_true(json_object_get(json_array_get(lossless, i), "identical")))
            return fail("a lossless cache did not come back");
    return check_rates(document, "lossless", "pack", "percent_of_zstd") ||
           check_rates(document, "lossless", "unpack", "percent_of_zstd") ||
           check_rates(document, "svd", "pack", "percent_of_gemm") ||
           check_rates(document, "svd", "unpack", "percent_of_gemm") || check_scaling(document) ||
           check_destinations(document) || check_attention(document);
}

int main(int argc, char **argv)
{
    char command[4096];
    json_error_t error;
    json_t *document;
    FILE *f;
    int result;

    if (argc != 2 || snprintf(command, sizeof command, "'%s' --quick", argv[1]) >= (int)sizeof command)
        return fail("usage: check BENCH");
    f = popen(command, "r");
    if (!f)
        return fail("cannot run the benchmark");
    document = json_loadf(f, 0, &error);
    if (pclose(f) != 0)
        return fail("the benchmark failed");
    if (!document)
        return fail(error.text);
    result = check(document);
    json_decref(document);
    return result;
}
