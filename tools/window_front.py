#!/usr/bin/env python3
"""Draws what a window of recent tokens is worth: KL against the bits of a scalar, at three lengths of a sequence.

A point is WINDOW:PACKED:KL, tokens of the window, bits of a packed scalar and KL in nats as `dibit perplexity` prints them.
Bits are averaged over the 128 lengths that end at the one named: with a window of R tokens, R to R + 127 are in 16 bit.
The table also has the bits that are allocated, R + 128 tokens of the window being there from the start.

Usage:  python3 tools/window_front.py 64:2.40:0.0080 128:2.40:0.0054 ... [--out docs/window.svg]
"""

import argparse
import math

LENGTHS = (2048, 8192, 32768)
COLOURS = {32: "#888888", 64: "#c46a1b", 128: "#1b6ac4", 256: "#3a8f3a"}
WIDTH, HEIGHT, LEFT, TOP = 300, 220, 50, 30


def bits(length, window, packed):
    each = [16 * (n - (held := 128 * ((n - window) // 128))) + packed * held for n in range(length - 127, length + 1)]
    return sum(own / n for own, n in zip(each, range(length - 127, length + 1))) / 128


def allocated(length, window, packed):
    return (16 * (window + 128) + packed * 128 * ((length - window) // 128)) / length


def panel(index, length, points):
    xs = [bits(length, window, packed) for window, packed, _ in points]
    low, high = min(xs) - 0.1, max(xs) + 0.1
    bottom, top = math.log10(min(p[2] for p in points) / 1.3), math.log10(max(p[2] for p in points) * 1.3)
    x = lambda value: LEFT + index * (WIDTH + LEFT) + (value - low) / (high - low) * WIDTH
    y = lambda kl: TOP + (top - math.log10(kl)) / (top - bottom) * HEIGHT
    out = [f'<text x="{x(low)}" y="{TOP - 10}">{length} tokens</text>']
    out += [f'<rect x="{x(low)}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>']
    for kl in (0.002, 0.005, 0.01):
        if bottom < math.log10(kl) < top:
            out += [f'<path d="M{x(low)} {y(kl):.1f}h{WIDTH}" stroke="#eee"/>', f'<text x="{x(low) - 42}" y="{y(kl) + 4:.1f}">{kl}</text>']
    steps = [low + (high - low) * i / 4 for i in range(5)]
    out += [f'<text x="{x(value) - 12:.1f}" y="{TOP + HEIGHT + 16}">{value:.2f}</text>' for value in steps]
    for window in sorted({p[0] for p in points}):
        own = sorted((x(bits(length, window, packed)), y(kl)) for w, packed, kl in points if w == window)
        colour = COLOURS.get(window, "#000")
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in own)
        out += [f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in own]
        if index == 0:
            anchor = "start" if own[0][0] < LEFT + WIDTH * 0.8 else "end"
            out += [f'<text x="{own[0][0]:.1f}" y="{own[0][1] - 7:.1f}" text-anchor="{anchor}" fill="{colour}">R = {window}</text>']
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="+")
    parser.add_argument("--out")
    args = parser.parse_args()
    points = [(int(w), float(packed), float(kl)) for w, packed, kl in (own.split(":") for own in args.points)]
    for window, packed, kl in sorted(points):
        columns = (f"{bits(n, window, packed):.2f} ({allocated(n, window, packed):.2f})" for n in LENGTHS)
        print(f"| {window} | {packed:.2f} | {kl:.4f} | {' | '.join(columns)} |")
    if args.out:
        size = f'width="{3 * (WIDTH + LEFT) + 30}" height="{TOP + HEIGHT + 40}"'
        body = [line for index, length in enumerate(LENGTHS) for line in panel(index, length, points)]
        note = f'<text x="{LEFT}" y="{TOP + HEIGHT + 34}">KL in nats against bits of a scalar, averaged over 128 lengths</text>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        background = '<rect width="100%" height="100%" fill="#fff"/>'
        with open(args.out, "w") as file:
            file.write("\n".join([head, background, *body, note, "</svg>", ""]))


if __name__ == "__main__":
    main()
