"""Loss and gradients of the linear correction's training, by PyTorch's autograd, against those of the engine.

usage: train_oracle.py CASE.json

Written straight from the definitions (KVLinC, section 3.2, equations 4 to 6); shares no code with the engine, whose test
`gradients_are_those_of_autograd` (crates/calibrate/src/linear/tests.rs) writes the case and runs this script. Exits with
77 where there is no PyTorch, and with 1 where numbers differ.

Of one layer, in float64: queries q [row][head][d] at positions `rows`, keys k, what their codes miss e, and values v, all
[token][KV head][d]; maps [head][d][D] of the query heads, then of the KV heads, W1 and W2 side by side; logits u of gates.
Query head h reads KV head h / (heads / kv_heads). For a query at t with c = `packed` of its row, keys 0 .. t:

    l_i = q.k_i / sqrt(d)            l'_i = q.(k_i - e_i) / sqrt(d) for i < c, else l_i
    phi(x) = [softmax(x W1), softmax(x W2)]
    C_i = sigmoid(u) phi_q(q).phi_k(e_i) for exact <= i < c, else 0
    a_i = exp(l'_i - max l') + C_i   A' = a / sum a     A = softmax(l)      (no gradient through the maximum)
    loss = - sum_i A_i ln max(A'_i, 1e-12) + weight |sum_i (A'_i - A_i) v_i|^2 / d,  summed over rows and heads
"""

import json
import sys

try:
    import torch
except ImportError:
    print("skipped: there is no PyTorch")
    sys.exit(77)

TOLERANCE = 2e-4


def main(path):
    torch.set_num_threads(1)
    with open(path) as file:
        case = json.load(file)
    heads, kv_heads, d, features = (case[name] for name in ("heads", "kv_heads", "head_dim", "features"))

    def tensor(name, *shape):
        return torch.tensor(case[name], dtype=torch.float64).reshape(*shape)

    q = tensor("queries", -1, heads, d)
    k, e, v = (tensor(name, -1, kv_heads, d) for name in ("keys", "missed", "values"))
    maps = tensor("maps", heads + kv_heads, d, features).requires_grad_()
    gates = tensor("gates", -1).requires_grad_()

    def phi(x, weights):
        z = x @ weights
        return torch.cat([torch.softmax(z[..., : features // 2], -1), torch.softmax(z[..., features // 2 :], -1)], -1)

    total = torch.zeros((), dtype=torch.float64)
    for head in range(heads):
        kv = head // (heads // kv_heads)
        gate = torch.sigmoid(gates[head]) if len(gates) else 1.0
        phi_k = phi(e[:, kv], maps[heads + kv])
        for index, (t, packed) in enumerate(zip(case["rows"], case["packed"])):
            query = q[index, head]
            exact = k[: t + 1, kv] @ query / d**0.5
            mixed = exact - torch.where(torch.arange(t + 1) < packed, e[: t + 1, kv] @ query / d**0.5, 0.0)
            corrected = (torch.arange(t + 1) >= case["exact"]) & (torch.arange(t + 1) < packed)
            added = torch.where(corrected, gate * (phi_k[: t + 1] @ phi(query, maps[head])), 0.0)
            a = torch.exp(mixed - mixed.max()) + added
            probability = a / a.sum()
            target = torch.softmax(exact, -1)
            total = total - (target * probability.clamp(min=1e-12).log()).sum()
            if case["output_weight"] > 0:
                error = (probability - target) @ v[: t + 1, kv]
                total = total + case["output_weight"] * (error**2).mean()
    total.backward()

    failed = False
    for name, found, expected in (
        ("loss", torch.tensor(case["loss"], dtype=torch.float64), total.detach()),
        ("maps", tensor("maps_gradient", -1), maps.grad.reshape(-1)),
        ("gates", tensor("gates_gradient", -1), gates.grad.reshape(-1) if len(gates) else gates.detach()),
    ):
        if expected.numel() == 0:
            continue
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        print(f"{name}: largest error {error:.1e} of the largest number")
        failed |= not error < TOLERANCE
    sys.exit(1 if failed else 0)


main(sys.argv[1])
