"""The outside baseline of `dibit bench throughput`: Hugging Face transformers with SDPA, on the same shape.

Weights are made up, from the same config.json; prompts, batches and numbers of tokens are the same, and so is what is
timed. Runs offline. Needs torch and transformers 5.

    python tools/throughput_transformers.py benches/llama-2-7b.config.json --batch 1,2,4,8,16,32,max --json out.json
"""

import argparse
import gc
import json
import sys
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

# Bytes of a GPU that it may lack before they are missed: torch's caching allocator and CUDA itself need some.
RESERVE = 1 << 30


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config.json")
    parser.add_argument("--batch", default="1,2,4,8,16,32,64,128", help="sequences at once; max is as many as fit")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--generate", type=int, default=1024, help="tokens that are generated for each")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--cache", default="dynamic", choices=["dynamic", "static"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the decoding step (with --cache static)")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures there")
    return parser.parse_args()


def made_up_model(args):
    """A model of the shape in the file, with random weights on the device."""
    with open(args.config) as file:
        values = json.load(file)
    config = AutoConfig.for_model(**values)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=args.attention)
    return model.eval()


class Run:
    """Generates batches, one after the other."""

    def __init__(self, args, model):
        self.args, self.model, self.step = args, model, model.forward
        self.cuda = args.device.startswith("cuda")
        if args.compile:
            self.step = torch.compile(model.forward, mode="reduce-overhead")

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def generate(self, batch, tokens):
        """Seconds from the prompts to the first token of each sequence, and of all further tokens."""
        args, config = self.args, self.model.config
        places = torch.arange(args.prompt, device=args.device)
        first = 31 * torch.arange(batch, device=args.device)
        ids = (first[:, None] + places[None, :]) % config.vocab_size
        if args.cache == "static":
            cache = StaticCache(config=config, max_cache_len=args.prompt + args.generate)
        else:
            cache = DynamicCache(config=config)
        self.synchronize()
        start = time.perf_counter()
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids = output.logits[:, -1:].argmax(-1)
        self.synchronize()
        prefill = time.perf_counter() - start
        position = torch.tensor([[args.prompt]], device=args.device)
        for _ in range(tokens - 1):
            if args.compile:
                torch.compiler.cudagraph_mark_step_begin()
            output = self.step(input_ids=ids, past_key_values=cache, use_cache=True, position_ids=position)
            ids = output.logits[:, -1:].argmax(-1).clone()
            position = position + 1
        self.synchronize()
        return prefill, time.perf_counter() - start - prefill

    def measure(self, batch):
        """The figures of a batch; None where memory is short."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            # Compiled steps are compiled and captured before the clock starts.
            self.generate(batch, 4)
            prefill, decode = self.generate(batch, self.args.generate)
        except torch.OutOfMemoryError:
            return None
        further = batch * (self.args.generate - 1)
        figures = {
            "batch": batch,
            "prefill_seconds": prefill,
            "decode_seconds": decode,
            "decode_tokens_per_s": further / decode if further else 0.0,
            "tokens_per_s": batch * self.args.generate / (prefill + decode),
        }
        if self.cuda:
            free, total = torch.cuda.mem_get_info()
            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
            figures["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            figures["in_use_bytes"] = total - free
        print(f"batch {batch}: {figures['decode_tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
        return figures

    def planned_largest(self):
        """The most sequences whose keys and values fit into what is free."""
        config = self.model.config
        heads = config.num_key_value_heads
        scalars = 2 * config.num_hidden_layers * heads * config.head_dim * (self.args.prompt + self.args.generate)
        free = torch.cuda.mem_get_info()[0] - RESERVE
        return free // (scalars * self.model.dtype.itemsize)


def main():
    args = arguments()
    torch.set_grad_enabled(False)
    model = made_up_model(args)
    run = Run(args, model)
    name = torch.cuda.get_device_name() if run.cuda else "CPU"
    report = {
        "program": f"transformers {transformers.__version__}, torch {torch.__version__}",
        "model": args.config,
        "device": name,
        "dtype": args.dtype,
        "attention": args.attention,
        "cache": args.cache,
        "compiled": args.compile,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "memory_bytes": torch.cuda.mem_get_info()[1] if run.cuda else None,
        "prompt": args.prompt,
        "generate": args.generate,
        "points": [],
        "out_of_memory": None,
        "largest": None,
    }

    def save():
        if args.json:
            with open(args.json, "w") as file:
                json.dump(report, file, indent=2)

    sizes = args.batch.split(",")
    fits = 0
    for batch in sorted({int(size) for size in sizes if size != "max"}):
        figures = run.measure(batch)
        if figures is None:
            report["out_of_memory"] = batch
            break
        fits = batch
        report["points"].append(figures)
        save()
    if "max" in sizes and run.cuda:
        gc.collect()
        torch.cuda.empty_cache()
        batch = min(run.planned_largest(), (report["out_of_memory"] or sys.maxsize) - 1)
        # As dibit does: what halving finds between what ran and what did not, to within the last few sequences.
        low, high = fits, batch + 1
        while batch > low:
            figures = run.measure(batch)
            if figures is None:
                report["out_of_memory"] = high = batch
            else:
                low = batch
                report["points"].append(figures)
            save()
            batch = low if high - low <= 1 + high // 16 else low + (high - low) // 2
        fits = low
        report["points"].sort(key=lambda point: point["batch"])
        report["largest"] = fits
    save()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
