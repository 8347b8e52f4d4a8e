//! Attention over a cache against a plain reference in f64, written from the method's equations.

mod attended;
mod case;
mod classes;
mod correction;
mod encode;
mod feedback;
mod limits;
mod made_up;
mod powers;
mod random;
mod stepwise;

use super::*;
use case::Case;
use classes::with_classes;
use dibit_cache::{
    Adapters, AutoSinks, CacheManager, CacheModel, CacheShape, CalibratedScheme, Calibration, Mode, Scheme, Sees,
    Sequence, Side, Sinks,
};
use dibit_device::{KvCache, Pass, QueryHeads};
use half::f16;
use made_up::{corrected, custom, noise, own, protecting, scheme};
use proptest::prelude::*;
use std::sync::Arc;

const LAYER: usize = 1;

/// Runs passes of the given lengths on a fresh cache and returns the attention output of every row.
fn run(cpu: &Cpu, case: &Case, mode: Mode, passes: &[usize], q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let total: usize = passes.iter().sum();
    run_on(cpu, case, &mut case.cache(cpu, total, 1, total), mode, passes, [q, k, v])
}

/// The same on a cache that may have been used before.
fn run_on(
    cpu: &Cpu,
    case: &Case,
    cache: &mut KvCache<Cpu>,
    mode: Mode,
    passes: &[usize],
    [q, k, v]: [&[f32]; 3],
) -> Vec<f32> {
    let mut sequence = cache.open().unwrap();
    let mut outs = Vec::new();
    for &rows in passes {
        let start = sequence.len();
        let mut out = vec![f32::NAN; rows * case.heads * case.head_dim];
        pass(
            cpu,
            case,
            cache,
            &mut [(&mut sequence, rows)],
            mode,
            |data| match data {
                Data::Query => q[start * case.heads * case.head_dim..].to_vec(),
                Data::Key => k[start * case.kv_heads * case.head_dim..].to_vec(),
                Data::Value => v[start * case.kv_heads * case.head_dim..].to_vec(),
            },
            &mut out,
        );
        outs.extend(out);
    }
    let used = cache.usage(&sequence);
    assert!(used.used_bytes <= used.allocated_bytes, "{}: {used:?}", case.scheme.name);
    cache.close(sequence);
    outs
}

enum Data {
    Query,
    Key,
    Value,
}

#[allow(clippy::too_many_arguments)]
fn pass(
    cpu: &Cpu,
    case: &Case,
    cache: &mut KvCache<Cpu>,
    sequences: &mut [(&mut Sequence, usize)],
    mode: Mode,
    data: impl Fn(Data) -> Vec<f32>,
    out: &mut Vec<f32>,
) {
    let mut batch = Batch::new(mode);
    for (sequence, rows) in sequences.iter_mut() {
        let new = sequence.len()..sequence.len() + *rows;
        cache.classify(sequence, case.classes.get(new).unwrap_or_default()).unwrap();
        cache.reserve(sequence, sequence.len() + *rows).unwrap();
        batch.push(cache.manager(), sequence, *rows);
    }
    let positions: Vec<usize> = batch.positions().map(|position| position as usize).collect();
    let hidden = positions.iter().map(|position| if case.sinks.contains(position) { 1000.0 } else { 1.0 }).collect();
    let [q, k, v] = [data(Data::Query), data(Data::Key), data(Data::Value)];
    let run = |pass: &mut Pass<Cpu>| {
        (0..LAYER).try_for_each(|_| pass.layer(&hidden, 1).map(drop))?;
        let heads = QueryHeads { num: case.heads, softcap: case.softcap, sinks: case.head_sinks.as_ref() };
        pass.whole_layer((&hidden, 1), heads, [&q, &k, &v], out)
    };
    cache.pass_once::<DeviceError>(cpu, &batch, run).unwrap();
    for (sequence, rows) in sequences {
        cache.advance(sequence, *rows);
    }
}

