//! Operations on rows, and linear layers, against those of the CPU.
#![cfg(feature = "gpu-tests")]

mod common;

use dibit_cache::Phase;
use dibit_cpu::Cpu;
use dibit_cuda::Cuda;
use dibit_device::{
    Activation, BlockType, Bytes, DType, Dense, Experts, Heads, Memory, Norm, Output, Projection, Routing, Tensor,
};
use std::sync::{Arc, OnceLock};

type Buffer = <Cuda as Memory>::Buffer;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

/// What results may be off by where activations are rounded to 16 bit, as a share of their root mean square.
const ROUNDED: f32 = 2e-2;

/// The same where they are not.
const EXACT: f32 = 1e-4;

fn cpu() -> &'static Cpu {
    static CPU: OnceLock<Cpu> = OnceLock::new();
    CPU.get_or_init(|| Cpu::new(Some(2)).unwrap())
}

/// Made-up numbers, normal with spread 1.
fn numbers(seed: u64, len: usize) -> Vec<f32> {
    Tensor::random(seed, 1.0, DType::F32, 1, len).to_f32()
}

/// A buffer on each device with the same numbers.
fn both(cuda: &Cuda, values: &[f32]) -> (Buffer, Vec<f32>) {
    (cuda.upload(values).unwrap(), values.to_vec())
}

/// Buffers of NaN.
fn poisoned(cuda: &Cuda, len: usize) -> (Buffer, Vec<f32>) {
    both(cuda, &vec![f32::NAN; len])
}

fn down(cuda: &Cuda, buffer: &Buffer, len: usize) -> Vec<f32> {
    let mut out = Vec::new();
    cuda.download(buffer, 0..len, &mut out).unwrap();
    out
}

/// Checks that numbers are those expected within a share of their root mean square, and NaN where they are expected to be.
fn assert_close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let known: Vec<f32> = expected.iter().copied().filter(|x| !x.is_nan()).collect();
    let rms = (known.iter().map(|x| x * x).sum::<f32>() / known.len().max(1) as f32).sqrt();
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let good = (got.is_nan() && expected.is_nan()) || (got - expected).abs() <= tolerance * rms;
        assert!(good, "{what}: number {i} is {got}, not {expected}; root mean square {rms}");
    }
}

fn matrix(seed: u64, dtype: DType, rows: usize, cols: usize) -> Tensor {
    Tensor::random(seed, (cols as f32).powf(-0.5), dtype, rows, cols)
}

#[test]
fn sanitized_rows_are_looked_up_and_copied() {
    let Some(cuda) = common::cuda() else { return };
    for (width, vocabulary) in [(1, 3), (7, 19), (64, 5), (260, 33), (1030, 9)] {
        let ids: Vec<u32> = (0..13).map(|i| (i * 7 + 2) % vocabulary as u32).collect();
        let (mut on_gpu, mut on_cpu) = (cuda.ids(20).unwrap(), cpu().ids(20).unwrap());
        cuda.write_ids(&mut on_gpu, &ids);
        cpu().write_ids(&mut on_cpu, &ids);
        for dtype in DTYPES {
            let table = Tensor::random(3, 1.0, dtype, vocabulary, width);
            let (mut got, mut expected) = poisoned(cuda, 14 * width);
            cuda.embed(&cuda.matrix(table.clone()).unwrap(), &on_gpu, 13, 1.7, &mut got);
            cpu().embed(&table, &on_cpu, 13, 1.7, &mut expected);
            assert_close(&down(cuda, &got, 14 * width), &expected, 0.0, "embed");
        }
        let (x, same) = both(cuda, &numbers(4, vocabulary * width));
        let (mut got, mut expected) = poisoned(cuda, 14 * width);
        cuda.copy_rows(&x, &on_gpu, 13, width, &mut got);
        cpu().copy_rows(&same, &on_cpu, 13, width, &mut expected);
        assert_close(&down(cuda, &got, 14 * width), &expected, 0.0, "copy_rows");
    }
}

