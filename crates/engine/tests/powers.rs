//! A model whose keys and values are beyond fp16: answers are those of the same model within it.

mod common;

use common::{answer, calibrated, engine, go_on, options, pretrained, request};
use dibit_cpu::Cpu;
use dibit_device::{DType, Tensor};
use dibit_engine::{Engine, Sampling};
use dibit_model::Pretrained;
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
            // A sequence that was open before is read again.
            let sequence = own.open().unwrap();
            let id = own.submit_to(sequence, requests[1].clone()).unwrap();
            assert_eq!(own.finish(id, |_| std::ops::ControlFlow::Continue(())).unwrap().text, expected[1].text);
        }
    }
}