/// How far outputs may be from the reference, as a share of the largest: weights of packed codes have 16 bits.
const TOLERANCE: f64 = 3e-3;

/// How far outputs may be apart that differ in the order of float sums alone. A sum that is rounded differently can move
/// a weight of packed codes by a step.
const REORDERED: f32 = 1e-4;

fn close(what: &str, got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(got) - expected).abs() <= TOLERANCE * scale,
            "{what}, number {i}: {got} instead of {expected}"
        );
    }
}

fn data(case: &Case, tokens: usize) -> [Vec<f32>; 3] {
    let make = |seed, heads| noise(seed, tokens * heads * case.head_dim, case.head_dim);
    let mut values = make(3, case.kv_heads);
    if matches!(case.scheme.sinks, Sinks::Auto(_)) {
        // The values of some tokens are small: few in the first page of a head, more than there are places in the second.
        for (token, row) in values.chunks_exact_mut(case.kv_heads * case.head_dim).enumerate() {
            for (head, value) in row.chunks_exact_mut(case.head_dim).enumerate() {
                let every = if token < 128 { 29 } else { 7 };
                if (token + head).is_multiple_of(every) {
                    value.iter_mut().for_each(|x| *x = f16::from_f32(0.1 * *x).to_f32());
                }
            }
        }
    }
    [make(1, case.heads), make(2, case.kv_heads), values]
}

/// Built-in schemes, and others that choose what those do not.
fn all_schemes() -> Vec<CalibratedScheme> {
    let mut schemes: Vec<CalibratedScheme> = Scheme::built_in().map(scheme).collect();
    schemes.extend([
        custom(4, 2, 32, "tokens = 100\nschedule = \"guaranteed\""),
        custom(16, 8, 64, "tokens = 256\nschedule = \"kivi\""),
        custom(2, 16, 64, "tokens = 0\nschedule = \"guaranteed\""),
        custom(3, 3, 32, "tokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 4"),
        custom(16, 4, 32, ""),
        own("correction = \"linear\"", "bits = 2\ntransform = \"hadamard\"", "bits = 4\ntransform = \"basis\""),
        own(
            "correction = { kind = \"linear+bias\", features = 64, states = \"fp16\" }",
            "bits = \"planes\"",
            "bits = 2",
        ),
        own("correction = \"linear\"", "bits = 2\naxis = \"token\"", "bits = 16"),
        own("correction = \"bias\"", "bits = 3\ngroup = 32", "bits = 2"),
        corrected("[window]\ntokens = 128\nschedule = \"kivi\"", "channel"),
        corrected("", "token"),
        own("", "bits = \"planes\"\naverage_bits = 2.5\ntransform = \"hadamard\"", "bits = 2"),
        own("", "bits = 2", "bits = \"planes\"\naxis = \"channel\"\ntransform = \"basis\""),
        own("", "bits = 2\nfeedback = true", "bits = 2"),
        own("correction = \"linear+bias\"", "bits = \"planes\"\nfeedback = true", "bits = 4"),
        protecting("", "bits = 2", "bits = 2"),
        protecting("", "bits = 2\naxis = \"token\"", "bits = 16"),
        protecting("", "bits = 16", "bits = 2\naxis = \"channel\""),
        protecting("correction = \"linear+bias\"", "bits = 3\nfeedback = true", "bits = 2\naxis = \"channel\""),
        protecting(
            "",
            "bits = \"planes\"\nfeedback = true",
            "bits = \"planes\"\naxis = \"channel\"\ntransform = \"basis\"",
        ),
    ]);
    schemes
}

/// Whether a head is too small for the scheme's channels in 16 bit, which is an error of the layout.
fn lacks_channels(scheme: &CalibratedScheme, head_dim: usize) -> bool {
    let shape = CacheShape { num_layers: 2, num_key_value_heads: 2, head_dim };
    let refused = scheme.plan(&CacheModel::of_shape(shape)).err();
    refused.inspect(|error| assert!(error.to_string().contains("which is none"), "{error}")).is_some()
}