#[test]
fn sanitized_norms() {
    let Some(cuda) = common::cuda() else { return };
    for (width, rows) in [(1, 3), (6, 5), (33, 4), (64, 9), (128, 2), (516, 3), (2050, 3), (4100, 2)] {
        let (x, same) = both(cuda, &numbers(1, (rows + 2) * width));
        let (weight, same_weight) = both(cuda, &numbers(2, width));
        for add in [false, true] {
            let (mut got, mut expected) = match add {
                true => both(cuda, &numbers(3, (rows + 2) * width)),
                false => poisoned(cuda, (rows + 2) * width),
            };
            let output = if add { Output::Add(1) } else { Output::Write(1) };
            let (norm, same_norm) = (Norm { weight: &weight, eps: 1e-5 }, Norm { weight: &same_weight, eps: 1e-5 });
            cuda.rms_norm(&x, 2..rows + 2, width, norm, &mut got, output);
            cpu().rms_norm(&same, 2..rows + 2, width, same_norm, &mut expected, output);
            assert_close(&down(cuda, &got, (rows + 2) * width), &expected, 1e-5, "rms_norm");
        }
        let (mut x, mut same) = (x, same);
        cuda.rms_norm_inplace(&mut x, rows, width, &weight, 1e-6);
        cpu().rms_norm_inplace(&mut same, rows, width, &same_weight, 1e-6);
        assert_close(&down(cuda, &x, (rows + 2) * width), &same, 1e-5, "rms_norm_inplace");
    }
}

#[test]
fn sanitized_heads_are_placed() {
    let Some(cuda) = common::cuda() else { return };
    for (head_dim, heads, kv_heads, rows) in
        [(2, 3, 1, 2), (16, 4, 2, 5), (80, 3, 3, 4), (128, 16, 8, 3), (256, 2, 1, 1)]
    {
        let positions: Vec<u32> = (0..rows as u32 + 2).map(|i| i * i * 1711 + i).collect();
        let (mut on_gpu, mut on_cpu) = (cuda.ids(rows + 2).unwrap(), cpu().ids(rows + 2).unwrap());
        cuda.write_ids(&mut on_gpu, &positions);
        cpu().write_ids(&mut on_cpu, &positions);
        let half = head_dim / 2;
        let frequencies = (0..half).map(|c| 1e6f32.powf(-(c as f32) / half as f32));
        let turns: Vec<f32> = frequencies.chain((0..half).map(|c| 1.0 + c as f32 / 7.0)).collect();
        let (turns, same_turns) = both(cuda, &turns);
        let (mut table, mut same_table) = poisoned(cuda, (rows + 2) * head_dim);
        cuda.rope_table(&turns, half, &on_gpu, rows + 2, &mut table);
        cpu().rope_table(&same_turns, half, &on_cpu, rows + 2, &mut same_table);
        assert_close(&down(cuda, &table, (rows + 2) * head_dim), &same_table, 1e-6, "rope_table");

        for normed in [false, true] {
            let (mut q, mut same_q) = both(cuda, &numbers(1, rows * heads * head_dim));
            let (mut k, mut same_k) = both(cuda, &numbers(2, rows * kv_heads * head_dim));
            let (norm, same_norm) = both(cuda, &numbers(3, head_dim));
            let own = [
                Heads { x: &mut q, heads, norm: normed.then_some(&norm) },
                Heads { x: &mut k, heads: kv_heads, norm: None },
            ];
            cuda.place_heads(own, 1e-6, head_dim, &table, 1..rows + 1);
            let own = [
                Heads { x: &mut same_q, heads, norm: normed.then_some(&same_norm) },
                Heads { x: &mut same_k, heads: kv_heads, norm: None },
            ];
            cpu().place_heads(own, 1e-6, head_dim, &same_table, 1..rows + 1);
            assert_close(&down(cuda, &q, same_q.len()), &same_q, 1e-5, "queries");
            assert_close(&down(cuda, &k, same_k.len()), &same_k, 1e-5, "keys");
            cuda.rope(&mut k, kv_heads, head_dim, &table, 2..rows + 2);
            cpu().rope(&mut same_k, kv_heads, head_dim, &same_table, 2..rows + 2);
            assert_close(&down(cuda, &k, same_k.len()), &same_k, 1e-5, "rope");
        }
    }
}

#[test]
fn sanitized_gates() {
    let Some(cuda) = common::cuda() else { return };
    for len in [1, 3, 4, 1023, 1030] {
        let mut values = numbers(1, len + 1);
        values.iter_mut().for_each(|x| *x *= 20.0);
        let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Clamped { limit: 7.0 }];
        for activation in all {
            // Powers of a number that large are infinite in 32 bit.
            values[0] = if activation == Activation::GeluTanh { -1e10 } else { -1e30 };
            let (mut gate, mut same) = both(cuda, &values);
            let (up, same_up) = both(cuda, &numbers(2, len));
            cuda.activate(activation, &mut gate, &up, len);
            cpu().activate(activation, &mut same, &same_up, len);
            assert_close(&down(cuda, &gate, len + 1), &same, 1e-5, &format!("{activation:?}"));
        }
    }
}

