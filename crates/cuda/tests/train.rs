//! The operations of training against the CPU, in buffers that hold what nothing may depend on.
#![cfg(feature = "gpu-tests")]

mod common;

use common::cuda;
use dibit_cpu::Cpu;
use dibit_cuda::Cuda;
use dibit_device::{AdamStep, Memory, Place, ROW_STATISTICS, RowStatistic, Rows, Train};
use proptest::prelude::*;

type Buffer = <Cuda as Memory>::Buffer;

/// What buffers hold before an operation.
const POISON: f32 = f32::NAN;

fn noise(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 131 + seed * 977) as f32 * 0.71).sin()).collect()
}

fn cpu() -> Cpu {
    Cpu::new(Some(1)).unwrap()
}

fn upload(cuda: &Cuda, values: &[f32]) -> Buffer {
    cuda.upload(values).unwrap()
}

fn download(cuda: &Cuda, buffer: &Buffer, len: usize) -> Vec<f32> {
    let mut out = Vec::new();
    cuda.download(buffer, 0..len, &mut out).unwrap();
    out
}

/// Compares numbers, of which those that are poisoned must be so on both sides.
#[track_caller]
fn close(got: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().filter(|x| !x.is_nan()).fold(f32::MIN_POSITIVE, |most, x| most.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        let alike = (got - expected).abs() <= tolerance * scale || (got.is_nan() && expected.is_nan());
        assert!(alike, "{what} {i}: {got}, not {expected}");
    }
}

/// A matrix in any order, with poison around its numbers.
fn matrix(rows: usize, columns: usize, turned: bool, offset: usize, gap: usize, seed: usize) -> (Vec<f32>, Place) {
    let place = match turned {
        false => Place::rows(offset, columns + gap),
        true => Place::rows(offset, rows + gap).transposed(),
    };
    let mut numbers = vec![POISON; offset + if turned { columns * (rows + gap) } else { rows * (columns + gap) }];
    let values = noise(rows * columns, seed);
    for (index, value) in values.into_iter().enumerate() {
        numbers[place.offset + index / columns * place.row + index % columns * place.column] = value;
    }
    (numbers, place)
}

/// A product by both devices, twice by the GPU.
fn check_product(cuda: &Cuda, shape: [usize; 3], turned: [bool; 2], gap: usize, add: bool) {
    let [m, n, k] = shape;
    let (a, a_place) = matrix(m, k, turned[0], 3, gap, 1);
    let (b, b_place) = matrix(k, n, turned[1], 0, gap, 2);
    let (before, place) = matrix(m, n, false, 7, gap, 3);
    let before = if add { before } else { vec![POISON; before.len()] };
    let mut expected = before.clone();
    cpu().product(shape, 0.3, (&a, a_place), (&b, b_place), (&mut expected, place), add);
    let (a, b) = (upload(cuda, &a), upload(cuda, &b));
    let run = || {
        let mut out = upload(cuda, &before);
        cuda.product(shape, 0.3, (&a, a_place), (&b, b_place), (&mut out, place), add);
        download(cuda, &out, before.len())
    };
    let got = run();
    close(&got, &expected, 1e-5, &format!("{shape:?} turned {turned:?} add {add}, number"));
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&run()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn products_are_those_of_the_cpu(
        m in 1usize..150, n in 1usize..150, k in 1usize..70, gap in 0usize..5, turned: [bool; 2], add: bool,
    ) {
        let Some(cuda) = cuda() else { return Ok(()) };
        check_product(cuda, [m, n, k], turned, gap, add);
    }

    #[test]
    fn features_and_the_way_back_are_those_of_the_cpu(
        rows in 1usize..40, half in 1usize..140, gate in 0.01f32..1.0, statistics: bool,
    ) {
        let Some(cuda) = cuda() else { return Ok(()) };
        let width = 2 * half;
        let whole = (rows + 2) * width;
        let inside = width..(rows + 1) * width;
        let poisoned = |values: Vec<f32>| -> Vec<f32> {
            values.into_iter().enumerate().map(|(i, x)| if inside.contains(&i) { x } else { POISON }).collect()
        };
        let (x, dy) = (poisoned(noise(whole, half)), poisoned(noise(whole, half + 5)));
        let cpu = cpu();
        let (mut y, mut back, mut found) = (x.clone(), dy.clone(), vec![POISON; (rows + 3) * ROW_STATISTICS]);
        let [mut own_y, mut own_back, mut own_found] = [&y, &back, &found].map(|values| upload(cuda, values));
        cpu.features(&mut y, 1..rows + 1, half, gate);
        cuda.features(&mut own_y, 1..rows + 1, half, gate);
        close(&download(cuda, &own_y, whole), &y, 1e-5, "feature");
        cpu.features_backward(&y, &mut back, 1..rows + 1, half, gate, statistics.then_some(&mut found), 2);
        cuda.features_backward(&own_y, &mut own_back, 1..rows + 1, half, gate, statistics.then_some(&mut own_found), 2);
        close(&download(cuda, &own_back, whole), &back, 1e-5, "derivative");
        // The sum may be near zero where its terms are not.
        let scaled = |found: &[f32]| found.iter().map(|x| x + 1.0).collect::<Vec<_>>();
        close(&scaled(&download(cuda, &own_found, found.len())), &scaled(&found), 1e-5, "derivative by the gate");
    }
}

