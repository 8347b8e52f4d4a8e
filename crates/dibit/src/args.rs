//! The command line.

mod bench;
mod calibrate;
mod conversation;
mod escapes;
mod generate;
mod prefill;
mod sampling;

pub use bench::{AttentionBenchArgs, Bench, BenchArgs, DecodeBenchArgs, MeasureArgs, ThroughputBenchArgs};
pub use calibrate::{CalibrateArgs, HeldOut, RecipeName, TrainingArgs};
pub use conversation::ConversationArgs;
pub use generate::GenerateArgs;
pub use prefill::{CellArgs, PrefillArgs, PrefillMode};
pub use sampling::{SamplingArgs, Seed};

use crate::device::{self, AnyDevice, DeviceChoice};
use clap::{Args, Parser, Subcommand, ValueEnum};
use dibit_cache::Scheme;
use dibit_cpu::Isa;
use dibit_device::DType;
use std::path::PathBuf;

/// The scheme that is used where the user names none: it costs least accuracy at its bits, and needs a calibration.
pub const BEST: &str = "dibit";

/// The one in its place where there is no calibration.
pub const UNCALIBRATED: &str = "k3v2";

/// LLM inference with a key-value cache of two bits
#[derive(Parser)]
#[command(name = "dibit", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  dibit generate \"Once upon a time\"
  dibit chat --model Qwen/Qwen3-0.6B
  dibit generate --model llama-3.2-1b-q4_k_m.gguf \"Once upon a time\"
  dibit perplexity --text wiki.txt --kv kivi,kvlinc
  dibit compare --text wiki.txt --report report
  dibit calibrate --model ./Qwen3-0.6B
  dibit ruler --tasks niah_single_1,vt --samples 10
  dibit inspect --model meta-llama/Llama-3.1-8B --context 131072 --kv fp16,kvlinc
  dibit bench attention --heads 32/8 --context 8192,32768

Without --model, the bundled model runs: 16 M parameters, for trying things out.
RUST_LOG chooses what is logged, as in RUST_LOG=warn.")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Continue a prompt
    Generate(GenerateArgs),
    /// Talk to a model
    Chat(ChatArgs),
    /// Measure what cache schemes cost: perplexity, KL divergence, bits
    Perplexity(PerplexityArgs),
    /// Compare schemes: bits, perplexity, KL, retrieval, memory, time; with a report in pictures
    Compare(CompareArgs),
    /// Make what a scheme needs to know of a model: permutations, bases, adapters of the linear correction
    Calibrate(CalibrateArgs),
    /// Measure what a model finds again in a long context: the retrieval benchmark RULER
    Ruler(RulerArgs),
    /// Plan memory: weights, cache by scheme, what fits
    Inspect(InspectArgs),
    /// Measure how fast schemes are, against fp16 and against the speed of memory
    Bench(BenchArgs),
    /// Print a completion script for a shell
    Completions(CompletionsArgs),
}

/// Where weights come from.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint's safetensors, or the GGUF file
    Auto,
    /// Seeded random weights of the shape in config.json, to measure without a download
    Dummy,
}

/// Storage type of the weights.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum DtypeArg {
    /// As in the checkpoint
    Auto,
    F32,
    Bf16,
}

impl DtypeArg {
    pub fn dtype(self) -> Option<DType> {
        match self {
            DtypeArg::Auto => None,
            DtypeArg::F32 => Some(DType::F32),
            DtypeArg::Bf16 => Some(DType::Bf16),
        }
    }
}

#[derive(Args)]
pub struct ModelArgs {
    #[arg(
        short,
        long,
        value_name = "DIR|FILE|ID",
        help = "Directory of a Hugging Face checkpoint, a .gguf file, or a hub id org/name[@revision] [default: the \
                bundled model]"
    )]
    pub model: Option<String>,
    /// Where weights come from; with dummy, --model may also be a config.json
    #[arg(long, value_enum, default_value = "auto")]
    pub load_format: LoadFormat,
    /// Storage type of the weights; sums are always f32
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: DtypeArg,
}

#[derive(Args)]
pub struct DeviceArgs {
    /// What the model runs on: auto (a GPU where one is found, else the CPU), cpu, cuda, or cuda:N for one of several GPUs
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    #[command(flatten)]
    pub isa: IsaArgs,
}

#[derive(Args, Default)]
pub struct IsaArgs {
    #[arg(long, env = "DIBIT_ISA", hide_env_values = true, value_parser = Isa::named, help = isa_help())]
    pub isa: Option<Isa>,
}

fn isa_help() -> String {
    let names: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
    format!(
        "Instruction set of the CPU's kernels, but for products with quantised weights: {} [default: {}]",
        names.join(", "),
        Isa::detect()
    )
}

#[derive(Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Threads of the CPU [default: one for each core]
    #[arg(short, long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

