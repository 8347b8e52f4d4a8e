//! Which tokens a layer protects: the first ones, or those with massive activations.

use crate::{Pivots, Sinks};
use std::ops::Range;

/// A massive activation is above this, and above this many times the median of the tokens' largest (Sun et al. 2024,
/// relaxed).
const MASSIVE: f32 = 100.0;
const MASSIVE_OVER_MEDIAN: f32 = 50.0;

/// The protected tokens of one sequence.
#[derive(Debug, Clone)]
pub struct SinkTokens {
    /// Positions for each layer, in the order in which they were found: that of their slots.
    layers: Vec<Vec<u32>>,
    /// Pivots, once an earlier layer of this pass found them.
    pivots: Option<Vec<u32>>,
}

impl SinkTokens {
    /// Those of an empty sequence.
    pub(crate) fn new(sinks: Sinks, num_layers: usize) -> Self {
        SinkTokens { layers: vec![sinks.first_positions(); num_layers], pivots: None }
    }

    /// Forgets what layers of an earlier pass found.
    pub fn begin_pass(&mut self) {
        self.pivots = None;
    }

    /// Positions that a layer protects.
    pub fn layer(&self, layer: usize) -> &[u32] {
        &self.layers[layer]
    }

    /// Chooses tokens of a prompt by the residual stream that enters `layer`: `hidden` has a row of `width` numbers
    /// for each token of `tokens`.
    pub fn choose(&mut self, sinks: Sinks, layer: usize, tokens: Range<usize>, hidden: &[f32], width: usize) {
        let begins = tokens.start == 0;
        match sinks {
            Sinks::None | Sinks::First(_) | Sinks::Auto(_) => {}
            Sinks::Massive(count) => {
                if begins {
                    self.layers[layer].clear();
                }
                self.add(layer, count, largest(hidden, width, count).map(|row| (tokens.start + row) as u32));
            }
            Sinks::Pivots(pivots) => {
                if begins {
                    self.layers[layer].clear();
                }
                if pivots.per_layer {
                    self.pivots = None;
                }
                // The residual stream that enters layer 0 has passed no layer.
                if layer > 0 && self.pivots.is_none() {
                    self.pivots = find_pivots(pivots, tokens.start, hidden, width);
                }
                match self.pivots.clone() {
                    Some(found) => self.add(layer, pivots.count, found.into_iter()),
                    None if begins => {
                        let first = Pivots::FALLBACK.min(tokens.len()) as u32;
                        self.add(layer, Pivots::FALLBACK, 0..first);
                    }
                    None => {}
                }
            }
        }
    }

    fn add(&mut self, layer: usize, capacity: usize, tokens: impl Iterator<Item = u32>) {
        let own = &mut self.layers[layer];
        for token in tokens {
            if own.len() < capacity && !own.contains(&token) {
                own.push(token);
            }
        }
    }
}

/// Rows of the `count` largest magnitudes, the largest first; a row may occur more than once (RotateKV).
fn largest(hidden: &[f32], width: usize, count: usize) -> impl Iterator<Item = usize> {
    let mut found: Vec<(f32, usize)> = Vec::with_capacity(count + 1);
    for (row, values) in hidden.chunks_exact(width).enumerate() {
        for value in values {
            let magnitude = value.abs();
            if found.len() == count && found.last().is_some_and(|(least, _)| magnitude <= *least) {
                continue;
            }
            let place = found.partition_point(|(other, _)| *other >= magnitude);
            found.insert(place, (magnitude, row));
            found.truncate(count);
        }
    }
    found.into_iter().map(|(_, row)| row)
}

/// Tokens with the largest activations, where some are massive.
fn find_pivots(pivots: Pivots, first: usize, hidden: &[f32], width: usize) -> Option<Vec<u32>> {
    let scores: Vec<f32> =
        hidden.chunks_exact(width).map(|row| row.iter().fold(0f32, |most, x| most.max(x.abs()))).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let most = scores[*order.first()?];
    let median = scores[order[order.len() / 2]];
    let massive = most > MASSIVE && most > MASSIVE_OVER_MEDIAN * median;
    massive.then(|| order.into_iter().take(pivots.count).map(|row| (first + row) as u32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 10 tokens of 4 channels, small but for some.
    fn hidden(large: &[(usize, f32)]) -> Vec<f32> {
        let mut hidden: Vec<f32> = (0..40).map(|i| (i as f32 * 0.37).sin()).collect();
        for &(row, value) in large {
            hidden[row * 4 + 2] = value;
        }
        hidden
    }

    #[test]
    fn massive_tokens_are_those_of_the_largest_activations() {
        let sinks = Sinks::Massive(3);
        let mut own = SinkTokens::new(sinks, 2);
        own.choose(sinks, 1, 0..10, &hidden(&[(7, -50.0), (0, 90.0)]), 4);
        assert_eq!(own.layer(1)[..2], [0, 7]);
        assert_eq!((own.layer(1).len(), own.layer(0).len()), (3, 0));
        // Later parts of the prompt fill what is left, a new sequence begins again.
        own.choose(sinks, 1, 10..20, &hidden(&[(1, 60.0)]), 4);
        assert_eq!(own.layer(1).len(), 3);
        let mut twice = hidden(&[(4, 70.0)]);
        twice[4 * 4..5 * 4].fill(80.0);
        own.choose(sinks, 1, 0..10, &twice, 4);
        assert_eq!(own.layer(1), [4]);
        own.choose(sinks, 1, 10..20, &hidden(&[(1, 60.0)]), 4);
        assert_eq!(own.layer(1)[..2], [4, 11]);
    }

    #[test]
    fn pivots_are_found_once_and_kept() {
        let sinks = Sinks::Pivots(Pivots { count: 2, per_layer: false });
        let mut own = SinkTokens::new(sinks, 4);
        own.choose(sinks, 0, 0..10, &hidden(&[(5, 5000.0)]), 4);
        own.choose(sinks, 1, 0..10, &hidden(&[]), 4);
        own.choose(sinks, 2, 0..10, &hidden(&[(6, 400.0), (9, -300.0)]), 4);
        own.choose(sinks, 3, 0..10, &hidden(&[(1, 9000.0)]), 4);
        let layers: Vec<&[u32]> = (0..4).map(|layer| own.layer(layer)).collect();
        assert_eq!(layers, [&[0, 1, 2, 3][..], &[0, 1, 2, 3], &[6, 9], &[6, 9]]);
        let sinks = Sinks::Pivots(Pivots { count: 2, per_layer: true });
        own.choose(sinks, 3, 0..10, &hidden(&[(1, 9000.0)]), 4);
        assert_eq!(own.layer(3)[0], 1);
    }

    #[test]
    fn first_tokens_need_no_search() {
        let mut own = SinkTokens::new(Sinks::First(3), 2);
        own.choose(Sinks::First(3), 1, 0..10, &hidden(&[(5, 5000.0)]), 4);
        assert_eq!((own.layer(0), own.layer(1)), (&[0, 1, 2][..], &[0, 1, 2][..]));
    }
}
