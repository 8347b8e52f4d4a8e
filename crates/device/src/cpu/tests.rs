//! Attention over a cache against a plain reference in f64, written from the method's equations.

use super::*;
use dibit_cache::{CacheManager, CacheShape, Scheme, Sequence, Side, Window};
use dibit_quant::Affine;
use half::f16;
use proptest::prelude::*;

const LAYER: usize = 1;

struct Case {
    scheme: Scheme,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

/// fp16-representable numbers with outlier channels.
fn noise(seed: usize, len: usize, width: usize) -> Vec<f32> {
    let mut state = seed as u64 * 0x9e37_79b9_7f4a_7c15 + 1;
    (0..len)
        .map(|i| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let uniform = (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
            let outlier = if i % width % 13 == 3 { 6.0 } else { 1.0 };
            f16::from_f32(uniform * 2.0 * outlier).to_f32()
        })
        .collect()
}

/// What a side looks like after quantisation: `rows` of `head_dim`, the first `packed` of them in pages.
fn stored(side: Side, per_channel: bool, rows: &[Vec<f32>], packed: usize) -> Vec<Vec<f64>> {
    let mut out: Vec<Vec<f64>> = rows.iter().map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect();
    let Side::Packed(form) = side else { return out };
    let mut quantise = |cells: Vec<(usize, usize)>| {
        let group: Vec<f32> = cells.iter().map(|&(t, c)| rows[t][c]).collect();
        let affine = Affine::fit(&group, form.bits).unwrap();
        for ((t, c), x) in cells.into_iter().zip(group) {
            out[t][c] = f64::from(affine.code(x, form.bits)) * f64::from(affine.scale) + f64::from(affine.min);
        }
    };
    let d = rows[0].len();
    if per_channel {
        for start in (0..packed).step_by(form.group) {
            (0..d).for_each(|c| quantise((start..start + form.group).map(|t| (t, c)).collect()));
        }
    } else {
        for t in 0..packed {
            for start in (0..d).step_by(form.group) {
                quantise((start..d.min(start + form.group)).map(|c| (t, c)).collect());
            }
        }
    }
    out
}

impl Case {
    fn shape(&self) -> CacheShape {
        CacheShape { num_layers: 2, num_key_value_heads: self.kv_heads, head_dim: self.head_dim }
    }

    fn manager(&self, len: usize, sequences: usize) -> CacheManager {
        let layout = CacheLayout::new(&self.scheme, self.shape()).unwrap();
        let blocks = sequences * layout.window.blocks(len);
        CacheManager::new(layout, blocks, sequences)
    }

    /// Row `t` of one head out of `[token][head][channel]` data.
    fn head(&self, data: &[f32], heads: usize, head: usize) -> Vec<Vec<f32>> {
        data.chunks_exact(heads * self.head_dim)
            .map(|row| row[head * self.head_dim..][..self.head_dim].to_vec())
            .collect()
    }

    /// Attention of the token at `position`, given how many tokens are visible as packed.
    fn reference(&self, q: &[f32], k: &[f32], v: &[f32], position: usize, cached: usize) -> Vec<f64> {
        let window = self.scheme.window;
        let mut out = Vec::new();
        for head in 0..self.heads {
            let kv_head = head / (self.heads / self.kv_heads);
            let keys = self.head(k, self.kv_heads, kv_head);
            let values = self.head(v, self.kv_heads, kv_head);
            let keys = stored(self.scheme.keys, true, &keys[..=position], window.packed_keys(cached));
            let values = stored(self.scheme.values, false, &values[..=position], window.packed_values(cached));
            let query = &self.head(q, self.heads, head)[position];
            let logits: Vec<f64> = keys
                .iter()
                .map(|key| {
                    key.iter().zip(query).map(|(k, &q)| k * f64::from(q)).sum::<f64>() / (self.head_dim as f64).sqrt()
                })
                .collect();
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|l| (l - largest).exp()).collect();
            let total: f64 = weights.iter().sum();
            for channel in 0..self.head_dim {
                out.push(weights.iter().zip(&values).map(|(w, value)| w * value[channel]).sum::<f64>() / total);
            }
        }
        out
    }
}

