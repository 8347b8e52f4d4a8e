//! What reports sort schemes by.

use dibit_cache::{CachePlan, CalibratedScheme, Correction, LayerOverride, PAGE_TOKENS, Packed, Side, Transform};
use serde::Serialize;
use std::ops::RangeInclusive;

/// Contexts that the states of a correction are set against.
const CONTEXTS: [usize; 6] = [1024, 2048, 4096, 8192, 32768, 131_072];

/// The two choices that make KVLinC of KIVI, and all others in words.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Choices {
    /// All other choices: schemes that agree here differ in nothing but the two.
    pub others: String,
    /// Whether a Hadamard matrix rotates values.
    pub rotated_values: bool,
    /// The linear correction; `None` where the scheme has none, or goes without it for want of adapters.
    pub correction: Option<LinearChoice>,
}

/// A linear correction that has its adapters.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LinearChoice {
    /// D.
    pub features: usize,
    /// Layers that are corrected, ascending; in some of them training may have switched every head off.
    pub layers: Vec<usize>,
    /// Layers of the model.
    pub of_layers: usize,
    /// Bits that the states take for a cached scalar: tokens, bits.
    pub state_bits_at: Vec<(usize, f64)>,
    /// All bits at the same contexts.
    pub bits_at: Vec<(usize, f64)>,
}

impl Choices {
    /// The choices of a scheme, whose layout has its tables.
    pub fn new(scheme: &CalibratedScheme, layout: &CachePlan) -> Self {
        let own = |own: &LayerOverride| format!("{:?}: {}; {}", own.layers, own.keys, unrotated(own.values));
        // A layer that only goes without the correction stores what the others store.
        let differs = |own: &&LayerOverride| (own.keys, own.values) != (scheme.keys, scheme.values);
        let layers: Vec<String> = scheme.layers.iter().filter(differs).map(own).collect();
        let bias = Correction { linear: None, ..scheme.correction };
        let others = format!(
            "keys {}; values {}; {:?}; sinks {:?}; attention {:?}; correction {bias}; planes {:?}; layers {layers:?}; classes {:?}",
            scheme.keys,
            unrotated(scheme.values),
            scheme.window,
            scheme.sinks,
            scheme.sees,
            scheme.planes,
            scheme.classes,
        );
        Choices {
            others,
            rotated_values: scheme.values.transform() == Transform::Hadamard,
            correction: LinearChoice::new(scheme, layout),
        }
    }
}

impl LinearChoice {
    fn new(scheme: &CalibratedScheme, layout: &CachePlan) -> Option<Self> {
        let calibration = scheme.calibration.as_ref()?;
        let corrected =
            |layer: &usize| layout.layers[*layer].linear.is_some() && calibration.layers[*layer].adapters.is_some();
        let layers: Vec<usize> = (0..layout.layers.len()).filter(corrected).collect();
        let features = scheme.linear().filter(|_| !layers.is_empty())?.features;
        let state_bits = |tokens: usize| {
            let scalars = tokens * layout.shape.scalars_per_token();
            let packed = layout.window.packed_keys(tokens) >= PAGE_TOKENS;
            if packed { layout.state_bytes() as f64 * 8.0 / scalars as f64 } else { 0.0 }
        };
        Some(LinearChoice {
            features,
            layers,
            of_layers: layout.layers.len(),
            state_bits_at: CONTEXTS.map(|tokens| (tokens, state_bits(tokens))).to_vec(),
            bits_at: CONTEXTS.map(|tokens| (tokens, layout.planned_usage(tokens, PAGE_TOKENS).bits())).to_vec(),
        })
    }

    /// Runs of neighbouring layers that are corrected.
    pub fn ranges(&self) -> Vec<RangeInclusive<usize>> {
        let runs = self.layers.chunk_by(|a, b| a + 1 == *b);
        runs.map(|run| run[0]..=run[run.len() - 1]).collect()
    }

    /// Whether every layer is corrected.
    pub fn is_everywhere(&self) -> bool {
        self.layers.len() == self.of_layers
    }
}

