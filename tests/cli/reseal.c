/* reseal.c - reseal ENTRY OFFSET VALUE: set a 16-bit field of an entry's header and make its checksum right again
 * (spec/container.md, section 3: XXH3-64 of bytes 0 .. 55, stored at 56). */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <xxhash.h>

int main(int argc, char **argv)
{
    uint8_t header[64];
    FILE *f = argc == 4 ? fopen(argv[1], "r+b") : NULL;
    unsigned long offset = argc == 4 ? strtoul(argv[2], NULL, 10) : 56;
    if (f == NULL || offset > 54 || fread(header, 1, sizeof header, f) != sizeof header)
        return 2;
    unsigned long value = strtoul(argv[3], NULL, 10);
    header[offset] = (uint8_t)value;
    header[offset + 1] = (uint8_t)(value >> 8);
    uint64_t checksum = XXH3_64bits(header, 56);
    for (int i = 0; i < 8; i++)
        header[56 + i] = (uint8_t)(checksum >> 8 * i);
    rewind(f);
    return fwrite(header, 1, sizeof header, f) == sizeof header && fclose(f) == 0 ? 0 : 1;
}
