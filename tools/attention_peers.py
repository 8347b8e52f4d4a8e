"""Decode attention of 16-bit caches in PyTorch: what `dibit bench attention --device cuda` is compared with.

python3 tools/attention_peers.py [--dibit PATH] [--json FILE] [--rounds 30] SHAPE...

A SHAPE is HEADS/KV_HEADS/HEAD_DIM/BATCH/CONTEXT. For each, one decode step of one layer is timed in PyTorch's SDPA with
its cuDNN and its FlashAttention kernels (bf16, random data, CUDA events, CUDA graphs, several sets of inputs so that
none is in the L2 cache), in turns with `dibit bench attention` of the same shape where --dibit names the program, and
with reading a large buffer, which is the memory's ceiling. Medians with 5th and 95th percentiles, in microseconds.
"""

import argparse
import json
import subprocess

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BYTES_OF_SETS = 400 << 20


def graph_of(run):
    """A CUDA graph of run(), after a warm-up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def timed(graph, count):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / count


def spread(values):
    values = sorted(values)
    at = lambda share: values[min(len(values) - 1, int(share * len(values)))]
    return {"median": at(0.5), "p5": at(0.05), "p95": at(0.95)}


def sdpa(shape):
    heads, kv_heads, head_dim, batch, context = shape
    size = 2 * batch * kv_heads * context * head_dim * 2
    sets = max(2, -(-BYTES_OF_SETS // size))
    make = lambda n, length: torch.randn(batch, n, length, head_dim, device="cuda", dtype=torch.bfloat16)
    inputs = [(make(heads, 1), make(kv_heads, context), make(kv_heads, context)) for _ in range(sets)]
    graphs = {}
    for name, backend in BACKENDS.items():

        def run():
            with sdpa_kernel(backend):
                for q, k, v in inputs:
                    torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads)

        try:
            graphs[name] = graph_of(run)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[0]}")
    # A graph replays on the memory of its inputs.
    return graphs, inputs


def read_graph():
    buffer = torch.randn(1 << 28, device="cuda")
    return graph_of(lambda: buffer.sum()), buffer


def dibit(program, shape, layers):
    heads, kv_heads, head_dim, batch, context = shape
    command = [program, "bench", "attention", "--device", "cuda", "--kv", "kivi,kvlinc-rotation,kvlinc,dibit"]
    command += ["--heads", f"{heads}/{kv_heads}", "--head-dim", str(head_dim), "--batch", str(batch)]
    command += ["--context", str(context), "--layers", str(layers), "--repeat", "20"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="+")
    parser.add_argument("--dibit")
    parser.add_argument("--json")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    results = []
    read, buffer = read_graph()
    read_bytes = buffer.numel() * buffer.element_size()
    for text in arguments.shapes:
        shape = [int(part) for part in text.split("/")]
        graphs, inputs = sdpa(shape)
        sets = len(inputs)
        times = {name: [] for name in [*graphs, "read"]}
        for _ in range(arguments.rounds):
            for name, graph in graphs.items():
                times[name].append(timed(graph, sets))
            times["read"].append(timed(read, 1))
        result = {"shape": text, **{name: spread(own) for name, own in times.items()}}
        result["read_gb_per_s"] = read_bytes / result["read"]["median"] / 1e3
        own = "; ".join(f"{name} {result[name]['median']:.1f}" for name in graphs)
        print(f"{text}: {own}; read {result['read_gb_per_s']:.0f} GB/s", flush=True)
        del graphs, inputs
        torch.cuda.empty_cache()
        if arguments.dibit:
            result["dibit"] = dibit(arguments.dibit, shape, max(4, sets))
            print(result["dibit"], flush=True)
        results.append(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
