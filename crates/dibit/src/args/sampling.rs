//! Options of sampling.

use super::escapes;
use clap::Args;

#[derive(Args)]
pub struct SamplingArgs {
    /// Divisor of the logits; 0 is greedy [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Sample from the most likely tokens that hold this probability [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Sample from this many most likely tokens, 0 or -1 for all [default: the model's]
    #[arg(long, allow_negative_numbers = true, value_parser = top_k)]
    pub top_k: Option<usize>,
    /// Leave out tokens less likely than this share of the most likely one [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Divide the logits of tokens that have occurred, 1 for none [default: the model's]
    #[arg(long, visible_alias = "repeat-penalty", allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Take this from the logits of generated tokens, -2 to 2
    #[arg(long, allow_negative_numbers = true, default_value = "0")]
    pub presence_penalty: f32,
    /// Take this from the logits of generated tokens, for each time, -2 to 2
    #[arg(long, allow_negative_numbers = true, default_value = "0")]
    pub frequency_penalty: f32,
    /// Strength of the DRY penalty on tokens that go on with a repetition, 0 for none
    #[arg(long, allow_negative_numbers = true, default_value = "0")]
    pub dry_multiplier: f32,
    /// Growth of the DRY penalty with each token of the repetition
    #[arg(long, allow_negative_numbers = true, default_value = "1.75", requires = "dry_multiplier")]
    pub dry_base: f32,
    /// Tokens that may repeat without DRY penalty
    #[arg(long, default_value = "2", requires = "dry_multiplier")]
    pub dry_allowed_length: usize,
    #[arg(
        long,
        value_name = "STRING",
        requires = "dry_multiplier",
        value_parser = escapes::parse,
        help = "String that ends a repetition for DRY; may be repeated, escapes as in --stop [default: \\n : \" *]"
    )]
    pub dry_sequence_breaker: Vec<String>,
    /// Add to the logit of a token: ID+BIAS or ID-BIAS, from -100 to 100; may be repeated
    #[arg(long, value_name = "ID+BIAS", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers, -1 for one from the clock [default: -1]
    #[arg(long, allow_negative_numbers = true, value_parser = seed)]
    pub seed: Option<Seed>,
}

/// Where random numbers begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seed {
    Clock,
    Given(u64),
}

fn top_k(text: &str) -> Result<usize, String> {
    if text == "-1" { Ok(0) } else { text.parse().map_err(|error| format!("{error}; give a number, 0 or -1 for all")) }
}

fn seed(text: &str) -> Result<Seed, String> {
    match text {
        "-1" => Ok(Seed::Clock),
        _ => text.parse().map(Seed::Given).map_err(|error| format!("{error}; give a number, or -1 for the clock")),
    }
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let problem = || "give a token id and what to add to its logit, as in 1234+1.5 or 1234-100".to_owned();
    let at = text.find(['+', '-', '=']).ok_or_else(problem)?;
    let (id, bias) = text.split_at(at);
    let bias = bias.trim_start_matches('=');
    Ok((id.parse().map_err(|_| problem())?, bias.parse().map_err(|_| problem())?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_llama_cpp_takes_is_understood() {
        assert_eq!((top_k("-1"), top_k("40")), (Ok(0), Ok(40)));
        assert!(top_k("-2").is_err());
        assert_eq!((seed("-1"), seed("7")), (Ok(Seed::Clock), Ok(Seed::Given(7))));
        assert!(seed("-7").is_err());
        assert_eq!(logit_bias("15043+1"), Ok((15043, 1.0)));
        assert_eq!(logit_bias("15043-1.5"), Ok((15043, -1.5)));
        assert_eq!(logit_bias("3=-2"), Ok((3, -2.0)));
        for bad in ["", "3", "+1", "a+1", "3+b"] {
            assert!(logit_bias(bad).is_err(), "{bad}");
        }
    }
}
