#!/usr/bin/env python3
"""Golden values for the cache quantiser, the Hadamard rotation and quantised decode attention.

Everything here is written straight from the definitions with numpy, and shares no code with
the engine. It writes

  <out>/quant.json           quantiser cases and Hadamard cases
  <out>/attention_<d>.json   one decode step over a partly quantised cache, per head size d

Definitions
-----------
QF quantiser, b bits, one group of values x (f16-representable), arithmetic in float32:
    mn   = f16(min(x))
    s    = f16((max(x) - mn) / (2^b - 1))
    code = round_half_even(clamp((x - mn) / s, 0, 2^b - 1))      code = 0 where s == 0
    x^   = code * s + mn
with the *stored* (f16) mn and s used in the last two lines.

Hadamard, order n:  H = (had(K) kron Sylvester(n / K)) / sqrt(n), applied to row vectors as
y = x H; K = 20 for n = 80, 12 for n = 96, else 1. had(12) and had(20) are Paley I matrices:
q = K - 1 prime, chi the quadratic character mod q, Q[i][j] = chi(j - i),
S = [[0, 1 ... 1], [-1 ... -1 (column), Q]], had(K) = I + S. They are not symmetric.

Decode attention, `len` cached tokens before the current one, window R, group G:
    c = G * max(0, floor((len - R) / G)) oldest tokens are quantised, the others (and the
    current token) are exact;
    K: 2-bit QF per channel, in groups of G consecutive tokens;
    V: rotated, v H, rounded to f16, then 2-bit QF per token with one group of head_dim values;
    out = softmax(q K^ / sqrt(d)) V^ H^T      (float64, from the stored f16 mn and s).

Usage:  python tools/golden_quant.py [--out fixtures/golden]
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
SEED = 20240611


# ---------------------------------------------------------------- definitions


def qf(x, bits):
    """Quantises one group. Returns (mn, s, codes, x^): f16, f16, ints, f32."""
    x = np.asarray(x, F32)
    top = F32(2**bits - 1)
    mn = F16(x.min())
    s = F16((x.max() - F32(mn)) / top)
    if s == 0:
        codes = np.zeros(x.shape, F32)
    else:
        # np.rint rounds half to even.
        codes = np.rint(np.clip((x - F32(mn)) / F32(s), F32(0), top))
    # code * s is exact in f32 (at most 8 + 11 bits), so a fused multiply-add agrees.
    back = codes * F32(s) + F32(mn)
    assert back.dtype == F32
    return mn, s, codes.astype(np.int64), back


def had_factor(n):
    return {80: 20, 96: 12}.get(n, 1)


def paley(order):
    """Paley I Hadamard matrix of the given order, order - 1 a prime that is 3 mod 4."""
    q = order - 1
    assert q % 4 == 3 and all(q % p for p in range(2, q))
    squares = {i * i % q for i in range(1, q)}

    def chi(a):
        a %= q
        return 0 if a == 0 else (1 if a in squares else -1)

    s = np.zeros((order, order), np.int64)
    s[0, 1:] = 1
    s[1:, 0] = -1
    s[1:, 1:] = [[chi(j - i) for j in range(q)] for i in range(q)]
    h = np.eye(order, dtype=np.int64) + s
    assert set(np.unique(h)) == {-1, 1}
    return h


def sylvester(n):
    assert n & (n - 1) == 0
    h = np.ones((1, 1), np.int64)
    while len(h) < n:
        h = np.kron(np.array([[1, 1], [1, -1]]), h)
    return h


def hadamard_signs(n):
    k = had_factor(n)
    h = np.kron(paley(k) if k > 1 else np.ones((1, 1), np.int64), sylvester(n // k))
    assert (h @ h.T == n * np.eye(n, dtype=np.int64)).all()
    return h


def hadamard(n):
    return hadamard_signs(n).astype(F64) / math.sqrt(n)


# ---------------------------------------------------------------- JSON numbers


def num32(v):
    """The shortest decimal that reads back as exactly this float32 (also by way of f64)."""
    v = F32(v)
    out = float(np.format_float_scientific(v, unique=True))
    if out == int(out) and abs(out) < 1e9:
        out = int(out)
    assert F32(out) == v
    return out


def nums32(a):
    a = np.asarray(a)
    return [nums32(r) for r in a] if a.ndim > 1 else [num32(v) for v in a]


def nums64(a):
    a = np.asarray(a)
    return [nums64(r) for r in a] if a.ndim > 1 else [float(f"{v:.12g}") for v in a]


def dump(path, doc):
    """One line per top-level entry, and per element of a top-level list."""
    parts = []
    for key, val in doc.items():
        if isinstance(val, list) and val and isinstance(val[0], (list, dict)):
            rows = ",\n".join(json.dumps(v, separators=(",", ":")) for v in val)
            parts.append(f"{json.dumps(key)}:[\n{rows}\n]")
        else:
            parts.append(f"{json.dumps(key)}:{json.dumps(val, separators=(',', ':'))}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    json.loads(path.read_text())
    print(f"{path}  {path.stat().st_size / 1000:.1f} kB")


# ---------------------------------------------------------------- (a) quantiser


def group_kinds(bits, n, rng):
    """(name, x) pairs; every x is f16-representable."""
    top = 2**bits - 1
    f16 = lambda a: np.asarray(a, F64).astype(F16)
    yield "normal", f16(rng.standard_normal(n))
    yield "constant", f16(np.full(n, -1.375))
    yield "zeros", f16(np.zeros(n))
    # Large offset: at 400 the f16 spacing is 0.25, so few distinct values are left.
    yield "offset", f16(400 + 0.5 * rng.standard_normal(n))
    yield "negative", f16(-np.abs(rng.standard_normal(n)) * 3 - 0.01)
    # Tiny range: a few f16 steps at 1.0. The scale comes out small (8 bit: subnormal).
    yield "tiny_range", f16(1 + rng.integers(0, 4, n) * 2.0**-10)
    # Subnormal inputs: the scale rounds to a few units of 2^-24, or to zero.
    yield "subnormal", f16(rng.integers(0, 3, n) * 2.0**-24)
    # The largest f16 range: max - min overflows f16, but not f32.
    wide = f16(rng.uniform(-60000, 60000, n))
    wide[0] = F16(65504)
    if n > 1:
        wide[-1] = F16(-65504)
    yield "wide", wide
    # One outlier in an otherwise narrow group.
    out = f16(0.05 * rng.standard_normal(n))
    out[n // 2] = F16(9)
    yield "outlier", out
    if n > 1:
        # Exact ties: mn = -0.5, s = 2^-4 and x at half steps, so rounding is to even.
        half = rng.integers(0, 2 * top + 1, n)
        odd = 2 * rng.integers(0, top, n) + 1
        half[: max(1, n // 2)] = odd[: max(1, n // 2)]
        half[0], half[-1] = 0, 2 * top
        if n >= 7:
            half[1:5] = [1, 3, 5, 2 * top - 1]  # 0.5, 1.5, 2.5 and top - 0.5
        yield "ties", f16(-0.5 + half * 2.0**-5)


def quant_cases(rng):
    cases = []
    for bits in (2, 4, 8):
        for n in (1, 7, 32, 80, 128):
            for kind, x in group_kinds(bits, n, rng):
                # The bulk of the cases need not be repeated at every length.
                if n in (32, 80) and kind not in ("normal", "offset", "ties"):
                    continue
                x = x + F16(0)  # -0 becomes +0: the minimum is then one value
                assert x.dtype == F16 and np.isfinite(x).all()
                mn, s, codes, back = qf(x, bits)
                assert np.isfinite(s) and codes.min() >= 0 and codes.max() < 2**bits
                if kind == "ties":
                    t = (x.astype(F64) - F64(mn)) / F64(s)
                    assert s == F16(2.0**-4) and (t % 1 == 0.5).any()
                cases.append(
                    {
                        "name": f"{kind}-b{bits}-n{n}",
                        "bits": bits,
                        "x": nums32(x),
                        "mn": num32(mn),
                        "s": num32(s),
                        "mn_bits": int(mn.view(np.uint16)),
                        "s_bits": int(s.view(np.uint16)),
                        "codes": codes.tolist(),
                        "xhat": nums32(back),
                    }
                )
    assert any(c["s"] == 0 and min(c["x"]) != max(c["x"]) for c in cases)
    return cases


# ---------------------------------------------------------------- (b) Hadamard


def hadamard_cases(rng):
    cases = []
    for n in (64, 80, 96, 128, 256):
        h = hadamard(n)
        x = np.round(rng.standard_normal(n), 3).astype(F32)
        y = x.astype(F64) @ h
        assert np.allclose(y @ h.T, x, atol=1e-12)
        # The sum over one row tells a wrong order of the Kronecker factors apart from
        # a wrong transposition; one whole row pins both down.
        cases.append(
            {"n": n, "k": had_factor(n), "x": nums32(x), "y": nums64(y), "row1_signs": hadamard_signs(n)[1].tolist()}
        )
    return cases


# ---------------------------------------------------------------- (c) attention


def margin(t):
    """Distance of t to the nearest rounding boundary k + 0.5."""
    return np.abs((t - np.floor(t)) - 0.5)


def attention_case(d, cached, rng, window=128, group=128, bits=2, heads=2):
    """One decode step. K and V are small whole numbers, so that the file stays small and
    every value is exact in f16; q is scaled to make the softmax neither flat nor one-hot."""
    total = cached + 1  # the last row is the current token
    c = group * max(0, (cached - window) // group)
    top = F32(2**bits - 1)

    k = np.rint(rng.standard_normal((total, d)) * 30)
    k[:, 3] += 250  # an outlier channel, as real K caches have
    k[:, d // 2] -= 120
    v = np.rint(rng.standard_normal((total, d)) * rng.uniform(5, 40, (total, 1)))
    v[:, 5] += 40
    q = (rng.standard_normal((heads, d)) * 0.04).astype(F16)

    # K sits on a grid, and exact ties would then be common: a test of the attention should not
    # hang on them (quant.json has them), so move such values by one.
    for g in range(0, c, group):
        for ch in range(d):
            while True:
                x = k[g : g + group, ch]
                mn, s, _, _ = qf(x, bits)
                bad = margin((x - F64(mn)) / F64(s)) < 1e-3
                if not bad.any():
                    break
                x[bad] += np.where(x[bad] < x.max(), 1, -1)

    # Nor should it hang on the last bit of the rotation, which is inexact in f32: redraw a V
    # row in which that could move a code or a stored f16. Rotated rows wait in an f16 window
    # before they are quantised, so they are rounded to f16 first.
    h = hadamard(d)

    def rotated(row):
        exact = row.astype(F64) @ h
        return exact, exact.astype(F16).astype(F64)

    def near_boundary(row):
        exact, kept = rotated(row)
        if margin(exact / np.spacing(np.abs(exact.astype(F16))).astype(F64)).min() < 1e-3:
            return True
        mn, s, _, _ = qf(kept, bits)
        if margin(np.clip((kept - F64(mn)) / F64(s), 0, float(top))).min() < 1e-5:
            return True
        return margin((kept.max() - F64(mn)) / float(top) / F64(np.spacing(np.abs(s)))) < 1e-2

    for t in range(c):
        while near_boundary(v[t]):
            v[t, rng.integers(d)] += 1

    k16, v16 = k.astype(F16), v.astype(F16)
    assert (k16.astype(F64) == k).all() and (v16.astype(F64) == v).all()

    khat = k.astype(F64)
    k_mn, k_s = np.zeros((c // group, d), F16), np.zeros((c // group, d), F16)
    for i in range(c // group):
        rows = slice(i * group, (i + 1) * group)
        for ch in range(d):
            mn, s, codes, _ = qf(k16[rows, ch], bits)
            khat[rows, ch] = codes * F64(s) + F64(mn)
            k_mn[i, ch], k_s[i, ch] = mn, s

    vrot = np.array([rotated(row)[1] for row in v])
    v_mn, v_s = np.zeros(c, F16), np.zeros(c, F16)
    for t in range(c):
        mn, s, codes, _ = qf(vrot[t], bits)
        vrot[t] = codes * F64(s) + F64(mn)
        v_mn[t], v_s[t] = mn, s

    def attend(keys, values):
        logits = q.astype(F64) @ keys.T / math.sqrt(d)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return p @ values, p

    out_rot, p = attend(khat, vrot)
    out = out_rot @ h.T
    exact, _ = attend(k.astype(F64), v.astype(F64))
    ess = 1 / (p**2).sum(axis=1)
    print(f"d={d}: c={c} of {cached}, effective tokens {ess.round(1)}, "
          f"|out| {np.abs(out).mean():.3g}, |out - exact| {np.abs(out - exact).mean():.3g}")
    return {
        "about": "row t of k and v is token t, the last row is the current token; see tools/golden_quant.py",
        "head_dim": d,
        "cached": cached,
        "window": window,
        "group": group,
        "bits": bits,
        "quantised": c,
        "q": nums32(q),
        "out": nums64(out),
        "out_unquantised": nums64(exact),
        "k_min": nums32(k_mn),
        "k_scale": nums32(k_s),
        "v_min": nums32(v_mn),
        "v_scale": nums32(v_s),
        "k": k.astype(int).tolist(),
        "v": v.astype(int).tolist(),
    }


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("fixtures/golden"))
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    dump(
        args.out / "quant.json",
        {
            "about": "see tools/golden_quant.py; y = x H, H = had(k) kron Sylvester(n/k) / sqrt(n)",
            "quantiser": quant_cases(np.random.default_rng(SEED)),
            "hadamard": hadamard_cases(np.random.default_rng(SEED + 1)),
            "had12": ["".join("+" if v > 0 else "-" for v in row) for row in paley(12)],
            "had20": ["".join("+" if v > 0 else "-" for v in row) for row in paley(20)],
        },
    )
    for d, cached in ((64, 300), (80, 270), (128, 270)):
        case = attention_case(d, cached, np.random.default_rng([SEED, d]))
        dump(args.out / f"attention_{d}.json", case)


if __name__ == "__main__":
    main()