impl RunArgs {
    /// The device that the command runs on.
    pub fn open_device(&self) -> anyhow::Result<AnyDevice> {
        device::open(self.device.device, self.threads, self.device.isa.isa)
    }
}

/// What windows of a text begin with.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum WindowBos {
    /// BOS, if the model has one
    Always,
    /// BOS where the tokenizer begins a text with it
    Auto,
}

#[derive(Args)]
pub struct WindowArgs {
    /// What each window of the text begins with
    #[arg(long, value_enum, default_value = "always")]
    pub window_bos: WindowBos,
}

#[derive(Args)]
pub struct CalibrationArgs {
    /// What `dibit calibrate` made for the schemes [default: what lies in the model's directory calibration/, or the user's
    /// folder]
    #[arg(long, value_name = "FILES", value_delimiter = ',')]
    pub calibration: Vec<PathBuf>,
}

#[derive(Args)]
pub struct HaystackArgs {
    #[arg(
        long,
        value_name = "FILE",
        help = "Essays to hide needles in: text, or JSON with a field \"text\" [default: RULER's noise sentences]"
    )]
    pub haystack: Option<PathBuf>,
}

fn scheme_help() -> String {
    let known = Scheme::built_in().collect::<Vec<_>>().join(", ");
    format!(
        "Cache scheme: {known}, or a file ending in .toml [default: {BEST}, or {UNCALIBRATED} without its calibration]"
    )
}

/// Whether a command makes a calibration where it finds none.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Calibrate {
    /// Without --kv, where it takes less than about two minutes
    Auto,
    Never,
    /// For the scheme of --kv too, however long it takes
    Now,
}

#[derive(Args)]
pub struct CacheArgs {
    #[arg(long, value_name = "SCHEME", help = scheme_help())]
    pub kv: Option<String>,
    /// What `dibit calibrate` made for the scheme and this model [default: what lies in its directory calibration/, or the
    /// user's folder]
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    pub calibration: Vec<PathBuf>,
    /// Whether to make a calibration where there is none
    #[arg(long, value_enum, default_value = "auto", env = "DIBIT_CALIBRATE", hide_env_values = true)]
    pub calibrate: Calibrate,
    /// Context that the cache is planned for, in tokens
    #[arg(short, long, value_parser = clap::value_parser!(u32).range(1..=1 << 27))]
    pub context: Option<u32>,
    #[command(flatten)]
    pub prefill: PrefillArgs,
}

#[derive(Args)]
#[command(after_help = "\
Within the conversation: /reset forgets it, /stats shows the cache, /quit ends. Ctrl-C stops an answer.

Examples:
  dibit chat --model Qwen/Qwen3-0.6B
  dibit chat --model ./Qwen2.5-1.5B-Instruct --system \"Answer in one sentence.\" --context 16384
  dibit chat --model Qwen/Qwen3-0.6B --template-arg enable_thinking=false --context-shift")]
pub struct ChatArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// System message
    #[arg(long)]
    pub system: Option<String>,
    /// Tokens of an answer at most, -1 for as many as the context holds
    #[arg(short = 'n', long, default_value = "1024", allow_negative_numbers = true, value_parser = generate::max_tokens)]
    pub max_tokens: usize,
    /// Drop the oldest turns where the conversation outgrows the context, which is said
    #[arg(long)]
    pub context_shift: bool,
    #[command(flatten)]
    pub conversation: ConversationArgs,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Args)]
#[command(after_help = "\
Every row sees the packed keys and values that decoding would show it (--prefill streaming). Other ways of reading show it what
they show the tokens of a prompt. KL and agreement are against fp16.

Examples:
  dibit perplexity --text wiki.test.raw --windows 4
  dibit perplexity --text wiki.test.raw --windows 4 --kv dibit --prefill streaming,cells,exact --cell 512
  dibit perplexity --model ./Qwen3-0.6B --text book.txt --kv kivi,kvlinc,mine.toml --context 4096 --json out.json")]
pub struct PerplexityArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Cache schemes, separated by commas; fp16 is always there as the reference
    #[arg(long, value_delimiter = ',', default_value = "fp16,kivi,kvlinc", value_name = "SCHEMES")]
    pub kv: Vec<String>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub window: WindowArgs,
    /// Tokens of a window
    #[arg(short, long, default_value = "2048")]
    pub context: usize,
    /// How windows are read, several ways separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "streaming")]
    pub prefill: Vec<PrefillMode>,
    #[command(flatten)]
    pub cell: CellArgs,
    /// Number of windows [default: the whole text]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub windows: Option<u32>,
    /// Write all figures there, those of every token too
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Perplexity, KL and agreement are those of `dibit perplexity`, retrieval is the mean of four tasks of `dibit ruler`, bits at
longer contexts are counted and not run. The report is one page that needs nothing else. Where schemes with a linear
correction have their adapters, it also shows what the correction does: by method, number of features, range of layers.

