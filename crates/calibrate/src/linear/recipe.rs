use serde::{Deserialize, Serialize};
use std::fmt;

/// How the learning rate changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RateSchedule {
    /// Not at all.
    Constant,
    /// Half a cosine, from the full rate to zero.
    Cosine,
    /// To a tenth, whenever the held-out divergence has not fallen for some measurements.
    Plateau,
}

/// What the feature maps begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Start {
    /// Uniform between plus and minus `sqrt(6 / (head_dim D / 2))`, as LoLCATs (Kaiming): all features are nearly alike,
    /// and every packed key is corrected by about `4 / D`.
    Uniform,
    /// Random directions, the same ones for queries and for what the codes of their keys miss, in the size that these have:
    /// features meet where both point the same way.
    Aligned,
    /// Queries and keys prefer different features, so that little is corrected at first: half of the features are of
    /// directions in which keys miss something, and queries prefer the other half.
    Apart,
}

/// How the adapters of a linear correction are trained.
///
/// The default differs from [`Recipe::paper`] where that was measured to be better or faster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Steps of the optimiser.
    pub steps: usize,
    /// Tokens of a step, rounded down to whole sequences; at least one.
    pub batch_tokens: usize,
    /// Learning rate of Adam, at first.
    pub rate: f32,
    /// How it changes.
    pub schedule: RateSchedule,
    /// Largest norm of a layer's gradient; 0 for any.
    pub clip: f32,
    /// Weight of the squared error of attention's output beside the cross-entropy of its rows.
    pub output_weight: f32,
    /// Whether the correction of each query head is multiplied by a number between 0 and 1, which is trained too and
    /// begins near 0.
    pub gate: bool,
    /// What the feature maps begin with.
    pub start: Start,
    /// Share of the queries of a sequence that are trained on.
    pub rows: f32,
}

impl Recipe {
    /// What the paper says (KVLinC, section 4 and appendix, base models): 500 steps of 24 sequences of 3072 tokens, Adam
    /// at 0.01, cross-entropy alone. The start is that of LoLCATs, which the paper builds on.
    pub fn paper() -> Self {
        Recipe {
            steps: 500,
            batch_tokens: 24 * Self::PAPER_CONTEXT,
            rate: 0.01,
            schedule: RateSchedule::Constant,
            clip: 1.0,
            output_weight: 0.0,
            gate: false,
            start: Start::Uniform,
            rows: 1.0,
        }
    }

    /// Tokens of a sequence of [`Recipe::paper`].
    pub const PAPER_CONTEXT: usize = 3072;

    /// Sequences of a step.
    pub fn sequences(&self, context: usize) -> usize {
        (self.batch_tokens / context.max(1)).max(1)
    }
}

impl Default for Recipe {
    fn default() -> Self {
        Recipe {
            steps: 300,
            batch_tokens: 8192,
            rate: 0.01,
            schedule: RateSchedule::Cosine,
            clip: 1.0,
            output_weight: 0.0,
            gate: true,
            start: Start::Aligned,
            rows: 0.25,
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Recipe { steps, batch_tokens, rate, schedule, clip, output_weight, gate, start, rows } = self;
        let schedule = match schedule {
            RateSchedule::Constant => "constant",
            RateSchedule::Cosine => "cosine",
            RateSchedule::Plateau => "plateau",
        };
        write!(f, "{steps} steps of {batch_tokens} tokens, rate {rate} {schedule}, clip {clip}")?;
        if *output_weight > 0.0 {
            write!(f, ", output error times {output_weight}")?;
        }
        f.write_str(if *gate { ", gates" } else { "" })?;
        f.write_str(match start {
            Start::Uniform => "",
            Start::Aligned => ", started aligned",
            Start::Apart => ", started apart",
        })?;
        if *rows < 1.0 {
            write!(f, ", {rows} of the queries")?;
        }
        Ok(())
    }
}
