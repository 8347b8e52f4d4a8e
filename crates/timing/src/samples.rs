use serde::Serialize;
use std::fmt;

/// What was measured of one thing, a number for each round.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds the number of the next round.
    pub fn push(&mut self, number: f64) {
        self.0.push(number);
    }

    /// `f` of the number of each round.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Samples {
        Samples(self.0.iter().map(|number| f(*number)).collect())
    }

    /// What each round's number is divided by the other's of that round.
    pub fn over(&self, other: &Samples) -> Samples {
        Samples(self.0.iter().zip(&other.0).map(|(own, other)| own / other).collect())
    }

    /// Median and quartiles.
    ///
    /// # Panics
    /// If there are no numbers.
    pub fn spread(&self) -> Spread {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Spread { median: at(0.5), low: at(0.25), high: at(0.75) }
    }
}

/// Median and quartiles of what was measured: half of the numbers lie between `low` and `high`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The first quartile.
    pub low: f64,
    /// The third quartile.
    pub high: f64,
}

/// `median (low to high)` with as many decimals as are asked for, two where none are.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let decimals = f.precision().unwrap_or(2);
        let Spread { median, low, high } = self;
        let text = format!("{median:.decimals$} ({low:.decimals$} to {high:.decimals$})");
        write!(f, "{text:>width$}", width = f.width().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_numbers() {
        let spread = |numbers: &[f64]| Samples(numbers.to_vec()).spread();
        assert_eq!(spread(&[4.0]), Spread { median: 4.0, low: 4.0, high: 4.0 });
        assert_eq!(spread(&[5.0, 1.0, 2.0, 4.0, 3.0]), Spread { median: 3.0, low: 2.0, high: 4.0 });
        assert_eq!(spread(&[2.0, 1.0]).median, 1.5);
        assert_eq!(format!("{:.1}", spread(&[2.0, 1.0])), "1.5 (1.2 to 1.8)");
    }

    #[test]
    fn ratios_are_those_of_the_same_round() {
        let (slow, fast) = (Samples(vec![8.0, 80.0, 4.0]), Samples(vec![2.0, 20.0, 1.0]));
        assert_eq!(slow.over(&fast), Samples(vec![4.0; 3]));
    }
}
