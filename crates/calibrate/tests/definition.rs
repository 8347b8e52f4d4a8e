//! Permutations and bases against their definitions, computed in f64 from the keys and values that the model shows.

mod common;

use common::{FIXTURES, both, bytes, dummy, fixture, make, options, parse, resq, rotatekv, says, text, try_make};
use dibit_cache::{CacheModel, CalibratedScheme};
use dibit_calibrate::{Artefact, Options, calibrate};
use dibit_cpu::Cpu;
use dibit_device::{DType, Tensor};
use dibit_model::{Observation, Pretrained};
use dibit_quant::Hadamard;
use dibit_runner::ExactPass;
use nalgebra::DMatrix;
use serde_json::json;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Longer than the rows that pass through a layer together.
const CONTEXT: usize = 150;

/// What one layer showed: the position of each row, its keys and its values.
#[derive(Default)]
struct Seen {
    rows: Vec<(usize, Vec<f64>, Vec<f64>)>,
}

/// Keys after RoPE and values of all layers, for sequences that begin with BOS.
fn observe(pretrained: &Pretrained, ids: &[u32]) -> Vec<Seen> {
    let (cpu, config) = (Arc::new(Cpu::new(Some(1)).unwrap()), &pretrained.config);
    let mut pass = ExactPass::new(&cpu, config, &pretrained.weights, CONTEXT).unwrap();
    let mut layers: Vec<Seen> = (0..config.num_hidden_layers).map(|_| Seen::default()).collect();
    let width = config.num_key_value_heads * config.head_dim;
    let wide = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    for chunk in ids.chunks_exact(CONTEXT - 1) {
        let sequence_ids: Vec<u32> = [config.bos_token_id.unwrap()].iter().chain(chunk).copied().collect();
        let mut see = |seen: Observation| {
            for (row, (k, v)) in seen.k.chunks_exact(width).zip(seen.v.chunks_exact(width)).enumerate() {
                layers[seen.layer].rows.push((seen.first_row + row, wide(k), wide(v)));
            }
        };
        pass.run(&sequence_ids, &mut see).unwrap();
    }
    layers
}

/// `H` of this order, by its definition where that is short.
fn hadamard(order: usize) -> DMatrix<f64> {
    let sylvester = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    if order.is_power_of_two() {
        return DMatrix::from_fn(order, order, |i, j| sylvester(i, j) / (order as f64).sqrt());
    }
    let own = Hadamard::new(order).unwrap();
    let row = |i: usize| {
        let mut row = vec![0.0; order];
        row[i] = 1.0;
        own.apply(&mut row);
        row
    };
    let rows: Vec<Vec<f32>> = (0..order).map(row).collect();
    DMatrix::from_fn(order, order, |i, j| f64::from(rows[i][j]))
}

/// Sums over tokens of rotated key channels before RoPE, and of their magnitudes.
fn channel_sums(pretrained: &Pretrained, seen: &Seen, rotated_heads: usize) -> [Vec<f64>; 2] {
    let config = &pretrained.config;
    let (d, order) = (config.head_dim, rotated_heads * config.head_dim);
    let inv_freq = config.rope.inv_freq(d);
    let matrix = hadamard(order);
    let mut sums = [(); 2].map(|()| vec![0.0; config.num_key_value_heads * d]);
    for (position, key, _) in &seen.rows {
        let mut plain = key.clone();
        for head in plain.chunks_exact_mut(d) {
            for (c, frequency) in inv_freq.iter().enumerate() {
                let (sine, cosine) = (*position as f64 * f64::from(*frequency)).sin_cos();
                let (a, b) = (head[c], head[c + d / 2]);
                head[c] = a * cosine + b * sine;
                head[c + d / 2] = b * cosine - a * sine;
            }
        }
        for (group, heads) in plain.chunks_exact(order).enumerate() {
            let rotated = matrix.tr_mul(&DMatrix::from_column_slice(order, 1, heads));
            for (j, x) in rotated.iter().enumerate() {
                sums[0][group * order + j] += x;
                sums[1][group * order + j] += x.abs();
            }
        }
    }
    sums
}

