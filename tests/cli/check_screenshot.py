"""check_screenshot.py PNG GROUND - whether a screenshot of a report shows something on a ground of this colour (rrggbb),
whose right edge it leaves free: nothing runs out of the window. Prints the number of colours."""
import struct
import sys
import zlib


def read_png(path):
    """Width, height and rows of (r, g, b), of 8 bits each, without interlacing: what Chromium writes."""
    with open(path, "rb") as file:
        data = file.read()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at:at + 8])
        if kind == b"IHDR":
            width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[at + 8:at + 21])
            assert depth == 8 and colour in (2, 6) and not interlaced
        if kind == b"IDAT":
            packed += data[at + 8:at + 8 + size]
        at += 12 + size
    return width, height, unfilter(zlib.decompress(packed), width, height, 3 if colour == 2 else 4)


def predict(kind, left, up, corner):
    if kind < 4:
        return (0, left, up, (left + up) // 2)[kind]
    distances = [abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)]
    return (left, up, corner)[distances.index(min(distances))]


def unfilter(raw, width, height, n):
    rows, above, stride = [], bytes(width * n), width * n + 1
    for y in range(height):
        kind, row = raw[y * stride], bytearray(raw[y * stride + 1:(y + 1) * stride])
        if kind == 2:
            row = bytearray((a + b) & 255 for a, b in zip(row, above))
        elif kind:
            for i in range(len(row)):
                left, corner = (row[i - n], above[i - n]) if i >= n else (0, 0)
                row[i] = (row[i] + predict(kind, left, above[i], corner)) & 255
        rows.append([tuple(row[i:i + 3]) for i in range(0, len(row), n)])
        above = row
    return rows


def main():
    width, height, rows = read_png(sys.argv[1])
    ground = tuple(bytes.fromhex(sys.argv[2]))
    colours = {}
    for row in rows:
        assert all(pixel == ground for pixel in row[-4:]), "something touches the right edge"
        for pixel in row:
            colours[pixel] = colours.get(pixel, 0) + 1
    assert max(colours, key=colours.get) == ground, f"mostly {max(colours, key=colours.get)}"
    assert len(colours) > 100 and colours[ground] < 0.97 * width * height, "next to nothing is drawn"
    print(len(colours))


if __name__ == "__main__":
    main()