#[test]
fn sanitized_largest_of_rows() {
    let Some(cuda) = common::cuda() else { return };
    for width in [1, 31, 64, 1000, 2500, 40_000] {
        let rows = 3;
        let mut values: Vec<f32> = numbers(5, rows * width).iter().map(|x| (x * 4.0).round()).collect();
        values[width - 1] = f32::NAN;
        values[2 * width - 1] = 100.0;
        let (x, same) = both(cuda, &values);
        let got = cuda.argmax_rows(&x, rows, width).unwrap();
        assert_eq!(got, cpu().argmax_rows(&same, rows, width).unwrap(), "width {width}");
        assert_eq!(got[..2], [None, Some(width as u32 - 1)]);
    }
}

/// A linear layer on both devices; bounds the error as the phase and the number of rows promise.
fn compare_linear(
    cuda: &Cuda,
    phase: Phase,
    dtype: DType,
    [rows, outputs, inputs]: [usize; 3],
    bias: bool,
    output: Output,
) {
    let what = format!("{phase:?}, {rows} x {outputs} x {inputs}, {dtype:?}, bias {bias}, {output:?}");
    let weight = matrix(7, dtype, outputs, inputs);
    let (x, same_x) = both(cuda, &numbers(8, (rows + 3) * inputs));
    let (own_bias, same_bias) = both(cuda, &numbers(9, outputs));
    let (Output::Write(first) | Output::Add(first)) = output;
    let mut values = vec![f32::NAN; (first + rows + 1) * outputs];
    if matches!(output, Output::Add(_)) {
        values[first * outputs..(first + rows) * outputs].copy_from_slice(&numbers(10, rows * outputs));
    }
    let (mut got, mut expected) = both(cuda, &values);
    let on_gpu = cuda.matrix(weight.clone()).unwrap();
    cuda.linear(phase, &x, 2..rows + 2, &on_gpu, bias.then_some(&own_bias), &mut got, output);
    cpu().linear(phase, &same_x, 2..rows + 2, &weight, bias.then_some(&same_bias), &mut expected, output);
    let rounded = dtype != DType::F32 && (phase == Phase::Prefill || rows > 16);
    let tolerance = if rounded { ROUNDED } else { EXACT };
    assert_close(&down(cuda, &got, values.len()), &expected, tolerance, &what);
}

#[test]
fn sanitized_linear_layers() {
    let Some(cuda) = common::cuda() else { return };
    let shapes = [[1, 1], [3, 5], [17, 8], [40, 24], [33, 100], [20, 520], [70, 1032], [2, 2064]];
    for (i, [outputs, inputs]) in shapes.into_iter().enumerate() {
        for dtype in DTYPES {
            for (j, rows) in [1, 3, 4, 5, 8, 11, 16, 17, 37].into_iter().enumerate() {
                let phase = if (i + j) % 4 == 0 { Phase::Prefill } else { Phase::Decode };
                let output = if j % 2 == 0 { Output::Write(j % 3) } else { Output::Add(i % 3) };
                compare_linear(cuda, phase, dtype, [rows, outputs, inputs], (i + j) % 3 == 0, output);
            }
        }
    }
    // Outputs for blocks of each size.
    for outputs in [2150, 4250] {
        for dtype in [DType::F16, DType::Bf16] {
            for rows in [3, 8, 10] {
                compare_linear(cuda, Phase::Decode, dtype, [rows, outputs, 136], true, Output::Add(1));
            }
        }
    }
}

#[test]
fn large_and_small_activations_keep_their_precision() {
    let Some(cuda) = common::cuda() else { return };
    for (dtype, scale) in [(DType::F16, 3e5), (DType::F16, 1e-3), (DType::Bf16, 1e9), (DType::Bf16, 1e-9)] {
        let weight = matrix(7, dtype, 24, 264);
        let (x, same) = both(cuda, &numbers(8, 2 * 264).iter().map(|x| x * scale).collect::<Vec<_>>());
        for (phase, tolerance) in [(Phase::Decode, EXACT), (Phase::Prefill, ROUNDED)] {
            let (mut got, mut expected) = poisoned(cuda, 48);
            cuda.linear(phase, &x, 0..2, &cuda.matrix(weight.clone()).unwrap(), None, &mut got, Output::Write(0));
            cpu().linear(phase, &same, 0..2, &weight, None, &mut expected, Output::Write(0));
            assert_close(&down(cuda, &got, 48), &expected, tolerance, &format!("{dtype:?} {phase:?} {scale}"));
        }
    }
}

