use crate::{Spread, rounds};
use std::convert::Infallible;
use std::time::Instant;

/// Rounds in which kernels take turns.
const ROUNDS: usize = 15;

/// Kernels against the first one of them: a peer, or what no kernel can exceed.
pub struct Kernels<'a> {
    title: String,
    unit: &'static str,
    contenders: Vec<Contender<'a>>,
}

struct Contender<'a> {
    name: String,
    work: f64,
    run: Box<dyn FnMut() + 'a>,
}

impl<'a> Kernels<'a> {
    /// None yet. `unit` is the work of a second, such as GB/s.
    pub fn new(title: impl Into<String>, unit: &'static str) -> Self {
        Kernels { title: title.into(), unit, contenders: Vec::new() }
    }

    /// One more, that does so much `work` whenever it is run.
    #[must_use]
    pub fn add(mut self, name: impl Into<String>, work: f64, run: impl FnMut() + 'a) -> Self {
        self.contenders.push(Contender { name: name.into(), work, run: Box::new(run) });
        self
    }

    /// Runs them in turns. Says of each how fast it is, and how many times faster than the first: medians and quartiles.
    pub fn table(mut self) -> String {
        let seconds = rounds(ROUNDS, self.contenders.len(), |contender| {
            let start = Instant::now();
            (self.contenders[contender].run)();
            Ok::<_, Infallible>(start.elapsed())
        });
        let Ok(seconds) = seconds;
        let speeds: Vec<_> =
            self.contenders.iter().zip(&seconds).map(|(own, seconds)| seconds.map(|s| own.work / s)).collect();
        let mut table = format!("{}\n", self.title);
        for (own, speed) in self.contenders.iter().zip(&speeds) {
            let (speed, ratio): (Spread, Spread) = (speed.spread(), speed.over(&speeds[0]).spread());
            let Kernels { unit, .. } = self;
            table += &format!("  {:<20} {speed:>28.2} {unit}  {ratio:>22.3} times\n", own.name);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_is_compared_with_the_first() {
        let kernels = Kernels::new("copies", "GB/s").add("one", 1.0, || {}).add("two", 2.0, || {});
        let table = kernels.table();
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!((lines.len(), lines[0][0], lines[2][0]), (3, "copies", "two"));
        assert_eq!(lines[1][6..], ["1.000", "(1.000", "to", "1.000)", "times"]);
    }
}
