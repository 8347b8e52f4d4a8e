//! Frequent words: which words of a coded text appear most often.

use super::random::Random;
use super::sample::{Draft, Recipe, beyond};
use std::f64::consts::PI;

/// Words that are asked for.
const FREQUENT: usize = 3;

/// Letters of a word.
const LETTERS: usize = 6;

/// Tokens of the prompt for each word of the code.
const TOKENS_PER_WORD: usize = 50;

/// The most frequent word, which is to be ignored.
const DOTS: &str = "...";

/// From this number of words on, the fourth most frequent one appears more often than the fifth, whatever the
/// rounding.
const SMALLEST: usize = 74;

/// A size is the number of words, before rounding.
pub(super) fn recipe(length: usize, max_new_tokens: usize) -> Recipe<'static> {
    let code = (length.saturating_sub(max_new_tokens) / TOKENS_PER_WORD).max(FREQUENT + 2);
    Recipe { sizes: SMALLEST..=beyond(length), draft: Box::new(move |size, random| question(size, code, random)) }
}

fn question(size: usize, code: usize, random: &mut Random) -> Draft {
    let mut words = random.distinct(code, |random| random.letters(b'a', LETTERS));
    words[0] = DOTS.to_owned();
    let mut text: Vec<&str> = Vec::new();
    for (index, word) in words.iter().enumerate() {
        text.extend(std::iter::repeat_n(word.as_str(), frequency(size, index + 1)));
    }
    random.shuffle(&mut text);
    Draft {
        input: format!(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently \
             appeared coded words. {}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are \
             the three most frequently appeared words in the above coded text?",
            text.join(" ")
        ),
        answer_prefix: " Answer: According to the coded text above, the three most frequently appeared words are:"
            .to_owned(),
        answers: words[1..=FREQUENT].to_vec(),
    }
}

/// How often the word of a rank, from 1, appears among `size`: the zeta distribution of exponent 2.
fn frequency(size: usize, rank: usize) -> usize {
    let zeta = PI * PI / 6.0;
    (size as f64 / (rank * rank) as f64 / zeta) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answers_appear_most_often_after_the_dots() {
        for (length, size) in [(256, SMALLEST), (1024, 200), (4096, 777)] {
            let Draft { input, answers, .. } = (recipe(length, 50).draft)(size, &mut Random::new(5, 0));
            let (text, _) = input.split_once('\n').unwrap();
            let text: Vec<&str> = text.split_once("coded words. ").unwrap().1.split(' ').collect();
            let count = |word: &str| text.iter().filter(|other| **other == word).count();
            let counts: Vec<usize> = answers.iter().map(|word| count(word)).collect();
            assert_eq!(counts, [2, 3, 4].map(|rank| frequency(size, rank)));
            assert!(count(DOTS) > counts[0]);
            let others = text.iter().filter(|word| **word != DOTS && !answers.iter().any(|answer| answer == *word));
            assert!(others.map(|word| count(word)).max().unwrap_or(0) < counts[2], "{input}");
        }
        assert!((SMALLEST..20_000).all(|size| frequency(size, 4) > frequency(size, 5)));
    }
}