/// Compares rows of passes with the reference.
fn check(cpu: &Cpu, case: &Case, passes: &[usize], positions: &[usize]) {
    let [q, k, v] = data(case, passes.iter().sum());
    let out = run(cpu, case, Mode::Chunk, passes, &q, &k, &v);
    let width = case.heads * case.head_dim;
    for position in positions {
        let expected = case.reference(&q, &k, &v, *position, passes);
        let what = format!("{} with heads of {} at {position}", case.scheme.origin, case.head_dim);
        close(&what, &out[position * width..][..width], &expected);
    }
}

#[test]
fn every_scheme_equals_the_reference_with_usual_heads() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for head_dim in [64, 80, 96, 128, 256] {
        for scheme in all_schemes() {
            // A prompt, a continuation over packed history, then single tokens.
            check(&cpu, &Case::new(scheme, 6, 2, head_dim), &[300, 229, 1], &[0, 129, 299, 300, 528, 529]);
        }
    }
}

#[test]
fn every_scheme_equals_the_reference_with_other_heads() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for head_dim in [8, 32, 48, 72, 88, 112, 120, 136, 192, 248] {
        for scheme in all_schemes() {
            if lacks_channels(&scheme, head_dim) {
                continue;
            }
            check(&cpu, &Case::new(scheme, 4, 2, head_dim), &[270, 10, 1], &[269, 280]);
        }
    }
}

#[test]
fn streaming_is_decoding_token_by_token() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for name in Scheme::built_in() {
        // Decoded tokens are not protected: of single tokens the first alone is a prompt.
        let case = Case::new(scheme(name), 4, 2, 64).protecting(&[0]);
        let [q, k, v] = data(&case, 400);
        let single = run(&cpu, &case, Mode::Chunk, &[1; 400], &q, &k, &v);
        for passes in [&[400][..], &[128, 128, 144], &[7, 250, 143]] {
            assert_eq!(run(&cpu, &case, Mode::Streaming, passes, &q, &k, &v), single, "{name}, passes {passes:?}");
        }
        let width = case.heads * case.head_dim;
        for position in [0, 127, 128, 129, 255, 256, 257, 399] {
            let expected = case.reference(&q, &k, &v, position, &[1; 400]);
            close(&format!("{name} at {position}"), &single[position * width..][..width], &expected);
        }
    }
}

#[test]
fn sequences_in_a_batch_do_not_see_each_other() {
    for name in Scheme::built_in() {
        batch_equals_single(&Case::new(scheme(name), 4, 2, 64));
    }
}

fn batch_equals_single(case: &Case) {
    let cpu = Cpu::new(Some(2)).unwrap();
    let lengths = [300usize, 1, 140];
    let all: Vec<[Vec<f32>; 3]> =
        (0..3).map(|i| [4, 2, 2].map(|heads| noise(10 * i + heads, (lengths[i] + 1) * heads * 64, 64))).collect();
    let mut cache = case.cache(&cpu, 301, 3, 500);
    let mut open: Vec<Sequence> = (0..3).map(|_| cache.open().unwrap()).collect();
    let gather = |index: usize, heads: usize, ranges: &[std::ops::Range<usize>]| -> Vec<f32> {
        all.iter()
            .zip(ranges)
            .flat_map(|(data, r)| data[index][r.start * heads * 64..r.end * heads * 64].to_vec())
            .collect()
    };
    let mut batched: Vec<Vec<f32>> = vec![Vec::new(); 3];
    for ranges in [lengths.map(|len| 0..len), lengths.map(|len| len..len + 1)] {
        let mut sequences: Vec<_> = open.iter_mut().zip(&ranges).map(|(s, r)| (s, r.len())).collect();
        let rows: usize = ranges.iter().map(|r| r.len()).sum();
        let mut out = vec![f32::NAN; rows * 256];
        pass(
            &cpu,
            case,
            &mut cache,
            &mut sequences,
            Mode::Chunk,
            |data| match data {
                Data::Query => gather(0, 4, &ranges),
                Data::Key => gather(1, 2, &ranges),
                Data::Value => gather(2, 2, &ranges),
            },
            &mut out,
        );
        let mut rest = &out[..];
        for (batched, range) in batched.iter_mut().zip(&ranges) {
            let (own, others) = rest.split_at(range.len() * 256);
            batched.extend_from_slice(own);
            rest = others;
        }
    }
    for ((len, [q, k, v]), batched) in lengths.into_iter().zip(&all).zip(batched) {
        assert_eq!(run(&cpu, case, Mode::Chunk, &[len, 1], q, k, v), batched, "{}", case.scheme.name);
    }
}

