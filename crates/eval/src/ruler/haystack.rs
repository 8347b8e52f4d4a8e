//! What needles lie in.

use super::RulerError;
use super::random::Random;

/// RULER's noise: a line of the contexts that are nothing but this.
pub(super) const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";

/// Depths between which those of needles are drawn, evenly from the beginning of an essay to its end.
const DEPTHS: usize = 40;

/// An essay for the tasks that hide needles between its sentences. It is repeated where it is too short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Haystack {
    words: Vec<String>,
    /// Whether a sentence ends with this word.
    ends: Vec<bool>,
}

impl Haystack {
    /// An essay, as words; RULER takes those of Paul Graham.
    ///
    /// # Errors
    /// [`RulerError::EmptyHaystack`].
    pub fn essay(text: &str) -> Result<Self, RulerError> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        if words.is_empty() {
            return Err(RulerError::EmptyHaystack);
        }
        let next = words.iter().skip(1).map(Some).chain([None]);
        let ends = words.iter().zip(next).map(|(word, next)| ends_sentence(word, next)).collect();
        Ok(Haystack { words, ends })
    }

    /// The stand-in for users without an essay: RULER's noise sentences, over and over.
    pub fn noise() -> Self {
        Haystack::essay(NOISE).expect("the noise has words")
    }

    /// The first `size` words with needles between sentences, each at a depth of its own.
    pub(super) fn hide(&self, size: usize, needles: &[String], random: &mut Random) -> String {
        let mut sentences: Vec<usize> = (1..=size).filter(|end| self.ends[(end - 1) % self.ends.len()]).collect();
        if sentences.last() != Some(&size) {
            sentences.push(size);
        }
        let text = |from: usize, to: usize| {
            let words = (from..to).map(|index| self.words[index % self.words.len()].as_str());
            words.collect::<Vec<_>>().join(" ")
        };
        let (mut parts, mut from) = (Vec::new(), 0);
        for (needle, depth) in needles.iter().zip(random.positions(DEPTHS, needles.len())) {
            let percent = (100.0 * depth as f64 / (DEPTHS - 1) as f64).round() as usize;
            let to = match sentences.len() * percent / 100 {
                0 => 0,
                before => sentences[before - 1],
            };
            parts.extend([text(from, to), needle.clone()]);
            from = to;
        }
        parts.push(text(from, size));
        parts.join(" ")
    }
}

/// Whether a sentence ends between two words.
fn ends_sentence(word: &str, next: Option<&String>) -> bool {
    let stops = word.trim_end_matches(['"', '\'', ')', ']', '”', '’']).ends_with(['.', '!', '?']);
    let begins = next
        .is_none_or(|next| !next.trim_start_matches(['"', '\'', '(', '[', '“', '‘']).starts_with(char::is_lowercase));
    stops && begins
}

/// Lines with others put between them, in their order, each before another line.
pub(super) fn scatter(lines: Vec<String>, others: Vec<String>, random: &mut Random) -> String {
    let mut positions = random.positions(lines.len(), others.len()).into_iter().zip(others).peekable();
    let mut all = Vec::new();
    for (index, line) in lines.into_iter().enumerate() {
        all.extend(positions.next_if(|(position, _)| *position == index).map(|(_, other)| other));
        all.push(line);
    }
    all.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_where_the_next_one_begins() {
        let text = "It cost 3.5 dollars, e.g. nothing. \"Really?\" he said! (Yes.) No";
        let ends = |text| {
            let Haystack { words, ends } = Haystack::essay(text).unwrap();
            words.into_iter().zip(ends).filter(|(_, end)| *end).map(|(word, _)| word).collect::<Vec<_>>()
        };
        assert_eq!(ends(text), ["nothing.", "said!", "(Yes.)"]);
        assert_eq!(ends("the end."), ["end."]);
        assert!(matches!(Haystack::essay(" \n"), Err(RulerError::EmptyHaystack)));
    }

    #[test]
    fn needles_lie_between_sentences_and_nothing_is_lost() {
        let haystack = Haystack::noise();
        let needles = ["<1>", "<2>", "<3>", "<4>"].map(str::to_owned);
        for size in [1, 5, 18, 19, 100] {
            for seed in 0..20 {
                let text = haystack.hide(size, &needles, &mut Random::new(seed, 0));
                let words: Vec<&str> = text.split_whitespace().collect();
                let at = |needle: &String| words.iter().position(|word| word == needle).unwrap();
                let places: Vec<usize> = needles.iter().map(at).collect();
                assert!(places.is_sorted(), "{text}");
                for place in places {
                    let before = words[..place].last().is_none_or(|word| word.ends_with(['.', '>']));
                    assert!(before || words[place + 1..].iter().all(|word| word.ends_with('>')), "{text}");
                }
                let rest: Vec<&str> = words.into_iter().filter(|word| !word.ends_with('>')).collect();
                let expected: Vec<&str> = NOISE.split(' ').cycle().take(size).collect();
                assert_eq!(rest, expected);
            }
        }
    }

    #[test]
    fn scattered_lines_keep_their_order_and_precede_another_line() {
        let lines = || vec!["-".to_owned(); 5];
        let all = scatter(lines(), ["a", "b", "c", "d", "e"].map(str::to_owned).to_vec(), &mut Random::new(0, 0));
        assert_eq!(all, "a\n-\nb\n-\nc\n-\nd\n-\ne\n-");
        for seed in 0..20 {
            let all = scatter(lines(), ["a", "b"].map(str::to_owned).to_vec(), &mut Random::new(seed, 0));
            assert!(all.ends_with('-') && !all.contains("a\nb") && all.find('a') < all.find('b'), "{all}");
            assert_eq!(all.matches('-').count(), 5);
        }
    }
}
