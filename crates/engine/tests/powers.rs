//! A model whose keys and values are beyond fp16: answers are those of the same model within it.

mod common;

use common::{answer, calibrated, engine, go_on, options, pretrained, request};
use dibit_cache::Mode;
use dibit_cpu::Cpu;
use dibit_device::{DType, Tensor};
use dibit_engine::{Engine, Request, Sampling};
use dibit_model::{Model, Pretrained};
use dibit_runner::{Capacity, Executor, Runner};
use std::ops::ControlFlow;
use std::sync::Arc;

fn times(weight: &Tensor, factor: f32) -> Tensor {
    Tensor::from_blocks(DType::F32, weight.rows(), weight.cols(), 1, |row, block| {
        block.iter_mut().zip(weight.row(row)).for_each(|(new, old)| *new = old * factor);
    })
}

/// The same function, with keys and values of all layers multiplied.
fn scaled(name: &str, key: f32, value: f32) -> Arc<Pretrained> {
    let mut own = Arc::into_inner(pretrained(name)).unwrap();
    for layer in &mut own.weights.layers {
        layer.k.weight = times(&layer.k.weight, key);
        layer.q.weight = times(&layer.q.weight, 1.0 / key);
        layer.v.weight = times(&layer.v.weight, value);
        layer.o.weight = times(&layer.o.weight, 1.0 / value);
    }
    Arc::new(own)
}

/// Whether a prompt is beyond fp16.
fn overflows(cpu: &Arc<Cpu>, model: &Pretrained, prompt: &[u32]) -> bool {
    let layout = model.cache_layout(&calibrated(model, "kivi")).unwrap();
    let own = Arc::new(Model::for_cache(cpu, &model.config, &model.weights, &layout).unwrap());
    let capacity = Capacity::of_one(&layout, prompt.len(), 1);
    let mut runner = Runner::new(own, layout, capacity).unwrap();
    let mut sequence = runner.open().unwrap();
    runner.step(Mode::Chunk, &mut [(&mut sequence, prompt)]).unwrap();
    runner.powers().iter().any(|powers| !powers.is_none())
}

#[test]
fn a_sequence_that_is_open_is_read_again() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let of = |exponent: f32| scaled("mistral-f32", 1.0, 2f32.powf(exponent));
    // The factor from which on a prompt is beyond fp16, by halves of what is left.
    let limit = |prompt: &[u32]| {
        let (mut within, mut beyond) = (0f32, 30f32);
        while beyond - within > 0.01 {
            let middle = (within + beyond) / 2.0;
            *if overflows(&cpu, &of(middle), prompt) { &mut beyond } else { &mut within } = middle;
        }
        within
    };
    let mut prompts: Vec<_> = (1..8).map(|seed| request(seed, 60 * seed, 1, Sampling::greedy())).collect();
    prompts.sort_by(|a, b| limit(&b.prompt).total_cmp(&limit(&a.prompt)));
    let [first, .., other] = &prompts[..] else { unreachable!("seven prompts") };
    // Beyond fp16 by one of them and not by the other.
    let exponent = (limit(&first.prompt) + limit(&other.prompt)) / 2.0;
    let model = of(exponent);
    assert!(overflows(&cpu, &model, &other.prompt) && !overflows(&cpu, &model, &first.prompt));
    let then = Request { prompt: first.prompt[..20].to_vec(), max_tokens: 10, ..first.clone() };
    let talk = |interrupted: bool| {
        let mut engine = Engine::new(&cpu, model.clone(), &calibrated(&model, "kivi"), options(2)).unwrap();
        let sequence = engine.open().unwrap();
        let say = |engine: &mut Engine, request: &Request| {
            let id = engine.submit_to(sequence, request.clone()).unwrap();
            engine.finish(id, |_| ControlFlow::Continue(())).unwrap().tokens
        };
        let before = say(&mut engine, first);
        if interrupted {
            engine.generate(std::slice::from_ref(other), go_on).unwrap();
        }
        (before, say(&mut engine, &then))
    };
    assert_eq!(talk(true), talk(false));
}

#[test]
fn answers_are_those_of_numbers_that_fit() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let plain = pretrained("mistral-f32");
    let requests: Vec<_> = [(1, 300, 20), (2, 40, 150), (3, 700, 10)]
        .map(|(seed, n, max)| request(seed, n, max, Sampling::greedy()))
        .into();
    for scheme in ["fp16", "kivi", "kvlinc-rotation", "dibit"] {
        let expected = engine(&cpu, &plain, scheme, 3).generate(&requests, go_on).unwrap();
        // Beyond fp16 from the first pass on, and by a factor at which only some later token may be.
        for exponent in [10, 13, 14, 22] {
            let large = scaled("mistral-f32", 2f32.powi(exponent), 2f32.powi(exponent + 3));
            let mut own = Engine::new(&cpu, large.clone(), &calibrated(&large, scheme), options(3)).unwrap();
            let got = own.generate(&requests, go_on).unwrap();
            for (got, expected) in got.iter().zip(&expected) {
                assert_eq!(answer(got), answer(expected), "{scheme}, 2^{exponent}");
            }
        }
    }
}