/// A side as it is without a Hadamard matrix.
fn unrotated(side: Side) -> Side {
    match side {
        Side::Packed(packed) if packed.transform == Transform::Hadamard => {
            Side::Packed(Packed { transform: Transform::None, ..packed })
        }
        other => other,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use dibit_cache::{Adapters, CacheModel, CacheShape, CalibratedScheme, Calibration, LayerCalibration};
    use std::sync::Arc;

    const SHAPE: CacheShape = CacheShape { num_layers: 4, num_key_value_heads: 2, head_dim: 128 };

    /// Choices of a corrected scheme, for tests of reports.
    pub(crate) fn corrected(rotated_values: bool, features: usize, layers: Vec<usize>) -> Choices {
        let correction = LinearChoice {
            features,
            layers,
            of_layers: 4,
            state_bits_at: vec![(1024, 2.0), (8192, 0.25)],
            bits_at: vec![(1024, 6.0), (8192, 2.75)],
        };
        Choices { others: "KIVI's".into(), rotated_values, correction: Some(correction) }
    }

    /// The same without a correction.
    pub(crate) fn plain(rotated_values: bool) -> Choices {
        Choices { others: "KIVI's".into(), rotated_values, correction: None }
    }

    fn choices(mut scheme: CalibratedScheme, features: Option<usize>) -> Choices {
        // In the last layer every head is switched off.
        let layer = |features: usize, gate: f32| LayerCalibration {
            adapters: Some(Adapters { features, gates: vec![gate; 4], ..Adapters::default() }),
            ..LayerCalibration::default()
        };
        let layers = |features| [1.0, 1.0, 1.0, 0.0].map(|gate| layer(features, gate)).to_vec();
        scheme.calibration = features.map(|features| Arc::new(Calibration { layers: layers(features) }));
        Choices::new(&scheme, &scheme.plan(&CacheModel::of_shape(SHAPE)).unwrap())
    }

    #[test]
    fn the_schemes_of_the_paper_differ_in_two_choices() {
        let names = ["kivi", "kivi-linc", "kvlinc-rotation", "kvlinc"];
        let [kivi, corrected, rotated, both] =
            names.map(|name| choices(CalibratedScheme::load(name).unwrap(), Some(256)));
        for own in [&corrected, &rotated, &both] {
            assert_eq!(own.others, kivi.others);
        }
        assert_eq!([&kivi, &corrected, &rotated, &both].map(|own| own.rotated_values), [false, false, true, true]);
        assert!(kivi.correction.is_none() && rotated.correction.is_none() && both.correction == corrected.correction);
        for other in ["kivi-paper", "quarot", "fp16"] {
            assert_ne!(choices(CalibratedScheme::load(other).unwrap(), None).others, kivi.others, "{other}");
        }
        // Without adapters there is nothing that corrects.
        assert_eq!(choices(CalibratedScheme::load("kvlinc").unwrap(), None), rotated);
    }

    #[test]
    fn states_are_counted_where_layers_are_corrected() {
        let text = "name = \"part\"\ncorrection = { kind = \"linear\", features = 64, states = \"fp16\" }\n\
            [keys]\nbits = 2\n[values]\nbits = 2\n[window]\ntokens = 128\nschedule = \"guaranteed\"\n\
            [layers.1]\ncorrection = \"none\"\n";
        let own = choices(CalibratedScheme::parse(text, "part").unwrap(), Some(64));
        assert_eq!(own.others, choices(CalibratedScheme::load("kivi").unwrap(), None).others);
        let correction = own.correction.unwrap();
        assert_eq!((correction.features, correction.ranges()), (64, vec![0..=0, 2..=3]));
        assert!(!correction.is_everywhere());
        // Two of four layers have states: 16 bit, D (d + 1) numbers for 2 N d scalars.
        let expected = 0.5 * 16.0 * 64.0 * 129.0 / (2.0 * 8192.0 * 128.0);
        let (tokens, bits) = correction.state_bits_at[3];
        assert!(tokens == 8192 && (bits - expected).abs() < 1e-9, "{bits}");
        assert!((correction.bits_at[3].1 - (2.46484375 + expected)).abs() < 1e-6);
    }
}
