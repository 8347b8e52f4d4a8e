//! What is known of the channels of a layer.

use super::pages::{Pages, squared_range};
use dibit_cache::{AutoSinks, CacheShape, PAGE_TOKENS, Sinks, square_norm};
use nalgebra::DMatrix;

/// Queries of the first tokens of a sequence are of no text.
const FIRST_QUERY: usize = 64;

/// Pages of a layer have places for tokens with small values where a page and KV head has so many of them on average.
const SMALL_TOKENS: f64 = 0.2;

/// Share of the pages that have a place for each of theirs.
const COVERED: f64 = 0.99;

/// Places beyond which only tokens count whose values are very small: this share of what is small. A layer with many small
/// values loses nothing where the larger ones among them are coded with the rest.
const USUAL_PLACES: usize = 8;
const VERY_SMALL: f32 = 0.75;

/// How queries meet the keys of each KV head: `[KV head][head_dim][head_dim]`, sums of `q q^T` over tokens and the query
/// heads that share a KV head.
pub(crate) struct KeyMetric {
    pub(crate) sums: Vec<f64>,
}

impl KeyMetric {
    pub(crate) fn new(shape: CacheShape) -> Self {
        KeyMetric { sums: vec![0.0; shape.row() * shape.head_dim] }
    }

    /// Adds rows of queries of a sequence, `[row][query head][head_dim]`, from position `first` on.
    pub(crate) fn add(&mut self, shape: CacheShape, first: usize, q: &[f32], rows: usize) {
        let d = shape.head_dim;
        let shared = q.len() / (rows * shape.row());
        let skipped = FIRST_QUERY.saturating_sub(first).min(rows);
        for (kv_head, sums) in self.sums.chunks_exact_mut(d * d).enumerate() {
            let tokens = q.chunks_exact(shared * shape.row()).skip(skipped);
            let queries = tokens.flat_map(|token| &token[kv_head * shared * d..(kv_head + 1) * shared * d]);
            add_products(queries.copied().collect(), d, sums);
        }
    }
}

/// Adds `x x^T` of all rows `x` of `d` numbers. The sums of a call are in 32 bit.
fn add_products(rows: Vec<f32>, d: usize, sums: &mut [f64]) {
    let columns = DMatrix::from_vec(d, rows.len() / d, rows);
    let products = &columns * columns.transpose();
    sums.iter_mut().zip(products.iter()).for_each(|(sum, product)| *sum += f64::from(*product));
}

/// How values are spread around the mean of their page: `[KV head][head_dim][head_dim]`, sums over tokens.
pub(crate) struct ValueSpread {
    pub(crate) sums: Vec<f64>,
    pages: Pages,
}

impl ValueSpread {
    pub(crate) fn new(shape: CacheShape) -> Self {
        ValueSpread { sums: vec![0.0; shape.row() * shape.head_dim], pages: Pages::default() }
    }

    /// Adds rows of values of a sequence from position `first` on, without those that are never packed.
    pub(crate) fn add(&mut self, shape: CacheShape, first: usize, v: &[f32], sinks: Sinks) {
        let (width, d) = (shape.row(), shape.head_dim);
        let sums = &mut self.sums;
        self.pages.add(first, v, width, |at, page| {
            for (head, sums) in sums.chunks_exact_mut(d * d).enumerate() {
                let values = of_head(page, width, head, d);
                let apart = apart(sinks, at, &values, d);
                let mut kept: Vec<f32> = values
                    .chunks_exact(d)
                    .zip(&apart)
                    .filter(|(_, apart)| !**apart)
                    .flat_map(|(x, _)| x)
                    .copied()
                    .collect();
                let count = (kept.len() / d).max(1) as f32;
                for channel in 0..d {
                    let mean = kept.iter().skip(channel).step_by(d).sum::<f32>() / count;
                    kept.iter_mut().skip(channel).step_by(d).for_each(|x| *x -= mean);
                }
                add_products(kept, d, sums);
            }
        });
    }
}

