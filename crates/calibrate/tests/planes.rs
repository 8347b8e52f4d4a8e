//! Planes: how calibration gives them to channels.

mod common;

use common::{dummy, options, parse, text};
use dibit_cache::{CalibratedScheme, Calibration};
use dibit_calibrate::{Options, Text, calibrate};
use dibit_cpu::Cpu;
use dibit_device::{DType, Tensor};
use dibit_model::Pretrained;
use serde_json::json;
use std::ops::ControlFlow;
use std::sync::Arc;

const CONTEXT: usize = 700;

fn model() -> Pretrained {
    dummy(2, 7, json!({"num_attention_heads": 4, "num_hidden_layers": 3}))
}

fn scheme(pool: &str, most: usize) -> CalibratedScheme {
    let side = "bits = \"planes\"\naxis = \"channel\"\n";
    let window = "[window]\ntokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 4\n";
    parse(&format!(
        "name = \"planes\"\n[keys]\n{side}[values]\n{side}transform = \"basis\"\n\
         [planes]\npool = \"{pool}\"\nmost = {most}\n{window}"
    ))
}

fn calibrated(threads: usize, scheme: &CalibratedScheme) -> Calibration {
    let ids = text(3 * CONTEXT, 5);
    let text = Text { documents: vec![ids], held_out: Vec::new() };
    let cpu = Arc::new(Cpu::new(Some(threads)).unwrap());
    let options = Options { tokens: Some(2 * CONTEXT), ..options(CONTEXT) };
    calibrate(&cpu, &model(), scheme, &text, &options, |_| ControlFlow::Continue(())).unwrap().unwrap().calibration
}

/// Planes of each head, keys and then values, layer by layer.
fn counts(calibration: &Calibration) -> Vec<Vec<usize>> {
    let layers = calibration.layers.iter();
    let sides = layers.flat_map(|layer| [layer.key_planes.clone().unwrap(), layer.value_planes.clone().unwrap()]);
    let head = |own: &[u8]| own.iter().map(|planes| usize::from(*planes)).sum();
    sides.map(|side| side.chunks_exact(64).map(head).collect()).collect()
}

#[test]
fn heads_beyond_fp16_are_divided_from_the_calibration_on() {
    let mut model = model();
    for layer in &mut model.weights.layers {
        for (weight, factor) in [(&mut layer.k.weight, 2f32.powi(18)), (&mut layer.q.weight, 2f32.powi(-18))] {
            *weight = Tensor::from_blocks(DType::F32, weight.rows(), weight.cols(), 1, |row, block| {
                block.iter_mut().zip(weight.row(row)).for_each(|(new, old)| *new = old * factor);
            });
        }
    }
    let mut scheme = scheme("model", 3);
    let text = Text { documents: vec![text(3 * CONTEXT, 5)], held_out: Vec::new() };
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let options = Options { tokens: Some(2 * CONTEXT), ..options(CONTEXT) };
    let made = calibrate(&cpu, &model, &scheme, &text, &options, |_| ControlFlow::Continue(())).unwrap().unwrap();
    let found = made.calibration.layers.iter().map(|layer| &layer.powers).collect::<Vec<_>>();
    assert!(found.iter().any(|powers| powers.exponents(true).iter().any(|exponent| *exponent > 0)), "{found:?}");
    assert!(found.iter().all(|powers| powers.exponents(false).is_empty()), "{found:?}");
    // Statistics are those of keys as they are: planes do not change.
    let plain = calibrated(2, &scheme);
    let planes = |all: &Calibration| all.layers.iter().map(|layer| layer.key_planes.clone()).collect::<Vec<_>>();
    assert_eq!(planes(&made.calibration), planes(&plain));
    scheme.calibration = Some(made.calibration.into());
    model.config.cache_layout(&scheme).unwrap();
}

#[test]
fn a_pool_is_spent_to_the_last_step() {
    let scheme = scheme("model", 3);
    let mut own = scheme.clone();
    let made = calibrated(2, &scheme);
    let counts = counts(&made);
    assert!(counts.iter().flatten().all(|count| *count >= 8 && count.is_multiple_of(8)), "{counts:?}");
    // 64 for each side of each head on average, and heads of a layer differ.
    assert_eq!(counts.iter().flatten().sum::<usize>(), 12 * 64);
    assert!(counts.iter().any(|heads| heads[0] != heads[1]), "{counts:?}");
    assert!(made.layers.iter().all(|layer| layer.key_planes.iter().flatten().all(|planes| *planes <= 3)));
    // What does not fit is refused here: bases that cannot be undone, values whose planes rise.
    own.calibration = Some(made.into());
    model().config.cache_layout(&own).unwrap();
}

#[test]
fn every_head_gets_its_own_budget_where_nothing_is_pooled() {
    let made = calibrated(1, &scheme("head", 2));
    assert!(counts(&made).iter().flatten().all(|planes| *planes == 64));
    let sides = counts(&calibrated(1, &scheme("side", 3)));
    for side in 0..2 {
        assert_eq!(sides.iter().skip(side).step_by(2).flatten().sum::<usize>(), 6 * 64, "{sides:?}");
    }
}

#[test]
fn feedback_and_places_are_calibrated_where_they_are_asked_for() {
    let mut asked = scheme("head", 2);
    let none = calibrated(2, &asked);
    assert!(none.layers.iter().all(|layer| layer.key_feedback.is_none() && layer.sink_places.is_none()));
    asked = CalibratedScheme::load("dibit").unwrap();
    let made = calibrated(2, &asked);
    for layer in &made.layers {
        let feedback = layer.key_feedback.as_ref().unwrap();
        assert!(feedback.factors.iter().any(|factor| *factor != 0.0));
        // Made-up values are all of a size.
        assert_eq!(layer.sink_places, Some(0));
    }
    asked.calibration = Some(made.into());
    let layout = model().config.cache_layout(&asked).unwrap();
    assert!(layout.layers.iter().flat_map(|layer| &layer.pages).all(|page| page.sinks.is_none()));
}

#[test]
fn threads_do_not_change_the_planes() {
    let scheme = scheme("model", 3);
    assert_eq!(calibrated(1, &scheme), calibrated(3, &scheme));
}
