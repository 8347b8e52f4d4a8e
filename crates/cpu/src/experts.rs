//! Mixtures of experts: rows are gathered by experts, so that no other matrix is read than those that are chosen.

use super::Cpu;
use dibit_cache::Phase;
use dibit_device::{Dense, DeviceError, Experts, Output, Routing, Tensor};
use std::cmp::Ordering;

/// Matrices of the experts.
#[derive(Clone)]
pub struct ExpertStack {
    matrices: Vec<Tensor>,
    biases: Vec<Vec<f32>>,
}

/// Pairs of a row and an expert.
#[derive(Default)]
pub struct ChosenExperts {
    chosen: usize,
    /// `[row][chosen]`: expert, and its weight.
    pairs: Vec<(usize, f32)>,
    /// Rows of one expert, and what becomes of them.
    gathered: Vec<f32>,
    done: Vec<f32>,
}

/// Larger ones first; numbers that are none come last, and of equals the first one.
fn by_logit(a: &(usize, f32), b: &(usize, f32)) -> Ordering {
    let key = |x: f32| if x.is_nan() { f32::NEG_INFINITY } else { x };
    key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0))
}

/// The experts of a row, with their weights.
fn route(routing: Routing, logits: &[f32]) -> impl Iterator<Item = (usize, f32)> {
    let mut order: Vec<(usize, f32)> = logits.iter().copied().enumerate().collect();
    order.select_nth_unstable_by(routing.chosen - 1, by_logit);
    let weighed = if routing.normalised { routing.chosen } else { order.len() };
    let largest = order[..routing.chosen].iter().fold(f32::NEG_INFINITY, |most, own| most.max(own.1));
    let total: f32 = order[..weighed].iter().map(|own| (own.1 - largest).exp()).sum();
    order.truncate(routing.chosen);
    order.sort_unstable_by(by_logit);
    order.into_iter().map(move |(expert, logit)| (expert, (logit - largest).exp() / total))
}

impl Experts for Cpu {
    type Stack = ExpertStack;
    type Chosen = ChosenExperts;

    fn stack(&self, matrices: Vec<Tensor>, bias: Option<Tensor>) -> Result<ExpertStack, DeviceError> {
        let biases = bias.map_or_else(Vec::new, |bias| (0..bias.rows()).map(|row| bias.row(row)).collect());
        Ok(ExpertStack { matrices, biases })
    }

    fn chosen(&self, _: Routing, _: usize) -> Result<ChosenExperts, DeviceError> {
        Ok(ChosenExperts::default())
    }

    fn choose(&self, routing: Routing, logits: &Vec<f32>, rows: usize, out: &mut ChosenExperts) {
        out.chosen = routing.chosen;
        out.pairs.clear();
        out.pairs.extend(logits.chunks_exact(routing.experts).take(rows).flat_map(|logits| route(routing, logits)));
    }

    fn expert_linear(
        &self,
        phase: Phase,
        x: &Vec<f32>,
        of_pairs: bool,
        all: &mut ChosenExperts,
        stack: &ExpertStack,
        out: &mut Vec<f32>,
    ) {
        let ChosenExperts { chosen, pairs, gathered, done } = all;
        for (expert, matrix) in stack.matrices.iter().enumerate() {
            let (inputs, outputs) = (matrix.cols(), matrix.rows());
            let own = || pairs.iter().enumerate().filter(|(_, pair)| pair.0 == expert).map(|(place, _)| place);
            gathered.clear();
            for place in own() {
                let row = if of_pairs { place } else { place / *chosen };
                gathered.extend_from_slice(&x[row * inputs..(row + 1) * inputs]);
            }
            let rows = gathered.len() / inputs;
            if rows == 0 {
                continue;
            }
            done.resize(done.len().max(rows * outputs), 0.0);
            self.linear(phase, gathered, 0..rows, matrix, stack.biases.get(expert), done, Output::Write(0));
            for (place, done) in own().zip(done.chunks_exact(outputs)) {
                out[place * outputs..(place + 1) * outputs].copy_from_slice(done);
            }
        }
    }

