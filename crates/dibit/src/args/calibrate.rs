//! Options of `dibit calibrate`.

use super::BEST;
use super::{RunArgs, WindowArgs};
use clap::{Args, ValueEnum};
use dibit_cache::Scheme;
use dibit_calibrate::{RateSchedule, Start};
use std::path::PathBuf;

fn calibrated_help() -> String {
    let calibrated = Scheme::built_in().filter(|name| Scheme::load(name).is_ok_and(|own| own.takes_calibration()));
    format!("The scheme: {}, or a file ending in .toml", calibrated.collect::<Vec<_>>().join(", "))
}

#[derive(Args)]
#[command(after_help = "\
Without --out the calibration lies in the user's folder (DIBIT_CACHE_DIR, or dibit/calibrations in the system's folder for
caches). All commands find it there for this model, whether it is named as a directory, a hub id or a GGUF file in any format.
Ctrl-C keeps what was gathered and trained in FILE.partial; the same command goes on from there, and measures anew what each
layer costs.
The same model, text, options and seed make the same file.

Examples:
  dibit calibrate --model ./Qwen3-0.6B
  dibit calibrate --kv rotatekv --text books.jsonl --out rotatekv.safetensors
  dibit perplexity --text wiki.txt --kv kivi,rotatekv --calibration rotatekv.safetensors
  dibit calibrate --kv kvlinc --model ./Qwen3-0.6B --text books.jsonl alpaca.json
  dibit calibrate --kv kvlinc --recipe paper --text alpaca.json --out paper.safetensors")]
pub struct CalibrateArgs {
    #[command(flatten)]
    pub run: RunArgs,
    #[arg(long, value_name = "SCHEME", default_value = BEST, help = calibrated_help())]
    pub kv: String,
    #[arg(
        long,
        value_name = "FILES",
        num_args = 1..,
        help = "Text to run the model on, UTF-8; of a .jsonl file, the \"text\" of every line, or its \"messages\"; of a \
                .json file, a list of such entries or of Alpaca's. Not the text to measure with [default: a bundled mix of \
                books, code, dialogue and facts]"
    )]
    pub text: Vec<PathBuf>,
    #[arg(
        long,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..),
        help = "Tokens of it [default: 16384]; of a training, how many its steps take"
    )]
    pub tokens: Option<usize>,
    #[command(flatten)]
    pub window: WindowArgs,
    /// Tokens of a sequence [default: 2048, or what the model supports; of the paper's recipe 3072]
    #[arg(short, long)]
    pub context: Option<usize>,
    /// Seed of random numbers: rotations, starts of training, orders
    #[arg(long, default_value = "0")]
    pub seed: u64,
    /// File to write, safetensors [default: one in the user's folder]
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    #[command(flatten)]
    pub training: TrainingArgs,
}

/// What further options change.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum RecipeName {
    /// What was measured to be best for its time
    Default,
    /// KVLinC's own: 500 steps of 24 sequences of 3072 tokens, every query, constant rate 0.01
    Paper,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum ScheduleName {
    /// Half a cosine, down to zero
    Cosine,
    /// A tenth, whenever held-out KL stops falling
    Plateau,
    Constant,
}

#[derive(Clone, Copy, ValueEnum, PartialEq, Eq)]
pub enum StartName {
    /// Uniform random numbers, as LoLCATs: all features nearly alike
    Uniform,
    /// Directions that queries and the errors of keys share
    Aligned,
    /// Queries and keys prefer different features, so that little is corrected at first
    Apart,
}

/// Text that training is measured on.
#[derive(Clone, Debug, PartialEq)]
pub enum HeldOut {
    /// A share of the text.
    Share(f32),
    /// A file of its own.
    File(PathBuf),
}

fn held_out(text: &str) -> Result<HeldOut, String> {
    match text.parse::<f32>() {
        Err(_) => Ok(HeldOut::File(text.into())),
        Ok(share) if share > 0.0 && share < 1.0 => Ok(HeldOut::Share(share)),
        Ok(_) => Err("a share of the text lies between 0 and 1".into()),
    }
}

