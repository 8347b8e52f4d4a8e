//! Stop strings in streamed text.

/// Passes text on until a stop string appears; text that may be the beginning of one is held back.
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
}

impl StopFilter {
    /// A filter for these strings; empty ones are ignored.
    pub fn new(stops: &[String]) -> Self {
        StopFilter { stops: stops.iter().filter(|stop| !stop.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Adds text. Returns what can be shown, and whether a stop string has appeared: it and what follows it are
    /// dropped.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let held = self.held.len() - self.stops.iter().map(|stop| self.overlap(stop)).max().unwrap_or(0);
        let rest = self.held.split_off(held);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// What was held back, once no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of the held text that a stop string begins with.
    fn overlap(&self, stop: &str) -> usize {
        let longest = stop.len().min(self.held.len());
        (1..=longest).rev().find(|&n| stop.is_char_boundary(n) && self.held.ends_with(&stop[..n])).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_stop_string_in_pieces_is_found() {
        let mut filter = StopFilter::new(&["\n\nUser:".into(), String::new()]);
        assert_eq!(filter.push("Hello\n"), ("Hello".into(), false));
        assert_eq!(filter.push("x\n\nUs"), ("\nx".into(), false));
        assert_eq!(filter.push("er: more"), (String::new(), true));
        assert_eq!(filter.finish(), "");
    }

    #[test]
    fn what_was_held_comes_out_at_the_end() {
        let mut filter = StopFilter::new(&["éé".into()]);
        assert_eq!(filter.push("café"), ("caf".into(), false));
        assert_eq!(filter.finish(), "é");
    }

    proptest! {
        #[test]
        fn equals_cutting_the_whole_text(pieces in prop::collection::vec("[ab]{0,4}", 0..8), stop in "[ab]{1,4}") {
            let mut filter = StopFilter::new(std::slice::from_ref(&stop));
            let (mut out, mut stopped) = (String::new(), false);
            for piece in &pieces {
                let (text, stop) = filter.push(piece);
                out += &text;
                stopped = stop;
                if stopped {
                    break;
                }
            }
            if !stopped {
                out += &filter.finish();
            }
            let whole = pieces.concat();
            prop_assert_eq!(out, whole.split(&stop).next().unwrap());
            prop_assert_eq!(stopped, whole.contains(&stop));
        }
    }
}
