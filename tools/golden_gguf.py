#!/usr/bin/env python3
"""A GGUF file with every type of tensor that is read, and the numbers that they stand for.

For each type the file has a tensor `raw.<type>` of random blocks and a tensor `numbers.<type>` of F32, which the `gguf`
package's dequantiser made of them. All bits of codes are random; scales in half precision are moderate and of both
signs, and one block has a scale of 0. Powers of two of MXFP4 are among those whose numbers single precision holds,
down to its subnormals. Q8_K has no dequantiser in the package: its numbers are a scale in single precision times codes.

    pip install gguf numpy
    python tools/golden_gguf.py --out fixtures/golden
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ROWS, COLS = 3, 512

# Bytes of a block at which a scale or a minimum in half precision lies.
SCALES = {
    Type.Q4_0: [0],
    Type.Q4_1: [0, 2],
    Type.Q5_0: [0],
    Type.Q5_1: [0, 2],
    Type.Q8_0: [0],
    Type.Q2_K: [80, 82],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.Q6_K: [208],
    Type.IQ4_NL: [0],
    Type.IQ4_XS: [0],
    Type.MXFP4: [],
}


def blocks(kind, rng):
    """Rows of random blocks, as bytes."""
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (ROWS * COLS // numbers, size), dtype=np.uint8)
    for place in SCALES[kind]:
        scale = (rng.uniform(0.001, 0.02, len(raw)) * rng.choice([-1, 1], len(raw))).astype(np.float16)
        scale[1] = 0
        raw[:, place : place + 2] = scale.view(np.uint8).reshape(-1, 2)
    if kind == Type.MXFP4:
        raw[:, 0] = rng.integers(100, 140, len(raw))
        raw[:6, 0] = [0, 1, 2, 3, 127, 251]
    return raw.reshape(ROWS, -1)


def q8_k(rng):
    """Rows of Q8_K: a scale, 256 codes, and the sums of 16 codes each."""
    count = ROWS * COLS // 256
    scale = rng.uniform(-0.02, 0.02, (count, 1)).astype(np.float32)
    codes = rng.integers(-128, 128, (count, 256), dtype=np.int8)
    sums = codes.reshape(count, 16, 16).sum(axis=2, dtype=np.int16)
    raw = np.concatenate([scale.view(np.uint8), codes.view(np.uint8), sums.view(np.uint8)], axis=1)
    return raw.reshape(ROWS, -1), (scale * codes.astype(np.float32)).reshape(ROWS, COLS)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("fixtures/golden"))
    out = parser.parse_args().out
    rng = np.random.default_rng(13)
    writer = gguf.GGUFWriter(out / "types.gguf", "qwen3")

    def add(kind, raw, numbers):
        writer.add_tensor(f"raw.{kind.name}", raw, raw_dtype=kind)
        writer.add_tensor(f"numbers.{kind.name}", numbers)

    plain = rng.normal(0, 0.1, (ROWS, COLS)).astype(np.float32)
    for kind in [Type.F32, Type.F16, Type.BF16]:
        raw = gguf.quants.quantize(plain, kind)
        add(kind, raw, gguf.quants.dequantize(raw, kind).astype(np.float32))
    for kind in SCALES:
        raw = blocks(kind, rng)
        numbers = gguf.quants.dequantize(raw, kind)
        assert numbers.shape == (ROWS, COLS) and np.isfinite(numbers).all(), kind
        add(kind, raw, numbers.astype(np.float32))
    add(Type.Q8_K, *q8_k(rng))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
