//! Common words: which words of a numbered list appear most often.

use super::random::Random;
use super::sample::{Draft, Recipe, beyond};
use super::vocabulary;

/// Words that are asked for.
const COMMON: usize = 10;

/// Contexts below this have lists of their own.
const SHORT: usize = 4096;

/// How a list is made.
#[derive(Clone, Copy)]
struct List {
    /// Different words.
    words: usize,
    /// How often a common word appears.
    common: usize,
    /// How often any other word appears.
    uncommon: usize,
}

/// A size is the number of different words.
pub(super) fn recipe(length: usize) -> Recipe<'static> {
    let (example, common, uncommon) = if length < SHORT {
        (List { words: 20, common: 3, uncommon: 1 }, 6, 1)
    } else {
        (List { words: 40, common: 10, uncommon: 3 }, 30, 3)
    };
    let draft = move |words, random: &mut Random| {
        let Draft { input, answer_prefix, answers } = question(example, random);
        let solved = format!("{input}{answer_prefix} {}", numbered(answers.iter()));
        let asked = question(List { words, common, uncommon }, random);
        Draft { input: format!("{solved}\n{}", asked.input), ..asked }
    };
    Recipe { sizes: 2 * COMMON..=beyond(length).min(vocabulary::num_keys() / 4), draft: Box::new(draft) }
}

fn question(list: List, random: &mut Random) -> Draft {
    let mut answers = vocabulary::words(list.words, random);
    let others = answers.split_off(COMMON);
    let mut all =
        vec![&answers; list.common].into_iter().chain(vec![&others; list.uncommon]).flatten().collect::<Vec<_>>();
    random.shuffle(&mut all);
    Draft {
        input: format!(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that \
             appear most often.\n{}\nQuestion: What are the 10 most common words in the above list?",
            numbered(all.into_iter())
        ),
        answer_prefix: " Answer: The top 10 words that appear most often in the list are:".to_owned(),
        answers,
    }
}

fn numbered<'a>(words: impl Iterator<Item = &'a String>) -> String {
    words.enumerate().map(|(index, word)| format!("{}. {word}", index + 1)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn the_answers_appear_most_often() {
        for (length, size, [example_common, common, uncommon]) in
            [(1024, 20, [3, 6, 1]), (4095, 100, [3, 6, 1]), (4096, 60, [10, 30, 3])]
        {
            let Draft { input, answers, .. } = (recipe(length).draft)(size, &mut Random::new(2, 0));
            let lists: Vec<&str> = input.lines().filter(|line| line.starts_with("1. ")).collect();
            let counts = |list: &str| {
                let mut counts = HashMap::new();
                for (index, pair) in list.split(' ').collect::<Vec<_>>().chunks(2).enumerate() {
                    assert_eq!(pair[0], format!("{}.", index + 1));
                    *counts.entry(pair[1].to_owned()).or_insert(0) += 1;
                }
                counts
            };
            let [example, asked] = [lists[0], lists[1]].map(counts);
            assert_eq!(asked.len(), size);
            for (word, count) in &asked {
                assert_eq!(*count, if answers.contains(word) { common } else { uncommon });
            }
            assert_eq!(example.values().filter(|&&count| count == example_common).count(), COMMON);
            let (_, solution) = input.split_once("appear most often in the list are: 1. ").unwrap();
            let solution: Vec<&str> = solution.lines().next().unwrap().split(' ').step_by(2).collect();
            assert_eq!(solution.len(), COMMON);
            assert!(solution.iter().all(|word| example[*word] == example_common), "{solution:?}");
        }
    }
}
