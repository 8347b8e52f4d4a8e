//! The operations of training against plain references in f64.

use super::*;
use crate::Isa;
use dibit_device::Memory;
use proptest::prelude::*;

fn noise(len: usize, seed: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 131 + seed * 977) as f32 * 0.71).sin()).collect()
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let most = x.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = x.iter().map(|x| (x - most).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn devices() -> impl Iterator<Item = Cpu> {
    Isa::available().into_iter().map(|isa| Cpu::new(Some(2)).unwrap().with_isa(isa).unwrap())
}

/// What a row's loss is, by its definition: cross-entropy, divergence, divergence without a correction, and A' and A.
fn row_reference(l: &[f64], mixed: &[f64], c: &[f64]) -> ([f64; 3], Vec<f64>, Vec<f64>) {
    let exact = softmax(l);
    let most = mixed.iter().copied().fold(f64::MIN, f64::max);
    let corrected = |c: &[f64]| {
        let a: Vec<f64> = mixed.iter().zip(c).map(|(l, c)| (l - most).exp() + c).collect();
        let sum: f64 = a.iter().sum();
        a.into_iter().map(|a| a / sum).collect::<Vec<f64>>()
    };
    let cross = |p: &[f64]| -> f64 { exact.iter().zip(p).map(|(a, p)| -a * p.max(1e-12).ln()).sum() };
    let entropy = cross(&exact);
    let (with, without) = (corrected(c), corrected(&vec![0.0; c.len()]));
    ([cross(&with), cross(&with) - entropy, cross(&without) - entropy], with, exact)
}

/// The derivative of a function by central differences.
fn differences(x: &[f64], mut f: impl FnMut(&[f64]) -> f64) -> Vec<f64> {
    let step = 1e-6;
    let mut moved = x.to_vec();
    let mut at = |i: usize, to: f64| {
        moved[i] = to;
        let value = f(&moved);
        moved[i] = x[i];
        value
    };
    (0..x.len()).map(|i| (at(i, x[i] + step) - at(i, x[i] - step)) / (2.0 * step)).collect()
}

#[track_caller]
fn close(got: &[f32], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len());
    let scale = expected.iter().fold(1.0, |most: f64, x| most.max(x.abs()));
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*got) - expected).abs() <= tolerance * scale, "{what} {i}: {got}, not {expected}");
    }
}

/// Attention rows of two heads that see what queries at some places see.
struct Case {
    visible: Vec<u32>,
    packed: Vec<u32>,
    kept: usize,
    stride: usize,
    exact: Vec<f32>,
    missed: Vec<f32>,
    correction: Vec<f32>,
    width: usize,
    values: Vec<f32>,
}

impl Case {
    fn new(places: &[(usize, usize)], kept: usize, spread: f32, seed: usize) -> Self {
        let stride = places.iter().map(|(visible, _)| *visible).max().unwrap() + 3;
        let len = 2 * places.len() * stride;
        let width = 5;
        Case {
            visible: places.iter().map(|(visible, _)| *visible as u32).collect(),
            packed: places.iter().map(|(_, packed)| *packed as u32).collect(),
            kept,
            stride,
            exact: noise(len, seed).iter().map(|x| x * spread).collect(),
            missed: noise(len, seed + 1),
            correction: noise(len, seed + 2).iter().map(|x| x * x * 0.3).collect(),
            width,
            values: noise(stride * width, seed + 3),
        }
    }

