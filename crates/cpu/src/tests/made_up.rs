//! Made-up numbers, calibrations and schemes.

use dibit_cache::{Adapters, CacheShape, CalibratedScheme, KeyFeedback, LayerCalibration, Linear};
use half::f16;

/// fp16-representable numbers with outlier channels.
pub(crate) fn noise(seed: usize, len: usize, width: usize) -> Vec<f32> {
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

/// A made-up calibration: channels of each frame in another order, and reflections as bases; those of values that have
/// planes stretched.
pub(crate) fn calibration(
    scheme: &CalibratedScheme,
    shape: CacheShape,
    query_heads: usize,
    frame: usize,
) -> LayerCalibration {
    let (heads, d) = (shape.num_key_value_heads, shape.head_dim);
    let adapters = scheme.linear().map(|Linear { features, .. }| {
        let maps = |seed: usize, heads: usize| {
            [0, 1].map(|part| noise(seed + part, heads * d * features / 2, 17).iter().map(|x| 0.1 * x).collect())
        };
        // Of the heads one is switched off, and of two KV heads none.
        let gates = (0..query_heads).map(|head| [1.0, 0.25, 0.0][head % 3]).collect();
        Adapters { features, query: maps(80, query_heads), key: maps(90, heads), gates }
    });
    // A prime that divides no frame.
    let order = |place: usize| place / frame * frame + (place % frame * 131 + 3) % frame;
    let basis = |seed: usize| -> Vec<f32> {
        let reflection = |head: usize| {
            let normal = noise(seed + head, d, d);
            let norm: f32 = normal.iter().map(|x| x * x).sum();
            (0..d * d).map(move |at| {
                let (i, j) = (at / d, at % d);
                f32::from(u8::from(i == j)) - 2.0 * normal[i] * normal[j] / norm
            })
        };
        (0..heads).flat_map(reflection).collect()
    };
    // Tiles of channels that do not lie side by side.
    let tile = |channel: usize| ((channel / d % 3 + channel % d % (d / 8) + 1) * 3 % 7 % 5) as u8;
    LayerCalibration {
        permutation: Some((0..heads * d).map(|place| order(place) as u32).collect()),
        key_basis: Some(basis(50)),
        value_basis: Some(match scheme.values.average_bits() {
            Some(_) => basis(70).iter().enumerate().map(|(at, x)| x * 2f32.powi(at as i32 % 4 - 1)).collect(),
            None => basis(70),
        }),
        key_planes: Some((0..heads * d).map(tile).collect()),
        key_feedback: Some(KeyFeedback {
            order: (0..heads * d).map(|place| ((2 * d - 1 - place % d - place / d) % d) as u32).collect(),
            factors: noise(60, heads * d * d, d).iter().map(|x| 0.3 * x / d as f32).collect(),
        }),
        sink_places: None,
        powers: Default::default(),
        value_planes: Some(
            (0..heads * d).map(|channel| (4 * (heads * d - channel / 8 * 8) / (heads * d)) as u8).collect(),
        ),
        adapters,
    }
}

pub(crate) fn scheme(name: &str) -> CalibratedScheme {
    CalibratedScheme::load(name).unwrap()
}

pub(crate) fn custom(key_bits: u32, value_bits: u32, group: usize, window: &str) -> CalibratedScheme {
    let side = |bits| if bits == 16 { "bits = 16".to_owned() } else { format!("bits = {bits}\ngroup = {group}") };
    let window = if window.is_empty() { String::new() } else { format!("[window]\n{window}\n") };
    let (keys, values) = (side(key_bits), side(value_bits));
    let text = format!("name = \"custom\"\n[keys]\n{keys}\n[values]\n{values}\n{window}");
    CalibratedScheme::parse(&text, "custom").unwrap()
}

/// A scheme with the usual window and one sink.
pub(crate) fn own(correction: &str, keys: &str, values: &str) -> CalibratedScheme {
    let window = "[window]\ntokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 1";
    let text = format!("name = \"own\"\n{correction}\n[keys]\n{keys}\n[values]\n{values}\n{window}");
    CalibratedScheme::parse(&text, &format!("own: {correction} {keys}")).unwrap()
}

/// A scheme whose pages protect tokens with small values.
pub(crate) fn protecting(correction: &str, keys: &str, values: &str) -> CalibratedScheme {
    let window = "[window]\ntokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"auto\"\ncount = 2";
    let text = format!("name = \"own\"\n{correction}\n[keys]\n{keys}\n[values]\n{values}\n{window}");
    CalibratedScheme::parse(&text, &format!("protecting: {correction} {keys} {values}")).unwrap()
}

/// A linear correction under another schedule, or none.
pub(crate) fn corrected(window: &str, axis: &str) -> CalibratedScheme {
    let keys = format!("[keys]\nbits = 2\naxis = \"{axis}\"");
    let text = format!("name = \"own\"\ncorrection = \"linear\"\n{keys}\n[values]\nbits = 2\n{window}");
    CalibratedScheme::parse(&text, "corrected").unwrap()
}