/// Runs passes of the given lengths and returns the attention output of every row.
fn run(cpu: &Cpu, case: &Case, mode: Mode, passes: &[usize], q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let total: usize = passes.iter().sum();
    let mut manager = case.manager(total, 1);
    let mut cache = cpu.store(manager.layout(), manager.num_blocks(), 1, total).unwrap();
    let mut sequence = manager.open().unwrap();
    let mut outs = Vec::new();
    for &rows in passes {
        let start = sequence.len();
        let mut out = vec![f32::NAN; rows * case.heads * case.head_dim];
        pass(
            cpu,
            case,
            &mut manager,
            &mut cache,
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
    manager: &mut CacheManager,
    cache: &mut CpuCache,
    sequences: &mut [(&mut Sequence, usize)],
    mode: Mode,
    data: impl Fn(Data) -> Vec<f32>,
    out: &mut Vec<f32>,
) {
    let mut batch = Batch::new(mode);
    for (sequence, rows) in sequences.iter_mut() {
        manager.reserve(sequence, sequence.len() + *rows).unwrap();
        batch.push(sequence, *rows, case.scheme.window);
    }
    let rows = batch.rows();
    cpu.write_kv(cache, LAYER, &batch, 0..rows, &data(Data::Key), &data(Data::Value)).unwrap();
    cpu.attention(cache, LAYER, &batch, 0..rows, case.heads, &data(Data::Query), out).unwrap();
    cpu.commit(cache, LAYER, &batch).unwrap();
    for (sequence, rows) in sequences {
        let len = sequence.len() + *rows;
        manager.advance(sequence, len);
    }
}

fn close(got: &[f32], expected: &[f64]) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
    for (i, (&got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(got) - expected).abs() < 2e-5 * scale, "number {i}: {got} instead of {expected}");
    }
}

fn scheme(name: &str) -> Scheme {
    Scheme::load(name).unwrap()
}

fn custom(key_bits: u32, value_bits: u32, group: usize, window: &str) -> Scheme {
    let side = |bits| if bits == 16 { "bits = 16".to_owned() } else { format!("bits = {bits}\ngroup = {group}") };
    let window = if window.is_empty() { String::new() } else { format!("[window]\n{window}\n") };
    let (keys, values) = (side(key_bits), side(value_bits));
    let text = format!("name = \"custom\"\n[keys]\n{keys}\n[values]\n{values}\n{window}");
    Scheme::parse(&text, "custom").unwrap()
}

fn data(case: &Case, tokens: usize) -> [Vec<f32>; 3] {
    let make = |seed, heads| noise(seed, tokens * heads * case.head_dim, case.head_dim);
    [make(1, case.heads), make(2, case.kv_heads), make(3, case.kv_heads)]
}

#[test]
fn every_scheme_and_head_size_equals_the_reference() {
    let cpu = Cpu::new(Some(2)).unwrap();
    let schemes = [
        scheme("fp16"),
        scheme("kivi"),
        scheme("kivi-paper"),
        custom(4, 2, 32, "tokens = 100\nschedule = \"guaranteed\""),
        custom(16, 8, 64, "tokens = 256\nschedule = \"kivi\""),
        custom(2, 16, 64, "tokens = 0\nschedule = \"guaranteed\""),
        custom(16, 4, 32, ""),
    ];
    for head_dim in [64, 80, 96, 128, 256] {
        for scheme in schemes.clone() {
            let case = Case { scheme, heads: 6, kv_heads: 2, head_dim };
            let tokens = 530;
            let [q, k, v] = data(&case, tokens);
            // A prompt, a continuation over packed history, then single tokens.
            let out = run(&cpu, &case, Mode::Chunk, &[300, 229, 1], &q, &k, &v);
            let width = case.heads * head_dim;
            for (position, cached) in [(0, 0), (129, 0), (299, 0), (300, 300), (528, 300), (529, 529)] {
                close(&out[position * width..][..width], &case.reference(&q, &k, &v, position, cached));
            }
        }
    }
}

#[test]
fn streaming_is_decoding_token_by_token() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for name in Scheme::built_in() {
        let case = Case { scheme: scheme(name), heads: 4, kv_heads: 2, head_dim: 64 };
        let [q, k, v] = data(&case, 400);
        let single = run(&cpu, &case, Mode::Chunk, &[1; 400], &q, &k, &v);
        for passes in [&[400][..], &[128, 128, 144], &[7, 250, 143]] {
            assert_eq!(run(&cpu, &case, Mode::Streaming, passes, &q, &k, &v), single, "{name}, passes {passes:?}");
        }
        let width = case.heads * case.head_dim;
        for position in [0, 127, 128, 129, 255, 256, 257, 399] {
            close(&single[position * width..][..width], &case.reference(&q, &k, &v, position, position));
        }
    }
}