#[test]
fn products_of_long_and_thin_shapes_are_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    let shapes = [[1, 1, 1], [1, 1, 700], [16, 24, 1000], [65, 3, 513], [2, 300, 256], [64, 64, 255], [200, 130, 300]];
    for (index, shape) in shapes.into_iter().enumerate() {
        for turned in [[false, false], [true, false], [false, true], [true, true]] {
            check_product(cuda, shape, turned, index % 3, index % 2 == 1);
        }
    }
    let (mut out, empty) = (upload(cuda, &[POISON]), upload(cuda, &[]));
    let place = Place::rows(0, 1);
    cuda.product([0, 1, 1], 1.0, (&empty, place), (&empty, place), (&mut out, place), false);
    assert!(download(cuda, &out, 1)[0].is_nan());
}

#[test]
fn parts_of_buffers_are_cleared_and_written() {
    let Some(cuda) = cuda() else { return };
    let mut x = upload(cuda, &noise(100, 1));
    let mut expected = noise(100, 1);
    cuda.clear(&mut x, 3..20);
    cuda.write(&mut x, 90, &noise(10, 2));
    expected[3..20].fill(0.0);
    expected[90..].copy_from_slice(&noise(10, 2));
    assert_eq!(download(cuda, &x, 100), expected);
}

/// Attention rows of two heads that see what queries at some places see. With `lost`, the first row's cache misses so
/// much of a key that its weight vanishes, or those of all others.
fn check_rows(cuda: &Cuda, places: &[(usize, usize)], kept: usize, spread: f32, lost: Option<f32>) {
    let (visible, packed): (Vec<u32>, Vec<u32>) = places.iter().map(|own| (own.0 as u32, own.1 as u32)).unzip();
    let stride = places.iter().map(|own| own.0).max().unwrap() + 3;
    let rows = Rows { heads: 2, visible: &visible, packed: &packed, exact: kept, stride };
    let (count, width) = (rows.count(), 5);
    // What a row does not see holds anything.
    let hidden = |values: Vec<f32>, seen: &[u32]| -> Vec<f32> {
        let see = |i: usize| i % stride < seen[i / stride % seen.len()] as usize;
        values.into_iter().enumerate().map(|(i, x)| if see(i) { x } else { POISON }).collect()
    };
    let exact = hidden(noise(count * stride, kept).iter().map(|x| x * spread).collect(), &visible);
    let mut missed = hidden(noise(count * stride, kept + 1), &packed);
    let mut correction = hidden(noise(count * stride, kept + 2).iter().map(|x| x * x * 0.3).collect(), &packed);
    if let Some(lost) = lost {
        (missed[3], correction[3]) = (lost, 0.0);
    }
    let statistics = vec![POISON; (count + 1) * ROW_STATISTICS];
    for outputs in [false, true] {
        let mut expected = [&exact, &missed, &correction, &statistics].map(Clone::clone);
        let mut own = [&exact, &missed, &correction, &statistics].map(|values| upload(cuda, values));
        let cpu = cpu();
        {
            let [exact, missed, correction, statistics] = &mut expected;
            cpu.row_loss(rows, exact, missed, correction, statistics, 1, outputs);
            let [exact, missed, correction, statistics] = &mut own;
            cuda.row_loss(rows, exact, missed, correction, statistics, 1, outputs);
        }
        let compare = |own: &[Buffer; 4], expected: &[Vec<f32>; 4]| {
            let got = |which: usize| download(cuda, &own[which], expected[which].len());
            let names = ["difference", "weight", "derivative", "statistic"];
            for which in if outputs { 0..4 } else { 2..4 } {
                close(&got(which), &expected[which], 1e-5, names[which]);
            }
            let inverse = |values: Vec<f32>| -> Vec<f32> {
                let place = RowStatistic::Inverse as usize;
                values.into_iter().skip(place).step_by(ROW_STATISTICS).collect()
            };
            close(&inverse(got(3)), &inverse(expected[3].clone()), 1e-5, "inverse");
        };
        compare(&own, &expected);
        if outputs {
            let (errors, toward) = (noise(count * width, kept + 4), hidden(noise(count * stride, kept + 5), &visible));
            let [exact, missed, correction, statistics] = &mut expected;
            let _ = exact;
            cpu.output_loss(rows, 3.0, width, missed, &errors, &toward, correction, statistics, 1);
            let [_, missed, correction, statistics] = &mut own;
            let (errors, toward) = (upload(cuda, &errors), upload(cuda, &toward));
            cuda.output_loss(rows, 3.0, width, missed, &errors, &toward, correction, statistics, 1);
            compare(&own, &expected);
        }
    }
}

