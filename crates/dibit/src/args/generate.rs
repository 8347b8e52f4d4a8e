//! Options of `dibit generate`.

use super::{CacheArgs, ConversationArgs, RunArgs, SamplingArgs, escapes};
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
#[command(after_help = "\
Examples:
  dibit generate \"Once upon a time\"
  dibit generate --model ./Llama-3.2-1B --kv kivi --temperature 0 --max-tokens 64 \"The capital of France is\"
  dibit generate --model Qwen/Qwen3-0.6B --chat --template-arg enable_thinking=false \"What is the capital of France?\"
  cat long.txt | dibit generate --json
  dibit generate --prompts prompts.txt --temperature 0
  dibit generate --samples 4 --temperature 1 --seed 7 \"A name for a boat:\"")]
#[command(group = clap::ArgGroup::new("many").multiple(true).args(["prompts", "samples"]))]
#[command(group = clap::ArgGroup::new("source").args(["prompt", "prompts", "prompt_file"]))]
pub struct GenerateArgs {
    /// The prompt; read from stdin where it is left out
    pub prompt: Option<String>,
    /// A file of prompts, one a line, run together
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// A file that holds the prompt; the end of its last line is no part of it
    #[arg(long, value_name = "FILE")]
    pub prompt_file: Option<PathBuf>,
    /// Texts to generate for each prompt, from random numbers of their own
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub samples: u16,
    /// Texts of --prompts and --samples that run at once
    #[arg(long, default_value = "8", requires = "many", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub parallel: u16,
    /// The prompt is a message to the model: its chat template is applied
    #[arg(long)]
    pub chat: bool,
    /// System message
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    #[command(flatten)]
    pub conversation: ConversationArgs,
    #[command(flatten)]
    pub run: RunArgs,
    #[command(flatten)]
    pub cache: CacheArgs,
    /// Tokens to generate at most, -1 for as many as the context holds
    #[arg(short = 'n', long, default_value = "256", allow_negative_numbers = true, value_parser = max_tokens)]
    pub max_tokens: usize,
    #[command(flatten)]
    pub sampling: SamplingArgs,
    #[arg(
        long,
        value_name = "STRING",
        value_parser = escapes::parse,
        help = "End the text where this string appears, or this special token is chosen; may be repeated; \\n, \\t, \\xNN and \
                the like stand for characters"
    )]
    pub stop: Vec<String>,
    /// Tell log-probabilities in the JSON, with those of this many most likely tokens
    #[arg(long, value_name = "COUNT", requires = "json", value_parser = clap::value_parser!(u16).range(0..=1000))]
    pub logprobs: Option<u16>,
    /// Print one JSON object (an array with --prompts or several samples) and nothing else to stdout
    #[arg(long)]
    pub json: bool,
}

/// A number of tokens, or -1 for no limit.
pub(super) fn max_tokens(text: &str) -> Result<usize, String> {
    match text {
        "-1" => Ok(usize::MAX),
        _ => text.parse().map_err(|error| format!("{error}; give a number, or -1 for as many as the context holds")),
    }
}
