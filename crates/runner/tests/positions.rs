//! Tokens that are turned by positions which are not their places.

use dibit_cache::{CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_model::{Model, ModelError, ModelFiles, Pretrained, WeightSource};
use dibit_runner::{Capacity, Executor, Runner};
use std::path::Path;
use std::sync::Arc;

const TOKENS: usize = 300;

const PRE_ROPE: &str =
    "name = \"pre-rope\"\n[keys]\nbits = 2\naxis = \"token\"\nposition = \"pre-rope\"\n[values]\nbits = 2";

fn runner(scheme: &str) -> Runner<Cpu> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mistral-f32");
    let own = Pretrained::load(&ModelFiles::open(&directory).unwrap(), WeightSource::Checkpoint, None).unwrap();
    let scheme = match scheme {
        "pre-rope" => CalibratedScheme::parse(PRE_ROPE, scheme).unwrap(),
        name => CalibratedScheme::load(name).unwrap(),
    };
    let layout = own.config.cache_layout(&scheme).unwrap();
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let model = Model::for_cache(&cpu, &own.config, &own.weights, &layout).unwrap();
    let capacity = Capacity::of_one(&layout, TOKENS, 1);
    Runner::new(Arc::new(model), layout, capacity).unwrap()
}

/// Logits behind the last token, read in passes of so many tokens.
fn logits(scheme: &str, passes: &[usize], position: impl Fn(u32) -> u32) -> Result<Vec<f32>, ModelError> {
    let mut runner = runner(scheme);
    let mut sequence = runner.open().unwrap();
    for rows in passes {
        let first = sequence.len() as u32;
        let places = first..first + *rows as u32;
        let ids: Vec<u32> = places.clone().map(|i| 5 + (i * i * 7 + i) % 379).collect();
        runner.step_at(Mode::Chunk, &mut sequence, &ids, &places.map(&position).collect::<Vec<_>>())?;
    }
    let mut logits = Vec::new();
    runner.logits(&[passes.last().unwrap() - 1], &mut logits)?;
    Ok(logits)
}

fn difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs()))
}

#[test]
fn attention_depends_on_differences_of_positions() {
    for scheme in ["fp16", "kivi"] {
        let plain = logits(scheme, &[TOKENS], |at| at).unwrap();
        let moved = logits(scheme, &[TOKENS], |at| at + 64).unwrap();
        // Two bits of keys that were turned otherwise are others.
        let tolerance = if scheme == "fp16" { 2e-3 } else { 0.3 };
        assert!(difference(&plain, &moved) < tolerance, "{scheme}: {}", difference(&plain, &moved));
        // An image in the middle, whose rows share a position.
        let image = |at: u32| if at < 40 { at } else { 40 + at.saturating_sub(90) };
        let whole = logits(scheme, &[TOKENS], image).unwrap();
        assert!(difference(&plain, &whole) > 1e-2, "{scheme}");
        if scheme == "fp16" {
            let cut = logits(scheme, &[&[100, 150][..], &[1; 50]].concat(), image).unwrap();
            assert!(difference(&whole, &cut) < 2e-3, "{}", difference(&whole, &cut));
        }
    }
}

#[test]
fn keys_before_rope_have_the_positions_of_their_places() {
    let error = logits("pre-rope", &[20], |at| at + 1).err();
    let error = error.map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("positions of their own under the scheme pre-rope"), "{error}");
}
