#!/usr/bin/env python3
"""Golden values for the scheme `dibit`: error feedback, the basis of values, page sinks and the budget of planes.

Nothing here shares code with the engine. It writes <out>/dibit.json: one KV head of D channels that SHARED query heads share.

  queries [token][SHARED][D]   o [HIDDEN][SHARED * D]   keys, values [128][D]: what a page is made of, fp16 numbers
  metric [D][D]                sum of q q^T over tokens from FIRST_QUERY on
  feedback_order [D]           channels in the order of coding: by falling diagonal
  feedback [D][D]              what later channels take up, rows and columns in that order
  spread [D][D]                sum of (v - mean)(v - mean)^T over tokens that are not apart
  basis [D][D]                 A u with A = Wo^(1/2) and eigenvectors u of A spread A; each column up to its sign
  sinks [..]                   slots of tokens with small values
  planes [D]                   planes of two bits of the key channels
  codes [D][128]               codes of the keys; 0 for sinks
  scales, zeros [D]            fp16 numbers
  weights [groups][GROUP]      of channels; measured: planes of a group, and what the model lost with them
  budget                       planes of all groups, given where they save most: allocation [groups][GROUP]

Numbers of codes are computed in float32, one operation after the other; all others in float64.

Usage:  python tools/golden_dibit.py [--out fixtures/golden]
"""

import argparse
import json
from pathlib import Path

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
D, SHARED, HIDDEN, TOKENS, FIRST_QUERY = 16, 3, 20, 128, 64
TILE, GROUP, BUDGET = 8, 32, 168
SHARE, PLACES, FIRST = F32(0.4), 8, 4


def inputs(rng):
    mix = rng.standard_normal((D, D)) * rng.lognormal(0, 1, D)
    queries = (rng.standard_normal((TOKENS, SHARED, D)) @ mix).astype(F32)
    o = rng.standard_normal((HIDDEN, SHARED * D)).astype(F32)
    keys = (rng.standard_normal((128, D)) * rng.lognormal(0, 1, D) + rng.standard_normal(D)).astype(F16)
    values = (rng.standard_normal((128, D)) * rng.lognormal(0, 0.5, D)).astype(F16)
    for slot in (2, 9, 30, 31, 64, 127):
        values[slot] = (values[slot].astype(F32) * F32(0.05)).astype(F16)
    return queries, o, keys, values


def feedback(metric):
    damped = metric + 0.01 * np.mean(np.diag(metric)) * np.eye(D)
    order = sorted(range(D), key=lambda c: (-metric[c, c], c))
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    return order, np.triu(upper / np.diag(upper)[:, None], 1)


