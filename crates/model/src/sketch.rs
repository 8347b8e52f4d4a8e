//! A few numbers of a model's weights, by which it is known again however they are stored.

use crate::weights::{EMBEDDING, OUTPUT_LAYER};
use dibit_device::Tensor;
use dibit_quant::splitmix;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Numbers of a tensor.
const PROJECTIONS: usize = 4;

/// Rows of a matrix that they are of.
const ROWS: usize = 8;

/// How often the square of what rounding explains a single tensor may lie apart: its projections are few, and one with
/// outliers is rounded worse than others.
const SINGLE: f64 = 8.0;

/// Random projections of some rows of every weight, as the checkpoint has them.
///
/// Rounding a matrix to fewer bits moves each projection by the rounding error of the matrix, relative to its norm, and
/// [`Sketch::difference`] allows for that. The weights of another model, or of a fine-tune that changes them by more
/// than their rounding, lie farther away.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sketch {
    /// By the names of Hugging Face.
    tensors: BTreeMap<String, Projections>,
}

/// Of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Projections {
    /// How the checkpoint stores it.
    format: String,
    /// Norm of the rows.
    norm: f32,
    /// Their sums with random signs.
    sums: [f32; PROJECTIONS],
}

/// A tensor in which two models differ.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightDifference {
    /// Its name.
    pub tensor: String,
    /// How far apart the two lie, relative to their norm; `None` where only one model has it.
    pub distance: Option<f32>,
    /// How far apart rounding may put them.
    pub explained: f32,
}

impl std::fmt::Display for WeightDifference {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let WeightDifference { tensor, distance, explained } = self;
        match distance {
            Some(distance) => write!(
                f,
                "{tensor} differs by {:.2} %, of which rounding explains {:.2} %",
                100.0 * distance,
                100.0 * explained
            ),
            None => write!(f, "only one of them has {tensor}"),
        }
    }
}

impl Sketch {
    /// Adds a tensor; `format` is how the checkpoint stores it.
    pub(crate) fn add(&mut self, name: &str, tensor: &Tensor, format: &str) {
        let mut sums = [0f64; PROJECTIONS];
        let mut squares = 0f64;
        let rows = ROWS.min(tensor.rows());
        for sample in 0..rows {
            for (col, value) in tensor.row(sample * tensor.rows() / rows).into_iter().enumerate() {
                // The signs are the same for all tensors, so that an output layer can be compared with an embedding.
                let signs = splitmix(((sample as u64) << 32) + col as u64);
                let value = f64::from(value);
                squares += value * value;
                for (projection, sum) in sums.iter_mut().enumerate() {
                    *sum += if signs >> projection & 1 == 1 { value } else { -value };
                }
            }
        }
        let (norm, sums) = (squares.sqrt() as f32, sums.map(|sum| sum as f32));
        self.tensors.insert(name.to_owned(), Projections { format: format.to_owned(), norm, sums });
    }

    /// The tensor in which another model differs most, where it is another one.
    pub fn difference(&self, other: &Sketch) -> Option<WeightDifference> {
        let names = self.tensors.keys().chain(other.tensors.keys().filter(|name| !self.tensors.contains_key(*name)));
        // By how the two are stored: what is stored well tells fine-tunes apart that what is stored badly does not.
        let mut groups: BTreeMap<[&String; 2], Vec<(f64, WeightDifference)>> = BTreeMap::new();
        for name in names {
            let (Some(own), Some(others)) = (self.get(name), other.get(name)) else {
                return Some(WeightDifference { tensor: name.clone(), distance: None, explained: 0.0 });
            };
            let (distance, explained) = (own.distance(others), own.rounding().hypot(others.rounding()));
            let difference =
                WeightDifference { tensor: name.clone(), distance: Some(distance as f32), explained: explained as f32 };
            groups.entry([&own.format, &others.format]).or_default().push(((distance / explained).powi(2), difference));
        }
        let mut worst: Option<(f64, WeightDifference)> = None;
        for group in groups.into_values() {
            let count = group.len() as f64;
            let mean = group.iter().map(|(ratio, _)| ratio).sum::<f64>() / count;
            // Three standard deviations of a mean of squares.
            let most = 1.0 + 3.0 * (2.0 / (count * PROJECTIONS as f64)).sqrt();
            let largest = group.into_iter().max_by(|(a, _), (b, _)| a.total_cmp(b)).expect("a group has tensors");
            // A NaN is another model, too.
            let same = mean <= most && largest.0 <= SINGLE;
            if !same && worst.as_ref().is_none_or(|(ratio, _)| largest.0 > *ratio) {
                worst = Some(largest);
            }
        }
        worst.map(|(_, difference)| difference)
    }

    /// What is known of a tensor; the embedding stands for an output layer that is tied to it.
    fn get(&self, name: &str) -> Option<&Projections> {
        let tied = || (name == OUTPUT_LAYER).then(|| self.tensors.get(EMBEDDING)).flatten();
        self.tensors.get(name).or_else(tied)
    }
}

impl Projections {
    /// How far two tensors lie apart, relative to the larger norm.
    fn distance(&self, other: &Projections) -> f64 {
        let norm = f64::from(self.norm.max(other.norm));
        if norm == 0.0 {
            return 0.0;
        }
        let squares = self.sums.iter().zip(&other.sums).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2));
        (squares.sum::<f64>() / PROJECTIONS as f64).sqrt() / norm
    }

    /// What rounding to the format moves a matrix by, relative to its norm, and 1.2 to 1.4 times as much as was measured
    /// on two models. An exact format gets what rounding f32 to it would take.
    fn rounding(&self) -> f64 {
        match self.format.as_str() {
            "f32" => 1e-4,
            "f16" => 4e-4,
            "bf16" => 2.4e-3,
            "Q8_0" | "Q8_K" => 0.008,
            "Q6_K" => 0.033,
            "Q5_0" | "Q5_1" | "Q5_K" => 0.055,
            "Q4_0" | "Q4_1" | "Q4_K" | "IQ4_NL" | "IQ4_XS" => 0.115,
            "MXFP4" => 0.16,
            "Q3_K" => 0.2,
            "Q2_K" => 0.38,
            // A format that was added later and is not known here is taken for an exact one.
            _ => 1e-4,
        }
    }
}
