//! A cache in permutations and bases at 8 bit against the 16-bit cache: rotations, biases, norms of heads and rotary
//! embeddings are undone where they must be.

mod common;

use common::{FIXTURES, dummy, fixture, make, options, parse, resq, rotatekv, text};
use dibit_cache::{CacheLayout, CalibratedScheme, Mode};
use dibit_calibrate::Artefact;
use dibit_cpu::Cpu;
use dibit_device::DType;
use dibit_model::{Model, ModelFiles, Pretrained, WeightSource};
use dibit_runner::{Capacity, Executor, Runner};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

/// Two pages, the second one not full.
const CONTEXT: usize = 200;

/// Enough for a window of 128 tokens to be flushed.
const LONG_CONTEXT: usize = 300;

/// Logits of each token, decoded one after the other.
fn logits(pretrained: &Pretrained, scheme: &CalibratedScheme, ids: &[u32]) -> Vec<Vec<f32>> {
    of_layout(pretrained, pretrained.cache_layout(scheme).unwrap(), ids)
}

fn of_layout(pretrained: &Pretrained, layout: CacheLayout, ids: &[u32]) -> Vec<Vec<f32>> {
    let (cpu, config) = (Arc::new(Cpu::new(Some(2)).unwrap()), &pretrained.config);
    let model = Model::for_cache(&cpu, config, &pretrained.weights, &layout).unwrap();
    let capacity = Capacity::of_one(&layout, ids.len(), ids.len());
    let mut runner = Runner::new(Arc::new(model), layout, capacity).unwrap();
    let mut sequence = runner.open().unwrap();
    let (rows, mut all): (Vec<usize>, _) = ((0..ids.len()).collect(), Vec::new());
    runner.step(Mode::Streaming, &mut [(&mut sequence, ids)]).unwrap();
    runner.logits(&rows, &mut all).unwrap();
    all.chunks_exact(config.vocab_size).map(<[f32]>::to_vec).collect()
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    logits.iter().map(|&x| f64::from(x - largest) - sum.ln()).collect()
}

/// Mean KL divergence in nats.
fn kl(reference: &[Vec<f32>], other: &[Vec<f32>]) -> f64 {
    let of = |(p, q): (&Vec<f32>, &Vec<f32>)| -> f64 {
        log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum()
    };
    reference.iter().zip(other).map(of).sum::<f64>() / reference.len() as f64
}

/// Root mean square of the differences, as a share of the spread of logits.
fn error(reference: &[Vec<f32>], other: &[Vec<f32>]) -> f64 {
    let square = |row: &[f32], mean: f64| row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>();
    let mean = |row: &[f32]| row.iter().map(|&x| f64::from(x)).sum::<f64>() / row.len() as f64;
    let spread: f64 = reference.iter().map(|row| square(row, mean(row))).sum();
    let difference =
        |(a, b): (&Vec<f32>, &Vec<f32>)| a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
    (reference.iter().zip(other).map(difference).sum::<f64>() / spread).sqrt()
}

fn calibrated(pretrained: &Pretrained, mut scheme: CalibratedScheme) -> CalibratedScheme {
    let artefact = make(pretrained, &scheme, &text(300, 9), &options(150));
    scheme.calibration = Some(Arc::new(artefact.calibration));
    scheme
}

/// The method at 8 bit and at 2 bit on every architecture.
fn compare(scheme: impl Fn(u32) -> String) {
    let mut models: Vec<_> = FIXTURES.iter().map(|name| (*name, fixture(name))).collect();
    models.push(("6 KV heads", dummy(6, 1, json!({}))));
    for (name, pretrained) in models {
        let ids = text(CONTEXT, 5);
        let exact = logits(&pretrained, &CalibratedScheme::load("fp16").unwrap(), &ids);
        let [eight, two] = [8, 2].map(|bits| logits(&pretrained, &calibrated(&pretrained, parse(&scheme(bits))), &ids));
        let [near, far] = [&eight, &two].map(|other| error(&exact, other));
        // 255 steps where there were 3. Numbers in the wrong place differ as much as those of 2 bit, or more.
        assert!(near < 0.03 && near < far / 20.0, "{name}: {near} at 8 bit, {far} at 2 bit");
        let [near, far] = [&eight, &two].map(|other| kl(&exact, other));
        assert!(near < 2e-3 && far > 0.05 && far.is_finite(), "{name}: KL {near} at 8 bit, {far} at 2 bit");
    }
}

#[test]
fn rotated_keys_in_a_local_order_are_themselves() {
    compare(|bits| rotatekv(bits, "local", "mean"));
}

#[test]
fn rotated_keys_in_a_global_order_are_themselves() {
    compare(|bits| rotatekv(bits, "global", "magnitude"));
}

#[test]
fn keys_and_values_in_a_basis_are_themselves() {
    compare(resq);
}

#[test]
fn the_built_in_schemes_run_and_cost_something() {
    let ids = text(LONG_CONTEXT, 5);
    for name in ["qwen2-bias-bf16", "qwen3-hd256-bf16"] {
        let pretrained = fixture(name);
        let exact = logits(&pretrained, &CalibratedScheme::load("fp16").unwrap(), &ids);
        for scheme in ["rotatekv", "rotatekv-window", "rotatekv-paper", "resq", "resq-official"] {
            let scheme = calibrated(&pretrained, CalibratedScheme::load(scheme).unwrap());
            let cost = kl(&exact, &logits(&pretrained, &scheme, &ids));
            assert!(cost > 1e-4 && cost < 10.0, "{name}, {}: {cost}", scheme.name);
        }
    }
}

#[test]
fn values_in_planes_are_the_same_whoever_brings_them_into_their_basis() {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    let files = ModelFiles::open(&tiny).unwrap();
    let bundled = Pretrained::load(&files, WeightSource::Checkpoint, Some(DType::F32)).unwrap();
    let text = std::fs::read_to_string(tiny.join("../../README.md")).unwrap();
    let ids = &bundled.tokenizer.encode(&text, true).unwrap()[..600];
    let mut dibit = CalibratedScheme::load("dibit").unwrap();
    Artefact::attach(&tiny.join("calibration/dibit.safetensors"), &bundled, &mut dibit).unwrap();
    let exact = logits(&bundled, &CalibratedScheme::load("fp16").unwrap(), ids);
    let fused = logits(&bundled, &dibit, ids);
    let online = of_layout(&bundled, bundled.config.cache_layout(&dibit).unwrap(), ids);
    let nll = |all: &[Vec<f32>]| {
        let each = all.iter().zip(&ids[1..]).map(|(row, id)| -log_softmax(row)[*id as usize]);
        each.sum::<f64>() / (ids.len() - 1) as f64
    };
    let [perplexity, online_perplexity] = [nll(&fused), nll(&online)].map(f64::exp);
    let [cost, online_cost, apart] = [kl(&exact, &fused), kl(&exact, &online), kl(&online, &fused)];
    println!("perplexity {perplexity} fused, {online_perplexity} online; KL {cost}, {online_cost}, apart {apart}");
    assert!((perplexity / online_perplexity - 1.0).abs() < 1e-3, "{perplexity} {online_perplexity}");
    assert!((cost - online_cost).abs() < 0.05 * cost && apart < 0.1 * cost, "{cost} {online_cost} {apart}");
}