#[test]
fn sequences_in_a_batch_do_not_see_each_other() {
    let cpu = Cpu::new(Some(2)).unwrap();
    let case = Case { scheme: scheme("kvlinc"), heads: 4, kv_heads: 2, head_dim: 64 };
    let lengths = [300usize, 1, 140];
    let all: Vec<[Vec<f32>; 3]> =
        (0..3).map(|i| [4, 2, 2].map(|heads| noise(10 * i + heads, (lengths[i] + 1) * heads * 64, 64))).collect();
    let mut manager = case.manager(301, 3);
    let mut cache = cpu.store(manager.layout(), manager.num_blocks(), 3, 500).unwrap();
    let mut open: Vec<Sequence> = (0..3).map(|_| manager.open().unwrap()).collect();
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
            &case,
            &mut manager,
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
        assert_eq!(run(&cpu, &case, Mode::Chunk, &[len, 1], q, k, v), batched);
    }
}

#[test]
fn splits_do_not_change_the_result() {
    let case = Case { scheme: scheme("kvlinc"), heads: 2, kv_heads: 1, head_dim: 128 };
    let [q, k, v] = data(&case, 1001);
    let outs: Vec<Vec<f32>> = [usize::MAX, 512, 128]
        .map(|split_tokens| {
            let cpu = Cpu { split_tokens, ..Cpu::new(Some(1)).unwrap() };
            run(&cpu, &case, Mode::Chunk, &[1000, 1], &q, &k, &v)
        })
        .into();
    for out in &outs[1..] {
        for (a, b) in outs[0].iter().zip(out) {
            assert!((a - b).abs() < 1e-5, "{a} and {b}");
        }
    }
}

#[test]
fn threads_and_instruction_sets_agree() {
    let case = Case { scheme: scheme("kivi"), heads: 6, kv_heads: 2, head_dim: 80 };
    let [q, k, v] = data(&case, 401);
    let out =
        |threads, isa| run(&Cpu { isa, ..Cpu::new(Some(threads)).unwrap() }, &case, Mode::Chunk, &[400, 1], &q, &k, &v);
    let expected = out(1, Isa::detect());
    assert_eq!(out(3, Isa::detect()), expected);
    for isa in Isa::available() {
        for (a, b) in out(1, isa).iter().zip(&expected) {
            assert!((a - b).abs() < 1e-5, "{isa:?}: {a} and {b}");
        }
    }
}

#[test]
fn a_constant_added_to_all_logits_changes_nothing() {
    // Adding a vector along q to every key shifts all logits of that query by the same amount.
    let case = Case { scheme: scheme("fp16"), heads: 1, kv_heads: 1, head_dim: 64 };
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
    let case = Case { scheme: scheme("kvlinc"), heads: 1, kv_heads: 1, head_dim: 64 };
    let cpu = Cpu::new(Some(1)).unwrap();
    let mut manager = case.manager(8, 1);
    let mut cache = cpu.store(manager.layout(), 0, 1, 8).unwrap();
    let mut sequence = manager.open().unwrap();
    manager.reserve(&mut sequence, 8).unwrap();
    let mut batch = Batch::new(Mode::Chunk);
    batch.push(&sequence, 8, Window { tokens: 128, schedule: dibit_cache::Schedule::Guaranteed });
    let good = vec![0.5; 8 * 64];
    for bad in [f32::NAN, f32::INFINITY, 70_000.0] {
        let mut values = good.clone();
        values[5 * 64 + 7] = bad;
        let error = cpu.write_kv(&mut cache, LAYER, &batch, 0..8, &good, &values).unwrap_err().to_string();
        assert!(error.contains("value of layer 1, token 5"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn random_shapes_and_lengths(
        group in 1usize..4, kv_heads in 1usize..4, which in 0usize..5,
        passes in prop::collection::vec(1usize..220, 1..5), name in 0usize..4,
    ) {
        let name = Scheme::built_in().nth(name).unwrap();
        let head_dim = [64, 80, 96, 128, 256][which];
        let case = Case { scheme: scheme(name), heads: group * kv_heads, kv_heads, head_dim };
        let tokens = passes.iter().sum();
        let [q, k, v] = data(&case, tokens);
        let out = run(&Cpu::new(Some(2)).unwrap(), &case, Mode::Chunk, &passes, &q, &k, &v);
        let width = case.heads * head_dim;
        let mut cached = 0;
        for rows in passes {
            let position = cached + rows - 1;
            close(&out[position * width..][..width], &case.reference(&q, &k, &v, position, cached));
            cached += rows;
        }
    }
}
