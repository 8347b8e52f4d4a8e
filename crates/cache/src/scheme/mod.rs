//! A scheme: how keys and values are stored, as data.
//!
//! A scheme is a small TOML file over a few orthogonal choices. It is parsed, validated as a whole
//! and then compiled into a [`crate::CacheLayout`].

mod check;
mod choices;
mod file;
mod side_file;
#[cfg(test)]
mod tests;

pub use choices::{
    AutoSinks, Axis, Class, Correction, LayerOverride, Linear, Packed, Permutation, Pivots, PlaneBudget, Pool, PreRope,
    Sees, Side, Sinks, StateType, Statistic, Transform,
};

use crate::{SchemeError, Window};
use std::path::Path;

macro_rules! built_in {
    ($($name:literal),* $(,)?) => { [$(($name, include_str!(concat!("../schemes/", $name, ".toml")))),*] };
}

const BUILT_IN: [(&str, &str); 25] = built_in![
    "fp16",
    "kivi",
    "kivi-paper",
    "kivi-linc",
    "kvlinc",
    "kvlinc-rotation",
    "dibit",
    "k3v2",
    "k2v2",
    "quarot",
    "quarot-official",
    "resq",
    "resq-official",
    "gear-l",
    "gear-l-paper",
    "gear",
    "rotatekv",
    "rotatekv-window",
    "rotatekv-paper",
    "akvq-vl",
    "f16",
    "bf16",
    "q8_0",
    "q5_1",
    "q4_0",
];

/// A validated scheme.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// Its name.
    pub name: String,
    /// What it was loaded from: a built-in name, or a file.
    pub origin: String,
    /// One line of description.
    pub summary: String,
    /// The keys.
    pub keys: Side,
    /// The values.
    pub values: Side,
    /// Recent tokens in 16 bit.
    pub window: Window,
    /// Other tokens in 16 bit.
    pub sinks: Sinks,
    /// What the tokens of a pass see of each other.
    pub sees: Sees,
    /// The correction that the method asks for.
    pub correction: Correction,
    /// How planes are given to channels, where there are any.
    pub planes: PlaneBudget,
    /// Layers with choices of their own; ranges do not overlap.
    pub layers: Vec<LayerOverride>,
    /// Kinds of tokens with choices of their own: class 1 and on; class 0 is every other token.
    pub classes: Vec<Class>,
}

impl Scheme {
    /// Names of the built-in schemes.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A built-in scheme by its name, or one's own by the path of its file (anything that ends in `.toml`).
    ///
    /// # Errors
    /// Every [`SchemeError`].
    pub fn load(name: &str) -> Result<Self, SchemeError> {
        if name.ends_with(".toml") {
            let text = std::fs::read_to_string(Path::new(name))
                .map_err(|source| SchemeError::Read { path: name.to_owned(), source })?;
            return Self::parse(&text, name);
        }
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(text, name),
            None => Err(unknown(name)),
        }
    }

    /// A scheme from the text of its file; `origin` names it in errors.
    ///
    /// # Errors
    /// [`SchemeError::Parse`] and [`SchemeError::Unsupported`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, SchemeError> {
        file::parse(text, origin)
    }

    /// Keys and values of a layer, for the tokens of a class; 0 is that of tokens without one.
    pub fn sides(&self, class: usize, layer: usize) -> (Side, Side) {
        let (keys, values, layers) = match class.checked_sub(1).map(|index| &self.classes[index]) {
            Some(class) => (class.keys, class.values, &class.layers),
            None => (self.keys, self.values, &self.layers),
        };
        layers.iter().find(|own| own.layers.contains(&layer)).map_or((keys, values), |own| (own.keys, own.values))
    }

    /// Layers with choices of their own, of any class.
    pub(crate) fn overrides(&self) -> impl Iterator<Item = &LayerOverride> {
        self.layers.iter().chain(self.classes.iter().flat_map(|class| &class.layers))
    }

    /// All sides that occur.
    fn all_sides(&self) -> impl Iterator<Item = Side> {
        let of_classes = self.classes.iter().flat_map(|class| [class.keys, class.values]);
        [self.keys, self.values]
            .into_iter()
            .chain(of_classes)
            .chain(self.overrides().flat_map(|own| [own.keys, own.values]))
    }

    /// Whether nothing is ever packed.
    pub fn is_exact(&self) -> bool {
        self.all_sides().all(|side| side == Side::Half)
    }

    /// The correction of a layer.
    pub fn correction(&self, layer: usize) -> Correction {
        self.layers.iter().find(|own| own.layers.contains(&layer)).map_or(self.correction, |own| own.correction)
    }

    /// Whether the scheme needs what `dibit calibrate` makes.
    pub fn is_calibrated(&self) -> bool {
        self.all_sides().any(Side::is_calibrated)
    }

    /// Whether keys or values have planes.
    pub fn has_planes(&self) -> bool {
        self.all_sides().any(|side| side.average_bits().is_some())
    }

    /// The size of the linear correction, where a layer has one: all that have one share it.
    pub fn linear(&self) -> Option<Linear> {
        self.corrections().find_map(|own| own.linear)
    }

    /// All corrections that occur.
    fn corrections(&self) -> impl Iterator<Item = Correction> {
        std::iter::once(self.correction).chain(self.layers.iter().map(|own| own.correction))
    }

    /// Whether the scheme can use what `dibit calibrate` makes.
    pub fn takes_calibration(&self) -> bool {
        self.is_calibrated() || self.linear().is_some() || self.protects_small_values()
    }

    /// Whether pages protect tokens with small values.
    pub fn protects_small_values(&self) -> bool {
        matches!(self.sinks, Sinks::Auto(_))
    }

    /// Choices that are allowed and cost much accuracy, as sentences.
    pub fn warnings(&self) -> Vec<String> {
        let clipped_keys = |own: &LayerOverride| own.keys.is_clipped();
        let of_classes = self.classes.iter().any(|class| class.keys.is_clipped());
        let any_clipped = self.keys.is_clipped() || of_classes || self.overrides().any(clipped_keys);
        let corrected = (self.keys.is_clipped() && self.correction != Correction::NONE)
            || self.layers.iter().any(|own| clipped_keys(own) && own.correction != Correction::NONE);
        let sinks = (any_clipped && self.sinks == Sinks::None).then_some(
            "keys.clip = \"mse\" without [sinks]: clipped keys of the first tokens, which take much of the attention, \
             cost far more than clipping saves (kind = \"first\" with count = 4 protects them)",
        );
        let correction = corrected.then_some(
            "a correction with keys.clip = \"mse\": it is for keys of whole ranges, which draw too much attention, and clipped \
             ones draw less as it is (leave one of the two out)",
        );
        [sinks, correction].into_iter().flatten().map(|warning| format!("{}: {warning}", self.name)).collect()
    }
}

fn unknown(name: &str) -> SchemeError {
    let nearest = Scheme::built_in()
        .map(|known| (strsim::damerau_levenshtein(name, known), known))
        .min()
        .filter(|(distance, _)| *distance <= 3.min(name.len() / 2));
    SchemeError::Unknown {
        name: name.to_owned(),
        suggestion: nearest.map(|(_, known)| format!(" (did you mean '{known}'?)")).unwrap_or_default(),
        known: Scheme::built_in().collect::<Vec<_>>().join(", "),
    }
}
