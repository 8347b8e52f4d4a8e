use super::needle::{Hay, Needles, Token};
use super::{COPYING, RulerError};
use std::fmt;
use std::str::FromStr;

/// A task of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Task {
    /// One number in repeated noise.
    NiahSingle1,
    /// One number in an essay.
    NiahSingle2,
    /// One UUID in an essay.
    NiahSingle3,
    /// One of four numbers in an essay.
    NiahMultikey1,
    /// One number among nothing but needles.
    NiahMultikey2,
    /// One UUID, asked for by a UUID, among nothing but needles.
    NiahMultikey3,
    /// Four numbers of one key in an essay.
    NiahMultivalue,
    /// The numbers of four keys in an essay.
    NiahMultiquery,
    /// Variables that are assigned a value through each other.
    Vt,
    /// The ten most common words of a list.
    Cwe,
    /// The three most frequent words of a coded text.
    Fwe,
}

/// How the prompts of a task come about.
pub(super) enum Kind {
    Needles(Needles),
    Variables,
    CommonWords,
    FrequentWords,
}

impl Task {
    /// All tasks, in the order of the paper.
    pub const ALL: [Task; 11] = [
        Task::NiahSingle1,
        Task::NiahSingle2,
        Task::NiahSingle3,
        Task::NiahMultikey1,
        Task::NiahMultikey2,
        Task::NiahMultikey3,
        Task::NiahMultivalue,
        Task::NiahMultiquery,
        Task::Vt,
        Task::Cwe,
        Task::Fwe,
    ];

    /// The name that RULER gives it.
    pub const fn name(self) -> &'static str {
        match self {
            Task::NiahSingle1 => "niah_single_1",
            Task::NiahSingle2 => "niah_single_2",
            Task::NiahSingle3 => "niah_single_3",
            Task::NiahMultikey1 => "niah_multikey_1",
            Task::NiahMultikey2 => "niah_multikey_2",
            Task::NiahMultikey3 => "niah_multikey_3",
            Task::NiahMultivalue => "niah_multivalue",
            Task::NiahMultiquery => "niah_multiquery",
            Task::Vt => "vt",
            Task::Cwe => "cwe",
            Task::Fwe => "fwe",
        }
    }

    /// Tokens that an answer may have.
    pub const fn max_new_tokens(self) -> usize {
        match self {
            Task::Vt => 30,
            Task::Cwe => 120,
            Task::Fwe => 50,
            _ => 128,
        }
    }

    /// Whether its needles lie in an essay.
    pub fn takes_essay(self) -> bool {
        matches!(self.kind(), Kind::Needles(Needles { hay: Hay::Essay, .. }))
    }

    pub(super) const fn kind(self) -> Kind {
        let single = Needles {
            hay: Hay::Essay,
            key: Token::Words,
            value: Token::Number,
            num_keys: 1,
            num_values: 1,
            num_queries: 1,
        };
        Kind::Needles(match self {
            Task::NiahSingle1 => Needles { hay: Hay::Noise, ..single },
            Task::NiahSingle2 => single,
            Task::NiahSingle3 => Needles { value: Token::Uuid, ..single },
            Task::NiahMultikey1 => Needles { num_keys: 4, ..single },
            Task::NiahMultikey2 => Needles { hay: Hay::Needles, ..single },
            Task::NiahMultikey3 => Needles { hay: Hay::Needles, key: Token::Uuid, value: Token::Uuid, ..single },
            Task::NiahMultivalue => Needles { num_values: 4, ..single },
            Task::NiahMultiquery => Needles { num_keys: 4, num_queries: 4, ..single },
            Task::Vt => return Kind::Variables,
            Task::Cwe => return Kind::CommonWords,
            Task::Fwe => return Kind::FrequentWords,
        })
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Task {
    type Err = RulerError;

    fn from_str(name: &str) -> Result<Self, RulerError> {
        if let Some(task) = Task::ALL.into_iter().find(|task| task.name() == name) {
            return Ok(task);
        }
        let names = || Task::ALL.map(Task::name).into_iter().chain([COPYING]);
        let nearest = names()
            .map(|known| (strsim::damerau_levenshtein(name, known), known))
            .min()
            .filter(|(distance, known)| *distance <= known.len() / 3);
        Err(RulerError::UnknownTask {
            name: name.to_owned(),
            suggestion: nearest.map(|(_, known)| format!(" (did you mean '{known}'?)")).unwrap_or_default(),
            known: names().collect::<Vec<_>>().join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back_and_others_get_the_nearest() {
        for task in Task::ALL {
            assert_eq!(task.name().parse::<Task>().unwrap(), task);
        }
        let error = |name: &str| name.parse::<Task>().unwrap_err().to_string();
        assert!(error("coping").contains("did you mean 'copying'?"));
        assert!(error("niah_singel_2").contains("did you mean 'niah_single_2'?"));
        assert!(error("VT").contains("there are niah_single_1, ") && !error("VT").contains("did you mean"));
        assert!(!error("").contains("did you mean"));
    }

    #[test]
    fn five_tasks_take_an_essay() {
        let names: Vec<_> = Task::ALL.into_iter().filter(|task| task.takes_essay()).map(Task::name).collect();
        assert_eq!(names.len(), 5);
        assert!(!names.contains(&"niah_single_1") && !names.contains(&"vt"));
    }
}