/// A number from `least` on, or above it.
fn number(text: &str, least: f32, most: f32, least_too: bool) -> Result<f32, String> {
    let number: f32 = text.parse().map_err(|_| "it is not a number".to_owned())?;
    let fits = number.is_finite() && number <= most && (number > least || (least_too && number == least));
    let bounds = if most.is_finite() { format!(", and at most {most}") } else { String::new() };
    let from = if least_too { "at least" } else { "above" };
    if fits { Ok(number) } else { Err(format!("it must be {from} {least}{bounds}")) }
}

fn positive(text: &str) -> Result<f32, String> {
    number(text, 0.0, f32::INFINITY, false)
}

fn not_negative(text: &str) -> Result<f32, String> {
    number(text, 0.0, f32::INFINITY, true)
}

fn share(text: &str) -> Result<f32, String> {
    number(text, 0.0, 1.0, false)
}

/// How adapters of a linear correction are trained.
#[derive(Args)]
#[command(next_help_heading = "Training of a linear correction")]
pub struct TrainingArgs {
    /// What the options below change [default: default]
    #[arg(long, value_enum, hide_possible_values = false)]
    pub recipe: Option<RecipeName>,
    /// Steps of the optimiser
    #[arg(
        long,
        value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=1 << 24),
        conflicts_with = "tokens"
    )]
    pub steps: Option<usize>,
    /// Tokens of a step
    #[arg(long, value_name = "TOKENS", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub batch_tokens: Option<usize>,
    /// Learning rate of Adam
    #[arg(long, value_name = "RATE", value_parser = positive)]
    pub learning_rate: Option<f32>,
    /// How it changes
    #[arg(long, value_enum)]
    pub schedule: Option<ScheduleName>,
    /// Largest norm of a layer's gradient; 0 for any
    #[arg(long, value_name = "NORM", value_parser = not_negative, allow_negative_numbers = true)]
    pub clip: Option<f32>,
    /// Weight of the squared error of attention's output in the loss; 0 for none
    #[arg(long, value_name = "WEIGHT", value_parser = not_negative, allow_negative_numbers = true)]
    pub mse: Option<f32>,
    /// Train a factor of each query head's correction, which begins near 0
    #[arg(long, overrides_with = "no_gate")]
    pub gate: bool,
    /// Without such a factor
    #[arg(long, overrides_with = "gate")]
    pub no_gate: bool,
    /// What the feature maps begin with
    #[arg(long, value_enum)]
    pub init: Option<StartName>,
    /// Share of the queries of a sequence that are trained on
    #[arg(long, value_name = "SHARE", value_parser = share)]
    pub queries: Option<f32>,
    /// Text to measure training on: a file, or a share of the text [default: 0.05]
    #[arg(long, value_name = "FILE|SHARE", value_parser = held_out)]
    pub heldout: Option<HeldOut>,
}

impl TrainingArgs {
    /// The first option that was given.
    pub fn given(&self) -> Option<&'static str> {
        let all = [
            (self.recipe.is_some(), "--recipe"),
            (self.steps.is_some(), "--steps"),
            (self.batch_tokens.is_some(), "--batch-tokens"),
            (self.learning_rate.is_some(), "--learning-rate"),
            (self.schedule.is_some(), "--schedule"),
            (self.clip.is_some(), "--clip"),
            (self.mse.is_some(), "--mse"),
            (self.gate, "--gate"),
            (self.no_gate, "--no-gate"),
            (self.init.is_some(), "--init"),
            (self.queries.is_some(), "--queries"),
            (self.heldout.is_some(), "--heldout"),
        ];
        all.into_iter().find_map(|(given, name)| given.then_some(name))
    }
}

impl From<ScheduleName> for RateSchedule {
    fn from(name: ScheduleName) -> Self {
        match name {
            ScheduleName::Cosine => RateSchedule::Cosine,
            ScheduleName::Plateau => RateSchedule::Plateau,
            ScheduleName::Constant => RateSchedule::Constant,
        }
    }
}

impl From<StartName> for Start {
    fn from(name: StartName) -> Self {
        match name {
            StartName::Uniform => Start::Uniform,
            StartName::Aligned => Start::Aligned,
            StartName::Apart => Start::Apart,
        }
    }
}
