//! What a gated layer makes of its two halves.

use super::exp::exp;
use super::simd::{BASELINE_FMA, Isa, dispatch};
use dibit_device::Activation;

/// `gate <- ` the activation of both.
pub(super) fn activate(isa: Isa, activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => silu_mul(isa, gate, up),
        Activation::GeluTanh => gelu_tanh_mul(isa, gate, up),
        Activation::Gelu => gate.iter_mut().zip(up).for_each(|(gate, up)| *gate = gelu(*gate) * up),
        Activation::Clamped { limit } => clamped_mul(isa, limit, gate, up),
    }
}

/// `x / (1 + exp(-x))`: no power overflows.
#[inline(always)]
fn silu<const FMA: bool>(x: f32) -> f32 {
    x * sigmoid::<FMA>(x)
}

/// `1 / (1 + exp(-x))` for `x >= 0`, and `exp(x) / (1 + exp(x))` below.
#[inline(always)]
fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    let power = exp::<FMA>(-x.abs());
    let numerator = if x < 0.0 { power } else { 1.0 };
    numerator / (1.0 + power)
}

#[inline(always)]
fn silu_mul_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = silu::<FMA>(*gate) * up;
    }
}

dispatch! {
    /// `gate <- gate sigmoid(gate) up`.
    fn silu_mul<>(gate: &mut [f32], up: &[f32]);
    baseline: silu_mul_body::<BASELINE_FMA>(gate, up);
    avx2: silu_mul_body::<true>(gate, up);
    avx512: silu_mul_body::<true>(gate, up);
    neon: silu_mul_body::<true>(gate, up);
}

/// `sqrt(2 / pi)`, and what stands before the cube.
const GELU: f32 = 0.797_884_6;
const GELU_CUBE: f32 = 0.044_715;

#[inline(always)]
fn gelu_tanh_body<const FMA: bool>(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        // (1 + tanh(y)) / 2 is the sigmoid of 2 y.
        let x = *gate;
        let y = GELU * (x + GELU_CUBE * (x * x * x));
        *gate = x * sigmoid::<FMA>(2.0 * y) * up;
    }
}

dispatch! {
    /// `gate <- gate (1 + tanh(sqrt(2 / pi) (gate + 0.044715 gate^3))) / 2 up`.
    fn gelu_tanh_mul<>(gate: &mut [f32], up: &[f32]);
    baseline: gelu_tanh_body::<BASELINE_FMA>(gate, up);
    avx2: gelu_tanh_body::<true>(gate, up);
    avx512: gelu_tanh_body::<true>(gate, up);
    neon: gelu_tanh_body::<true>(gate, up);
}

/// `x (1 + erf(x / sqrt(2))) / 2`.
fn gelu(x: f32) -> f32 {
    (f64::from(x) * 0.5 * libm::erfc(-f64::from(x) * std::f64::consts::FRAC_1_SQRT_2)) as f32
}

/// What gpt-oss multiplies the gate by before its sigmoid.
const CLAMPED: f32 = 1.702;

#[inline(always)]
fn clamped_body<const FMA: bool>(limit: f32, gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        let (g, u) = (if *gate > limit { limit } else { *gate }, up.clamp(-limit, limit));
        *gate = g * sigmoid::<FMA>(CLAMPED * g) * (u + 1.0);
    }
}

dispatch! {
    /// [`Activation::Clamped`].
    fn clamped_mul<>(limit: f32, gate: &mut [f32], up: &[f32]);
    baseline: clamped_body::<BASELINE_FMA>(limit, gate, up);
    avx2: clamped_body::<true>(limit, gate, up);
    avx512: clamped_body::<true>(limit, gate, up);
    neon: clamped_body::<true>(limit, gate, up);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether `got` is within `tolerance` of `exact`, as a share of it.
    fn close(got: f32, exact: f64, tolerance: f64) -> bool {
        (f64::from(got) - exact).abs() <= tolerance * exact.abs()
    }

    #[test]
    fn silu_is_that_of_the_formula() {
        let x: Vec<f32> = (-200_000..200_000).map(|i| i as f32 * 4.3e-4).collect();
        for isa in Isa::available() {
            let mut gate = x.clone();
            activate(isa, Activation::Silu, &mut gate, &vec![2.0; x.len()]);
            for (x, got) in x.iter().zip(gate) {
                let exact = 2.0 * f64::from(*x) / (1.0 + (-f64::from(*x)).exp());
                assert!(close(got, exact, 1e-6), "{isa:?}: silu({x}) = {}", got / 2.0);
            }
            let mut ends = [f32::MAX, -f32::MAX, 0.0, -88.0];
            activate(isa, Activation::Silu, &mut ends, &[1.0; 4]);
            assert_eq!(ends, [f32::MAX, 0.0, 0.0, 0.0], "{isa:?}");
            let mut nothing = [f32::NAN];
            activate(isa, Activation::Silu, &mut nothing, &[1.0]);
            assert!(nothing[0].is_nan(), "{isa:?}");
        }
    }

    #[test]
    fn other_activations_are_those_of_their_formulas() {
        let x: Vec<f32> = (-60_000..60_000).map(|i| i as f32 * 1.3e-4).collect();
        let limit = 5.0;
        let formulas: [(Activation, &dyn Fn(f64) -> f64); 3] = [
            (Activation::Gelu, &|x| x * (1.0 + libm::erf(x / 2f64.sqrt())) / 2.0),
            (Activation::GeluTanh, &|x| {
                x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh()) / 2.0
            }),
            (Activation::Clamped { limit: limit as f32 }, &|x| {
                let g = x.min(limit);
                g / (1.0 + (-1.702 * g).exp())
            }),
        ];
        for isa in Isa::available() {
            for (activation, formula) in &formulas {
                for (up, factor) in [(2.0, 3.0), (-7.0, -4.0)] {
                    let factor = if matches!(activation, Activation::Clamped { .. }) { factor } else { up };
                    let mut gate = x.clone();
                    activate(isa, *activation, &mut gate, &vec![up as f32; x.len()]);
                    for (x, got) in x.iter().zip(gate) {
                        let exact = factor * formula(f64::from(*x));
                        let near = close(got, exact, 2e-6) || (f64::from(got) - exact).abs() < 1e-6;
                        assert!(near, "{isa:?}, {activation:?}: {x} gives {got}, not {exact}");
                    }
                }
            }
            let mut ends = [f32::MAX, -f32::MAX, 0.0];
            activate(isa, Activation::GeluTanh, &mut ends, &[1.0; 3]);
            assert_eq!(ends, [f32::MAX, 0.0, 0.0], "{isa:?}");
        }
    }
}
