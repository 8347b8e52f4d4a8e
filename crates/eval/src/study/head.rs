use super::attention::{Rows, TILE, Tile};
use super::matrix::{Quantized, quantized};
use super::variant::{PAIRS, VARIANTS};
use super::{GROUP, LayerSample, StudyShape};
use dibit_quant::{Hadamard, QuantError};
use std::ops::AddAssign;

/// A quotient whose terms are still being added up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ratio {
    numerator: f64,
    denominator: f64,
}

impl Ratio {
    pub fn new(numerator: f64, denominator: f64) -> Self {
        Ratio { numerator, denominator }
    }

    /// The squared error of `other`, relative to the squared norm of `exact`.
    pub fn error(exact: &[f32], other: &[f32]) -> Self {
        let squared = |x: f32| f64::from(x) * f64::from(x);
        let error = exact.iter().zip(other).map(|(x, y)| squared(x - y)).sum();
        Ratio::new(error, exact.iter().map(|&x| squared(x)).sum())
    }

    /// The quotient; an error of nothing is 0.
    pub fn value(self) -> f64 {
        if self.numerator == 0.0 { 0.0 } else { self.numerator / self.denominator }
    }
}

impl AddAssign for Ratio {
    fn add_assign(&mut self, other: Ratio) {
        self.numerator += other.numerator;
        self.denominator += other.denominator;
    }
}

/// Keys, or values, quantised in one way.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct VariantFigures {
    pub tensor: Ratio,
    pub attention: Ratio,
    pub scale: Ratio,
}

/// Keys and values quantised together.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct PairFigures {
    pub attention: Ratio,
    pub output: Ratio,
}

/// Everything that is measured on one KV head and its query heads, or summed over several.
#[derive(Debug, Clone, Default)]
pub(super) struct HeadFigures {
    pub keys: [VariantFigures; VARIANTS.len()],
    pub values: [VariantFigures; VARIANTS.len()],
    pub pairs: [PairFigures; PAIRS.len()],
}

impl HeadFigures {
    /// Measures KV head `head` of a layer.
    pub fn of(
        shape: StudyShape,
        layer: &LayerSample,
        head: usize,
        query_stride: usize,
        hadamard: &Hadamard,
    ) -> Result<Self, QuantError> {
        let head_dim = shape.head_dim;
        let keys = gather(&layer.k, shape.num_key_value_heads, head, head_dim);
        let values = gather(&layer.v, shape.num_key_value_heads, head, head_dim);
        let all = |matrix: &[f32]| -> Result<Vec<Quantized>, QuantError> {
            VARIANTS.iter().map(|&variant| quantized(matrix, hadamard, variant)).collect()
        };
        let (quantized_keys, quantized_values) = (all(&keys)?, all(&values)?);
        let complete = shape.tokens / GROUP * GROUP * head_dim;
        let mut figures = HeadFigures {
            keys: alone(&keys[..complete], &quantized_keys),
            values: alone(&values[..complete], &quantized_values),
            pairs: Default::default(),
        };
        let group = shape.num_heads / shape.num_key_value_heads;
        for query_head in head * group..(head + 1) * group {
            let queries = gather(&layer.q, shape.num_heads, query_head, head_dim);
            for tile in tiles(&queries, head_dim, query_stride) {
                figures.attend(&tile, head_dim, (&keys, &quantized_keys), (&values, &quantized_values));
            }
        }
        Ok(figures)
    }

    fn attend(&mut self, tile: &Tile, head_dim: usize, keys: (&[f32], &[Quantized]), values: (&[f32], &[Quantized])) {
        let exact = tile.attend(keys.0, head_dim);
        let output = tile.mix(&exact, values.0, head_dim);
        let rows: Vec<Rows> = keys.1.iter().map(|keys| tile.attend(&keys.values, head_dim)).collect();
        let divergence = |rows: &Rows| Ratio::new(tile.divergence(&exact, rows), tile.positions.len() as f64);
        let error = |rows: &Rows, values: &Quantized| Ratio::error(&output, &tile.mix(rows, &values.values, head_dim));
        for (figures, rows) in self.keys.iter_mut().zip(&rows) {
            figures.attention += divergence(rows);
        }
        for (figures, values) in self.values.iter_mut().zip(values.1) {
            figures.attention += error(&exact, values);
        }
        for (figures, pair) in self.pairs.iter_mut().zip(&PAIRS) {
            let rows = &rows[pair.keys.index()];
            figures.attention += divergence(rows);
            figures.output += error(rows, &values.1[pair.values.index()]);
        }
    }
}

impl AddAssign<&HeadFigures> for HeadFigures {
    fn add_assign(&mut self, other: &HeadFigures) {
        let variants = |sums: &mut [VariantFigures], others: &[VariantFigures]| {
            for (sum, other) in sums.iter_mut().zip(others) {
                sum.tensor += other.tensor;
                sum.attention += other.attention;
                sum.scale += other.scale;
            }
        };
        variants(&mut self.keys, &other.keys);
        variants(&mut self.values, &other.values);
        for (sum, other) in self.pairs.iter_mut().zip(&other.pairs) {
            sum.attention += other.attention;
            sum.output += other.output;
        }
    }
}

/// What shows without attention: the error of the complete groups, which `matrix` holds, and their scales.
fn alone(matrix: &[f32], variants: &[Quantized]) -> [VariantFigures; VARIANTS.len()] {
    std::array::from_fn(|index| {
        let Quantized { values, scales, groups } = &variants[index];
        VariantFigures {
            tensor: Ratio::error(matrix, values),
            attention: Ratio::default(),
            scale: Ratio::new(*scales, *groups as f64),
        }
    })
}

/// One head `[tokens][head_dim]` of a tensor `[tokens][heads][head_dim]`.
pub(super) fn gather(tensor: &[f32], heads: usize, head: usize, head_dim: usize) -> Vec<f32> {
    tensor
        .chunks_exact(heads * head_dim)
        .flat_map(|token| &token[head * head_dim..(head + 1) * head_dim])
        .copied()
        .collect()
}

/// Every `stride`-th row of the queries `[tokens][head_dim]` of a head, the last of each `stride`.
pub(super) fn tiles(queries: &[f32], head_dim: usize, stride: usize) -> Vec<Tile> {
    let positions: Vec<usize> = (stride - 1..queries.len() / head_dim).step_by(stride).collect();
    let norm = 1.0 / (head_dim as f32).sqrt();
    let query = |&position: &usize| queries[position * head_dim..(position + 1) * head_dim].iter().map(|x| x * norm);
    let tile = |positions: &[usize]| Tile {
        positions: positions.to_vec(),
        queries: positions.iter().flat_map(query).collect(),
    };
    positions.chunks(TILE).map(tile).collect()
}
