#!/usr/bin/env python3
"""Writes tiny random-weight checkpoints with reference outputs from Hugging Face transformers.

Each fixture is a directory laid out like a model repository on the Hub (config.json,
safetensors, tokenizer.json, tokenizer_config.json, generation_config.json) plus

  expected.json       {"ids", "nll", "argmax"}: 300 token ids, the 299 values of
                      -log p(ids[i + 1] | ids[..= i]), and the most likely next token after each of
                      the 300 prefixes; float32 on the CPU, eager attention, weights upcast from
                      the stored dtype
  expected_chat.json  (some) [{"messages", "add_generation_prompt", "text"}]: the chat template
                      rendered by apply_chat_template(tokenize=False)

config.json is spelled by hand, as models of each family spell it, rather than by
save_pretrained, which would modernise it. To be sure that transformers reads such a file as
meant, every checkpoint is loaded back and compared with a model built from an explicit config.

Needs: torch, transformers >= 5, tokenizers, safetensors, numpy.
Usage: python tools/make_fixtures.py [--out fixtures] [--seed 0]
"""

import argparse
import json
import math
import os
import shutil
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from fixture_tokenizer import (
    BOS,
    CHATML,
    CHATML_DEFAULT_SYSTEM,
    CHATML_THINKING,
    EOS,
    IM_END,
    INST,
    MAX_POSITIONS,
    PAD,
    SPECIALS,
    VOCAB,
    check_tokenizer,
    make_tokenizer,
    save_tokenizer,
    write_json,
)

TOKENS = 300
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def fixtures():
    """name -> (config.json as written, the config it has to mean, other settings)"""
    version = {"transformers_version": "4.44.0", "use_cache": True, "vocab_size": VOCAB}
    plain = {"hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": MAX_POSITIONS}
    out = {}

    # No head_dim: hidden_size / num_attention_heads. Only a tiny hidden size keeps this small
    # at head size 64, hence the single head.
    out["llama2-linear-f16"] = (
        {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            **plain,
            "hidden_size": 64,
            "intermediate_size": 112,
            "model_type": "llama",
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 2.0, "type": "linear"},
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            **version,
        },
        (LlamaConfig, 64, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        {"shards": 2, "chat": None},
    )
    llama3_rope = {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 256,
        "rope_type": "llama3",
    }
    out["llama32-old-bf16"] = (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "eos_token_id": [EOS, IM_END],
            "head_dim": 64,
            **plain,
            "hidden_size": 48,
            "intermediate_size": 96,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 6,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": llama3_rope,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            **version,
        },
        (LlamaConfig, 64, {**llama3_rope, "rope_theta": 500000.0}),
        {"chat": CHATML},
    )
    out["mistral-f32"] = (
        {
            "architectures": ["MistralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": 96,
            **plain,
            "hidden_size": 24,
            "intermediate_size": 40,
            "model_type": "mistral",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            **version,
        },
        (MistralConfig, 96, {"rope_type": "default", "rope_theta": 1000000.0}),
        {"chat_file": INST, "expected_chat": True},
    )
    out["qwen2-bias-bf16"] = (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "eos_token_id": IM_END,
            "head_dim": 80,
            **plain,
            "hidden_size": 48,
            "intermediate_size": 96,
            "max_window_layers": 2,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 1024,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            **version,
            "use_sliding_window": False,
        },
        (Qwen2Config, 80, {"rope_type": "default", "rope_theta": 1000000.0}),
        {"chat": CHATML_DEFAULT_SYSTEM, "expected_chat": True},
    )
    out["qwen3-hd256-bf16"] = (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "dtype": "bfloat16",
            "eos_token_id": IM_END,
            "head_dim": 256,
            **plain,
            "hidden_size": 40,
            "intermediate_size": 64,
            "layer_types": ["full_attention", "full_attention"],
            "max_window_layers": 2,
            "model_type": "qwen3",
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "pad_token_id": PAD,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": True,
            **version,
            "transformers_version": "5.0.0",
            "use_sliding_window": False,
        },
        (Qwen3Config, 256, {"rope_type": "default", "rope_theta": 1000000.0}),
        {"chat": CHATML_THINKING},
    )
    return out


def explicit_config(written, meaning):
    """The same model, as a config object with nothing left to conventions."""
    cls, head_dim, rope = meaning
    keep = (
        "hidden_size intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
        "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings vocab_size"
    ).split()
    extra = {"use_sliding_window": False} if cls in (Qwen2Config, Qwen3Config) else {}
    if cls is MistralConfig:
        extra = {"sliding_window": None}
    return cls(
        **{k: written[k] for k in keep},
        head_dim=head_dim,
        rope_parameters=dict(rope),
        bos_token_id=BOS,
        eos_token_id=EOS,
        **extra,
    )


def expected_inv_freq(head_dim, rope):
    """Rotary frequencies from the definition, to check transformers' reading of the config."""
    inv = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope["rope_type"] == "linear":
        return inv / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * inv / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        return inv * (smooth + (1 - smooth) / rope["factor"])
    return inv


def random_weights(model, dtype, rng):
    """Values for every stored tensor, large enough for peaked attention and uneven logits."""
    tied = model.config.tie_word_embeddings
    state = {}
    for name, param in sorted(model.state_dict().items()):
        if tied and name == "lm_head.weight":
            continue
        noise = rng.standard_normal(tuple(param.shape))
        if name.endswith("norm.weight"):  # also q_norm and k_norm
            value = 1 + 0.3 * noise
        elif name.endswith("k_proj.bias"):
            value = 0.5 * noise
            big = rng.choice(value.size, 8, replace=False)
            value[big] = 8 * np.sign(noise[big])
        elif name.endswith(".bias"):
            value = 0.3 * noise
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            value = 0.3 * noise
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            value = 0.2 * noise
        else:
            value = 0.12 * noise
        state[name] = torch.from_numpy(value).to(torch.float32).to(dtype).contiguous()
    return state


