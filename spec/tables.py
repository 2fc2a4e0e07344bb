#!/usr/bin/env python3
"""The base tables of spec/codec.md, section "Tables".

    tables.py > tables.txt              compute the tables
    tables.py --c tables.txt > ../codec/table_data.h     the same numbers as C

tables.txt is normative and frozen: this script says where its numbers come from, but another floating-point library
may round some of them differently, and files in use depend on every one of them.
"""
import heapq
import math
import sys

SHAPES = [2.0, 1.5, 1.2, 0.9]  # exponent of the generalised Gaussian: 2 Gaussian, 1 Laplace
RUNGS = 28  # sigma / step = 2^(-3 + rung/4): 1/8 up to 13.45
TOTAL = 4096
MAX_REACH = 127
RARE = 2.0 ** -15  # below this a symbol of its own (frequency 1) costs the others more than an escape costs it


def within(shape, sigma, limit):
    """Probability of |x| <= limit: the regularised lower incomplete gamma function by its series."""
    a = 1 / shape
    alpha = sigma * math.sqrt(math.gamma(a) / math.gamma(3 * a))
    x = (limit / alpha) ** shape
    if x > 40:
        return 1.0
    term = total = 1 / a
    n = 1
    while term > total * 1e-17:
        term *= x / (a + n)
        total += term
        n += 1
    return min(1.0, total * math.exp(-x) * x ** a / math.gamma(a))


def probabilities(shape, sigma):
    """p[0], p[1] = p[-1], ... p[reach], and the probability of everything beyond."""
    p = [within(shape, sigma, 0.5)]
    while len(p) <= MAX_REACH:
        u = len(p)
        one = (within(shape, sigma, u + 0.5) - within(shape, sigma, u - 0.5)) / 2
        if u > 1 and one < RARE:
            break
        p.append(one)
    return p, max(0.0, 1 - within(shape, sigma, len(p) - 0.5))


def frequencies(p, escape):
    """Integers of sum TOTAL, at least 1 each, symmetric, with the smallest expected length: what is left after the ones
    goes, unit by unit, to the symbol that gains most. A pair u, -u takes two units at once."""
    weights = p + [escape]
    units = [1] + [2] * (len(p) - 1) + [1]
    f = [1] * len(weights)
    left = TOTAL - sum(units)

    def entry(i):
        return -weights[i] * math.log2((f[i] + 1) / f[i]), i

    heap = [entry(i) for i in range(len(weights))]
    heapq.heapify(heap)
    while left > 0:
        _, i = heapq.heappop(heap)
        if units[i] <= left:
            f[i] += 1
            left -= units[i]
            heapq.heappush(heap, entry(i))
    return f[:-1], f[-1]


def compute():
    print("# shape rung reach escape f(0) f(1) ... f(reach); spec/codec.md, section Tables, says what they mean")
    for shape, beta in enumerate(SHAPES):
        for rung in range(RUNGS):
            p, escape = probabilities(beta, 2 ** (-3 + rung / 4))
            f, f_escape = frequencies(p, escape)
            print(shape, rung, len(f) - 1, f_escape, *f)


def print_c(path):
    print("/* Made by spec/tables.py --c from spec/tables.txt: reach, frequency of the escape, f(0) ... f(reach) of the\n"
          " * tables, one behind the other. */")
    print("/* clang-format off */")
    print("static const uint16_t table_data[] = {")
    for line in open(path):
        if not line.startswith("#"):
            line, row = "", line.split()[2:]
            for number in row:
                if len(line) + len(number) > 112:
                    print("    " + line.rstrip())
                    line = ""
                line += number + ", "
            print("    " + line.rstrip())
    print("};")


if len(sys.argv) == 3 and sys.argv[1] == "--c":
    print_c(sys.argv[2])
else:
    compute()