    fn rows(&self) -> Rows<'_> {
        Rows { heads: 2, visible: &self.visible, packed: &self.packed, exact: self.kept, stride: self.stride }
    }

    /// Logits, mixed logits and correction of a row.
    fn row(&self, index: usize) -> [Vec<f64>; 3] {
        let query = index % self.visible.len();
        let (visible, packed) = (self.visible[query] as usize, self.packed[query] as usize);
        let at = index * self.stride;
        let l = wide(&self.exact[at..at + visible]);
        let missed = wide(&self.missed[at..at + visible]);
        let mixed = (0..visible).map(|i| if i < packed { l[i] - missed[i] } else { l[i] }).collect();
        let c =
            (0..visible).map(|i| if (self.kept..packed).contains(&i) { self.correction[at + i].into() } else { 0.0 });
        [l, mixed, c.collect()]
    }

    /// The row's output error, squared and over its width.
    fn output_error(&self, with: &[f64], exact: &[f64]) -> f64 {
        let sum = |channel: usize| -> f64 {
            let errors = with.iter().zip(exact).enumerate();
            errors.map(|(i, (with, exact))| (with - exact) * f64::from(self.values[i * self.width + channel])).sum()
        };
        (0..self.width).map(|channel| sum(channel).powi(2)).sum::<f64>() / self.width as f64
    }

    fn check(&self, cpu: &Cpu, weight: f32) {
        let rows = self.rows();
        let count = rows.count();
        let mut statistics = vec![7.0; (count + 1) * ROW_STATISTICS];
        let [mut exact, mut missed, mut correction] = [&self.exact, &self.missed, &self.correction].map(Clone::clone);
        cpu.row_loss(rows, &mut exact, &mut missed, &mut correction, &mut statistics, 1, weight > 0.0);
        if weight > 0.0 {
            let (stride, width) = (self.stride, self.width);
            let values = (&self.values, Place::rows(0, width));
            let mut errors = vec![0.0; count * width];
            let shape = [count, width, stride];
            cpu.product(
                shape,
                1.0,
                (&exact, Place::rows(0, stride)),
                values,
                (&mut errors, Place::rows(0, width)),
                false,
            );
            let mut toward = vec![0.0; count * stride];
            let values = (&self.values, Place::rows(0, width).transposed());
            let out = (&mut toward, Place::rows(0, stride));
            cpu.product([count, stride, width], 1.0, (&errors, Place::rows(0, width)), values, out, false);
            cpu.output_loss(rows, weight, width, &missed, &errors, &toward, &mut correction, &mut statistics, 1);
        }
        assert_eq!(statistics[..ROW_STATISTICS], [7.0; ROW_STATISTICS]);
        for index in 0..count {
            let [l, mixed, c] = self.row(index);
            let (expected, with, target) = row_reference(&l, &mixed, &c);
            let own = &statistics[(index + 1) * ROW_STATISTICS..][..ROW_STATISTICS];
            close(&own[..3], &expected, 3e-6, "statistic");
            let loss = |c: &[f64]| {
                let (statistics, with, exact) = row_reference(&l, &mixed, c);
                statistics[0] + if weight > 0.0 { f64::from(weight) * self.output_error(&with, &exact) } else { 0.0 }
            };
            if weight > 0.0 {
                let output = own[RowStatistic::Output as usize];
                close(&[output], &[self.output_error(&with, &target)], 1e-5, "output");
            }
            let packed = self.packed[index % self.visible.len()] as usize;
            let mut expected = differences(&c, loss);
            expected.iter_mut().enumerate().for_each(|(i, x)| *x *= f64::from((self.kept..packed).contains(&i)));
            expected.resize(self.stride, 0.0);
            close(&correction[index * self.stride..][..self.stride], &expected, 2e-5, "derivative");
        }
    }
}

#[test]
fn the_loss_of_rows_and_its_derivative_are_those_of_the_definition() {
    for cpu in devices() {
        for (kept, spread) in [(0, 1.0), (2, 4.0), (0, 12.0)] {
            let case = Case::new(&[(1, 0), (6, 5), (20, 16), (40, 33), (70, 70), (33, 3)], kept, spread, kept);
            case.check(&cpu, 0.0);
            case.check(&cpu, 3.0);
        }
    }
}

