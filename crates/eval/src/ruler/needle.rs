//! Needles in a haystack.

use super::haystack::{Haystack, NOISE, scatter};
use super::random::Random;
use super::sample::{Draft, Recipe, beyond};
use super::vocabulary;

/// What a needle lies in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Hay {
    Noise,
    Essay,
    /// Other needles.
    Needles,
}

/// What a key or a value is.
#[derive(Clone, Copy)]
pub(super) enum Token {
    Words,
    Number,
    Uuid,
}

impl Token {
    /// What many of them are called.
    const fn plural(self) -> &'static str {
        match self {
            Token::Words => "words",
            Token::Number => "numbers",
            Token::Uuid => "uuids",
        }
    }

    fn draw(self, random: &mut Random) -> String {
        match self {
            Token::Words => vocabulary::key(random),
            Token::Number => (1_000_000 + random.below(9_000_000)).to_string(),
            Token::Uuid => uuid(random.bits()),
        }
    }
}

/// A UUID of version 4.
fn uuid(bits: u128) -> String {
    let bits = bits & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

/// Settings of a task.
#[derive(Clone, Copy)]
pub(super) struct Needles {
    pub hay: Hay,
    pub key: Token,
    pub value: Token,
    pub num_keys: usize,
    /// Values of each key.
    pub num_values: usize,
    /// Keys that are asked for.
    pub num_queries: usize,
}

impl Needles {
    /// A size is the number of words of an essay, or of lines of noise or of other needles.
    pub(super) fn recipe(self, length: usize, haystack: &Haystack) -> Recipe<'_> {
        let smallest = if self.hay == Hay::Essay { 1 } else { self.num_keys * self.num_values };
        let largest = match self.hay {
            Hay::Needles => beyond(length).min(vocabulary::num_keys() / 4),
            _ => beyond(length),
        };
        Recipe { sizes: smallest..=largest, draft: Box::new(move |size, random| self.draft(size, haystack, random)) }
    }

    fn draft(self, size: usize, haystack: &Haystack, random: &mut Random) -> Draft {
        let Needles { hay, key, value, num_keys, num_values, num_queries } = self;
        let others = if hay == Hay::Needles { size } else { 0 };
        let keys = random.distinct(num_keys + others, |random| key.draw(random));
        let values = random.distinct(num_keys * num_values + others, |random| value.draw(random));
        let (values, other_values) = values.split_at(num_keys * num_values);
        let plural = value.plural();
        let line = |key: &String, value: &String| format!("One of the special magic {plural} for {key} is: {value}.");
        let mut needles: Vec<String> =
            values.iter().enumerate().map(|(index, value)| line(&keys[index / num_values], value)).collect();
        random.shuffle(&mut needles);
        let context = match hay {
            Hay::Essay => haystack.hide(size, &needles, random),
            Hay::Noise => scatter(vec![NOISE.to_owned(); size], needles, random),
            Hay::Needles => {
                let lines = keys[num_keys..].iter().zip(other_values).map(|(key, value)| line(key, value)).collect();
                scatter(lines, needles, random)
            }
        };
        let mut asked: Vec<usize> = (0..num_keys).collect();
        random.shuffle(&mut asked);
        asked.truncate(num_queries);
        let query = match asked.iter().map(|&index| keys[index].as_str()).collect::<Vec<_>>().as_slice() {
            [one] => (*one).to_owned(),
            [first @ .., last] => format!("{}, and {last}", first.join(", ")),
            [] => String::new(),
        };
        let answers = asked.iter().flat_map(|&index| &values[index * num_values..][..num_values]).cloned().collect();
        let singular = plural.trim_end_matches('s');
        let (some, are, what_are, kind) = if num_queries * num_values == 1 {
            ("A", "is", "is", singular)
        } else {
            ("Some", "are", "are all", plural)
        };
        Draft {
            input: format!(
                "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz \
                 you about the {kind} afterwards.\n{context}\nWhat {what_are} the special magic {kind} for {query} \
                 mentioned in the provided text?"
            ),
            answer_prefix: format!(" The special magic {kind} for {query} mentioned in the provided text {are}"),
            answers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ruler::Task;
    use crate::ruler::task::Kind;
    use std::collections::HashSet;

    fn needles(task: Task) -> Needles {
        match task.kind() {
            Kind::Needles(needles) => needles,
            _ => panic!("{task} has no needles"),
        }
    }

    fn draft(task: Task, size: usize, seed: u64) -> Draft {
        let haystack = Haystack::essay("Words, 1000000 of them. More words, quite-long ones.").unwrap();
        (needles(task).recipe(4096, &haystack).draft)(size, &mut Random::new(seed, 0))
    }

    /// Key and value of each needle, in the order of the text.
    fn found(input: &str) -> Vec<(String, String)> {
        let pieces = input.split("One of the special magic ").skip(1);
        let pair = |piece: &str| {
            let (key, rest) = piece.split_once(" for ").unwrap().1.split_once(" is: ").unwrap();
            (key.to_owned(), rest.split('.').next().unwrap().to_owned())
        };
        pieces.map(pair).collect()
    }

    #[test]
    fn the_wording_is_that_of_ruler() {
        let Draft { input, answer_prefix, answers } = draft(Task::NiahSingle1, 1, 0);
        let [(key, value)] = &found(&input)[..] else { panic!("one needle: {input}") };
        assert_eq!(
            input,
            format!(
                "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about \
                 the number afterwards.\nOne of the special magic numbers for {key} is: {value}.\nThe grass is green. The sky \
                 is blue. The sun is yellow. Here we go. There and back again.\nWhat is the special magic number for {key} \
                 mentioned in the provided text?"
            )
        );
        assert_eq!(answer_prefix, format!(" The special magic number for {key} mentioned in the provided text is"));
        assert_eq!(answers, std::slice::from_ref(value));

        let Draft { input, answer_prefix, .. } = draft(Task::NiahMultiquery, 20, 0);
        let start = "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz \
                     you about the numbers afterwards.\n";
        assert!(input.starts_with(start), "{input}");
        let (_, question) = input.rsplit_once('\n').unwrap();
        let query = question.strip_prefix("What are all the special magic numbers for ").unwrap();
        let query = query.strip_suffix(" mentioned in the provided text?").unwrap();
        assert_eq!((query.matches(", ").count(), query.matches(", and ").count()), (3, 1));
        assert_eq!(answer_prefix, format!(" The special magic numbers for {query} mentioned in the provided text are"));
    }

    #[test]
    fn every_answer_is_the_value_of_a_key_that_is_asked_for() {
        // Task, needles in 30 units of haystack, answers.
        let cases = [
            (Task::NiahSingle1, 1, 1),
            (Task::NiahSingle2, 1, 1),
            (Task::NiahSingle3, 1, 1),
            (Task::NiahMultikey1, 4, 1),
            (Task::NiahMultikey2, 31, 1),
            (Task::NiahMultikey3, 31, 1),
            (Task::NiahMultivalue, 4, 4),
            (Task::NiahMultiquery, 4, 4),
        ];
        for (task, count, answered) in cases {
            for seed in 0..10 {
                let Draft { input, answer_prefix, answers } = draft(task, 30, seed);
                let found = found(&input);
                assert_eq!((found.len(), answers.len()), (count, answered), "{task}");
                let keys: HashSet<&String> = found.iter().map(|(key, _)| key).collect();
                assert_eq!(keys.len(), count / needles(task).num_values, "{task}");
                assert_eq!(found.iter().map(|(_, value)| value).collect::<HashSet<_>>().len(), count, "{task}");
                for answer in &answers {
                    assert_eq!(input.matches(answer.as_str()).count(), 1, "{task}");
                    let (key, _) = found.iter().find(|(_, value)| value == answer).unwrap();
                    assert!(answer_prefix.contains(key.as_str()), "{task}");
                }
            }
        }
    }

    #[test]
    fn uuids_say_their_version() {
        assert_eq!(uuid(0), "00000000-0000-4000-8000-000000000000");
        assert_eq!(uuid(u128::MAX), "ffffffff-ffff-4fff-bfff-ffffffffffff");
    }
}
