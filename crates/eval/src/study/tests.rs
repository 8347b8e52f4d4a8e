use super::*;
use dibit_quant::{Affine, Bits};

/// Numbers that look normal, the same on every machine.
pub(super) fn normal(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut uniform = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    move || (0..12).map(|_| uniform()).sum::<f32>() - 6.0
}

/// One layer; every 16th key channel is `outlier` times as large, and its queries are as much smaller.
pub(super) fn layer(shape: StudyShape, outlier: f32, seed: u64) -> LayerSample {
    let mut next = normal(seed);
    let factor = |channel: usize| if channel.is_multiple_of(16) { outlier } else { 1.0 };
    let mut tensor = |heads: usize, scale: &dyn Fn(usize) -> f32| -> Vec<f32> {
        (0..shape.tokens * heads * shape.head_dim).map(|i| next() * scale(i % shape.head_dim)).collect()
    };
    let k = tensor(shape.num_key_value_heads, &factor);
    LayerSample {
        q: tensor(shape.num_heads, &|channel| 2.0 / factor(channel)),
        v: tensor(shape.num_key_value_heads, &|_| 1.0),
        k,
    }
}

pub(super) fn shape(tokens: usize, num_heads: usize, num_key_value_heads: usize, head_dim: usize) -> StudyShape {
    StudyShape { tokens, num_heads, num_key_value_heads, head_dim }
}

/// A small study for tests of other modules.
pub(crate) fn small(layers: usize) -> Study {
    let shape = shape(160, 2, 1, 64);
    study(shape, &(0..layers as u64).map(|seed| layer(shape, 12.0, seed)).collect::<Vec<_>>()).unwrap()
}

fn variant(variants: &[VariantStudy], notation: &str) -> VariantStudy {
    variants.iter().find(|variant| variant.notation == notation).unwrap().clone()
}

#[test]
fn outlier_channels_show_the_observations_of_the_paper() {
    let shape = shape(384, 4, 2, 64);
    let study = study(shape, &[layer(shape, 12.0, 1), layer(shape, 8.0, 2)]).unwrap();
    let error = |notation| variant(&study.keys, notation).attention_error.layers;
    let [plain, rotated] = [error("Q_C(K)"), error("Q_C(KH)")];
    let [token, rotated_token] = [error("Q_T(K)"), error("Q_T(KH)")];
    for layer in 0..2 {
        assert!(rotated_token[layer] > 2.0 * plain[layer], "observation 2: {rotated_token:?} {plain:?}");
        assert!(token[layer] > 2.0 * plain[layer], "observation 2: {token:?} {plain:?}");
        assert!(rotated[layer] > 2.0 * plain[layer], "observation 3: {rotated:?} {plain:?}");
    }
    let pair = |method: &str| study.pairs.iter().find(|pair| pair.method.as_deref() == Some(method)).unwrap();
    assert!(pair("QuaRot").output_error.mean > pair("KVLinC without its correction").output_error.mean);
    assert_eq!(pair("KIVI").attention_error, variant(&study.keys, "Q_C(K)").attention_error);
}

#[test]
fn figures_equal_a_direct_computation() {
    let shape = shape(130, 2, 1, 2);
    let sample = layer(shape, 3.0, 5);
    let study = study(shape, std::slice::from_ref(&sample)).unwrap();
    let rows = |tensor: &[f32]| -> Vec<[f64; 2]> {
        tensor.chunks(2).map(|row| [f64::from(row[0]), f64::from(row[1])]).collect()
    };
    // Q_T with groups of the two channels: minimum and maximum come back, up to fp16.
    let per_token = |tensor: &[f32], turn: bool| -> (Vec<[f64; 2]>, f64) {
        let mut back = rows(tensor);
        let mut scales = 0.0;
        for row in &mut back[..128] {
            let turned = |[a, b]: [f64; 2]| if turn { [(a + b) / 2f64.sqrt(), (a - b) / 2f64.sqrt()] } else { [a, b] };
            let group = turned(*row).map(|x| x as f32);
            let affine = Affine::fit(&group, Bits::Two).unwrap();
            scales += f64::from(affine.scale.to_f32());
            *row = turned(group.map(|x| f64::from(affine.value(affine.code(x, Bits::Two)))));
        }
        (back, scales / 128.0)
    };
    let attention = |query: &[f64], keys: &[[f64; 2]], position: usize| -> Vec<f64> {
        let logit = |key: &[f64; 2]| ((query[0] * key[0] + query[1] * key[1]) / 2f64.sqrt()).exp();
        let weights: Vec<f64> = keys[..=position].iter().map(logit).collect();
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    };
    let output = |weights: &[f64], values: &[[f64; 2]]| -> [f64; 2] {
        [0, 1].map(|c| weights.iter().zip(values).map(|(weight, value)| weight * value[c]).sum())
    };
    let (k, v) = (rows(&sample.k), rows(&sample.v));
    let ((k_token, k_scale), (v_rotated, v_scale)) = (per_token(&sample.k, false), per_token(&sample.v, true));
    let squared = |a: &[[f64; 2]], b: &[[f64; 2]]| -> f64 {
        a.iter().flatten().zip(b.iter().flatten()).map(|(x, y)| (x - y).powi(2)).sum()
    };
    let (mut kl, mut error, mut norm) = (0.0, 0.0, 0.0);
    for (index, query) in rows(&sample.q).iter().enumerate() {
        let position = index / 2;
        let (exact, other) = (attention(query, &k, position), attention(query, &k_token, position));
        kl += exact.iter().zip(&other).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        let exact_output = output(&exact, &v);
        error += squared(&[exact_output], &[output(&exact, &v_rotated)]);
        norm += squared(&[exact_output], &[[0.0; 2]]);
    }
    assert_eq!((study.query_stride, study.quantized_tokens, study.group_channels), (1, 128, 2));
    let keys = variant(&study.keys, "Q_T(K)");
    let values = variant(&study.values, "Q_T(VH)");
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-3 * b.abs() + 1e-9, "{a} is not {b}");
    near(keys.scale.mean, k_scale);
    near(values.scale.mean, v_scale);
    near(keys.tensor_error.mean, squared(&k[..128], &k_token) / squared(&k[..128], &vec![[0.0; 2]; 128]));
    near(keys.attention_error.mean, kl / 260.0);
    near(values.attention_error.mean, error / norm);
}

