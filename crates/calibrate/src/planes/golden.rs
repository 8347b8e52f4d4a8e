//! Against tools/golden_dibit.py.

use super::budget::{Group, pooled};
use super::statistics::{KeyMetric, ValueSpread};
use super::value_basis::{basis, output_metric};
use crate::feedback::feedback;
use dibit_cache::{AutoSinks, CacheShape, Sinks, square_norm};
use dibit_device::{DType, Tensor};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    shape: Shape,
    queries: Vec<f32>,
    o: Vec<f32>,
    values: Vec<f32>,
    metric: Vec<f64>,
    feedback_order: Vec<u32>,
    feedback: Vec<f64>,
    spread: Vec<f64>,
    basis: Vec<f64>,
    sinks: Vec<usize>,
    weights: Vec<f64>,
    measured: Vec<Vec<(Vec<u8>, f64)>>,
    budget: usize,
    allocation: Vec<u8>,
}

#[derive(Deserialize)]
struct Shape {
    d: usize,
    shared: usize,
    hidden: usize,
    tokens: usize,
    first: usize,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../../fixtures/golden/dibit.json")).unwrap()
}

/// Within a share of the largest.
fn assert_close(what: &str, got: impl IntoIterator<Item = f64>, expected: &[f64], share: f64) {
    let largest = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
    let got: Vec<f64> = got.into_iter().collect();
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= share * largest, "{what}, number {at}: {got} instead of {expected}");
    }
}

#[test]
fn what_is_calibrated_is_what_numpy_finds() {
    let own = golden();
    let Shape { d, shared, hidden, tokens, first } = own.shape;
    let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim: d };
    let mut metric = KeyMetric::new(shape);
    metric.add(shape, 0, &own.queries, tokens);
    assert_close("metric", metric.sums.iter().copied(), &own.metric, 1e-5);
    let fed_back = feedback(&own.metric, d, 0).unwrap();
    assert_eq!(fed_back.order, own.feedback_order);
    assert_close("feedback", fed_back.factors.iter().map(|x| f64::from(*x)), &own.feedback, 1e-5);
    let auto = AutoSinks { first, places: 8, share: 0.4 };
    let elsewhere: Vec<bool> = (0..128).map(|slot| slot < first).collect();
    let squares: Vec<f32> = own.values.chunks_exact(d).map(square_norm).collect();
    assert_eq!(auto.choose(&squares, &elsewhere), own.sinks);
    let mut spread = ValueSpread::new(shape);
    spread.add(shape, 0, &own.values, Sinks::Auto(auto));
    assert_close("spread", spread.sums.iter().copied(), &own.spread, 1e-5);
    let weight = Tensor::from_f32(own.o, DType::F32, hidden, shared * d);
    let found = basis(&output_metric(shape, &weight)[0], &own.spread);
    // Columns are known up to their sign.
    let sign = |column: usize| {
        let dot = |row: usize| f64::from(found[row * d + column]) * own.basis[row * d + column];
        (0..d).map(dot).sum::<f64>().signum()
    };
    assert_close("basis", (0..d * d).map(|at| f64::from(found[at]) * sign(at % d)), &own.basis, 1e-4);
}

#[test]
fn planes_are_given_as_numpy_gives_them() {
    let own = golden();
    let channels = own.weights.len() / own.measured.len();
    let group = |(weights, measured): (&[f64], &Vec<(Vec<u8>, f64)>)| {
        let mut group = Group::new(weights.to_vec());
        measured.iter().for_each(|(planes, cost)| group.measure(planes, *cost));
        group
    };
    let groups: Vec<Group> = own.weights.chunks(channels).zip(&own.measured).map(group).collect();
    let given = pooled(&groups.iter().collect::<Vec<_>>(), channels, own.budget, 3);
    assert_eq!(given.concat(), own.allocation);
}
