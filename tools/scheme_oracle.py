"""What a scheme does to a cache, and what attention over it returns, in numpy.

Written straight from the definitions; shares no code with the engine. golden_schemes.py uses it.

Definitions
-----------
Cached keys and values are rounded to f16 (in their frame) before anything else.

Packed tokens, of `len` cached ones with window R, are the oldest
    none         len
    guaranteed   128 floor(max(0, len - R) / 128)
    kivi         keys floor(len / R) R, values max(0, len - R)
and the others stay f16. Pages are 128 tokens, on the grid of absolute positions. Packed positions
that are sinks stay f16 and take part in no group.

float-min, b bits, one group:      mn = f16(min)   s = f16((max - min) / (2^b - 1))
    code = rint(clip((x - mn) / s, 0, 2^b - 1))    x^ = code s + mn          code = 0 where s = 0
integer-zero with clip c:          mx = c max      mn = c min      (include_zero: mx >= 0 >= mn)
    s = f16((mx - mn) / (2^b - 1)) zp = f16(rint(-mn / s))
    code = clip(rint(x / s) + zp, 0, 2^b - 1)      x^ = s (code - zp)
    where s = 0 and mx != 0: s = f16(|mx|), zp = -sign(mx), code = 0
Arithmetic in float32, from the stored (f16) s, mn and zp; rint rounds half to even.

clip = "mse", one group: of the shares r = 1, .92, .84, .76, .68, .6, .5 of the range, around its middle, the one with the
least sum of (x - x^)^2; of equals the largest. For r < 1 the ends are m - r h and m + r h with m = (min + max) / 2 and
h = (max - min) / 2. All in float32, the sum value after value in the order of the group.

Groups. Axis "channel": `group` consecutive tokens of one channel. Axis "token": `group` consecutive
channels of one head of one token; the last group is what is left over.

high_precision p: the last h = round(p d) channels stay f16, groups are cut from the others.

outliers o: per vector (keys: a channel over the tokens of a page; values: a token's channels of one
head) the k = max(1, floor(o n)) largest and the k smallest of its n values (n = 128 for keys, d for
values; equal values: first the lowest index; sinks take no part) are replaced by the vector's mean
before the groups are quantised, and put back, in f16, afterwards.

low_rank r: for the n packed tokens of the prefill pass and each head, E = x - x^ [n][d], with zeros
where a token is a sink; P [d][r] starts from uniform numbers and thrice: (third time: P = qr(P).Q)
Q = E P, (third time: Q = qr(Q).Q), P = E^T Q. Q and P are stored in f16, x^ += Q P^T.
P[i][j] = (splitmix(i r + j) >> 40) / 2^24 at first, with splitmix(n) in wrapping 64-bit arithmetic
    x = 0x9e3779b97f4a7c15 n;  x = (x ^ x >> 30) 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) 0x94d049bb133111eb;  x ^ x >> 31

grouped-hadamard, m heads to a frame, m the largest of heads, heads / 2 ... 1 that divides kv_heads:
RoPE is undone at the key's position, a frame of m d numbers is multiplied by H_(m d), permuted,
new[j] = old[perm[j]], and cut into slices of d, which are quantised per token in groups of at most
d. "local": perm holds a permutation of 0 .. m d - 1 for each frame; "global": one of all channels of
the token. Read: the way back, then RoPE. RoPE turns the pair (c, c + d/2) by the float32 product
position inv_freq[c].

token-hadamard: each page X [128][...] is quantised as H_128 X (float32) and read as H_128^T X^'.

Hadamard, order n: H = (had(K) kron Sylvester(n / K)) / sqrt(n), y = x H; K = 20 for n = 80, 12 for n =
96, else 1; had(K) is the Paley I matrix of golden_quant.py. The inverse is the transpose.

Attention: softmax(q k^T / sqrt(d)) v in float64; query head i reads KV head i / (heads / kv_heads).
"""

import math

import numpy as np

from golden_quant import hadamard

F16, F32, F64 = np.float16, np.float32, np.float64
PAGE = 128


# ---------------------------------------------------------------- quantisers


def ends(x):
    """Smallest and largest along the last axis."""
    return x.min(-1, keepdims=True), x.max(-1, keepdims=True)