fn permutations(artefact: &Artefact) -> Vec<&[u32]> {
    artefact.calibration.layers.iter().map(|layer| layer.permutation.as_deref().unwrap()).collect()
}

/// The order is a permutation within each frame, and ascending in `sums` as far as f32 can tell.
fn check_order(what: &str, order: &[u32], sums: &[f64], magnitudes: &[f64], frame: usize) {
    let tolerance = 1e-5 * magnitudes.iter().copied().fold(0.0, f64::max);
    let (least, most) = sums.iter().fold((f64::MAX, f64::MIN), |(a, b), x| (a.min(*x), b.max(*x)));
    assert!(most - least > 1000.0 * tolerance, "{what}: sums that do not tell channels apart");
    assert_eq!(order.len(), sums.len(), "{what}");
    for (index, channels) in order.chunks_exact(frame).enumerate() {
        let mut sorted: Vec<usize> = channels.iter().map(|&c| c as usize).collect();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(index * frame..(index + 1) * frame), "{what}: {channels:?}");
        for pair in channels.windows(2) {
            let [a, b] = [pair[0], pair[1]].map(|c| sums[c as usize]);
            assert!(a <= b + tolerance, "{what}: channel {} of {a} before channel {} of {b}", pair[0], pair[1]);
        }
    }
}

fn check_permutations(name: &str, pretrained: &Pretrained) {
    let ids = text(3 * (CONTEXT - 1) + 7, 1);
    let seen = observe(pretrained, &ids);
    assert_eq!(seen[1].rows.len(), 3 * CONTEXT);
    for (place, statistic) in [("local", "mean"), ("local", "magnitude"), ("global", "mean")] {
        let scheme = parse(&rotatekv(2, place, statistic));
        let layout = scheme.plan(&CacheModel::of_shape(pretrained.config.cache_shape())).unwrap();
        let artefact = make(pretrained, &scheme, &ids, &options(CONTEXT));
        for (index, order) in permutations(&artefact).into_iter().enumerate() {
            let own = &layout.layers[index];
            let [signed, magnitudes] = channel_sums(pretrained, &seen[index], own.rotated_heads);
            let sums = if statistic == "mean" { &signed } else { &magnitudes };
            let frame = own.frame * pretrained.config.head_dim;
            check_order(&format!("{name}, layer {index}, {place}, {statistic}"), order, sums, &magnitudes, frame);
        }
    }
}

#[test]
fn permutations_sort_the_rotated_keys_before_rope() {
    for name in FIXTURES {
        check_permutations(name, &fixture(name));
    }
}

#[test]
fn any_number_of_kv_heads_will_do() {
    // Rotated 1, 2 and 4 at a time.
    for heads in [3, 6, 8] {
        check_permutations(&format!("{heads} KV heads"), &dummy(heads, 1, json!({})));
    }
}

#[test]
fn local_orders_keep_heads_together_and_global_ones_do_not() {
    let (pretrained, ids) = (dummy(6, 1, json!({})), text(600, 2));
    let leaving = |place: &str| {
        let artefact = make(&pretrained, &parse(&rotatekv(2, place, "mean")), &ids, &options(CONTEXT));
        let leaves = |(at, channel): (usize, &u32)| at / 128 != *channel as usize / 128;
        permutations(&artefact).concat().iter().take(384).enumerate().filter(|pair| leaves(*pair)).count()
    };
    assert_eq!(leaving("local"), 0);
    assert!(leaving("global") > 100);
}

#[test]
fn magnitude_is_another_order_than_mean() {
    let (pretrained, ids) = (fixture("llama32-old-bf16"), text(600, 2));
    let of = |statistic: &str| make(&pretrained, &parse(&rotatekv(2, "local", statistic)), &ids, &options(CONTEXT));
    let (mean, magnitude) = (of("mean"), of("magnitude"));
    for (a, b) in permutations(&mean).iter().zip(permutations(&magnitude)) {
        let moved = a.iter().zip(b).filter(|(a, b)| a != b).count();
        assert!(moved > a.len() / 2, "{moved} of {}", a.len());
    }
}

