//! What tests of the engine share.
#![allow(dead_code)]

use dibit_cache::{Adapters, CalibratedScheme, Calibration, KeyFeedback, LayerCalibration, Linear};
use dibit_cpu::Cpu;
use dibit_engine::{Completion, Engine, FinishReason, Options, Prefill, Request, Sampling};
use dibit_model::{ModelConfig, ModelFiles, Pretrained, WeightSource};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

/// As commands read prompts on a CPU.
pub const CELLS: Prefill = Prefill::Cells(256);

pub fn pretrained(name: &str) -> Arc<Pretrained> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
    Arc::new(Pretrained::load(&ModelFiles::open(&directory).unwrap(), WeightSource::Checkpoint, None).unwrap())
}

pub fn options(sequences: usize) -> Options {
    Options { context: 1024, sequences, prefill: CELLS }
}

/// A scheme with a calibration, where it takes one.
pub fn calibrated(model: &Pretrained, scheme: &str) -> CalibratedScheme {
    let mut scheme = CalibratedScheme::load(scheme).unwrap();
    if scheme.takes_calibration() {
        scheme.calibration = Some(Arc::new(calibration(&model.config, scheme.linear())));
    }
    scheme
}

pub fn engine(cpu: &Arc<Cpu>, model: &Arc<Pretrained>, scheme: &str, sequences: usize) -> Engine {
    Engine::new(cpu, model.clone(), &calibrated(model, scheme), options(sequences)).unwrap()
}

/// A calibration that changes nothing but the order of numbers: channels of a head in reverse.
fn calibration(config: &ModelConfig, linear: Option<Linear>) -> Calibration {
    let (heads, d) = (config.num_key_value_heads, config.head_dim);
    let reversed = |channel: usize| channel / d * d + d - 1 - channel % d;
    let basis: Vec<f32> = (0..heads * d * d).map(|at| f32::from(u8::from(at % d == reversed(at / d) % d))).collect();
    let adapters = linear.map(|Linear { features, .. }| {
        let maps = |heads: usize| {
            [1, 2].map(|seed| (0..heads * d * features / 2).map(|i| ((i * seed) as f32).sin()).collect())
        };
        let gates = vec![0.5; config.num_attention_heads];
        Adapters { features, query: maps(config.num_attention_heads), key: maps(heads), gates }
    });
    let layer = LayerCalibration {
        permutation: Some((0..heads * d).map(|channel| reversed(channel) as u32).collect()),
        key_basis: Some(basis.clone()),
        value_basis: Some(basis),
        key_planes: Some((0..heads * d).map(|channel| (channel % d % (d / 8) % 3) as u8).collect()),
        value_planes: Some((0..heads * d).map(|channel| (3 - channel % d / 8 * 32 / d) as u8).collect()),
        key_feedback: Some(KeyFeedback::none(heads, d)),
        sink_places: None,
        powers: Default::default(),
        adapters,
    };
    Calibration { layers: vec![layer; config.num_hidden_layers] }
}

pub fn request(seed: u32, prompt_tokens: u32, max_tokens: usize, sampling: Sampling) -> Request {
    let prompt = (0..prompt_tokens).map(|i| 5 + (seed * 131 + i * i * 7 + i) % 379).collect();
    Request { prompt, history: Vec::new(), max_tokens, sampling, stream: 0, stop: Vec::new(), logprobs: None }
}

pub fn go_on(_: usize, _: &str) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// What does not depend on the clock.
pub fn answer(completion: &Completion) -> (&str, &[u32], FinishReason, dibit_cache::Usage) {
    (&completion.text, &completion.tokens, completion.finish, completion.usage)
}