def sinks(values):
    norms = []
    for slot in range(FIRST, 128):
        total = F32(0)
        for x in values[slot].astype(F32):
            total = F32(total + F32(x * x))
        norms.append((total, slot))
    norms.sort()
    limit = F32(F32(SHARE * SHARE) * norms[len(norms) // 2][0])
    return sorted(slot for norm, slot in norms[:PLACES] if norm < limit)


def value_basis(o, spread):
    metric = sum(o[:, h * D : (h + 1) * D].astype(F64).T @ o[:, h * D : (h + 1) * D].astype(F64) for h in range(SHARED))
    lambdas, u = np.linalg.eigh(metric)
    lambdas = np.maximum(lambdas, 1e-5 * lambdas.max())
    root = u @ np.diag(np.sqrt(lambdas)) @ u.T
    lambdas, u = np.linalg.eigh(root @ spread @ root)
    return root @ u[:, ::-1]


def code(keys, planes, order, factors, kept):
    """Codes of the tokens `kept`, channel after channel."""
    codes = np.zeros((D, 128), int)
    scales, zeros = np.zeros(D, F16), np.zeros(D, F16)
    left = keys[kept].astype(F32)
    for c in range(D):
        own = left[:, c]
        if planes[c] == 0:
            zeros[c] = F16(np.mean(own.astype(F64)))
        else:
            scales[c] = F16(F32(own.max() - own.min()) / F32(4 ** planes[c] - 1))
            zeros[c] = F16(own.min())
    for i, c in enumerate(order):
        scale, zero, top = F32(scales[c]), F32(zeros[c]), F32(4 ** planes[c] - 1)
        steps = (left[:, c] - zero) / scale if scale > 0 else np.zeros(len(kept), F32)
        own = np.rint(np.clip(steps, F32(0), top)).astype(F32)
        codes[c, kept] = own
        missed = left[:, c] - (own * scale + zero)
        for j in range(i + 1, D):
            left[:, order[j]] = left[:, order[j]] - missed * F32(factors[i, j])
    return codes, scales, zeros


def code_planes(weights):
    """Of the channels a quarter each with 2 and 0 planes, the others with one."""
    planes = np.ones(D, int)
    order = np.argsort(-weights)
    planes[order[: D // 4]], planes[order[-D // 4 :]] = 2, 0
    return planes


def error(planes):
    return 1.0 if planes == 0 else 1.0 / (4.0**planes - 1) ** 2


def spend(weights, tiles, most):
    """Plane by plane to the tile where it saves most; a tile is TILE channels of like weight."""
    order = np.argsort(-weights, kind="stable").reshape(-1, TILE)
    planes = np.zeros(len(order), int)
    for _ in range(tiles):
        saving = [weights[own].sum() * (error(p) - error(p + 1)) if p < most else -1.0 for own, p in zip(order, planes)]
        planes[int(np.argmax(saving))] += 1
    given = np.zeros(len(weights), int)
    given[order] = planes[:, None]
    return given


def loss(weights, measured, tiles, most):
    """What the weights say, times a factor that is interpolated between measurements, by its logarithm."""
    expected = lambda given: sum(w * error(p) for w, p in zip(weights, given))
    counts = [own.sum() for own, _ in measured]
    factors = [np.log(cost / expected(own)) for own, cost in measured]
    factor = np.interp(tiles * TILE, counts, factors) if measured else 0.0
    return expected(spend(weights, tiles, most)) * np.exp(factor)


def allocate(weights, measured, budget, most):
    """Always so many further tiles of planes to a group as save most for each; every group has a tile at least."""
    all_tiles = most * weights.shape[1] // TILE
    losses = [[loss(w, m, tiles, most) for tiles in range(all_tiles + 1)] for w, m in zip(weights, measured)]
    given, left = [1] * len(weights), budget // TILE - len(weights)
    while left > 0:
        options = [((losses[g][n] - losses[g][to]) / (to - n), -g, n - to) for g, n in enumerate(given) for to in range(n + 1, all_tiles + 1)]
        _, group, more = max(options)
        more = min(-more, left)
        given[-group] += more
        left -= more
    return np.array([spend(w, tiles, most) for w, tiles in zip(weights, given)])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("fixtures/golden"))
    out = parser.parse_args().out
    rng = np.random.default_rng(20261130)
    queries, o, keys, values = inputs(rng)
    rows = queries[FIRST_QUERY:].reshape(-1, D).astype(F64)
    metric = rows.T @ rows
    order, factors = feedback(metric)
    slots = sinks(values)
    kept = [slot for slot in range(FIRST, 128) if slot not in slots]
    centred = values[kept].astype(F64) - values[kept].astype(F64).mean(0)
    spread = centred.T @ centred
    ranges = np.ptp(keys[kept].astype(F64), axis=0)
    planes = code_planes(np.diag(metric) * ranges**2)
    codes, scales, zeros = code(keys, planes, order, factors, kept)
    weights = rng.lognormal(0, 2, (5, GROUP))
    # Some groups were measured once or twice.
    costs = [[], [(2, 3.0)], [(1, 40.0), (5, 2.0)], [(4, 0.01)], [(2, 1.0), (6, 0.9)]]
    measured = [[(spend(w, tiles, 3), cost) for tiles, cost in own] for w, own in zip(weights, costs)]
    golden = {
        "shape": {"d": D, "shared": SHARED, "hidden": HIDDEN, "tokens": TOKENS, "first": FIRST},
        "queries": queries.ravel().tolist(),
        "o": o.ravel().tolist(),
        "keys": keys.astype(F64).ravel().tolist(),
        "values": values.astype(F64).ravel().tolist(),
        "metric": metric.ravel().tolist(),
        "feedback_order": order,
        "feedback": factors.ravel().tolist(),
        "spread": spread.ravel().tolist(),
        "basis": value_basis(o, spread).ravel().tolist(),
        "sinks": slots,
        "planes": planes.tolist(),
        "codes": codes.ravel().tolist(),
        "scales": scales.astype(F64).tolist(),
        "zeros": zeros.astype(F64).tolist(),
        "weights": weights.ravel().tolist(),
        "measured": [[(own.tolist(), cost) for own, cost in group] for group in measured],
        "budget": BUDGET,
        "allocation": allocate(weights, measured, BUDGET, 3).ravel().tolist(),
    }
    (out / "dibit.json").write_text(json.dumps(golden))


if __name__ == "__main__":
    main()