#[test]
fn vanishing_probabilities_pull_at_nothing() {
    for cpu in devices() {
        // What the first key holds is lost: its logit falls by 60, and no correction is there.
        let mut case = Case::new(&[(20, 16)], 0, 1.0, 9);
        case.missed[3] = 60.0;
        case.correction[3] = 0.0;
        let rows = case.rows();
        let mut statistics = vec![0.0; rows.count() * ROW_STATISTICS];
        let [mut exact, mut missed, mut correction] = [&case.exact, &case.missed, &case.correction].map(Clone::clone);
        cpu.row_loss(rows, &mut exact, &mut missed, &mut correction, &mut statistics, 0, false);
        let [l, mixed, c] = case.row(0);
        let (expected, ..) = row_reference(&l, &mixed, &c);
        close(&statistics[..3], &expected, 3e-6, "statistic");
        let own = |c: &[f64]| row_reference(&l, &mixed, c).0[0];
        let mut expected = differences(&c, own);
        // From 0 upwards the clamp still holds for a while.
        let sum = 1.0 / f64::from(statistics[RowStatistic::Inverse as usize]);
        let pulling: f64 = softmax(&l).iter().enumerate().filter(|(i, _)| *i != 3).map(|(_, a)| a).sum();
        expected[3] = pulling / sum;
        close(&correction[..16], &expected[..16], 2e-5, "derivative");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn features_and_the_way_back_are_those_of_the_definition(rows in 1usize..20, half in 1usize..40, gate in 0.01f32..1.0) {
        let width = 2 * half;
        let x = noise((rows + 1) * width, half);
        let dy = noise((rows + 1) * width, half + 5);
        let map = |x: &[f64], gate: f64| -> Vec<f64> {
            x.chunks(half).flat_map(|x| softmax(x).into_iter().map(move |p| gate * p)).collect()
        };
        for cpu in devices() {
            let mut y = x.clone();
            cpu.features(&mut y, 1..rows + 1, half, gate);
            prop_assert_eq!(&y[..width], &x[..width]);
            let mut back = dy.clone();
            let mut statistics = vec![0.0; (rows + 2) * ROW_STATISTICS];
            cpu.features_backward(&y, &mut back, 1..rows + 1, half, gate, Some(&mut statistics), 2);
            let mut alone = dy.clone();
            cpu.features_backward(&y, &mut alone, 1..rows + 1, half, gate, None, 0);
            prop_assert_eq!(&alone, &back);
            for row in 1..rows + 1 {
                let own = row * width..(row + 1) * width;
                let (x, dy) = (wide(&x[own.clone()]), wide(&dy[own.clone()]));
                close(&y[own.clone()], &map(&x, gate.into()), 1e-6, "feature");
                let value = |x: &[f64], gate: f64| -> f64 { map(x, gate).iter().zip(&dy).map(|(y, dy)| y * dy).sum() };
                close(&back[own], &differences(&x, |x| value(x, gate.into())), 1e-6, "derivative");
                let by_gate = differences(&[gate.into()], |gate| value(&x, gate[0]));
                let got = statistics[(row + 1) * ROW_STATISTICS + RowStatistic::Gate as usize];
                close(&[got], &by_gate, 1e-5, "derivative by the gate");
            }
        }
    }
}

#[test]
fn steps_of_adam_are_those_of_the_algorithm() {
    let len = 100;
    for cpu in devices() {
        let mut state = [noise(len, 1), vec![0.0; len], vec![0.0; len]];
        let mut expected: Vec<[f64; 3]> = state[0].iter().map(|x| [f64::from(*x), 0.0, 0.0]).collect();
        for t in 1..6 {
            let gradient = noise(len, 2 + t);
            let decay = |beta: f64| 1.0 - beta.powi(t as i32);
            let step = AdamStep {
                rate: 0.01,
                betas: [0.9, 0.999],
                epsilon: 1e-8,
                scale: 0.5,
                corrections: [decay(0.9) as f32, decay(0.999) as f32],
            };
            let [x, first, second] = &mut state;
            cpu.adam(step, len, &gradient, first, second, x);
            for ([x, first, second], gradient) in expected.iter_mut().zip(&gradient) {
                let gradient = 0.5 * f64::from(*gradient);
                *first = 0.9 * *first + 0.1 * gradient;
                *second = 0.999 * *second + 0.001 * gradient * gradient;
                *x -= 0.01 * (*first / decay(0.9)) / ((*second / decay(0.999)).sqrt() + 1e-8);
            }
        }
        close(&state[0], &expected.iter().map(|own| own[0]).collect::<Vec<_>>(), 1e-5, "number");
        let squares = wide(&state[0][3..90]).iter().map(|x| x * x).sum::<f64>();
        assert!((cpu.sum_of_squares(&state[0], 3..90) / squares - 1.0).abs() < 1e-12);
    }
}

#[test]
fn nothing_depends_on_the_number_of_threads() {
    let case = Case::new(&[(300, 256); 40], 4, 2.0, 1);
    let of = |threads: usize| {
        let cpu = Cpu::new(Some(threads)).unwrap();
        let rows = case.rows();
        let mut statistics = vec![0.0; rows.count() * ROW_STATISTICS];
        let [mut exact, mut missed, mut correction] = [&case.exact, &case.missed, &case.correction].map(Clone::clone);
        let mut out = vec![0.0; 303 * 303];
        cpu.scope(|| {
            let place = Place::rows(0, case.stride);
            let (a, b) = ((&case.exact, place.transposed()), (&case.missed, place));
            cpu.product([303, 303, 80], 1.0, a, b, (&mut out, Place::rows(0, 303)), false);
            cpu.row_loss(rows, &mut exact, &mut missed, &mut correction, &mut statistics, 0, true);
            cpu.features(&mut out, 0..303, 150, 0.5);
        });
        let squares = cpu.sum_of_squares(&correction, 0..correction.len());
        (out, exact, missed, correction, statistics, squares.to_bits())
    };
    let one = of(1);
    for threads in [2, 3, 5] {
        assert!(of(threads) == one, "{threads} threads");
    }
}
