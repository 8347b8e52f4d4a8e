//! Passes that are recorded and done again.

use super::*;
use dibit_device::{DType, Dense, QueryHeads, Tensor};
use made_up::{custom, own, scheme};

/// Lengths of sequences that are decoded together, each from its prompt on; the last one comes later.
const PROMPTS: [usize; 3] = [130, 1, 70];
const STEPS: usize = 270;
const LATE: usize = 200;

/// Outputs of all steps, and how many passes were recorded.
fn decode(cuda: &Cuda, case: &Case) -> (Vec<f32>, usize) {
    let lens = PROMPTS.map(|prompt| prompt + STEPS);
    let mut machine = Machine::new(cuda, case, lens[0], PROMPTS.len(), *PROMPTS.iter().max().unwrap());
    let data: [Data; 3] = std::array::from_fn(|i| case.data(i, lens[i]));
    let mut sequences = PROMPTS.map(|_| machine.cache.open().unwrap());
    for ((sequence, rows), data) in sequences.iter_mut().zip(PROMPTS).zip(&data) {
        machine.pass(&mut [(sequence, rows, data)], Mode::Chunk).unwrap();
    }
    // Rows of all sequences, one behind the other, from which those of a step are taken.
    let starts = [0, lens[0], lens[0] + lens[1]];
    let widths = case.widths();
    let tables: [_; 3] = std::array::from_fn(|i| {
        let numbers: Vec<f32> = data.iter().flat_map(|own| own[i].clone()).collect();
        let rows = numbers.len() / widths[i];
        cuda.matrix(Tensor::from_f32(numbers, DType::F32, rows, widths[i])).unwrap()
    });
    let mut rows = widths.map(|width| cuda.buffer(PROMPTS.len() * width).unwrap());
    let mut out = cuda.buffer(PROMPTS.len() * widths[0]).unwrap();
    let hidden = cuda.buffer(PROMPTS.len()).unwrap();
    let mut ids = cuda.ids(PROMPTS.len()).unwrap();
    let mut outputs = Vec::new();
    for step in 0..STEPS {
        let count = if step < LATE { 2 } else { 3 };
        let cache = &mut machine.cache;
        let mut batch = Batch::new(Mode::Chunk);
        let mut places = Vec::new();
        for (sequence, start) in sequences[..count].iter_mut().zip(starts) {
            places.push((start + sequence.len()) as u32);
            let len = sequence.len() + 1;
            cache.reserve(sequence, len).unwrap();
            batch.push(cache.manager(), sequence, 1);
        }
        cuda.write_ids(&mut ids, &places);
        let work = |pass: &mut Pass<Cuda>| {
            for (table, rows) in tables.iter().zip(&mut rows) {
                cuda.embed(table, &ids, count, 1.0, rows);
            }
            let [q, k, v] = rows.each_ref();
            (0..=LAYER)
                .try_for_each(|_| pass.whole_layer((&hidden, 1), QueryHeads::plain(case.heads), [q, k, v], &mut out))
        };
        cache.claim(1).unwrap().pass::<DeviceError>(cuda, &batch, work).unwrap();
        for sequence in &mut sequences[..count] {
            cache.advance(sequence, 1);
        }
        let mut own = Vec::new();
        cuda.download(&out, 0..count * widths[0], &mut own).unwrap();
        outputs.extend(own);
    }
    (outputs, machine.cache.store().recorded())
}

#[test]
fn recorded_passes_are_the_same_bits() {
    let Some(cuda) = cuda() else { return };
    let plain = Cuda::new(0).unwrap().without_graphs();
    let linear =
        own("correction = { kind = \"linear\", features = 32 }", "bits = 2\ntransform = \"hadamard\"", "bits = 2");
    for scheme in [scheme("kivi"), scheme("rotatekv-window"), scheme("dibit"), linear, custom(16, 4, 32, "")] {
        let case = Case::new(scheme, 2, 1, 64);
        let (expected, none) = decode(&plain, &case);
        let (got, recorded) = decode(cuda, &case);
        assert!(none == 0 && recorded >= 3, "{}: {none} and {recorded} graphs", case.scheme.origin);
        let same = got.iter().zip(&expected).all(|(got, expected)| got.to_bits() == expected.to_bits());
        assert!(same && got.len() == expected.len(), "{}", case.scheme.origin);
        assert!(got.iter().all(|x| x.is_finite()));
        println!("{}: {recorded} graphs", case.scheme.origin);
    }
}