/// The numbers of one head of a page: `[token][head_dim]`.
fn of_head(page: &[f32], width: usize, head: usize, d: usize) -> Vec<f32> {
    page.chunks_exact(width).flat_map(|token| &token[head * d..(head + 1) * d]).copied().collect()
}

/// Which tokens of the page that begins at a position are kept apart from its codes, by its values.
fn apart(sinks: Sinks, position: usize, values: &[f32], d: usize) -> Vec<bool> {
    wanted(sinks, position, values, d).0
}

/// [`apart`], and how many of them want a place in the page: all whose values are small, and those whose values are very
/// small.
fn wanted(sinks: Sinks, position: usize, values: &[f32], d: usize) -> (Vec<bool>, [usize; 2]) {
    let mut apart: Vec<bool> = (position..position + PAGE_TOKENS).map(|token| token < sinks.first()).collect();
    let Sinks::Auto(auto) = sinks else { return (apart, [0; 2]) };
    let squares: Vec<f32> = values.chunks_exact(d).map(square_norm).collect();
    let very_small = AutoSinks { share: VERY_SMALL * auto.share, ..auto }.choose(&squares, &apart).len();
    let small = auto.choose(&squares, &apart);
    small.iter().for_each(|slot| apart[*slot] = true);
    (apart, [small.len(), very_small])
}

/// Squared ranges of channels within pages, those of values in their basis, and how many tokens have small values.
pub(crate) struct Ranges {
    keys: Vec<f64>,
    values: Vec<f64>,
    /// Tokens with small, and with very small values of each page and KV head.
    small: Vec<[usize; 2]>,
    pages: Pages,
}

impl Ranges {
    pub(crate) fn new(shape: CacheShape) -> Self {
        let none = || vec![0.0; shape.row()];
        Ranges { keys: none(), values: none(), small: Vec::new(), pages: Pages::default() }
    }

    /// Adds rows of keys and values of a sequence from position `first` on. `basis` turns values into what is stored.
    pub(crate) fn add(
        &mut self,
        shape: CacheShape,
        basis: Option<&[f32]>,
        first: usize,
        [k, v]: [&[f32]; 2],
        sinks: Sinks,
    ) {
        let (width, d) = (shape.row(), shape.head_dim);
        let Self { keys, values, small, pages } = self;
        let rows: Vec<f32> =
            k.chunks_exact(width).zip(v.chunks_exact(width)).flat_map(|(k, v)| [k, v].concat()).collect();
        pages.add(first, &rows, 2 * width, |at, page| {
            for head in 0..shape.num_key_value_heads {
                let own_keys = of_head(page, 2 * width, head, d);
                let mut own_values = of_head(page, 2 * width, shape.num_key_value_heads + head, d);
                let (apart, counts) = wanted(sinks, at, &own_values, d);
                small.push(counts);
                if let Some(basis) = basis {
                    // Columns are rows of numbers one after the other, so that this is `values basis`.
                    let basis = DMatrix::from_column_slice(d, d, &basis[head * d * d..(head + 1) * d * d]);
                    own_values = (basis * DMatrix::from_vec(d, PAGE_TOKENS, own_values)).as_slice().to_vec();
                }
                for channel in 0..d {
                    let range = |all: &[f32]| squared_range(all.iter().skip(channel).step_by(d).copied(), &apart);
                    keys[head * d + channel] += range(&own_keys);
                    values[head * d + channel] += range(&own_values);
                }
            }
        });
    }

    /// The weight of each channel of keys: it reaches a logit multiplied by its query, and rounding it costs in proportion
    /// to the square of its range.
    pub(crate) fn key_weights(&self, metric: &KeyMetric, d: usize) -> Vec<f64> {
        let squares = metric.sums.chunks_exact(d * d).flat_map(|sums| (0..d).map(move |c| sums[c * d + c]));
        self.keys.iter().zip(squares).map(|(range, query)| range * query).collect()
    }

    /// The weight of each channel of values in a basis in which all channels matter alike.
    pub(crate) fn value_weights(&self) -> &[f64] {
        &self.values
    }

