//! Models with heads of any size against a plain forward pass in f64, written from the architecture's equations.

mod passes;

use dibit_cache::{CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_device::{DType, Tensor};
use dibit_model::{LinearWeights, Model, ModelConfig, ModelFiles, WeightSource, Weights};
use serde_json::json;
use std::sync::Arc;
use tempfile::TempDir;

const HEAD_DIMS: [usize; 7] = [8, 32, 48, 72, 112, 120, 248];

/// How far logits may be from the reference, as a share of the largest, where nothing is rounded but to f32.
const EXACT: f64 = 1e-4;

/// The same where keys and values are read from the cache in fp16.
const HALF: f64 = 5e-3;

/// The same with 8 bits.
const EIGHT_BITS: f64 = 3e-2;

struct Case {
    config: ModelConfig,
    weights: Weights,
}

impl Case {
    /// Four query heads on two KV heads; weights are so large that attention is no average.
    fn new(head_dim: usize) -> Self {
        let folder = TempDir::new().unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 40, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_dim, "vocab_size": 96,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "initializer_range": 0.2,
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let files = ModelFiles::without_weights(folder.path()).unwrap();
        let config = ModelConfig::parse(&files.config, "config.json").unwrap();
        let source = WeightSource::Dummy { seed: 7, pooled: false };
        let weights = Weights::load(&files, &config, source, Some(DType::F32)).unwrap();
        Case { config, weights }
    }

    fn logits(&self, cpu: &Arc<Cpu>, scheme: &CalibratedScheme, ids: &[u32], passes: &[usize]) -> Vec<Vec<f32>> {
        let layout = self.weights.cache_layout(&self.config, scheme).unwrap();
        let model = Model::for_cache(cpu, &self.config, &self.weights, &layout).unwrap();
        passes::logits(&Arc::new(model), &layout, Mode::Chunk, ids, passes)
    }

    fn reference(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let Case { config, weights } = self;
        let (d, group) = (config.head_dim, config.num_attention_heads / config.num_key_value_heads);
        let mut rows: Vec<Vec<f64>> = ids.iter().map(|id| wide(&weights.embed.row(*id as usize))).collect();
        let norm = |x: &[f64], weight: &Tensor| -> Vec<f64> {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            let scale = 1.0 / (mean + f64::from(config.rms_norm_eps)).sqrt();
            x.iter().zip(weight.to_f32()).map(|(x, weight)| x * scale * f64::from(weight)).collect()
        };
        let inv_freq = config.rope.inv_freq(d);
        let turn = |heads: &mut [f64], position: usize| {
            for head in heads.chunks_exact_mut(d) {
                for (c, frequency) in inv_freq.iter().enumerate() {
                    let (sine, cosine) = (position as f64 * f64::from(*frequency)).sin_cos();
                    let (a, b) = (head[c], head[c + d / 2]);
                    (head[c], head[c + d / 2]) = (a * cosine - b * sine, b * cosine + a * sine);
                }
            }
        };
        for layer in &weights.layers {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (position, row) in rows.iter_mut().enumerate() {
                let x = norm(row, layer.input_norm.as_ref().unwrap());
                let [mut q, mut k, v] = [&layer.q, &layer.k, &layer.v].map(|linear| times(linear, &x));
                turn(&mut q, position);
                turn(&mut k, position);
                keys.push(k);
                values.push(v);
                let attend = |head: usize| {
                    let own = head / group * d..(head / group + 1) * d;
                    let logit =
                        |key: &Vec<f64>| dot(&q[head * d..(head + 1) * d], &key[own.clone()]) / (d as f64).sqrt();
                    let logits: Vec<f64> = keys.iter().map(logit).collect();
                    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = logits.iter().map(|logit| (logit - top).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let channel =
                        |c: usize| weights.iter().zip(&values).map(|(w, value)| w * value[c]).sum::<f64>() / total;
                    own.clone().map(channel).collect::<Vec<f64>>()
                };
                let heads: Vec<f64> = (0..config.num_attention_heads).flat_map(attend).collect();
                add(row, &times(&layer.o, &heads));
                let x = norm(row, layer.mlp_norm.as_ref().unwrap());
                let mlp = layer.mlp.gated().unwrap();
                let [gate, up] = [&mlp.gate, &mlp.up].map(|linear| times(linear, &x));
                let gated: Vec<f64> = gate.iter().zip(&up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                add(row, &times(&mlp.down, &gated));
            }
        }
        let head = LinearWeights { weight: weights.lm_head.clone(), bias: None };
        rows.iter().map(|row| times(&head, &norm(row, &weights.norm))).collect()
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(row: &mut [f64], x: &[f64]) {
    row.iter_mut().zip(x).for_each(|(row, x)| *row += x);
}

fn times(linear: &LinearWeights, x: &[f64]) -> Vec<f64> {
    assert!(linear.bias.is_none());
    let matrix = wide(&linear.weight.to_f32());
    matrix.chunks_exact(linear.weight.cols()).map(|row| dot(row, x)).collect()
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 31 + i * 7) % 96).collect()
}

fn close(what: &str, tolerance: f64, got: &[Vec<f32>], expected: &[Vec<f64>]) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let largest = expected.iter().flatten().fold(0f64, |most, x| most.max(x.abs()));
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        for (got, expected) in got.iter().zip(expected) {
            let difference = (f64::from(*got) - expected).abs() / largest;
            assert!(difference <= tolerance, "{what}, token {at}: {got} instead of {expected}");
        }
    }
}

#[test]
fn a_prompt_equals_the_reference_whatever_the_scheme() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let ids = ids(140);
    for head_dim in HEAD_DIMS {
        let case = Case::new(head_dim);
        let expected = case.reference(&ids);
        for name in ["fp16", "kivi", "kvlinc", "quarot", "gear", "kvlinc-rotation"] {
            let got = case.logits(&cpu, &CalibratedScheme::load(name).unwrap(), &ids, &[ids.len()]);
            close(&format!("{name} with heads of {head_dim}"), EXACT, &got, &expected);
        }
    }
}

#[test]
fn decoding_equals_the_reference_as_far_as_the_cache_does() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let ids = ids(160);
    let passes = [&[150][..], &[1; 10]].concat();
    let side = "bits = 8\naxis = \"token\"\ngroup = 32\ntransform = \"hadamard\"\n";
    let eight = format!("name = \"eight\"\n[keys]\n{side}[values]\n{side}");
    let eight = CalibratedScheme::parse(&eight, "eight").unwrap();
    let half = CalibratedScheme::load("fp16").unwrap();
    for head_dim in HEAD_DIMS {
        let case = Case::new(head_dim);
        let expected = case.reference(&ids);
        for (scheme, tolerance) in [(&half, HALF), (&eight, EIGHT_BITS)] {
            let got = case.logits(&cpu, scheme, &ids, &passes);
            close(&format!("{} with heads of {head_dim}", scheme.name), tolerance, &got, &expected);
        }
    }
}