#[test]
fn per_channel_groups_are_128_tokens() {
    let shape = shape(300, 1, 1, 64);
    let mut sample = layer(shape, 1.0, 9);
    // Constant within each group of tokens, and in no way constant within a token.
    for (index, x) in sample.k.iter_mut().enumerate() {
        *x = ((index % 64) as f32 - 31.5) * (1.0 + (index / 64 / 128) as f32);
    }
    let study = study(shape, &[sample]).unwrap();
    let plain = variant(&study.keys, "Q_C(K)");
    assert_eq!((plain.tensor_error.mean, plain.attention_error.mean, plain.scale.mean), (0.0, 0.0, 0.0));
    assert!(variant(&study.keys, "Q_T(K)").tensor_error.mean > 0.0);
    assert_eq!((study.query_stride, study.quantized_tokens), (2, 256));
}

#[test]
fn groups_along_channels_fit_the_head() {
    for (head_dim, group) in [(72, 72), (80, 80), (112, 112), (256, 128)] {
        let shape = shape(130, 1, 1, head_dim);
        let study = study(shape, &[layer(shape, 4.0, 3)]).unwrap();
        assert_eq!(study.group_channels, group);
        let errors = study.keys.iter().chain(&study.values).flat_map(|v| [&v.tensor_error, &v.attention_error]);
        assert!(errors.map(|error| error.mean).all(|mean| mean > 0.0 && mean.is_finite()), "head_dim {head_dim}");
    }
    let odd = shape(130, 1, 1, 76);
    assert_eq!(study(odd, &[layer(odd, 1.0, 1)]), Err(StudyError::Quant(QuantError::HadamardOrder(76))));
}

#[test]
fn the_spread_shown_first_is_that_of_the_largest_outliers() {
    let shape = shape(200, 1, 1, 64);
    let layers: Vec<LayerSample> =
        [1.0, 2.0, 9.0, 3.0, 1.0].into_iter().enumerate().map(|(seed, o)| layer(shape, o, seed as u64)).collect();
    let study = study(shape, &layers).unwrap();
    let shown: Vec<usize> = study.spreads.iter().map(|spread| spread.layer).collect();
    assert_eq!(shown, [2, 0, 4]);
    let spread = &study.spreads[0];
    assert!(spread.key_outlier > 5.0);
    let mut column: Vec<f32> = layers[2].k.iter().step_by(64).copied().collect();
    column.sort_by(f32::total_cmp);
    let expected = Spread { min: column[0], p05: column[9], median: column[99], p95: column[189], max: column[199] };
    assert_eq!(spread.keys.channels[0], expected);
    assert!(spread.rotated_keys.channels.iter().all(|channel| channel.max < expected.max));
}

#[test]
fn bad_input_is_refused() {
    let shape = shape(128, 2, 1, 64);
    let good = layer(shape, 1.0, 1);
    let one = std::slice::from_ref(&good);
    assert_eq!(study(shape, &[]), Err(StudyError::Empty));
    assert_eq!(study(StudyShape { tokens: 127, ..shape }, one), Err(StudyError::TooShort { tokens: 127 }));
    let wrong = StudyShape { num_heads: 3, ..shape };
    assert_eq!(study(wrong, one), Err(StudyError::Shape { layer: 0, shape: wrong }));
    let none = StudyShape { num_key_value_heads: 0, ..shape };
    assert_eq!(study(none, one), Err(StudyError::Shape { layer: 0, shape: none }));
    let mut damaged = good.clone();
    damaged.q[3] = f32::NAN;
    assert_eq!(study(shape, &[good.clone(), damaged]), Err(StudyError::NotFinite { layer: 1 }));
    let mut large = good.clone();
    large.k[3] = 1e9;
    assert!(matches!(study(shape, &[large]), Err(StudyError::Quant(QuantError::Range { .. }))));
}