#[test]
fn rows_do_not_depend_on_each_other_in_decode() {
    let Some(cuda) = common::cuda() else { return };
    // Outputs for blocks of each size.
    let cases = DTYPES.map(|dtype| (dtype, 50, 1048)).into_iter();
    for (dtype, outputs, inputs) in cases.chain([(DType::F16, 2150, 136), (DType::Bf16, 4250, 136)]) {
        let weight = cuda.matrix(matrix(7, dtype, outputs, inputs)).unwrap();
        let values = numbers(8, 16 * inputs);
        let norm = cuda.upload(&numbers(9, inputs)).unwrap();
        let x = cuda.upload(&values).unwrap();
        let mut whole = [cuda.buffer(16 * outputs).unwrap(), cuda.buffer(16 * outputs).unwrap()];
        let mut normed = cuda.buffer(16 * inputs).unwrap();
        for rows in [1, 2, 4, 7, 8, 9, 16].into_iter().rev() {
            let [plain, behind_norm] = &mut whole;
            let before = [down(cuda, plain, 16 * outputs), down(cuda, behind_norm, 16 * outputs)];
            // The last rows, so that each has another place in the batch.
            let first = 16 - rows;
            let own = cuda.upload(&values[first * inputs..]).unwrap();
            cuda.linear(Phase::Decode, &own, 0..rows, &weight, None, plain, Output::Write(first));
            let mut out = cuda.buffer(rows * outputs).unwrap();
            let to = [Projection { weight: &weight, bias: None, out: &mut out }];
            let norm = Some(Norm { weight: &norm, eps: 1e-5 });
            cuda.norm_linear(Phase::Decode, &x, first..16, inputs, norm, &mut normed, to);
            let now = down(cuda, &out, rows * outputs);
            if rows == 16 {
                *behind_norm = cuda.upload(&now).unwrap();
            } else {
                assert_eq!(now, before[1][first * outputs..], "{rows} rows behind a norm, {dtype:?}");
                assert_eq!(down(cuda, plain, 16 * outputs), before[0], "{rows} rows, {dtype:?}");
            }
        }
    }
}