Examples:
  dibit compare --text wiki.test.raw --report report
  dibit compare --text wiki.test.raw --schemes kivi,kivi-linc,kvlinc-rotation,kvlinc \\
    --calibration kvlinc.safetensors --retrieval-context 2048,4096 --report report
  dibit compare --model ./Qwen3-0.6B --text wiki.test.raw --schemes kivi,kvlinc,mine.toml --context 4096 --csv out.csv
  dibit compare --text wiki.test.raw --calibration rotatekv.safetensors,resq.safetensors --samples 0")]
pub struct CompareArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// The text, UTF-8
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Cache schemes, separated by commas; all takes the built-in ones. fp16 is always there as the reference
    #[arg(long, visible_alias = "kv", value_delimiter = ',', default_value = "all", value_name = "SCHEMES")]
    pub schemes: Vec<String>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub window: WindowArgs,
    /// Tokens of a window
    #[arg(short, long, default_value = "2048")]
    pub context: usize,
    /// Number of windows
    #[arg(long, default_value = "4", value_parser = clap::value_parser!(u32).range(1..))]
    pub windows: u32,
    /// Retrieval prompts of each of four tasks; 0 leaves retrieval out
    #[arg(long, default_value = "3")]
    pub samples: u32,
    /// Tokens of a retrieval prompt; several lengths are separated by commas [default: those of a window]
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "TOKENS",
        value_parser = clap::value_parser!(u32).range(1..=1 << 27)
    )]
    pub retrieval_context: Vec<u32>,
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// Seed of the retrieval prompts
    #[arg(long, default_value = "42")]
    pub seed: u64,
    #[command(flatten)]
    pub haystack: HaystackArgs,
    /// Write all figures there
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the table there
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write a page with pictures into this directory
    #[arg(long, value_name = "DIR")]
    pub report: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Tasks: niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe, copying.
An answer of several strings counts by the share that is found. Decoding is greedy.
copying is none of RULER's: random tokens twice, of any --context, and what is expected in the second copy.

Examples:
  dibit ruler --tasks niah_single_1,niah_multikey_2,vt --samples 10
  dibit ruler --model ./Qwen3-0.6B --chat --haystack essays.txt --context 4096,8192 --json out.json
  dibit ruler --model ./Llama-3.2-1B --kv fp16,kvlinc,mine.toml --dump prompts.jsonl")]
pub struct RulerArgs {
    #[command(flatten)]
    pub run: RunArgs,
    /// Cache schemes, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "fp16,kivi,kvlinc", value_name = "SCHEMES")]
    pub kv: Vec<String>,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    /// Tasks, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "all")]
    pub tasks: Vec<String>,
    /// Tokens of a prompt and its answer; several lengths are separated by commas
    #[arg(
        short,
        long,
        value_delimiter = ',',
        default_value = "4096",
        value_name = "TOKENS",
        value_parser = clap::value_parser!(u32).range(1..=1 << 27)
    )]
    pub context: Vec<u32>,
    /// Prompts of each task and length
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(u32).range(1..))]
    pub samples: u32,
    /// Seed of the prompts
    #[arg(long, default_value = "42")]
    pub seed: u64,
    #[command(flatten)]
    pub haystack: HaystackArgs,
    /// Put prompts into the model's chat template; without it the text is continued as it is
    #[arg(long)]
    pub chat: bool,
    #[command(flatten)]
    pub conversation: ConversationArgs,
    /// Prompts that run at once
    #[arg(long, default_value = "4", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub parallel: u16,
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// Write all figures there, with every answer
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the scores there, one a line
    #[arg(long, value_name = "FILE")]
    pub csv: Option<PathBuf>,
    /// Write the prompts there before they run, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub dump: Option<PathBuf>,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  dibit inspect
  dibit inspect --model ./Llama-3.1-8B --context 131072 --batch 4 --kv fp16,kvlinc
  dibit inspect --model config.json --load-format dummy --json
  dibit inspect --device cuda --kv fp16,kvlinc")]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[arg(
        long,
        value_name = "DEVICE",
        num_args = 0..=1,
        default_missing_value = "auto",
        help = "Plan for this device (auto, cpu, cuda, cuda:N), and show what was found of it and how operations run there \
                [default: auto, without showing it]"
    )]
    pub device: Option<DeviceChoice>,
    /// Context of a sequence, in tokens [default: the model's]
    #[arg(short, long, value_parser = clap::value_parser!(u32).range(1..=1 << 27))]
    pub context: Option<u32>,
    /// Sequences at once
    #[arg(short, long, default_value = "1", value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub batch: u32,
    /// Cache schemes, separated by commas
    #[arg(long, value_delimiter = ',', default_value = "fp16,kivi,kvlinc,dibit", value_name = "SCHEMES")]
    pub kv: Vec<String>,
    #[command(flatten)]
    pub prefill: PrefillArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  dibit completions bash > ~/.local/share/bash-completion/completions/dibit
  dibit completions zsh > ~/.zfunc/_dibit")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}