#[test]
fn the_loss_of_rows_and_its_derivative_are_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for (kept, spread) in [(0, 1.0), (2, 4.0), (0, 12.0)] {
        let places = [(1, 0), (6, 5), (20, 16), (40, 33), (70, 70), (33, 3), (300, 128), (601, 512)];
        check_rows(cuda, &places, kept, spread, None);
    }
    for lost in [60.0, -60.0] {
        check_rows(cuda, &[(20, 16)], 0, 1.0, Some(lost));
    }
    let many: Vec<(usize, usize)> = (0..150).map(|i| (1 + i % 37, i % 37)).collect();
    check_rows(cuda, &many, 1, 2.0, None);
}

#[test]
fn steps_of_adam_are_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    let len = 1000;
    let (cpu, rest) = (cpu(), [POISON; 3]);
    let mut expected = [noise(len, 1), vec![0.0; len], vec![0.0; len]].map(|own| [&own[..], &rest].concat());
    let mut own = [0, 1, 2].map(|which| upload(cuda, &expected[which]));
    for t in 1..5 {
        let gradient = noise(len, 2 + t);
        let decay = |beta: f64| (1.0 - beta.powi(t as i32)) as f32;
        let step = AdamStep {
            rate: 0.01,
            betas: [0.9, 0.999],
            epsilon: 1e-8,
            scale: 0.5,
            corrections: [decay(0.9), decay(0.999)],
        };
        let [x, first, second] = &mut expected;
        cpu.adam(step, len, &gradient, first, second, x);
        let [x, first, second] = &mut own;
        cuda.adam(step, len, &upload(cuda, &gradient), first, second, x);
    }
    for (own, expected) in own.iter().zip(&expected) {
        close(&download(cuda, own, len + 3), expected, 1e-5, "number");
    }
}

#[test]
fn sums_of_squares_are_those_of_the_cpu() {
    let Some(cuda) = cuda() else { return };
    let x = noise(100_000, 4);
    let own = upload(cuda, &x);
    for range in [0..0, 5..6, 3..90, 0..8192, 1..8194, 17..100_000] {
        let (got, expected) = (cuda.sum_of_squares(&own, range.clone()), cpu().sum_of_squares(&x, range.clone()));
        assert!((got - expected).abs() <= 1e-12 * expected, "{range:?}: {got}, not {expected}");
    }
    let long = vec![0.5; SQUARES_OF_SEVERAL_PARTS];
    assert_eq!(cuda.sum_of_squares(&upload(cuda, &long), 0..long.len()), long.len() as f64 / 4.0);
    assert!(cuda.sum_of_squares(&upload(cuda, &[1.0, f32::NAN]), 0..2).is_nan());
}

/// More numbers than the largest count of parts of the least size holds.
const SQUARES_OF_SEVERAL_PARTS: usize = (1 << 23) + 12_345;
