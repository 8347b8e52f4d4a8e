/// Maps numbers to positions of a picture. What lies outside of the domain is drawn at its end.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    log: bool,
}

impl Scale {
    /// A linear scale from `low` to `high`.
    pub fn linear([low, high]: [f64; 2], [from, to]: [f64; 2]) -> Self {
        // A domain of one number still needs a width.
        let half = if high > low { 0.0 } else { low.abs().max(1.0) * 0.1 };
        Scale { low: low - half, high: high + half, from, to, log: false }
    }

    /// A logarithmic scale from `low` to `high`, which are above 0.
    pub fn log([low, high]: [f64; 2], [from, to]: [f64; 2]) -> Self {
        let factor = if high > low { 1.0 } else { 2.0 };
        Scale { low: low / factor, high: high * factor, from, to, log: true }
    }

    /// A logarithmic scale with some air around the values; those that are not above 0 do not count.
    pub fn around(values: impl Iterator<Item = f64>, range: [f64; 2]) -> Self {
        let [low, high] = extent(values.filter(|x| *x > 0.0)).unwrap_or([0.1, 1.0]);
        let air = (high / low).powf(0.06).max(1.08);
        Scale::log([low / air, high * air], range)
    }

    /// Position of `value`.
    pub fn at(&self, value: f64) -> f64 {
        let place = |x: f64| if self.log { x.max(f64::MIN_POSITIVE).ln() } else { x };
        let share = (place(value.clamp(self.low, self.high)) - place(self.low)) / (place(self.high) - place(self.low));
        self.from + share * (self.to - self.from)
    }

    /// Whether `value` lies in the domain.
    pub fn holds(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }

    /// Round numbers of the domain, at least `distance` apart in the picture.
    pub fn ticks(&self, distance: f64) -> Vec<f64> {
        let candidates = if self.log { self.log_ticks() } else { Vec::new() };
        if candidates.len() >= 3 {
            return self.apart(candidates, distance);
        }
        // Even steps lie ever closer on a logarithmic scale: the first that have room everywhere.
        let even = [1.0, 1.5, 2.0, 3.0, 4.0].map(|factor| self.linear_ticks(factor * distance));
        let roomy = even.iter().find(|ticks| self.apart(ticks.iter().copied(), distance).len() == ticks.len());
        roomy.unwrap_or(&even[4]).clone()
    }

    /// Ticks for bits of a number: powers of two, and what has room between them.
    pub fn bit_ticks(&self, distance: f64) -> Vec<f64> {
        let widths = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 3.0, 6.0, 12.0, 24.0, 2.5, 5.0, 10.0, 1.5];
        let ticks = self.apart(widths.into_iter().filter(|bits| self.holds(*bits)), distance);
        if ticks.len() < 2 { self.ticks(distance) } else { ticks }
    }

    /// The candidates that are far enough from all that came before them, in ascending order.
    fn apart(&self, candidates: impl IntoIterator<Item = f64>, distance: f64) -> Vec<f64> {
        let mut ticks: Vec<f64> = Vec::new();
        for tick in candidates {
            if ticks.iter().all(|other| (self.at(tick) - self.at(*other)).abs() >= distance) {
                ticks.push(tick);
            }
        }
        ticks.sort_by(f64::total_cmp);
        ticks
    }

    /// 1, 2 and 5 of every decade, or whole decades where these are many.
    fn log_ticks(&self) -> Vec<f64> {
        let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let steps: &[f64] = if (self.high / self.low).log10() > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let ticks = decades.flat_map(|decade| steps.iter().map(move |step| step * 10f64.powi(decade)));
        ticks.filter(|tick| self.holds(*tick)).collect()
    }

    fn linear_ticks(&self, distance: f64) -> Vec<f64> {
        let room = ((self.to - self.from).abs() / distance).max(1.0);
        let rough = (self.high - self.low) / room;
        let decade = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|x| x * decade).into_iter().find(|step| *step >= rough).unwrap_or(rough);
        let first = (self.low / step - 1e-9).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|tick| *tick <= self.high + step * 1e-9).collect()
    }
}

/// Smallest and largest of the finite values.
pub(super) fn extent(values: impl Iterator<Item = f64>) -> Option<[f64; 2]> {
    values.filter(|x| x.is_finite()).fold(None, |extent, x| match extent {
        None => Some([x, x]),
        Some([low, high]) => Some([low.min(x), high.max(x)]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_the_domain_are_ends_of_the_range() {
        let scale = Scale::linear([2.0, 4.0], [100.0, 0.0]);
        assert_eq!([scale.at(2.0), scale.at(3.0), scale.at(4.0), scale.at(9.0)], [100.0, 50.0, 0.0, 0.0]);
        let scale = Scale::log([1.0, 100.0], [0.0, 10.0]);
        assert!((scale.at(10.0) - 5.0).abs() < 1e-9);
        assert_eq!([scale.at(0.0), scale.at(1e9)], [0.0, 10.0]);
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(Scale::linear([75.0, 112.0], [0.0, 200.0]).ticks(40.0), [80.0, 90.0, 100.0, 110.0]);
        assert_eq!(Scale::log([0.015, 0.7], [0.0, 200.0]).ticks(20.0), [0.02, 0.05, 0.1, 0.2, 0.5]);
        assert_eq!(Scale::log([0.01, 500.0], [0.0, 200.0]).ticks(60.0), [0.01, 1.0, 100.0]);
        let ticks = Scale::log([1.1, 1.4], [0.0, 200.0]).ticks(40.0);
        assert!(ticks.iter().zip([1.1, 1.2, 1.3, 1.4]).all(|(a, b)| (a - b).abs() < 1e-9) && ticks.len() == 4);
        assert_eq!(Scale::log([2.2, 17.0], [0.0, 300.0]).bit_ticks(30.0), [3.0, 4.0, 6.0, 8.0, 12.0, 16.0]);
    }

    #[test]
    fn nothing_to_draw_still_makes_a_scale() {
        for scale in [
            Scale::linear([5.0, 5.0], [0.0, 10.0]),
            Scale::around(std::iter::empty(), [0.0, 10.0]),
            Scale::around([0.0, 3.0, f64::NAN].into_iter(), [0.0, 10.0]),
        ] {
            assert!(scale.at(5.0).is_finite() && !scale.ticks(2.0).is_empty(), "{scale:?}");
        }
    }
}
