//! Planes: how calibration gives them to channels.

mod common;

use common::{dummy, options, parse, text};
use dibit_cache::{Calibration, Scheme};
use dibit_calibrate::{Options, Text, calibrate};
use dibit_device::Cpu;
use dibit_model::Pretrained;
use serde_json::json;
use std::ops::ControlFlow;

const CONTEXT: usize = 700;

fn model() -> Pretrained {
    dummy(2, 7, json!({"num_attention_heads": 4, "num_hidden_layers": 3}))
}

fn scheme(pool: &str, most: usize) -> Scheme {
    let side = "bits = \"planes\"\naxis = \"channel\"\n";
    let window = "[window]\ntokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 4\n";
    parse(&format!(
        "name = \"planes\"\n[keys]\n{side}[values]\n{side}transform = \"basis\"\n\
         [planes]\npool = \"{pool}\"\nmost = {most}\n{window}"
    ))
}

fn calibrated(threads: usize, scheme: &Scheme) -> Calibration {
    let ids = text(3 * CONTEXT, 5);
    let text = Text { documents: vec![ids], held_out: Vec::new() };
    let cpu = Cpu::new(Some(threads)).unwrap();
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
fn a_pool_is_spent_to_the_last_step_and_heads_of_a_layer_share_alike() {
    let scheme = scheme("model", 3);
    let mut own = scheme.clone();
    let made = calibrated(2, &scheme);
    let counts = counts(&made);
    assert!(
        counts.iter().all(|heads| heads[0] == heads[1] && heads[0] >= 8 && heads[0].is_multiple_of(4)),
        "{counts:?}"
    );
    // 64 for each side of each layer on average.
    assert_eq!(counts.iter().map(|heads| heads[0]).sum::<usize>(), 6 * 64);
    assert!(counts.iter().any(|heads| heads[0] != 64), "{counts:?}");
    assert!(made.layers.iter().all(|layer| layer.key_planes.iter().flatten().all(|planes| *planes <= 3)));
    // What does not fit is refused here: bases that are not orthogonal, values whose planes rise.
    own.calibration = Some(made.into());
    model().config.cache_layout(&own).unwrap();
}

#[test]
fn every_head_gets_its_own_budget_where_nothing_is_pooled() {
    let made = calibrated(1, &scheme("head", 2));
    assert!(counts(&made).iter().flatten().all(|planes| *planes == 64));
    let sides = counts(&calibrated(1, &scheme("side", 3)));
    for side in 0..2 {
        assert_eq!(sides.iter().skip(side).step_by(2).map(|heads| heads[0]).sum::<usize>(), 3 * 64, "{sides:?}");
    }
}

#[test]
fn threads_do_not_change_the_planes() {
    let scheme = scheme("model", 3);
    assert_eq!(calibrated(1, &scheme), calibrated(3, &scheme));
}
