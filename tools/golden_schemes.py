#!/usr/bin/env python3
"""Golden values for whole schemes: one decode step over a cache that each scheme has packed.

Nothing here shares code with the engine. It writes <out>/schemes.safetensors, and <out>/clip.json with
single groups that are clipped.

Input sets A, B, C
------------------
  <set>.q         F16 [1][heads][d]      query of the last token, post-RoPE
  <set>.k, .v     F16 [T][kv_heads][d]   keys (post-RoPE) and values of all T tokens
  <set>.inv_freq  F32 [d/2]              f32(10000^(-2c/d)) for the pair of channels (c, c + d/2)

Cases
-----
  <case>.out          F32 [heads][d]          what attention returns for the last token
  <case>.key_basis    F32 [kv_heads][d][d]    where the transform of the keys is "basis"; all heads share it
  <case>.value_basis  F32 [kv_heads][d][d]    where the transform of the values is "basis"
  <case>.perm         I32 [kv_heads * d]      where the keys are permuted
  <case>.sinks        I32 [count]             positions of massive or pivot tokens
Metadata (all strings): `cases`, the names joined by spaces; for each set `<set>.shape`, T heads
kv_heads d; for each case `.set`, `.scheme` (TOML), `.key_frame` and `.value_frame` (none, hadamard
or basis: the frame in which the engine is fed), `.rms` of the output, `.error` (rms of output minus
attention over the unquantised cache) and `.spread` (largest change of the output when rotations,
RoPE and power iteration run in float32 here too, which says how far rounding alone may move it).

What happens: the first T - 1 tokens enter the cache in one prefill pass, then the last token is
decoded. It sees its own key and value, and the cache as it is for len = T - 1 tokens. With attention
= "stored" a token is quantised before it is attended to, its own key and value included.

Frames. A transform "hadamard" or "basis" lies outside of the cache: the engine gets q H and k H (for
a basis q B and k B; v B_v), each a product in float64 of the stored numbers, rounded to float32, and
returns outputs in the frame of the transformed values. H and B act on row vectors, per head.
"grouped-hadamard" and "token-hadamard" lie inside: the engine gets plain q, k, v.

The definitions are in scheme_oracle.py.

Usage:  python tools/golden_schemes.py [--out fixtures/golden]
"""

import argparse
import json
import math
import struct
import tomllib
from pathlib import Path

import numpy as np

from golden_quant import dump, group_kinds, hadamard, nums32
from scheme_oracle import F16, F32, F64, Grouped, attention, extremes, frame_heads, inv_freq, low_rank
from scheme_oracle import clipped, qf, qi, quantise_channels, rope, run, splitmix

SEED = 20251123
SETS = {"A": (400, 8, 4, 64), "B": (400, 4, 2, 128), "C": (300, 3, 3, 80)}  # T, heads, kv_heads, d


# ---------------------------------------------------------------- inputs