#[test]
fn a_sequence_finds_nothing_of_the_one_before_it() {
    let cpu = Cpu::new(Some(2)).unwrap();
    let cases = Scheme::built_in().map(|name| Case::new(scheme(name), 4, 2, 64)).chain([with_classes("")]);
    for case in cases {
        let data = data(&case, 700);
        let loud: Vec<Vec<f32>> = data.iter().map(|numbers| numbers.iter().map(|x| -100.0 * x).collect()).collect();
        let before = Case { sinks: vec![3, 200, 310, 399], ..Case::new(case.scheme.clone(), 4, 2, 64) };
        let [q, k, v] = &data;
        for (mode, passes) in
            [(Mode::Chunk, &[300, 229, 1][..]), (Mode::Chunk, &[1, 1, 420, 1]), (Mode::Streaming, &[400])]
        {
            let fresh = run(&cpu, &case, mode, passes, q, k, v);
            let mut cache = case.cache(&cpu, 700, 1, 700);
            run_on(&cpu, &before, &mut cache, mode, &[650, 1], [&loud[0], &loud[1], &loud[2]]);
            let reused = run_on(&cpu, &case, &mut cache, mode, passes, [q, k, v]);
            assert!(fresh == reused, "{}, {mode:?} {passes:?}", case.scheme.name);
        }
    }
}

#[test]
fn factors_that_fp16_cannot_hold_are_refused() {
    let cpu = Cpu::new(Some(1)).unwrap();
    let case = Case::new(scheme("gear-l"), 1, 1, 64);
    let mut cache = case.cache(&cpu, 641, 1, 641);
    let mut sequence = cache.open().unwrap();
    cache.reserve(&mut sequence, 641).unwrap();
    let mut batch = Batch::new(Mode::Chunk);
    batch.push(cache.manager(), &sequence, 641);
    // Most numbers of one channel lie between two codes that are 10,000 apart.
    let mut k = noise(1, 641 * 64, 64);
    for token in 0..641 {
        k[token * 64 + 7] = [0.0, 30000.0, 4500.0, 25500.0][if token % 128 < 2 { token % 128 } else { 2 + token % 2 }];
    }
    let v = noise(2, 641 * 64, 64);
    let pack = |pass: &mut Pass<Cpu>| {
        pass.skip_to(LAYER);
        let mut layer = pass.layer(&Vec::new(), 1)?;
        layer.stage(641, &k, &v).unwrap();
        layer.pack()
    };
    let error = cache.pass_once(&cpu, &batch, pack).unwrap_err().to_string();
    assert!(error.contains("layer 1") && error.contains("--kv fp16"), "{error}");
}

#[test]
fn splits_do_not_change_the_result() {
    for name in Scheme::built_in() {
        let case = Case::new(scheme(name), 4, 2, 64);
        let [q, k, v] = data(&case, 1001);
        let outs: Vec<Vec<f32>> = [usize::MAX, 512, 128]
            .map(|split_tokens| {
                let cpu = Cpu { split_tokens, ..Cpu::new(Some(1)).unwrap() };
                run(&cpu, &case, Mode::Chunk, &[1000, 1], &q, &k, &v)
            })
            .into();
        for out in &outs[1..] {
            for (a, b) in outs[0].iter().zip(out) {
                assert!((a - b).abs() < REORDERED, "{name}: {a} and {b}");
            }
        }
    }
}