def save_weights(path, state, shards):
    meta = {"format": "pt"}
    if shards == 1:
        save_file(state, path / "model.safetensors", metadata=meta)
        (path / "model.safetensors").chmod(0o644)
        return
    # Names in sorted order, cut by size: a layer may straddle two files, as in real models.
    total = sum(t.nbytes for t in state.values())
    files = [{} for _ in range(shards)]
    seen = 0
    for name, tensor in state.items():
        files[min(shards - 1, seen * shards // total)][name] = tensor
        seen += tensor.nbytes
    assert all(files)
    weight_map = {}
    for i, part in enumerate(files, 1):
        file = f"model-{i:05}-of-{shards:05}.safetensors"
        save_file(part, path / file, metadata=meta)
        (path / file).chmod(0o644)
        weight_map.update(dict.fromkeys(part, file))
    write_json(
        path / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


@torch.no_grad()
def reference(path, written, meaning, state, ids):
    """float32 logits [300, vocab] of the checkpoint on disk, after checking how it was read."""
    cls, head_dim, rope = meaning
    args = dict(dtype=torch.float32, attn_implementation="eager")
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **args)
    assert not any(info.get(k) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    assert type(model).__name__ == written["architectures"][0]
    loaded = model.state_dict()
    for name, value in state.items():
        assert loaded[name].dtype == torch.float32 and torch.equal(loaded[name], value.float()), name
    inv_freq = model.model.rotary_emb.inv_freq.numpy()
    assert np.allclose(inv_freq, expected_inv_freq(head_dim, rope), rtol=1e-5), "rotary frequencies"
    assert model.config._attn_implementation == "eager"
    assert getattr(model.config, "sliding_window", None) is None
    logits = model(torch.tensor([ids]), use_cache=False).logits[0]

    explicit = explicit_config(written, meaning)
    explicit._attn_implementation = "eager"
    twin = type(model)(explicit).eval()
    full = {k: v.float() for k, v in state.items()}
    if explicit.tie_word_embeddings:
        full["lm_head.weight"] = full["model.embed_tokens.weight"]
    twin.load_state_dict(full)
    again = twin(torch.tensor([ids]), use_cache=False).logits[0]
    assert torch.equal(logits, again), "config.json is not read as meant"
    return logits


README = """\
# Fixtures

Each directory here with a `config.json` is a tiny checkpoint with random weights (2 layers, 384
tokens) in the layout of a Hugging Face model repository, one for each combination of family, dtype,
head size and config spelling that the loader has to handle. `expected.json` holds 300 token ids, the
negative log-likelihood of each id after the first, and the most likely next token at each position,
as computed by Hugging Face transformers in float32 on the CPU; `expected_chat.json` holds rendered
chat templates. They share one small byte-level BPE tokenizer, which puts `<|begin_of_text|>` (id 0)
before a text. `golden/` holds reference values for the cache quantiser, the Hadamard rotation and
quantised attention, which come from their definitions in numpy. To make everything again:

    pip install torch transformers tokenizers safetensors numpy
    python tools/make_fixtures.py --out fixtures
    python tools/golden_quant.py --out fixtures/golden
"""


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=Path, default=Path("fixtures"))
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    tok = make_tokenizer()

    for name, (written, meaning, settings) in fixtures().items():
        path = args.out / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        write_json(path / "config.json", written)
        save_tokenizer(path, tok, written, settings)
        check_tokenizer(path, tok, settings)

        # One stream per fixture, so that adding one leaves the others as they are.
        rng = np.random.default_rng([args.seed, zlib.crc32(name.encode())])
        dtype = DTYPES[written.get("torch_dtype") or written["dtype"]]
        skeleton = AutoModelForCausalLM.from_config(explicit_config(written, meaning))
        state = random_weights(skeleton, dtype, rng)
        save_weights(path, state, settings.get("shards", 1))
        stored = {}
        for file in sorted(path.glob("*.safetensors")):
            stored |= load_file(file)
        assert {k: v.dtype for k, v in stored.items()} == dict.fromkeys(state, dtype)

        ids = [BOS] + rng.integers(len(SPECIALS), VOCAB, TOKENS - 1).tolist()
        logits = reference(path, written, meaning, state, ids)
        logp = torch.log_softmax(logits, dim=-1)
        nll = -logp[torch.arange(TOKENS - 1), torch.tensor(ids[1:])]
        argmax = logits.argmax(dim=-1).tolist()
        doc = {"ids": ids, "nll": [float(f"{v:.8g}") for v in nll.tolist()], "argmax": argmax}
        lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in doc.items())
        (path / "expected.json").write_text("{\n" + lines + "\n}\n")

        top2 = logits.topk(2, dim=-1).values
        size = sum(f.stat().st_size for f in path.iterdir())
        entropy = -(logp.exp() * logp).sum(-1).mean().item()
        print(
            f"{name}: {size / 1000:.0f} kB, mean nll {nll.mean():.4f}, mean entropy {entropy:.2f}, logit std "
            f"{logits.std():.2f}, smallest argmax margin {(top2[:, 0] - top2[:, 1]).min():.1e}, "
            f"{len(set(argmax))} distinct argmax"
        )

    (args.out / "README.md").write_text(README)


if __name__ == "__main__":
    main()
