//! Variable tracking: a chain of assignments, scattered over noise.

use super::RulerError;
use super::haystack::{NOISE, scatter};
use super::random::Random;
use super::sample::{Draft, Recipe, beyond, largest_fitting};

/// Assignments after the first.
const HOPS: usize = 4;

/// Tokens of the solved example that precedes the question.
const EXAMPLE_TOKENS: usize = 500;

/// Letters of the names in the example and in the question.
const EXAMPLE_LETTERS: usize = 3;
const LETTERS: usize = 5;

/// A size is a number of lines of noise. `tokens` measures an input with its answer prefix.
pub(super) fn recipe(
    length: usize,
    tokens: impl Fn(&Draft) -> Result<usize, RulerError>,
) -> Result<Recipe<'static>, RulerError> {
    let sizes = HOPS + 1..=beyond(length);
    let example = largest_fitting(&sizes, |size| {
        Ok(tokens(&question(size, EXAMPLE_LETTERS, &mut Random::new(0, 0)))? <= EXAMPLE_TOKENS)
    })?;
    let example = example.unwrap_or(*sizes.start());
    let draft = move |size, random: &mut Random| {
        let Draft { input, answer_prefix, answers } = question(example, EXAMPLE_LETTERS, random);
        let solved = format!("{input}{answer_prefix} {}\n", answers.join(" "));
        let asked = question(size, LETTERS, random);
        Draft { input: format!("{solved}\n{}", asked.input), ..asked }
    };
    Ok(Recipe { sizes, draft: Box::new(draft) })
}

fn question(noises: usize, letters: usize, random: &mut Random) -> Draft {
    let names = random.distinct(HOPS + 1, |random| random.letters(b'A', letters));
    let value = 10_000 + random.below(89_999);
    let mut chain = vec![format!("VAR {} = {value}", names[0])];
    chain.extend(names.windows(2).map(|pair| format!("VAR {} = VAR {} ", pair[1], pair[0])));
    let context = scatter(vec![NOISE.to_owned(); noises], chain, random);
    // The prefix ends in a space, and so do the assignments: RULER's, though many tokenizers make it a token of its own.
    Draft {
        input: format!(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: \
             Find all variables that are assigned the value {value} in the text above."
        ),
        answer_prefix: format!(
            " Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the \
             value {value}, they are: ",
            HOPS + 1
        ),
        answers: names,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_leads_from_the_value_to_every_answer() {
        for seed in 0..20 {
            let Draft { input, answer_prefix, answers } = question(12, LETTERS, &mut Random::new(seed, 0));
            let mut lines = input.lines().filter_map(|line| line.strip_prefix("VAR "));
            let (first, value) = lines.next().unwrap().split_once(" = ").unwrap();
            assert!((10_000..99_999).contains(&value.parse::<usize>().unwrap()));
            assert!(input.ends_with(&format!(
                "\nQuestion: Find all variables that are assigned the value {value} in the text above."
            )));
            assert!(answer_prefix.ends_with(&format!(", 5 variables are assigned the value {value}, they are: ")));
            let mut names = vec![first];
            for line in lines {
                let (name, from) = line.split_once(" = VAR ").unwrap();
                assert_eq!(from, format!("{} ", names.last().unwrap()));
                names.push(name);
            }
            assert_eq!(names, answers);
            assert!(names.iter().all(|name| name.len() == LETTERS));
            assert_eq!(input.lines().filter(|line| *line == NOISE).count(), 12);
        }
    }

    #[test]
    fn a_solved_example_precedes_the_question() {
        let recipe = recipe(4096, |draft| Ok(draft.input.split_whitespace().count())).unwrap();
        let Draft { input, answers, .. } = (recipe.draft)(9, &mut Random::new(1, 0));
        let [instruction, example, again, asked] = input.split("\n\n").collect::<Vec<_>>()[..] else {
            panic!("{input}")
        };
        assert_eq!(
            [instruction, again],
            ["Memorize and track the chain(s) of variable assignment hidden in the following text."; 2]
        );
        let names: Vec<&str> = example.rsplit_once("they are:  ").unwrap().1.split(' ').collect();
        assert_eq!(names.len(), 5);
        assert!(names.iter().all(|name| example.contains(&format!("VAR {name} = "))));
        assert!(answers.iter().all(|name| asked.contains(name) && !example.contains(name)));
    }
}