/// Uncentred second moments of the `rows`.
fn moments<'a>(d: usize, rows: impl Iterator<Item = &'a [f64]>) -> DMatrix<f64> {
    let rows: Vec<f64> = rows.flatten().copied().collect();
    let rows = DMatrix::from_row_slice(rows.len() / d, d, &rows);
    rows.tr_mul(&rows)
}

/// An orthogonal matrix whose last `high` columns span the space of the largest eigenvalues, and which is mixed within
/// both spaces.
fn check_basis(what: &str, basis: &[f32], moments: &DMatrix<f64>, high: usize) {
    let d = moments.nrows();
    let low = d - high;
    let basis = DMatrix::from_row_slice(d, d, &basis.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    assert!((&basis.transpose() * &basis - DMatrix::identity(d, d)).amax() < 1e-5, "{what} is not orthogonal");
    let mut eigenvalues: Vec<f64> = moments.symmetric_eigenvalues().iter().copied().collect();
    eigenvalues.sort_by(f64::total_cmp);
    let turned = basis.transpose() * moments * &basis;
    let largest: f64 = eigenvalues[low..].iter().sum();
    let held = turned.view((low, low), (high, high)).trace();
    assert!((held / largest - 1.0).abs() < 1e-5, "{what}: {held} of {largest}");
    assert!(turned.view((0, low), (low, high)).amax() < 1e-5 * largest, "{what}: the two spaces are not separate");
    for (space, start, size) in [("low", 0, low), ("high", low, high)] {
        let block = turned.view((start, start), (size, size));
        let off = (0..size).flat_map(|i| (0..i).map(move |j| (i, j))).map(|at| block[at].abs()).fold(0.0, f64::max);
        assert!(size == 1 || off > 1e-3 * block.amax(), "{what}: the {space} space is not mixed");
    }
}

fn check_bases(name: &str, pretrained: &Pretrained) {
    let ids = text(3 * (CONTEXT - 1) + 7, 1);
    let artefact = make(pretrained, &parse(&resq(2)), &ids, &options(CONTEXT));
    let (heads, d) = (pretrained.config.num_key_value_heads, pretrained.config.head_dim);
    let high = (0.03125 * d as f64).round_ties_even() as usize;
    for (index, seen) in observe(pretrained, &ids).iter().enumerate() {
        let own = &artefact.calibration.layers[index];
        let [keys, values] = [&own.key_basis, &own.value_basis].map(|basis| basis.as_deref().unwrap());
        assert_eq!((keys.len(), values.len(), &own.permutation), (heads * d * d, heads * d * d, &None));
        // All heads share one basis of keys.
        assert!(keys.chunks_exact(d * d).all(|head| head == &keys[..d * d]), "{name}");
        let all = moments(d, seen.rows.iter().flat_map(|(_, key, _)| key.chunks_exact(d)));
        check_basis(&format!("{name}, layer {index}, keys"), &keys[..d * d], &all, high);
        for (head, basis) in values.chunks_exact(d * d).enumerate() {
            let own = moments(d, seen.rows.iter().map(|(_, _, value)| &value[head * d..(head + 1) * d]));
            check_basis(&format!("{name}, layer {index}, values of head {head}"), basis, &own, high);
        }
    }
}

#[test]
fn bases_hold_the_largest_second_moments_in_their_last_columns() {
    for name in FIXTURES {
        check_bases(name, &fixture(name));
    }
    check_bases("3 KV heads", &dummy(3, 1, json!({})));
}

#[test]
fn the_seed_turns_bases_and_nothing_else() {
    let (pretrained, scheme, ids) = (fixture("llama32-old-bf16"), parse(&both()), text(400, 3));
    let of = |seed: u64| make(&pretrained, &scheme, &ids, &Options { seed, ..options(CONTEXT) });
    let (first, other, last) = (of(0), of(1), of(u64::MAX));
    // Hash maps have another order in each run of this.
    for _ in 0..8 {
        assert_eq!(bytes(&of(0)), bytes(&first));
    }
    assert_eq!(permutations(&first), permutations(&other));
    for pair in [[&first, &other], [&first, &last]] {
        let [a, b] = pair.map(|artefact| artefact.calibration.layers.iter().map(|layer| &layer.value_basis));
        assert!(a.zip(b).all(|(a, b)| a != b));
    }
    assert!(other.source.contains("seed 1") && other.source.starts_with("300 tokens in sequences of 150"));
}

#[test]
fn threads_do_not_matter() {
    let ids = text(400, 3);
    for (name, scheme) in [("qwen2-bias-bf16", both()), ("llama32-old-bf16", resq(2))] {
        let (pretrained, scheme) = (fixture(name), parse(&scheme));
        let of = |threads: usize| {
            let cpu = Arc::new(Cpu::new(Some(threads)).unwrap());
            let go_on = |_| ControlFlow::Continue(());
            bytes(
                &calibrate(&cpu, &pretrained, &scheme, &common::one(&ids), &options(CONTEXT), go_on).unwrap().unwrap(),
            )
        };
        let one = of(1);
        assert!([2, 3, 5].into_iter().all(|threads| of(threads) == one), "{name}");
    }
}

#[test]
fn tokens_are_whole_sequences_of_the_text() {
    let (pretrained, scheme, ids) = (fixture("mistral-f32"), parse(&rotatekv(2, "local", "mean")), text(100, 3));
    // A sequence of 20 takes 19 tokens of the text and BOS.
    let of = |tokens: Option<usize>, ids: &[u32]| {
        let made = make(&pretrained, &scheme, ids, &Options { tokens, ..options(20) });
        (made.source.split(',').next().unwrap().to_owned(), made.calibration)
    };
    let whole = of(None, &ids);
    assert_eq!(whole.0, "100 tokens in sequences of 20");
    assert_eq!(of(Some(81), &ids), of(Some(100), &ids[..95]));
    assert_eq!(of(Some(40), &ids), of(None, &ids[..38]));
    assert_ne!(of(Some(40), &ids).1, whole.1);
}

#[test]
fn what_cannot_be_calibrated_is_refused() {
    let (pretrained, scheme, ids) = (fixture("mistral-f32"), parse(&rotatekv(2, "local", "mean")), text(100, 3));
    let of = |ids: &[u32], context: usize, tokens: Option<usize>| {
        try_make(&pretrained, &scheme, ids, &Options { tokens, ..options(context) })
    };
    says(of(&ids, 102, None), &["100 tokens and 101 are needed", "--tokens", "--context"]);
    says(of(&[], 2, None), &["0 tokens and 1 are needed"]);
    says(of(&ids, 20, Some(101)), &["100 tokens and 114 are needed"]);
    says(of(&ids, 2, Some(usize::MAX)), &["100 tokens and"]);
    for context in [0, 1, 1025, usize::MAX] {
        says(of(&ids, context, None), &[&format!("sequences of {context} tokens"), "between 2 and", "1024"]);
    }
    let kivi = CalibratedScheme::load("kivi").unwrap();
    says(try_make(&pretrained, &kivi, &ids, &options(20)), &["kivi needs no calibration"]);
    let far = format!("{}[layers.7]\nkeys = {{ bits = 4 }}\n", rotatekv(2, "local", "mean"));
    says(try_make(&pretrained, &parse(&far), &ids, &options(20)), &["layers 7..8 of a model with 2"]);
}

#[test]
fn damaged_weights_make_no_file() {
    let ids = text(100, 3);
    for scheme in [rotatekv(2, "local", "mean"), resq(2)] {
        for number in [f32::NAN, f32::INFINITY] {
            let mut pretrained = fixture("mistral-f32");
            let weight = &mut pretrained.weights.layers[1].k.weight;
            let mut numbers = weight.to_f32();
            numbers[5] = number;
            *weight = Tensor::from_f32(numbers, DType::F32, weight.rows(), weight.cols());
            says(try_make(&pretrained, &parse(&scheme), &ids, &options(20)), &["layer 1", "weights", "not usable"]);
        }
    }
}