def qf(x, bits, within=None):
    """float-min along the last axis. Returns x^ (float64), codes, s, mn."""
    assert x.dtype == F32
    top = F32(2**bits - 1)
    lo, hi = within or ends(x)
    mn = lo.astype(F16)
    s = ((hi - lo) / top).astype(F16)
    assert np.isfinite(mn).all() and np.isfinite(s).all()
    safe = np.where(s == 0, F16(1), s).astype(F32)
    codes = np.rint(np.clip((x - mn.astype(F32)) / safe, F32(0), top))
    assert codes.dtype == F32
    codes[np.broadcast_to(s == 0, codes.shape)] = 0
    return codes.astype(F64) * s.astype(F64) + mn.astype(F64), codes, s, mn


def qi(x, bits, clip, include_zero=False, within=None):
    """integer-zero along the last axis. Returns x^ (float64), codes, s, zp."""
    assert x.dtype == F32
    top, clip = F32(2**bits - 1), F32(clip)
    lo, hi = within or ends(x)
    mx, mn = clip * hi, clip * lo
    if include_zero:
        mx, mn = np.maximum(mx, F32(0)), np.minimum(mn, F32(0))
    s = ((mx - mn) / top).astype(F16)
    flat = s == 0
    safe = np.where(flat, F16(1), s).astype(F32)
    zp = np.rint(-mn / safe).astype(F16)
    codes = np.clip(np.rint(x / safe) + zp.astype(F32), F32(0), top)
    assert codes.dtype == F32 and np.isfinite(s).all() and np.isfinite(zp).all()
    s = np.where(flat, np.abs(mx).astype(F16), s)
    zp = np.where(flat, -np.sign(mx).astype(F16), zp)
    codes[np.broadcast_to(flat, codes.shape)] = 0
    return s.astype(F64) * (codes.astype(F64) - zp.astype(F64)), codes, s, zp


SHARES = (1, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5)


def clipped(x, side):
    """x^ (float64), codes, x^ (float32) and share of each group's range, for the shares that miss least."""
    (lo, hi), best = ends(x), None
    middle, half = F32(0.5) * (lo + hi), F32(0.5) * (hi - lo)
    for share in map(F32, SHARES):
        within = (lo, hi) if share == 1 else (middle - share * half, middle + share * half)
        if side["quantizer"] == "float-min":
            back, codes, s, zero = qf(x, side["bits"], within)
            offset = zero.astype(F32)
        else:
            back, codes, s, zero = qi(x, side["bits"], 1, side.get("include_zero", False), within)
            offset = -s.astype(F32) * zero.astype(F32)
        short = codes * s.astype(F32) + offset
        error = np.add.accumulate((x - short) * (x - short), axis=-1)[..., -1:]
        assert error.dtype == F32
        tried = back, codes, short, np.full(error.shape, share)
        if best is None:
            best, least = tried, error
        better = error < least
        best = tuple(np.where(better, new, old) for new, old in zip(tried, best))
        least = np.where(better, error, least)
    return best


def quantise(x, side):
    """x^ of groups along the last axis."""
    if side.get("clip") == "mse":
        return clipped(x, side)[0]
    if side["quantizer"] == "float-min":
        return qf(x, side["bits"])[0]
    return qi(x, side["bits"], side["clip"], side.get("include_zero", False))[0]


def quantise_tokens(x, side, group=None):
    """Axis token: x [tokens][heads][channels]."""
    group = group or side["group"]
    out = np.empty(x.shape, F64)
    for a in range(0, x.shape[-1], group):
        out[..., a : a + group] = quantise(x[..., a : a + group], side)
    return out


def quantise_channels(x, side, members):
    """Axis channel: x [tokens][heads][channels], of which only `members` form groups. Others come back as NaN."""
    out = np.full(x.shape, np.nan)
    for a in range(0, len(x), side["group"]):
        rows = members[(members >= a) & (members < a + side["group"])]
        if len(rows):
            out[rows] = np.moveaxis(quantise(np.moveaxis(x[rows], 0, -1), side), -1, 0)
    return out


# ---------------------------------------------------------------- rotations


