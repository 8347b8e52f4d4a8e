//! Prompts that fill a length.

use super::random::Random;
use super::task::Kind;
use super::{Haystack, RulerError, Task, common, frequent, variables};
use dibit_model::ModelError;
use std::ops::RangeInclusive;

/// A prompt with what its answer must contain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Its task.
    pub task: Task,
    /// Its number within the task, from 0.
    pub index: usize,
    /// The question with its context.
    pub input: String,
    /// How the answer begins; a model is to go on from there.
    pub answer_prefix: String,
    /// The strings to be found.
    pub answers: Vec<String>,
    /// Token ids of input and prefix, as the caller encodes them.
    pub prompt: Vec<u32>,
}

/// Which prompts are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleOptions {
    /// Tokens of a prompt and its answer at most.
    pub length: usize,
    /// Number of prompts.
    pub count: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// A prompt before it has been measured.
pub(super) struct Draft {
    pub input: String,
    pub answer_prefix: String,
    pub answers: Vec<String>,
}

/// How prompts of a task are drafted, larger or smaller.
pub(super) struct Recipe<'a> {
    pub sizes: RangeInclusive<usize>,
    pub draft: Box<Drafter<'a>>,
}

/// Drafts a prompt of a size.
type Drafter<'a> = dyn Fn(usize, &mut Random) -> Draft + 'a;

/// More units of haystack than a prompt of this length has, as none takes less than a quarter of a token.
pub(super) fn beyond(length: usize) -> usize {
    4 * length.min(1 << 40)
}

/// Makes prompts of a task. `encode` turns an input and the beginning of its answer into the ids that the model
/// reads; with `max_new_tokens` of the task they fill the length, and never exceed it. A prompt depends on nothing
/// but the arguments and its index.
///
/// # Errors
/// [`RulerError::TooShort`], and those of `encode`.
pub fn samples(
    task: Task,
    options: SampleOptions,
    haystack: &Haystack,
    encode: impl Fn(&str, &str) -> Result<Vec<u32>, ModelError>,
) -> Result<Vec<Sample>, RulerError> {
    let SampleOptions { length, count, seed } = options;
    let answer = task.max_new_tokens();
    let encode = |draft: &Draft| encode(&draft.input, &draft.answer_prefix).map_err(RulerError::from);
    let Recipe { sizes, draft } = match task.kind() {
        Kind::Needles(needles) => needles.recipe(length, haystack),
        Kind::Variables => variables::recipe(length, |draft| Ok(encode(draft)?.len()))?,
        Kind::CommonWords => common::recipe(length),
        Kind::FrequentWords => frequent::recipe(length, answer),
    };
    let draft = |index: usize, size| draft(size, &mut Random::new(seed, (task as u64) << 32 | index as u64));
    let smallest = *sizes.start();
    // Samples of one size are alike in length, so one search serves for all.
    let fits = |size| Ok(encode(&draft(0, size))?.len() + answer <= length);
    let typical = largest_fitting(&sizes, fits)?.unwrap_or(smallest);
    let sample = |index| {
        let mut size = typical;
        loop {
            let draft = draft(index, size);
            let prompt = encode(&draft)?;
            let needed = prompt.len() + answer;
            if needed <= length {
                let Draft { input, answer_prefix, answers } = draft;
                return Ok(Sample { task, index, input, answer_prefix, answers, prompt });
            }
            if size == smallest {
                return Err(RulerError::TooShort { task, needed, answer, length });
            }
            let surplus = ((needed - length) * size).div_ceil(prompt.len());
            size = size.saturating_sub(surplus).max(smallest);
        }
    };
    (0..count).map(sample).collect()
}

/// The largest size that fits, where larger ones are longer; `None` where not even the smallest one does.
pub(super) fn largest_fitting(
    sizes: &RangeInclusive<usize>,
    mut fits: impl FnMut(usize) -> Result<bool, RulerError>,
) -> Result<Option<usize>, RulerError> {
    let (mut low, largest) = (*sizes.start(), *sizes.end());
    if largest < low || !fits(low)? {
        return Ok(None);
    }
    // `low` fits; `high` does not, or is beyond the sizes.
    let mut high = loop {
        let next = (2 * low).min(largest + 1);
        if next > largest || !fits(next)? {
            break next;
        }
        low = next;
    };
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(Some(low))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words, and punctuation on its own.
    fn encode(input: &str, prefix: &str) -> Result<Vec<u32>, ModelError> {
        let text = format!("{input}{prefix}");
        let words = text.split_whitespace().map(|word| 1 + word.matches(|c: char| !c.is_alphanumeric()).count());
        Ok(vec![0; words.sum()])
    }

    fn make(task: Task, length: usize, count: usize, seed: u64) -> Result<Vec<Sample>, RulerError> {
        let haystack = Haystack::essay("It was late. The (old) man went home; nobody saw him. Why?").unwrap();
        samples(task, SampleOptions { length, count, seed }, &haystack, encode)
    }

    #[test]
    fn prompts_fill_the_length_and_never_exceed_it() {
        for task in Task::ALL {
            for length in [1500, 4000, 5000] {
                for sample in make(task, length, 4, 0).unwrap() {
                    let total = sample.prompt.len() + task.max_new_tokens();
                    assert!(total <= length && total + 120 > length, "{task}: {total} of {length}");
                    assert!(sample.answers.iter().all(|answer| sample.input.contains(answer.as_str())), "{task}");
                }
            }
        }
    }

    #[test]
    fn a_sample_depends_on_its_seed_and_index_alone() {
        for task in Task::ALL {
            let all = make(task, 1500, 3, 7).unwrap();
            assert_eq!(make(task, 1500, 3, 7).unwrap(), all);
            assert_eq!(make(task, 1500, 1, 7).unwrap(), all[..1]);
            assert_ne!(all[0].answers, all[1].answers);
            assert_ne!(make(task, 1500, 1, 8).unwrap()[0].answers, all[0].answers);
        }
    }

    #[test]
    fn a_length_too_short_for_a_task_says_what_it_needs() {
        for task in Task::ALL {
            for length in [0, 1, task.max_new_tokens(), 150] {
                let error = make(task, length, 1, 0).unwrap_err();
                let RulerError::TooShort { needed, .. } = error else { panic!("{task}: {error}") };
                assert!(needed > length, "{task}");
            }
            assert!(make(task, 0, 0, 0).unwrap().is_empty());
        }
        let message = make(Task::Vt, 100, 1, 0).unwrap_err().to_string();
        assert!(message.starts_with("vt needs ") && message.contains("30 of them for the answer"), "{message}");
    }

    #[test]
    fn the_search_finds_the_edge() {
        for largest in [3, 4, 17, 100] {
            for edge in 2..=largest {
                let found = largest_fitting(&(3..=largest), |size| Ok(size <= edge)).unwrap();
                assert_eq!(found, (edge >= 3).then_some(edge));
            }
        }
    }
}