#[test]
fn sanitized_projections_behind_a_norm() {
    let Some(cuda) = common::cuda() else { return };
    for (i, inputs) in [8, 30, 72, 264, 1032].into_iter().enumerate() {
        for dtype in DTYPES {
            for (j, rows) in [1, 4, 6, 16, 19].into_iter().enumerate() {
                let phase = if (i + j) % 3 == 0 { Phase::Prefill } else { Phase::Decode };
                // The last one is stored in another type now and then.
                let last = if (i + j) % 4 == 3 { DType::F16 } else { dtype };
                let weights =
                    [(37, dtype), (16, dtype), (5, last)].map(|(outputs, dtype)| matrix(7, dtype, outputs, inputs));
                let on_gpu = weights.clone().map(|weight| cuda.matrix(weight).unwrap());
                let (x, same_x) = both(cuda, &numbers(8, (rows + 2) * inputs));
                let (norm, same_norm) = both(cuda, &numbers(9, inputs));
                let (bias, same_bias) = both(cuda, &numbers(10, 37));
                let (mut normed, mut same_normed) = poisoned(cuda, rows * inputs);
                let mut got = weights.each_ref().map(|weight| poisoned(cuda, (rows + 1) * weight.rows()).0);
                let mut expected = weights.each_ref().map(|weight| poisoned(cuda, (rows + 1) * weight.rows()).1);
                let [a, b, c] = &mut got;
                let to = [
                    Projection { weight: &on_gpu[0], bias: Some(&bias), out: a },
                    Projection { weight: &on_gpu[1], bias: None, out: b },
                    Projection { weight: &on_gpu[2], bias: Some(&bias), out: c },
                ];
                let has_norm = (i + j) % 5 > 0;
                let own = has_norm.then_some(Norm { weight: &norm, eps: 1e-5 });
                cuda.norm_linear(phase, &x, 1..rows + 1, inputs, own, &mut normed, to);
                let [a, b, c] = &mut expected;
                let to = [
                    Projection { weight: &weights[0], bias: Some(&same_bias), out: a },
                    Projection { weight: &weights[1], bias: None, out: b },
                    Projection { weight: &weights[2], bias: Some(&same_bias), out: c },
                ];
                let own = has_norm.then_some(Norm { weight: &same_norm, eps: 1e-5 });
                cpu().norm_linear(phase, &same_x, 1..rows + 1, inputs, own, &mut same_normed, to);
                let rounded = (dtype, last) != (DType::F32, DType::F32) && (phase == Phase::Prefill || rows > 16);
                let tolerance = if rounded { ROUNDED } else { EXACT };
                for (got, expected) in got.iter().zip(&expected) {
                    let what = format!("{phase:?}, {rows} rows of {inputs}, {dtype:?} and {last:?}");
                    assert_close(&down(cuda, got, expected.len()), expected, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn quantised_matrices_are_widened() {
    let Some(cuda) = common::cuda() else { return };
    let (rows, cols) = (11, 96);
    let kind = BlockType::Q8_0;
    let mut raw = Vec::new();
    for block in 0..rows * cols / 32 {
        raw.extend(half::f16::from_f32(0.01 + block as f32 * 1e-3).to_le_bytes());
        raw.extend((0..32).map(|i| (i * 7 + block * 5) as u8));
    }
    let bytes: Bytes = Arc::new(raw);
    let weight = Tensor::from_quantized(&bytes, 0, kind, rows, cols).unwrap();
    let table = cuda.matrix(weight.clone()).unwrap();
    let ids: Vec<u32> = (0..rows as u32).collect();
    let mut on_gpu = cuda.ids(rows).unwrap();
    cuda.write_ids(&mut on_gpu, &ids);
    let (mut got, _) = poisoned(cuda, rows * cols);
    cuda.embed(&table, &on_gpu, rows, 1.0, &mut got);
    // fp16 rounds what eight bits times a scale are.
    for (got, expected) in down(cuda, &got, rows * cols).iter().zip(weight.to_f32()) {
        assert!((got - expected).abs() <= expected.abs() / 2048.0, "{got}, {expected}");
    }
}

#[test]
fn sanitized_experts() {
    let Some(cuda) = common::cuda() else { return };
    for (i, [experts, chosen, inputs, outputs, rows]) in
        [[4, 2, 40, 17, 1], [8, 3, 64, 33, 9], [40, 4, 30, 8, 25], [3, 3, 72, 50, 70]].into_iter().enumerate()
    {
        for dtype in DTYPES {
            let routing = Routing { experts, chosen, normalised: i % 2 == 0 };
            let matrices = |seed: u64, rows: usize, cols: usize| -> Vec<Tensor> {
                (0..experts as u64).map(|expert| matrix(seed + expert, dtype, rows, cols)).collect()
            };
            let bias = (i % 2 == 1).then(|| matrix(90, dtype, experts, outputs));
            let (logits, same_logits) = both(cuda, &numbers(1, rows * experts));
            let (x, same_x) = both(cuda, &numbers(2, rows * inputs));
            let (mut choice, mut same_choice) =
                (cuda.chosen(routing, rows).unwrap(), cpu().chosen(routing, rows).unwrap());
            cuda.choose(routing, &logits, rows, &mut choice);
            cpu().choose(routing, &same_logits, rows, &mut same_choice);
            let stacks = [(matrices(10, outputs, inputs), bias), (matrices(50, inputs, outputs), None)];
            let on_gpu = stacks.clone().map(|(all, bias)| cuda.stack(all, bias).unwrap());
            let same: Vec<_> = stacks.into_iter().map(|(all, bias)| cpu().stack(all, bias).unwrap()).collect();
            let what = format!("{routing:?}, {rows} rows, {dtype:?}");
            let (mut mid, mut same_mid) = poisoned(cuda, (rows * chosen + 1) * outputs);
            cuda.expert_linear(Phase::Decode, &x, false, &mut choice, &on_gpu[0], &mut mid);
            cpu().expert_linear(Phase::Decode, &same_x, false, &mut same_choice, &same[0], &mut same_mid);
            assert_close(&down(cuda, &mid, same_mid.len()), &same_mid, EXACT, &what);
            let (mut end, mut same_end) = poisoned(cuda, (rows * chosen + 1) * inputs);
            cuda.expert_linear(Phase::Decode, &mid, true, &mut choice, &on_gpu[1], &mut end);
            cpu().expert_linear(Phase::Decode, &same_mid, true, &mut same_choice, &same[1], &mut same_end);
            assert_close(&down(cuda, &end, same_end.len()), &same_end, EXACT, &what);
            let (mut out, mut same_out) = both(cuda, &numbers(3, (rows + 2) * inputs));
            cuda.add_experts(&end, &choice, inputs, &mut out, 1);
            cpu().add_experts(&same_end, &same_choice, inputs, &mut same_out, 1);
            assert_close(&down(cuda, &out, same_out.len()), &same_out, EXACT, &what);
        }
    }
}
