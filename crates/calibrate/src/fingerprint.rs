//! What a calibration was made for.

use crate::key::hash;
use crate::{CalibrationError, ModelKey};
use dibit_cache::{AutoSinks, Class, LayerOverride, Schedule, Scheme, Side, Sinks};
use dibit_model::Pretrained;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// Version of the calibration's format and of what is computed.
pub(crate) const VERSION: &str = "3";

/// The fields that say what scheme it was made for, in the order of [`Fingerprint::parts`].
const SCHEME_FIELDS: [&str; 8] = ["keys", "values", "window", "sinks", "layers", "classes", "correction", "planes"];

/// What a calibration was made for. All of it must agree with what it is used for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Version of the format.
    pub version: String,
    /// What the model is known by.
    pub model: ModelKey,
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
                format!("first {first}, and up to {places} a page with values of a norm below {share} of the median")
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
            model: ModelKey::new(pretrained),
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

    /// The fingerprint in the header of a file; `path` names it in errors.
    ///
    /// # Errors
    /// [`CalibrationError::Malformed`] and [`CalibrationError::Version`].
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, CalibrationError> {
        let unreadable =
            || CalibrationError::Malformed { path: path.to_owned(), problem: "its fingerprint cannot be read".into() };
        let value: Value = serde_json::from_str(text).map_err(|_| unreadable())?;
        let text = |field: &str| value.get(field).and_then(Value::as_str);
        // Those of other versions say other things of the model.
        let found = text("version").ok_or_else(unreadable)?;
        if found != VERSION {
            let scheme = SCHEME_FIELDS.map(|field| text(field).unwrap_or_default()).join("\n");
            return Err(CalibrationError::Version { path: path.to_owned(), found: found.to_owned(), scheme });
        }
        serde_json::from_value(value).map_err(|_| unreadable())
    }

    /// The scheme that it was made for, in words that no other one has.
    pub fn scheme(&self) -> String {
        self.parts().map(|(_, value)| value)[1..].join("\n")
    }

    /// The start of the names of files in which calibrations of this scheme and of models of this shape are looked for, and
    /// the name of this one. `scheme` is the scheme's, for people.
    pub fn file_name(&self, scheme: &str) -> [String; 2] {
        let scheme: String = scheme.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let parts = format!("{}\n{}", self.version, self.scheme());
        let start = format!("{scheme}-{}-{}-", self.model.shape_name(), hash(&parts));
        let name = format!("{start}{}.safetensors", self.model.name());
        [start, name]
    }

    /// Names and values of all parts but the model.
    fn parts(&self) -> [(&'static str, &str); 9] {
        [
            ("version", &self.version),
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

    /// The first part in which this fingerprint differs from that of a run: its name, and how.
    pub fn difference(&self, run: &Fingerprint) -> Option<(&'static str, String)> {
        let pairs = self.parts().into_iter().zip(run.parts());
        let scheme = pairs.map(|((what, own), (_, run))| (what, own, run)).find(|(_, own, run)| own != run);
        match scheme {
            Some((what, own, run)) => Some((what, format!("{own}, and this run has {run}"))),
            None => Some(("model", self.model.difference(&run.model)?)),
        }
    }
}
