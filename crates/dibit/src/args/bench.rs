//! The command line of `dibit bench`.

use super::{CalibrationArgs, DeviceArgs, PrefillArgs, RunArgs};
use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand};
use dibit_eval::bench::{BatchSize, Heads};
use dibit_model::{SUPPORTED_HEAD_DIMS, supports_head_dim};
use std::path::PathBuf;

#[derive(Args)]
#[command(after_help = "\
Whatever is compared takes turns in one run. Figures are medians, with the quartiles in brackets; ratios are of the same
round. docs/performance.md says what is measured and how.

Examples:
  dibit bench attention --heads 32/8 --context 8192,32768
  dibit bench decode --model ./Llama-3.2-1B --depth 2048,8192
  dibit bench throughput --model ./Llama-3.2-1B --batch 1,4,16,max")]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: Bench,
}

#[derive(Subcommand)]
pub enum Bench {
    /// Attention of a decoding step: one layer, random keys and values
    Attention(AttentionBenchArgs),
    /// A whole model: decoding at several depths of the cache, and prefill
    Decode(DecodeBenchArgs),
    /// A whole model: tokens per second and memory by the number of sequences, until memory is full
    Throughput(ThroughputBenchArgs),
}

#[derive(Args)]
pub struct MeasureArgs {
    /// MiB of other memory of the device that are read in every round: to measure how fast that is, and to empty caches
    #[arg(
        long,
        value_name = "MIB",
        default_value = "1024",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20)
    )]
    pub sweep: usize,
    /// Print JSON, or write it to a file beside the table
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub json: Option<Option<PathBuf>>,
}

#[derive(Args)]
#[command(after_help = "\
In every round all schemes attend once, and --sweep MiB of other memory are read. So what a step reads is no longer in the
processor's caches, unless these are larger than that.

Examples:
  dibit bench attention --heads 16/8,32/8 --context 8192,32768 --kv kivi,kvlinc --threads 1,2
  dibit bench attention --device cuda --heads 32/32 --batch 16 --context 8192 --kv kvlinc
  dibit bench attention --head-dim 64 --kv kvlinc,mine.toml --repeat 31 --json out.json")]
pub struct AttentionBenchArgs {
    /// Query heads and KV heads, as in 32/8; several are separated by commas
    #[arg(long, value_delimiter = ',', default_value = "32/8", value_name = "Q/KV")]
    pub heads: Vec<Heads>,
    /// Channels of a head
    #[arg(long, default_value = "128", value_parser = head_dim)]
    pub head_dim: usize,
    /// Sequences at once; several numbers are separated by commas
    #[arg(
        short,
        long,
        value_delimiter = ',',
        default_value = "1",
        value_name = "SEQUENCES",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_SEQUENCES)
    )]
    pub batch: Vec<usize>,
    /// Cached tokens of each; several lengths are separated by commas
    #[arg(
        short,
        long,
        value_delimiter = ',',
        default_value = "8192",
        value_name = "TOKENS",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 27)
    )]
    pub context: Vec<usize>,
    /// Layers that a step goes through, each with a cache of its own; figures are of one. Several of them leave no gaps
    /// between the kernels of a GPU
    #[arg(long, default_value = "1", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    pub layers: usize,
    /// Cache schemes, separated by commas; fp16 is always there as the reference
    #[arg(long, value_delimiter = ',', default_value = "fp16,kivi,kvlinc", value_name = "SCHEMES")]
    pub kv: Vec<String>,
    /// Threads of the CPU; several numbers are separated by commas [default: one for each core]
    #[arg(short, long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Vec<u16>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Rounds
    #[arg(long, default_value = "15", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub repeat: usize,
    #[command(flatten)]
    pub measure: MeasureArgs,
}

#[derive(Args)]
#[command(after_help = "\
Caches are filled with random keys and values, without a prefill; then the model decodes, greedily. Depth 0 is always
there as the reference, and schemes are compared with the first one.

With --load-format dummy a config.json is enough; benches/llama-3.2-1b.json has the shape of Llama-3.2-1B. For another one:
hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads, head_dim, vocab_size,
max_position_embeddings, rms_norm_eps, tie_word_embeddings, and \"architectures\": [\"LlamaForCausalLM\"].

Examples:
  dibit bench decode --model benches/llama-3.2-1b.json --load-format dummy --depth 2048,8192,32768 --threads 2
  dibit bench decode --model ./Qwen3-0.6B --kv fp16,kivi,kvlinc --depth 4096 --prompt 0 --json")]
pub struct DecodeBenchArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Tokens that are cached before the first one is decoded; several depths are separated by commas
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0,2048",
        value_name = "TOKENS",
        value_parser = RangedU64ValueParser::<usize>::new().range(..=1 << 27)
    )]
    pub depth: Vec<usize>,
    /// Cache schemes, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "fp16,kvlinc", value_name = "SCHEMES")]
    pub kv: Vec<String>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Tokens of the prompt whose prefill is timed; 0 leaves it out
    #[arg(
        long,
        default_value = "512",
        value_name = "TOKENS",
        value_parser = RangedU64ValueParser::<usize>::new().range(..=1 << 27)
    )]
    pub prompt: usize,
    /// Sequences that are decoded at once
    #[arg(
        short,
        long,
        default_value = "1",
        value_name = "SEQUENCES",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_SEQUENCES)
    )]
    pub batch: usize,
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// Tokens of each sequence that are decoded in a round
    #[arg(long, default_value = "32", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub tokens: usize,
    /// Rounds
    #[arg(long, default_value = "5", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 20))]
    pub repeat: usize,
    #[command(flatten)]
    pub measure: MeasureArgs,
}

#[derive(Args)]
#[command(after_help = "\
Every sequence has a prompt of its own and gets the same number of tokens, greedily. A batch that does not fit into memory
ends those of its scheme. With --load-format dummy schemes get made-up calibrations, so that all of them run whole.
benches/ has shapes of Llama-2-7B, Llama-3.1-8B and Qwen3-1.7B.

Examples:
  dibit bench throughput --model benches/llama-2-7b.config.json --load-format dummy --batch 1,8,32,max --report report
  dibit bench throughput --kv fp16,kvlinc,dibit --batch 1,4,16 --generate 128 --json out.json")]
pub struct ThroughputBenchArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Cache schemes, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "fp16,kvlinc", value_name = "SCHEMES")]
    pub kv: Vec<String>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Sequences at once, separated by commas; max is as many as memory holds
    #[arg(short, long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128", value_name = "SEQUENCES")]
    pub batch: Vec<BatchSize>,
    /// Tokens of each prompt
    #[arg(
        long,
        default_value = "256",
        value_name = "TOKENS",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 27)
    )]
    pub prompt: usize,
    /// Tokens that are generated for each
    #[arg(
        long,
        default_value = "1024",
        value_name = "TOKENS",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 27)
    )]
    pub generate: usize,
    /// Prompt tokens of several sequences that are prefilled in one pass [default: 256 on a CPU; on a GPU one sequence]
    #[arg(long, value_name = "TOKENS", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 27))]
    pub prefill_rows: Option<usize>,
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// Print JSON, or write it to a file beside the table, after every batch
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    pub json: Option<Option<PathBuf>>,
    /// Write a page with pictures into this directory, and the pictures as throughput.svg
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
}

/// Sequences at once at most.
const MOST_SEQUENCES: u64 = 1 << 16;

fn head_dim(text: &str) -> Result<usize, String> {
    let known = text.parse().ok().filter(|channels| supports_head_dim(*channels));
    known.ok_or_else(|| format!("head_dim {text} is not supported; supported: {SUPPORTED_HEAD_DIMS}"))
}
