//! Error feedback of keys, in the metric of the queries that meet them: as GPTQ does for weights.

use crate::CalibrationError;
use dibit_cache::KeyFeedback;
use nalgebra::{Cholesky, DMatrix};

/// Share of the mean of the diagonal that is added to it.
const DAMPING: f64 = 0.01;

/// The feedback of the KV heads of a layer, by sums of `q q^T` of each.
///
/// # Errors
/// [`CalibrationError::NotFinite`] where the sums are no metric.
pub(crate) fn feedback(sums: &[f64], d: usize, layer: usize) -> Result<KeyFeedback, CalibrationError> {
    let mut all = KeyFeedback::default();
    for sums in sums.chunks_exact(d * d) {
        let (order, factors) = of_head(sums, d).ok_or(CalibrationError::NotFinite { layer })?;
        all.order.extend(order.into_iter().map(|channel| channel as u32));
        all.factors.extend(factors);
    }
    Ok(all)
}

fn of_head(sums: &[f64], d: usize) -> Option<(Vec<usize>, Vec<f32>)> {
    let mean = (0..d).map(|c| sums[c * d + c]).sum::<f64>() / d as f64;
    // Where no query was seen, channels are coded for themselves.
    let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|a, b| sums[b * d + b].total_cmp(&sums[a * d + a]).then(a.cmp(b)));
    let metric = DMatrix::from_fn(d, d, |i, j| sums[order[i] * d + order[j]] + if i == j { damping } else { 0.0 });
    let inverse = Cholesky::new(metric)?.inverse();
    let lower = Cholesky::new((&inverse + inverse.transpose()) * 0.5)?.unpack();
    let factor = |at: usize| {
        let (i, j) = (at / d, at % d);
        if j > i { (lower[(j, i)] / lower[(i, i)]) as f32 } else { 0.0 }
    };
    Some((order, (0..d * d).map(factor).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the rest of a row costs in the metric is least where the later channels take up what the first one misses.
    #[test]
    fn later_channels_take_up_what_is_best() {
        let d = 8;
        let x = DMatrix::from_fn(d, 40, |i, j| {
            ((i * 31 + j * 17) % 23) as f64 / 11.0 - 1.0 + if i == 2 { 3.0 } else { 0.0 }
        });
        let sums = &x * x.transpose();
        let own = feedback(sums.as_slice(), d, 0).unwrap();
        assert_eq!(own.order[0], 2);
        let damping = DAMPING * sums.trace() / d as f64;
        let metric = DMatrix::from_fn(d, d, |i, j| {
            sums[(own.order[i] as usize, own.order[j] as usize)] + if i == j { damping } else { 0.0 }
        });
        let cost = |moved: &[f64]| {
            let error = DMatrix::from_column_slice(d, 1, moved);
            (error.transpose() * &metric * error)[(0, 0)]
        };
        // An error of 1 in the first channel, and what the others are changed by.
        let mut moved: Vec<f64> = own.factors[..d].iter().map(|factor| -f64::from(*factor)).collect();
        // The code misses 1: the key is 1 lower, and others are moved by -F.
        moved[0] = -1.0;
        let least = cost(&moved);
        for channel in 1..d {
            for by in [-1e-2, 1e-2] {
                let mut other = moved.clone();
                other[channel] += by;
                assert!(cost(&other) > least, "{channel} {by}");
            }
        }
        assert!((0..d).all(|i| (0..=i).all(|j| own.factors[i * d + j] == 0.0)));
    }

    #[test]
    fn without_queries_channels_are_coded_for_themselves() {
        let own = feedback(&[0.0; 2 * 64], 8, 0).unwrap();
        assert_eq!(own.order, [0, 1, 2, 3, 4, 5, 6, 7].repeat(2));
        assert!(own.factors.iter().all(|factor| *factor == 0.0));
        assert!(matches!(feedback(&[f64::NAN; 64], 8, 3), Err(CalibrationError::NotFinite { layer: 3 })));
    }
}