    /// Places that the pages of the layer have: as many as nearly all of them want, and none where few want one.
    pub(crate) fn places(&self) -> usize {
        let all: usize = self.small.iter().map(|[small, _]| small).sum();
        if (all as f64) < SMALL_TOKENS * self.small.len() as f64 {
            return 0;
        }
        let [small, very_small] = [0, 1].map(|which| {
            let mut sorted: Vec<usize> = self.small.iter().map(|counts| counts[which]).collect();
            sorted.sort_unstable();
            sorted.get((COVERED * sorted.len() as f64) as usize).copied().unwrap_or(0)
        });
        small.min(USUAL_PLACES).max(very_small)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_and_ranges_are_those_of_their_heads() {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: 2, head_dim: 8 };
        let number = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 25.0;
        let (rows, width) = (256, shape.row());
        let (k, v): (Vec<f32>, Vec<f32>) =
            ((0..rows * width).map(number).collect(), (0..rows * width).map(|i| number(i + 7)).collect());
        let q: Vec<f32> = (0..rows * 2 * width).map(|i| number(3 * i)).collect();
        let mut metric = KeyMetric::new(shape);
        metric.add(shape, 0, &q[..100 * 2 * width], 100);
        metric.add(shape, 100, &q[100 * 2 * width..], rows - 100);
        // KV head 1 is shared by query heads 2 and 3.
        let product = |a: usize, b: usize| -> f64 {
            let of = |row: usize, head: usize| {
                f64::from(q[(row * 4 + head) * 8 + a]) * f64::from(q[(row * 4 + head) * 8 + b])
            };
            (64..rows).flat_map(|row| [of(row, 2), of(row, 3)]).sum()
        };
        for (a, b) in [(0, 0), (3, 5), (7, 1)] {
            let expected = product(a, b);
            assert!((metric.sums[64 + a * 8 + b] - expected).abs() < 1e-3 * expected.abs().max(1.0), "{a} {b}");
        }
        // A basis that swaps channels 0 and 1 and doubles channel 2.
        let mut basis = vec![0.0; 64];
        (0..8).for_each(|c| basis[c * 8 + [1, 0, 2, 3, 4, 5, 6, 7][c]] = if c == 2 { 2.0 } else { 1.0 });
        let mut ranges = Ranges::new(shape);
        ranges.add(shape, Some(&[&basis[..], &basis[..]].concat()), 0, [&k, &v], Sinks::First(2));
        let squared = |data: &[f32], channel: usize| -> f64 {
            let page = |rows: std::ops::Range<usize>| {
                let all = rows.map(|row| data[row * width + channel]);
                let (min, max) = all.fold((f32::MAX, f32::MIN), |(min, max), x| (min.min(x), max.max(x)));
                f64::from(max - min).powi(2)
            };
            page(2..128) + page(128..256)
        };
        assert!((ranges.keys[9] - squared(&k, 9)).abs() < 1e-6);
        assert!((ranges.value_weights()[8] - squared(&v, 9)).abs() < 1e-6);
        assert!((ranges.value_weights()[10] - 4.0 * squared(&v, 10)).abs() < 1e-5);
        assert_eq!(ranges.places(), 0);
        let places = |small: &[(usize, [usize; 2])]| {
            let small = small.iter().flat_map(|(count, own)| vec![*own; *count]).collect();
            Ranges { small, ..Ranges::new(shape) }.places()
        };
        assert_eq!(places(&[(90, [0, 0]), (10, [2, 0])]), 2);
        assert_eq!(places(&[(95, [0, 0]), (5, [3, 3])]), 0);
        // One page of more than a hundred has more than its places.
        assert_eq!(places(&[(199, [1, 0]), (1, [7, 7])]), 1);
        assert_eq!(places(&[(49, [1, 1]), (1, [7, 7])]), 7);
        // Many small values take the usual places, and very small ones each its own.
        assert_eq!((places(&[(50, [20, 3])]), places(&[(50, [20, 15])])), (8, 15));
    }
}