    fn add_experts(&self, x: &Vec<f32>, all: &ChosenExperts, width: usize, out: &mut Vec<f32>, first: usize) {
        let rows = out[first * width..].chunks_exact_mut(width);
        let experts = x.chunks_exact(all.chosen * width).zip(all.pairs.chunks_exact(all.chosen));
        for (out, (x, pairs)) in rows.zip(experts) {
            for (x, (_, weight)) in x.chunks_exact(width).zip(pairs) {
                out.iter_mut().zip(x).for_each(|(out, x)| *out += weight * x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_device::DType;
    use proptest::prelude::*;

    /// Every expert of every row, by the definition.
    fn reference(routing: Routing, logits: &[f32]) -> Vec<(usize, f64)> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap());
        let chosen = &order[..routing.chosen];
        let of = if routing.normalised { chosen } else { &order[..] };
        let total: f64 = of.iter().map(|expert| f64::from(logits[*expert]).exp()).sum();
        chosen.iter().map(|expert| (*expert, f64::from(logits[*expert]).exp() / total)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn mixtures_are_those_of_the_definition(
            experts in 1usize..12, chosen in 1usize..5, normalised in prop::bool::ANY, rows in 1usize..9, seed in 0u64..1000,
        ) {
            let routing = Routing { experts, chosen: chosen.min(experts), normalised };
            let (inputs, outputs) = (16, 8);
            let of = |seed: u64, rows: usize, cols: usize| Tensor::random(seed, 1.0, DType::F32, rows, cols);
            let matrices: Vec<Tensor> = (0..experts as u64).map(|expert| of(seed + expert, outputs, inputs)).collect();
            let bias = of(seed + 50, experts, outputs);
            let (logits, x) = (of(seed + 60, rows, experts).to_f32(), of(seed + 61, rows, inputs).to_f32());
            let run = |rows: std::ops::Range<usize>| -> Vec<f32> {
                let cpu = Cpu::new(Some(1)).unwrap();
                let stack = cpu.stack(matrices.clone(), Some(bias.clone())).unwrap();
                let mut chosen = cpu.chosen(routing, rows.len()).unwrap();
                let own = logits[rows.start * experts..rows.end * experts].to_vec();
                cpu.choose(routing, &own, rows.len(), &mut chosen);
                let own = x[rows.start * inputs..rows.end * inputs].to_vec();
                let mut mid = vec![f32::NAN; rows.len() * routing.chosen * outputs];
                cpu.expert_linear(Phase::Decode, &own, false, &mut chosen, &stack, &mut mid);
                let mut out = vec![1.0; (rows.len() + 1) * outputs];
                cpu.add_experts(&mid, &chosen, outputs, &mut out, 1);
                assert_untouched(&out[..outputs]);
                out[outputs..].to_vec()
            };
            let all = run(0..rows);
            for row in 0..rows {
                let own = &all[row * outputs..(row + 1) * outputs];
                let alone = run(row..row + 1);
                prop_assert_eq!(own, &alone[..]);
                let weights = reference(routing, &logits[row * experts..(row + 1) * experts]);
                for (j, got) in own.iter().enumerate() {
                    let of_expert = |(expert, weight): &(usize, f64)| {
                        let products = matrices[*expert].row(j).into_iter().zip(&x[row * inputs..]);
                        let sum: f64 = products.map(|(w, x)| f64::from(w) * f64::from(*x)).sum();
                        weight * (sum + f64::from(bias.row(*expert)[j]))
                    };
                    let exact = 1.0 + weights.iter().map(of_expert).sum::<f64>();
                    prop_assert!((f64::from(*got) - exact).abs() < 1e-4, "{} {}", got, exact);
                }
            }
        }
    }

    /// Rows before the first one stay.
    fn assert_untouched(before: &[f32]) {
        assert!(before.iter().all(|x| *x == 1.0));
    }

    #[test]
    fn logits_that_are_no_numbers_choose_something() {
        let routing = Routing { experts: 3, chosen: 2, normalised: true };
        let chosen: Vec<usize> = route(routing, &[f32::NAN, 1.0, f32::NAN]).map(|own| own.0).collect();
        assert_eq!(chosen, [1, 0]);
        // Of equals the first.
        let chosen: Vec<usize> = route(routing, &[2.0, 2.0, 2.0]).map(|own| own.0).collect();
        assert_eq!(chosen, [0, 1]);
    }
}
