//! What a calibration was made for.

use dibit_cache::{AutoSinks, Class, LayerOverride, Schedule, Scheme, Side, Sinks};
use dibit_device::Tensor;
use dibit_model::{LinearWeights, Pretrained};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Version of the calibration's format and of what is computed.
const VERSION: &str = "1";

/// Rows of each weight that the model's hash looks at.
const HASHED_ROWS: usize = 8;

/// What a calibration was made for. All of it must agree with what it is used for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the format.
    pub version: String,
    /// Hash of the model's configuration and of a sample of its weights.
    pub model: String,
    /// The keys of the scheme, in words: bits, axis, group, quantiser, rotation.
    pub keys: String,
    /// The values of the scheme, where they are calibrated; what is known of keys suits any others.
    pub values: String,
    /// The window of the scheme.
    pub window: String,
    /// Sinks of the scheme.
    pub sinks: String,
    /// Layers with choices of their own.
    pub layers: String,
    /// Classes of tokens with choices of their own.
    pub classes: String,
    /// The linear correction of the scheme, and whether it comes on top of another one; empty without.
    #[serde(default)]
    pub correction: String,
    /// How planes are given to channels; empty without.
    #[serde(default)]
    pub planes: String,
}

impl Fingerprint {
    /// The fingerprint of a scheme on a model as it was loaded.
    pub fn new(pretrained: &Pretrained, scheme: &Scheme) -> Self {
        let window = match scheme.window.schedule {
            Schedule::None => "none".to_owned(),
            Schedule::Guaranteed => format!("{} tokens, guaranteed", scheme.window.tokens),
            Schedule::Kivi => format!("{} tokens, kivi", scheme.window.tokens),
        };
        let sinks = match scheme.sinks {
            Sinks::None => "none".to_owned(),
            Sinks::First(count) => format!("first {count}"),
            Sinks::Auto(AutoSinks { first, places, share }) => {
                format!("first {first}, and up to {places} a page with values below {share} of the median")
            }
            Sinks::Massive(count) => format!("massive activations, {count}"),
            Sinks::Pivots(pivots) => format!("pivots, {}, per layer: {}", pivots.count, pivots.per_layer),
        };
        let values = |side: Side| if side.is_calibrated() { side.to_string() } else { "any".to_owned() };
        let own = |own: &LayerOverride| format!("{:?}: {}; {}", own.layers, own.keys, values(own.values));
        // A layer that only goes without the correction uses the same calibration.
        let differs = |own: &&LayerOverride| own.keys != scheme.keys || values(own.values) != values(scheme.values);
        let layers = |all: &[LayerOverride]| all.iter().filter(differs).map(own).collect::<Vec<_>>().join(" | ");
        let class =
            |class: &Class| format!("{}: {}; {}; {}", class.name, class.keys, class.values, layers(&class.layers));
        Fingerprint {
            version: VERSION.to_owned(),
            model: model_hash(pretrained),
            keys: scheme.keys.to_string(),
            values: values(scheme.values),
            window,
            sinks,
            layers: layers(&scheme.layers),
            classes: scheme.classes.iter().map(class).collect::<Vec<_>>().join(" | "),
            correction: scheme.linear().map_or(String::new(), |linear| {
                format!("{} features{}", linear.features, if scheme.correction.bias { ", bias" } else { "" })
            }),
            planes: match scheme.has_planes() {
                true => format!("{:?} pool, {} at most", scheme.planes.pool, scheme.planes.most),
                false => String::new(),
            },
        }
    }

    /// Names and values of all parts.
    pub(crate) fn parts(&self) -> [(&'static str, &str); 10] {
        [
            ("version", &self.version),
            ("model", &self.model),
            ("quantiser of keys", &self.keys),
            ("quantiser of values", &self.values),
            ("window", &self.window),
            ("sinks", &self.sinks),
            ("choice of single layers", &self.layers),
            ("choice of classes", &self.classes),
            ("linear correction", &self.correction),
            ("budget of planes", &self.planes),
        ]
    }

    /// The first part in which this fingerprint differs from another: its name, and both values.
    pub fn difference<'a>(&'a self, other: &'a Fingerprint) -> Option<(&'static str, &'a str, &'a str)> {
        let pairs = self.parts().into_iter().zip(other.parts());
        pairs.map(|((what, own), (_, other))| (what, own, other)).find(|(_, own, other)| own != other)
    }
}

/// SHA-256 of the shape of the model and of some rows of each weight, widened: conversions that lose nothing keep it.
/// Value and output projections are left out, as they were when a rotation might have been fused into them: files that
/// were made stay usable.
fn model_hash(pretrained: &Pretrained) -> String {
    let mut hash = Sha256::new();
    let config = &pretrained.config;
    hash.update(format!(
        "{:?} {} {} {} {} {} {:?}",
        config.architecture,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.rope.inv_freq(config.head_dim)
    ));
    let mut add = |tensor: &Tensor| {
        hash.update(format!("{} {}", tensor.rows(), tensor.cols()));
        for sample in 0..HASHED_ROWS.min(tensor.rows()) {
            for value in tensor.row(sample * tensor.rows() / HASHED_ROWS.min(tensor.rows())) {
                hash.update(value.to_le_bytes());
            }
        }
    };
    add(&pretrained.weights.embed);
    add(&pretrained.weights.norm);
    add(&pretrained.weights.lm_head);
    for layer in &pretrained.weights.layers {
        let mut linear = |weights: &LinearWeights| {
            add(&weights.weight);
            weights.bias.iter().for_each(&mut add);
        };
        [&layer.q, &layer.k, &layer.gate, &layer.up, &layer.down].into_iter().for_each(&mut linear);
        [&layer.input_norm, &layer.post_norm].into_iter().chain(&layer.q_norm).chain(&layer.k_norm).for_each(&mut add);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