#[test]
fn threads_and_instruction_sets_agree() {
    for name in Scheme::built_in() {
        let case = Case::new(scheme(name), 6, 2, 80);
        let [q, k, v] = data(&case, 401);
        let out = |threads, isa| {
            let cpu = Cpu { isa, ..Cpu::new(Some(threads)).unwrap() };
            run(&cpu, &case, Mode::Chunk, &[400, 1], &q, &k, &v)
        };
        let expected = out(1, Isa::detect());
        assert_eq!(out(3, Isa::detect()), expected, "{name}");
        // The row that is decoded reads what the prompt stored; where tokens are quantised before attention, a
        // difference in the last place can move a code.
        let width = case.heads * case.head_dim;
        for isa in Isa::available() {
            for (a, b) in out(1, isa)[400 * width..].iter().zip(&expected[400 * width..]) {
                assert!((a - b).abs() < REORDERED, "{name}, {isa:?}: {a} and {b}");
            }
        }
    }
}

#[test]
fn a_constant_added_to_all_logits_changes_nothing() {
    // Adding a vector along q to every key shifts all logits of that query by the same amount.
    let case = Case::new(scheme("fp16"), 1, 1, 64);
    let [mut q, mut k, v] = data(&case, 200);
    q[199 * 64..].fill(0.0);
    q[199 * 64] = 8.0;
    k.iter_mut().step_by(64).for_each(|x| *x = (*x * 4.0).round() / 4.0);
    let cpu = Cpu::new(Some(1)).unwrap();
    let before = run(&cpu, &case, Mode::Chunk, &[199, 1], &q, &k, &v);
    k.iter_mut().step_by(64).for_each(|x| *x += 64.0);
    let after = run(&cpu, &case, Mode::Chunk, &[199, 1], &q, &k, &v);
    for (a, b) in before[199 * 64..].iter().zip(&after[199 * 64..]) {
        assert!((a - b).abs() < 1e-5, "{a} and {b}");
    }
}

#[test]
fn numbers_that_fp16_cannot_hold_are_refused_by_name() {
    let case = Case::new(scheme("kivi"), 1, 1, 64);
    let cpu = Cpu::new(Some(1)).unwrap();
    let mut cache = case.cache(&cpu, 8, 1, 8);
    let sequence = cache.open().unwrap();
    let mut batch = Batch::new(Mode::Chunk);
    batch.push(cache.manager(), &sequence, 8);
    let good = vec![0.5; 8 * 64];
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = good.clone();
        values[5 * 64 + 7] = bad;
        let stage = |pass: &mut Pass<Cpu>| {
            pass.skip_to(LAYER);
            pass.layer(&Vec::new(), 1)?.stage(8, &good, &values).map(drop)
        };
        let error = cache.pass_once(&cpu, &batch, stage).unwrap_err().to_string();
        assert!(error.contains("value of layer 1, token 5"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_shapes_and_lengths(
        group in 1usize..4, kv_heads in 1usize..4, which in 1usize..33,
        passes in prop::collection::vec(1usize..220, 1..5), name in 0usize..15,
    ) {
        let name = Scheme::built_in().nth(name).unwrap();
        let head_dim = 8 * which;
        prop_assume!(!lacks_channels(&scheme(name), head_dim));
        let case = Case::new(scheme(name), group * kv_heads, kv_heads, head_dim).protecting(&[0]);
        let tokens = passes.iter().sum();
        let [q, k, v] = data(&case, tokens);
        let out = run(&Cpu::new(Some(2)).unwrap(), &case, Mode::Chunk, &passes, &q, &k, &v);
        let width = case.heads * head_dim;
        let mut position = 0;
        for rows in &passes {
            position += rows;
            let expected = case.reference(&q, &k, &v, position - 1, &passes);
            close(name, &out[(position - 1) * width..][..width], &expected);
        }
    }
}