def make_set(name):
    total, heads, kv_heads, d = SETS[name]
    rng = np.random.default_rng([SEED, ord(name)])
    half = d // 2
    # Keys: channels with a mean, some rotary pairs far larger than the others.
    scale = rng.lognormal(0, 0.3, (kv_heads, d))
    mean = 0.6 * rng.standard_normal((kv_heads, d))
    for h in range(kv_heads):
        for pair, gain in zip(rng.choice(half, 3, replace=False), (4, 6, 9)):
            scale[h, [pair, pair + half]] *= gain / 2
            mean[h, [pair, pair + half]] += gain * rng.choice([-1, 1], 2)
    k = mean + scale * rng.standard_normal((total, kv_heads, d))
    norm = rng.lognormal(0, 0.15, total)
    norm[[0, 2, 40]] = 0.05, 0.3, 0.2
    norm[[5, 77, 133, 260]] = 3, 4, 3.5, 2.5
    k *= norm[:, None, None]
    # Values: uneven channels, single outliers, nearly nothing at the first token.
    v = rng.lognormal(0, 0.4, (kv_heads, d)) * rng.standard_normal((total, kv_heads, d))
    v += 0.3 * rng.standard_normal((kv_heads, d))
    spikes = rng.random(v.shape) < 0.003
    v[spikes] *= 8
    v[0] *= 0.05
    # Queries: small where keys are large, and so long that a head attends to a tenth of the tokens.
    k16 = rope(k, np.arange(total)).astype(F16)
    q = rng.standard_normal((1, heads, d)) / np.repeat(np.sqrt(scale**2 + mean**2), heads // kv_heads, 0)
    q = rope(q, [total - 1])
    for i in range(heads):
        logits = k16[:, i // (heads // kv_heads)].astype(F64) @ q[0, i]

        def attended(gain):
            p = np.exp(gain * (logits - logits.max()))
            return p.sum() ** 2 / (p**2).sum()

        lo, hi = 0.0, 100.0
        for _ in range(60):
            mid = (lo + hi) / 2
            lo, hi = (mid, hi) if attended(mid) > total / 10 else (lo, mid)
        q[0, i] *= lo * math.sqrt(d)
    return {"shape": SETS[name], "q": q.astype(F16), "k": k16, "v": v.astype(F16), "inv_freq": inv_freq(d)}


def orthogonal(n, rng):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def basis(moment, high, rng):
    """Principal axes, ascending, mixed at random among the low and among the `high` last ones."""
    d = len(moment)
    axes = np.linalg.eigh(moment)[1]
    mix = np.zeros((d, d))
    mix[: d - high, : d - high], mix[d - high :, d - high :] = orthogonal(d - high, rng), orthogonal(high, rng)
    return (axes @ mix).astype(F32)


# ---------------------------------------------------------------- cases


def side(bits, axis=None, group=128, quantizer="float-min", **more):
    if bits == 16:
        return {"bits": 16}
    if quantizer == "integer-zero":
        more = {"clip": 1.0} | more
    return {"bits": bits, "axis": axis, "group": group, "quantizer": quantizer} | more


def channel(bits, group=128, **more):
    return side(bits, "channel", group, **more)


def token(bits, group=128, **more):
    return side(bits, "token", group, **more)


def qi_token(bits, group=128, **more):
    return side(bits, "token", group, "integer-zero", **more)


def rotated_keys(permutation, heads=4):
    more = {"transform": "grouped-hadamard", "heads": heads, "permutation": permutation, "position": "pre-rope"}
    return qi_token(2, clip=0.8, **more)


GUARANTEED = {"tokens": 128, "schedule": "guaranteed"}
KIVI = {"tokens": 128, "schedule": "kivi"}
H = {"transform": "hadamard"}


def cases():
    """(set, name, scheme, positions of sinks)."""

    def case(set_, name, keys, values, window=GUARANTEED, attention=None, first=None, massive=None, pivots=None):
        scheme = {"name": name}
        if attention:
            scheme["attention"] = attention
        scheme |= {"keys": keys, "values": values}
        if window:
            scheme["window"] = window
        positions = None
        if first:
            scheme["sinks"] = {"kind": "first", "count": first}
        for kind, given in (("massive", massive), ("pivots", pivots)):
            if given:
                positions = np.array(given, np.int32)
                scheme["sinks"] = {"kind": kind, "count": len(given)}
        return set_, f"{set_}-{name}", scheme, positions

    # KIVI, KVLinC's quantiser and their neighbours.
    yield case("A", "kivi2-g32", channel(2, 32), token(2, 32))
    yield case("A", "kivi4-g64", channel(4, 64), token(4, 64))
    yield case("A", "kivi2-schedule", channel(2), token(2), KIVI)
    yield case("B", "kivi2-g128", channel(2), token(2))
    yield case("B", "kivi3-g64", channel(3, 64), token(3, 64), GUARANTEED | {"tokens": 256})
    yield case("B", "kivi8-g128", channel(8), token(8))
    yield case("B", "kivi2-sinks", channel(2), token(2), first=4)
    yield case("C", "kivi2-g32", channel(2, 32), token(2, 32))
    yield case("C", "kivi2-schedule-sinks", channel(2, 64), token(2, 64), KIVI, first=4)
    yield case("A", "kvlinc", channel(2), token(2, **H))
    yield case("C", "kvlinc-sinks", channel(2), token(2, **H), first=4)
    yield case("B", "mixed-4-2", channel(4), token(2))
    yield case("B", "mixed-16-3", side(16), token(3))
    yield case("B", "values-channel", channel(2), channel(2, 64))
    yield case("C", "values-channel-pivots", channel(3), channel(2), pivots=[1, 5, 77, 280])
    yield case("B", "keys-token", token(2), token(2))
    yield case("C", "keys-token-g64", token(4, 64), token(2, 64))
    # Integer zero points of groups that do not contain 0.
    shifted = side(2, "channel", 32, "integer-zero", clip=0.8)
    yield case("A", "keys-channel-qi", shifted, qi_token(3, 32))
    shifted = shifted | {"include_zero": True}
    yield case("B", "keys-channel-qi-zero", shifted, shifted | {"bits": 4})
    # The part of each group's range that misses least.
    clip = {"clip": "mse"}
    yield case("A", "clip-keys", channel(2, **clip), token(2, **H), first=4)
    yield case("B", "clip-keys-3", channel(3, **clip), token(2, **H), first=4)
    yield case("C", "clip-token", token(2, 64, **clip), qi_token(3, 32, **clip), first=4)
    zero = side(2, "channel", 32, "integer-zero", include_zero=True, **clip)
    yield case("A", "clip-channel-qi", zero, channel(2, 64, **clip))
    # Rotations on both sides.
    quarot = qi_token(2, include_zero=True, **H)
    yield case("A", "quarot", quarot, quarot)
    yield case("C", "quarot", quarot, quarot)
    yield case("B", "quarot-official", quarot, quarot, None, "stored")
    yield case("A", "keys-channel-hadamard", channel(2, **H), token(2, **H))
    akvq = qi_token(2, clip=0.8, **H)
    yield case("B", "akvq-vl", akvq, akvq, pivots=[0, 5, 133, 390])
    yield case("A", "akvq-vl", akvq, akvq, pivots=[0, 2, 77, 133, 255])
    resq = qi_token(2, include_zero=True, transform="basis", high_precision=0.03125)
    yield case("A", "resq", resq, resq)
    yield case("B", "resq", resq, resq)
    yield case("C", "high-precision", *[qi_token(2, 64, include_zero=True, high_precision=0.05, **H)] * 2)
    # GEAR.
    yield case("A", "gear-l", channel(2, low_rank=2), token(2, low_rank=2))
    yield case("B", "gear-l-g64", channel(2, 64, low_rank=2), token(2, 64, low_rank=2))
    yield case("C", "gear-l-rank4-sinks", channel(2, 64, low_rank=4), token(2, 64, low_rank=4), first=4)
    gear = {"low_rank": 2, "outliers": 0.01}
    yield case("B", "gear", channel(2, 64, **gear), token(2, 64, **gear))
    yield case("A", "gear-sinks", channel(2, low_rank=2, outliers=0.03), token(2, low_rank=2, outliers=0.04), first=4)
    # RotateKV.
    values = qi_token(2, clip=0.8, **H)
    yield case("A", "rotatekv-none", rotated_keys("none"), values, None)
    yield case("A", "rotatekv-local", rotated_keys("local"), values, None, massive=[0, 5, 133, 260])
    yield case("A", "rotatekv-local-2-heads", rotated_keys("local", 2), values)
    yield case("A", "rotatekv-global-2-heads", rotated_keys("global", 2), values)
    yield case("A", "rotatekv-stored", rotated_keys("local"), values, None, "stored")
    yield case("B", "rotatekv-global", rotated_keys("global"), values, None)
    yield case("B", "rotatekv-window", rotated_keys("none"), values, massive=[0, 5, 133, 300])
    yield case("B", "rotatekv-stored-sinks", rotated_keys("global"), values, None, "stored", massive=[0, 5, 133, 260])
    yield case("C", "rotatekv-local", rotated_keys("local"), values, None)
    yield case("C", "rotatekv-global", rotated_keys("global"), values, massive=[0, 5, 40, 77])
    # Rotations along tokens.
    th = {"transform": "token-hadamard"}
    yield case("A", "token-hadamard-kc-vt", channel(2, **th), token(2, **th))
    yield case("B", "token-hadamard-kt-vc", token(2, **th), channel(2, **th))
    yield case("C", "token-hadamard-keys", channel(2, 32, **th), token(2))
    yield case("C", "token-hadamard-values", channel(2), qi_token(2, 64, clip=0.8, **th))


def toml(scheme):
    lines, tables = [], []
    for key, val in scheme.items():
        if isinstance(val, dict):
            tables += ["", f"[{key}]"] + [f"{k} = {json.dumps(v)}" for k, v in val.items()]
        else:
            lines.append(f"{key} = {json.dumps(val)}")
    text = "\n".join(lines + tables) + "\n"
    assert tomllib.loads(text) == scheme
    return text


def case_tensors(data, name, scheme, positions):
    total, _, kv_heads, d = data["shape"]
    rng = np.random.default_rng([SEED, *name.encode()])
    extra = {}
    if positions is not None:
        extra["sinks"] = positions
    keys, values = scheme["keys"], scheme["values"]
    if keys.get("transform") == "basis":
        high = round(keys["high_precision"] * d)
        k, v = data["k"].astype(F64), data["v"].astype(F64)
        extra["key_basis"] = np.stack([basis(np.einsum("thi,thj->ij", k, k), high, rng)] * kv_heads)
        extra["value_basis"] = np.stack([basis(v[:, h].T @ v[:, h], high, rng) for h in range(kv_heads)])
        for b in (extra["key_basis"], extra["value_basis"]):
            assert all(np.allclose(m.astype(F64) @ m.T, np.eye(d), atol=1e-6) for m in b)
    permutation = keys.get("permutation", "none")
    if permutation == "global":
        extra["perm"] = rng.permutation(kv_heads * d).astype(np.int32)
    if permutation == "local":
        m = frame_heads(keys["heads"], kv_heads)
        extra["perm"] = np.concatenate([rng.permutation(m * d) for _ in range(kv_heads // m)]).astype(np.int32)
    return extra


def clip_cases():
    """Groups with clip = "mse", number by number."""
    rng = np.random.default_rng([SEED, *b"clip"])
    shares = set()
    for bits in (2, 3, 4, 8):
        for n in (1, 32, 128):
            # Outliers at both ends.
            tails = np.concatenate([[-4, 4], rng.standard_normal(n)]).astype(F16)
            for kind, x in [*group_kinds(bits, n, rng), ("tails", tails)]:
                x = (x + F16(0)).astype(F32)
                for quantizer in ("float-min", "integer-zero"):
                    # Zero points of narrow groups far from zero are another rule's.
                    if quantizer == "integer-zero" and kind in ("offset", "tiny_range", "subnormal"):
                        continue
                    _, codes, back, share = clipped(x[None], {"quantizer": quantizer, "bits": bits})
                    shares.add(float(share[0, 0]))
                    name = f"{kind}-{quantizer}-b{bits}-n{n}"
                    yield {"name": name, "bits": bits, "quantizer": quantizer, "x": nums32(x), "xhat": nums32(back[0]),
                           "codes": codes[0].astype(int).tolist()}
    assert len(shares) == 7, shares


# ---------------------------------------------------------------- checks


def check_quantisers():
    x = np.array([-1, -0.2, 0.4, 2], F32)
    back, codes, s, mn = qf(x, 2)
    assert (mn, s) == (-1, 1) and codes.tolist() == [0, 1, 1, 3] and back.tolist() == [-1, 0, 0, 2]
    assert qf(np.array([0, 0.5, 1.5, 2.5, 3], F32), 2)[1].tolist() == [0, 0, 2, 2, 3]
    # In exact arithmetic s = 0.8, the codes are 0 1 1 3 and 0.4 / s is a tie. The stored s is a
    # little smaller than 0.8, so 0.4 lies above the tie; everything else is as in the exact case.
    back, codes, s, zp = qi(x, 2, 0.8)
    assert s == F16(0.8) and float(s[0]) < 0.8 and zp == 1 and codes.tolist() == [0, 1, 2, 3]
    assert np.allclose(back, [-0.8, 0, 0.8, 1.6], atol=1e-3)
    back, codes, s, zp = qi(x * F32(1.25), 2, 0.8)  # s = 1: exact, and 0.5 rounds to 0
    assert (s, zp) == (1, 1) and codes.tolist() == [0, 1, 1, 3] and back.tolist() == [-1, 0, 0, 2]
    for value in (0.0, 1.25, -3.5):
        assert (qf(np.full(5, value, F32), 2)[0] == value).all()
        assert (qi(np.full(5, value, F32), 2, 1.0)[0] == value).all()
        assert np.allclose(qi(np.full(5, value, F32), 2, 1.0, True)[0], value, rtol=1e-3)
    # Values that are spread evenly lie best in the middles of four quarters; four values at four codes are exact.
    even = (np.arange(128, dtype=F32) / 64 - 1)[None]
    assert clipped(even, channel(2))[3] == F32(0.76) and clipped(even, channel(8))[3] == 1
    assert clipped(np.arange(4, dtype=F32)[None], channel(2))[3] == 1
    # One group at a time, in plain Python.
    rng = np.random.default_rng(SEED)
    for bits in (2, 3, 4, 8):
        x = (3 * rng.standard_normal(40) + 1).astype(F16).astype(F32)
        top = 2**bits - 1
        mn, s = float(F16(x.min())), float(F16((x.max() - x.min()) / F32(top)))
        ref = [round(min(max((float(a) - mn) / s, 0), top)) * s + mn for a in x]
        assert np.allclose(qf(x, bits)[0], ref, atol=1e-9)
        hi, lo = 0.8 * float(x.max()), 0.8 * float(x.min())
        s = float(F16((hi - lo) / top))
        zp = round(-lo / s)
        ref = [s * (min(max(round(float(a) / s) + zp, 0), top) - zp) for a in x]
        assert np.allclose(qi(x, bits, 0.8)[0], ref, atol=1e-9)
    assert splitmix(0) == 0 and splitmix(1) == 0xE220A8397B1DCDAF  # the generator's first output for seed 0


def check_rotations(sets):
    for n in (64, 80, 96, 128, 256, 512):
        h = hadamard(n)
        assert np.allclose(h @ h.T, np.eye(n), atol=1e-12) and np.allclose(h.T @ h, np.eye(n), atol=1e-12)
    for data in sets.values():
        total, heads, kv_heads, d = data["shape"]
        k, at = data["k"].astype(F64), np.arange(total)
        assert np.abs(rope(rope(k, at, -1), at) - k).max() < 1e-6
        # The product of queries and keys depends on the distance of their positions only.
        a, b = k[5:6], k[9:10]
        near = (rope(a, [3]) * rope(b, [10])).sum(), (rope(a, [203]) * rope(b, [210])).sum()
        assert abs(near[0] - near[1]) < 2e-3 * abs(k[5] * k[9]).sum()
        # RotateKV without quantisation is plain attention.
        for m in (1, 2, 4):
            perm = np.random.default_rng(m).permutation(kv_heads * d)
            frame = Grouped(rotated_keys("global", m), kv_heads, d, perm)
            back = frame.back(frame.there(k, at), at)
            q, v = data["q"][0], data["v"].astype(F64)
            assert np.abs(attention(q, back, v) - attention(q, k, v)).max() < 1e-9


def check_low_rank(sets):
    for data in sets.values():
        x = data["k"][:256, 0].astype(F32)
        e = x - quantise_channels(x[:, None], channel(2), np.arange(len(x)))[:, 0].astype(F32)
        best = np.linalg.svd(e.astype(F64), compute_uv=False)
        norms = [np.linalg.norm(e - low_rank(e, r)) for r in (1, 2, 4, 8)]
        bounds = [math.sqrt((best[r:] ** 2).sum()) for r in (1, 2, 4, 8)]
        assert all(a > b for a, b in zip([np.linalg.norm(e)] + norms, norms)), norms
        assert all(b <= n < 1.1 * b for n, b in zip(norms, bounds)), (norms, bounds)
        assert np.abs(low_rank(e, 2) - low_rank(e, 2, F32)).max() < 2e-3 * np.abs(e).max()
    mask = extremes(np.array([1, 5, 5, 0, 0, 2], F32), 1)
    assert mask.tolist() == [False, True, False, True, False, False]


# ---------------------------------------------------------------- output


def save(path, tensors, metadata):
    kinds = {"float16": "F16", "float32": "F32", "int32": "I32"}
    # Widest numbers first, so that all are aligned.
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header, data = {"__metadata__": metadata}, b""
    for name in order:
        a = np.ascontiguousarray(tensors[name]).astype(tensors[name].dtype.newbyteorder("<"))
        start = len(data)
        data += a.tobytes()
        kind, shape = kinds[tensors[name].dtype.name], list(a.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, len(data)]}
    assert all(isinstance(v, str) for v in metadata.values())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    print(f"{path}  {path.stat().st_size / 1000:.1f} kB")
    assert path.stat().st_size < 2_000_000


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("fixtures/golden"))
    args = ap.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    sets = {name: make_set(name) for name in SETS}
    check_quantisers()
    check_rotations(sets)
    check_low_rank(sets)

    dump(args.out / "clip.json", {"about": "see tools/golden_schemes.py", "groups": list(clip_cases())})
    tensors, metadata, names, outs = {}, {"about": "see tools/golden_schemes.py"}, [], {}
    for name, data in sets.items():
        metadata[f"{name}.shape"] = " ".join(map(str, data["shape"]))
        tensors |= {f"{name}.{t}": data[t] for t in ("q", "k", "v", "inv_freq")}
    for set_, name, scheme, positions in cases():
        data = sets[set_]
        extra = case_tensors(data, name, scheme, positions)
        out, exact, counts = run(data, scheme, extra)
        spread = float(np.abs(run(data, scheme, extra, F32)[0] - out).max())
        error = rms(out - exact)
        frames = [scheme[s].get("transform", "none") for s in ("keys", "values")]
        frames = ["none" if f in ("grouped-hadamard", "token-hadamard") else f for f in frames]
        numbers = {"rms": rms(out), "error": error, "spread": spread}
        print(f"{name:26} packed {counts}  " + "  ".join(f"{k} {v:.2e}" for k, v in numbers.items()))
        assert np.isfinite(out).all() and error > 0 and spread < 0.02 * error + 1e-6
        assert name not in names
        names.append(name)
        tensors[f"{name}.out"] = out.astype(F32)
        tensors |= {f"{name}.{t}": a for t, a in extra.items()}
        strings = {"set": set_, "scheme": toml(scheme), "key_frame": frames[0], "value_frame": frames[1]}
        strings |= {k: f"{v:.3e}" for k, v in numbers.items()}
        metadata |= {f"{name}.{k}": v for k, v in strings.items()}
        # No two schemes can be taken for one another.
        for other, (o, f, e) in outs.items():
            if other[0] == set_ and f == frames[1]:
                assert rms(o - out) > 0.05 * min(e, error), f"{name} is too close to {other}"
        outs[name] = (out, frames[1], error)
    metadata["cases"] = " ".join(names)
    save(args.out / "schemes.safetensors", tensors, metadata)


if __name__ == "__main__":
    main()