def inv_freq(d):
    return (10000.0 ** (-2 * np.arange(d // 2) / d)).astype(F32)


def rope(x, positions, sign=1, work=F64):
    """x [tokens][heads][d], turned by sign * position * inv_freq."""
    half = x.shape[-1] // 2
    angle = np.asarray(positions).astype(F32)[:, None] * inv_freq(2 * half)
    assert angle.dtype == F32
    cos, sin = np.cos(angle.astype(work))[:, None], sign * np.sin(angle.astype(work))[:, None]
    a, b = x[..., :half].astype(work), x[..., half:].astype(work)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def frame_heads(heads, kv_heads):
    while kv_heads % heads:
        heads //= 2
    return heads


class Grouped:
    """grouped-hadamard: there (to what is quantised) and back."""

    def __init__(self, side, kv_heads, d, perm, work=F64):
        self.m = frame_heads(side["heads"], kv_heads)
        self.h = hadamard(self.m * d).astype(work)
        self.work = work
        index = np.arange(kv_heads * d)
        if side["permutation"] == "local":
            base = index // (self.m * d) * (self.m * d)
            index = base + perm
        elif side["permutation"] == "global":
            index = perm
        assert sorted(index) == list(range(kv_heads * d))
        self.index, self.inverse = index, np.argsort(index)

    def there(self, k, positions):
        flat = rope(k, positions, -1, self.work).reshape(-1, self.h.shape[0])
        return (flat @ self.h).reshape(len(k), -1)[:, self.index].reshape(k.shape)

    def back(self, x, positions):
        flat = x.reshape(len(x), -1)[:, self.inverse].astype(self.work).reshape(-1, self.h.shape[0])
        return rope((flat @ self.h.T).reshape(x.shape), positions, 1, self.work)


# ---------------------------------------------------------------- residuals


def splitmix(n):
    mask = 2**64 - 1
    x = n * 0x9E3779B97F4A7C15 & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    return x ^ x >> 31


def uniform(rows, cols):
    return np.array([[(splitmix(i * cols + j) >> 40) / 2**24 for j in range(cols)] for i in range(rows)])


def low_rank(e, rank, work=F64):
    """f16 factors of e [n][d] by power iteration, as their product."""
    e = e.astype(work)
    p = uniform(e.shape[1], rank).astype(work)
    for loop in range(3):
        if loop == 2:
            p = np.linalg.qr(p)[0]
        q = e @ p
        if loop == 2:
            q = np.linalg.qr(q)[0]
        p = e.T @ q
    return q.astype(F16).astype(F64) @ p.astype(F16).astype(F64).T


def extremes(x, count):
    """Mask of the `count` largest and the `count` smallest along the last axis, lowest index first among equals."""
    mask = np.zeros(x.shape, bool)
    for order in (np.argsort(-x, axis=-1, kind="stable"), np.argsort(x, axis=-1, kind="stable")):
        np.put_along_axis(mask, order[..., :count], True, -1)
    return mask


def without_outliers(x, share, n):
    """x with its outliers along the last axis replaced by the mean, and their mask."""
    mask = extremes(x, max(1, math.floor(share * n)))
    mean = x.astype(F64).mean(-1, keepdims=True).astype(F32)
    return np.where(mask, mean, x).astype(F32), mask


# ---------------------------------------------------------------- the cache


def packed(window, len_, keys):
    if window is None:
        return len_
    r = window["tokens"]
    if window["schedule"] == "kivi":
        return len_ // r * r if keys else max(0, len_ - r)
    return PAGE * (max(0, len_ - r) // PAGE)


def stored(x, side, count, sinks, keys, frame=None, work=F64):
    """What is read back, in float64, of x [T][kv_heads][d], whose first `count` tokens are packed."""
    x = x.astype(F16)
    out = x.astype(F64)
    if side["bits"] == 16 or count == 0:
        return out
    d = x.shape[-1]
    rest = np.array([t for t in range(count) if t not in sinks])
    src = x[:count].astype(F32)

    if frame is not None:  # grouped-hadamard
        rotated = frame.there(src, np.arange(count)).astype(F32)
        back = frame.back(quantise_tokens(rotated, side, min(side["group"], d)), np.arange(count))
        out[rest] = back[rest]
        return out

    if side.get("transform") == "token-hadamard":
        assert count % PAGE == 0 and not sinks
        h = hadamard(PAGE).astype(work)
        for a in range(0, count, PAGE):
            page = np.einsum("st,thc->shc", h, src[a : a + PAGE].astype(work)).astype(F32)
            if side["axis"] == "channel":
                back = quantise_channels(page, side, np.arange(PAGE))
            else:
                back = quantise_tokens(page, side)
            out[a : a + PAGE] = np.einsum("st,shc->thc", h.astype(F64), back)
        return out

    low = d - int(math.floor(side.get("high_precision", 0) * d + 0.5))
    assert abs(side.get("high_precision", 0) * d % 1 - 0.5) > 0.01
    mask = np.zeros(src.shape, bool)
    plain = src
    if "outliers" in side:
        plain = src.copy()
        if keys:
            for a in range(0, count, PAGE):
                rows = rest[(rest >= a) & (rest < a + PAGE)]
                got, m = without_outliers(np.moveaxis(src[rows], 0, -1), side["outliers"], PAGE)
                plain[rows], mask[rows] = np.moveaxis(got, -1, 0), np.moveaxis(m, -1, 0)
        else:
            plain, mask = without_outliers(src, side["outliers"], d)

    if side["axis"] == "channel":
        back = quantise_channels(plain[..., :low], side, rest)
    else:
        back = quantise_tokens(plain[..., :low], side)
    back = np.concatenate([back, src[..., low:].astype(F64)], -1)
    back = np.where(mask, src.astype(F64), back)

    if "low_rank" in side:
        e = np.zeros(src.shape, F32)
        e[rest] = src[rest] - back[rest].astype(F32)
        assert not e[mask].any()
        for head in range(e.shape[1]):
            back[:, head] += low_rank(e[:, head], side["low_rank"], work)
    out[rest] = back[rest]
    return out


def attention(q, k, v):
    """q [heads][d]; k, v [T][kv_heads][d]."""
    heads, d = q.shape
    share = heads // k.shape[1]
    out = np.empty((heads, d))
    for i in range(heads):
        logits = k[:, i // share] @ q[i].astype(F64) / math.sqrt(d)
        p = np.exp(logits - logits.max())
        out[i] = p / p.sum() @ v[:, i // share]
    return out


def fed(x, transform, basis, share=1, work=F64):
    """x [T][heads][d] as the engine gets it, float32."""
    if transform == "hadamard":
        return (x.astype(work) @ hadamard(x.shape[-1]).astype(work)).astype(F32)
    if transform == "basis":
        heads = [x[:, i].astype(work) @ basis[i // share].astype(work) for i in range(x.shape[1])]
        return np.stack(heads, 1).astype(F32)
    return x.astype(F32)


def run(data, scheme, extra, work=F64):
    """Output of the decode step, and of one over an unquantised cache, both in the frame of the values."""
    total, heads, kv_heads, d = data["shape"]
    keys, values, window = scheme["keys"], scheme["values"], scheme.get("window")
    tk, tv = keys.get("transform"), values.get("transform")
    q = fed(data["q"], tk, extra.get("key_basis"), heads // kv_heads, work)[0]
    k = fed(data["k"], tk, extra.get("key_basis"), 1, work)
    v = fed(data["v"], tv, extra.get("value_basis"), 1, work)

    own = scheme.get("attention", "exact") == "exact"
    len_ = total - 1 if own else total
    sinks = set()
    if "sinks" in scheme:
        first = scheme["sinks"]["kind"] == "first"
        sinks = set(range(scheme["sinks"]["count"]) if first else extra["sinks"].tolist())
        assert len(sinks) == scheme["sinks"]["count"] and max(sinks) < total - 1
    frame = Grouped(keys, kv_heads, d, extra.get("perm"), work) if tk == "grouped-hadamard" else None
    ck, cv = packed(window, len_, True), packed(window, len_, False)
    # The prefill pass packs a chunk of its own; the decode step must not have changed the state.
    assert not own or (ck, cv) == (packed(window, total - 1, True), packed(window, total - 1, False))
    khat = stored(k, keys, ck, sinks, True, frame, work)
    vhat = stored(v, values, cv, sinks, False, None, work)
    if own:
        khat[-1], vhat[-1] = k[-1], v[-1]
    return attention(q, khat, vhat), attention(q, k.astype(F64), v.astype(F64)), (ck, cv)
