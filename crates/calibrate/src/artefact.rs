//! The file of a calibration.

use crate::file::{Array, Contents};
use crate::{CalibrationError, Fingerprint, Measurement, Training};
use dibit_cache::{Adapters, CalibratedScheme, Calibration, LayerCalibration, SchemeError};
use dibit_model::Pretrained;
use std::path::Path;
use std::sync::Arc;

const FINGERPRINT: &str = "dibit.fingerprint";
const SOURCE: &str = "dibit.source";
const RECIPE: &str = "dibit.recipe";
const COURSE: &str = "course";

/// A calibration with what it was made for.
#[derive(Debug, Clone, PartialEq)]
pub struct Artefact {
    /// What it was made for.
    pub fingerprint: Fingerprint,
    /// What it was made from, in words.
    pub source: String,
    /// The numbers.
    pub calibration: Calibration,
    /// What training of adapters found, where there was one.
    pub training: Option<Training>,
}

/// Tensors of numbers of a byte.
const SMALL: [&str; 4] = ["key_planes", "value_planes", "key_powers", "value_powers"];

impl Artefact {
    /// Writes the file: it is complete, or not there.
    ///
    /// Tensors are `layers.{i}.permutation`, `layers.{i}.key_planes`, `layers.{i}.value_planes`,
    /// `layers.{i}.feedback_order`, `layers.{i}.sink_places`, `layers.{i}.key_powers` and `layers.{i}.value_powers` (u32),
    /// `layers.{i}.key_basis`, `layers.{i}.value_basis`, `layers.{i}.feedback` and `layers.{i}.gates` (f32), all of one
    /// dimension, and `layers.{i}.phi_q.w1`, `phi_q.w2`, `phi_k.w1` and `phi_k.w2` (f32), `[head][head_dim][D / 2]`: the
    /// numbers of [`LayerCalibration`] in their order. Of a training there are `layers.{i}.divergence_before`, `layers.{i}.divergence_after` and `course` (f32),
    /// the numbers of [`Training`]. The fingerprint is JSON in the metadata.
    ///
    /// # Errors
    /// [`CalibrationError::Write`].
    pub fn save(&self, path: &Path) -> Result<(), CalibrationError> {
        let mut contents = Contents::default();
        let fingerprint = serde_json::to_string(&self.fingerprint).expect("strings");
        contents.metadata.insert(FINGERPRINT.to_owned(), fingerprint);
        contents.metadata.insert(SOURCE.to_owned(), self.source.clone());
        contents.metadata.insert("dibit.layers".to_owned(), self.calibration.layers.len().to_string());
        for (index, layer) in self.calibration.layers.iter().enumerate() {
            let wide = |own: &[u8]| own.iter().map(|number| u32::from(*number)).collect();
            let powers = |keys| Some(layer.powers.exponents(keys)).filter(|own| !own.is_empty()).map(wide);
            for (name, values) in [
                ("permutation", layer.permutation.clone()),
                ("key_planes", layer.key_planes.as_deref().map(wide)),
                ("value_planes", layer.value_planes.as_deref().map(wide)),
                ("feedback_order", layer.key_feedback.as_ref().map(|own| own.order.clone())),
                ("sink_places", layer.sink_places.map(|places| vec![places.into()])),
                ("key_powers", powers(true)),
                ("value_powers", powers(false)),
            ] {
                if let Some(values) = values {
                    let array = Array { shape: vec![values.len()], values };
                    contents.integers.push((format!("layers.{index}.{name}"), array));
                }
            }
            let gates = layer.adapters.as_ref().map(|own| &own.gates);
            for (name, numbers) in [
                ("key_basis", layer.key_basis.as_ref()),
                ("value_basis", layer.value_basis.as_ref()),
                ("feedback", layer.key_feedback.as_ref().map(|own| &own.factors)),
                ("gates", gates),
            ] {
                if let Some(values) = numbers.cloned() {
                    let array = Array { shape: vec![values.len()], values };
                    contents.floats.push((format!("layers.{index}.{name}"), array));
                }
            }
            for (name, values) in layer.adapters.iter().flat_map(maps) {
                let own = layer.adapters.as_ref().expect("their maps");
                let half = own.features / 2;
                let head_dim = own.query[0].len() / (own.gates.len() * half);
                let shape = vec![values.len() / (head_dim * half), head_dim, half];
                contents.floats.push((format!("layers.{index}.{name}"), Array { shape, values: values.clone() }));
            }
        }
        if let Some(Training { recipe, before, after, course }) = &self.training {
            contents.metadata.insert(RECIPE.to_owned(), recipe.clone());
            let mut add = |name: String, values: Vec<f32>| {
                contents.floats.push((name, Array { shape: vec![values.len()], values }));
            };
            for (index, (before, after)) in before.iter().zip(after).enumerate().filter(|(_, own)| !own.0.is_empty()) {
                add(format!("layers.{index}.divergence_before"), before.clone());
                add(format!("layers.{index}.divergence_after"), after.clone());
            }
            add(COURSE.to_owned(), course.iter().flat_map(Measurement::numbers).collect());
        }
        contents.write(path)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`CalibrationError::Read`], [`CalibrationError::Malformed`] and [`CalibrationError::Version`].
    pub fn load(path: &Path) -> Result<Self, CalibrationError> {
        Self::from_contents(Contents::read(path)?, path)
    }

    /// The calibration in the bytes of a file; `path` names it in errors.
    ///
    /// # Errors
    /// [`CalibrationError::Malformed`] and [`CalibrationError::Version`].
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self, CalibrationError> {
        Self::from_contents(Contents::parse(bytes, path)?, path)
    }

    fn from_contents(mut contents: Contents, path: &Path) -> Result<Self, CalibrationError> {
        let malformed = |problem: &str| CalibrationError::Malformed { path: path.to_owned(), problem: problem.into() };
        let fingerprint = contents.metadata.get(FINGERPRINT).ok_or_else(|| malformed("it has no fingerprint"))?;
        let fingerprint = Fingerprint::parse(fingerprint, path)?;
        let layers = contents.metadata.get("dibit.layers").and_then(|count| count.parse().ok());
        let layers: usize = layers.filter(|count| *count <= 4096).ok_or_else(|| malformed("it has no layers"))?;
        let source = contents.metadata.remove(SOURCE).unwrap_or_default();
        let mut training = contents.metadata.remove(RECIPE).map(|recipe| {
            let none = vec![Vec::new(); layers];
            Training { recipe, before: none.clone(), after: none, course: Vec::new() }
        });
        let mut calibration = Calibration { layers: vec![LayerCalibration::default(); layers] };
        let place = |name: &str| -> Option<(usize, String)> {
            let (index, part) = name.strip_prefix("layers.")?.split_once('.')?;
            let number = index.parse::<usize>().ok().filter(|number| *number < layers)?;
            // One spelling, so that no tensor occurs twice.
            (number.to_string() == index).then(|| (number, part.to_owned()))
        };
        let shapes = contents.integers.iter().map(|(name, array)| (name, array.shape.len()));
        let shapes = shapes.chain(contents.floats.iter().map(|(name, array)| (name, array.shape.len())));
        let expected = |name: &str| if name.contains(".phi_") { 3 } else { 1 };
        if let Some((name, dimensions)) = shapes.into_iter().find(|(name, found)| *found != expected(name)) {
            return Err(malformed(&format!("tensor {name} has {dimensions} dimensions, not {}", expected(name))));
        }
        if let Some((name, _)) = contents.doubles.first() {
            return Err(malformed(&format!("it has a tensor {name} of 64-bit numbers")));
        }
        for (name, array) in contents.integers {
            match place(&name) {
                Some((index, part)) if part == "permutation" => {
                    calibration.layers[index].permutation = Some(array.values);
                }
                Some((index, part)) if part == "feedback_order" => {
                    calibration.layers[index].key_feedback.get_or_insert_default().order = array.values;
                }
                Some((index, part)) if part == "sink_places" && matches!(array.values[..], [0..=255]) => {
                    calibration.layers[index].sink_places = Some(array.values[0] as u8);
                }
                Some((index, part)) if SMALL.contains(&&*part) => {
                    let numbers = array.values.iter().map(|number| u8::try_from(*number));
                    let numbers: Vec<u8> = numbers
                        .collect::<Result<_, _>>()
                        .map_err(|_| malformed(&format!("tensor {name} has numbers beyond 255")))?;
                    let layer = &mut calibration.layers[index];
                    match &*part {
                        "key_planes" => layer.key_planes = Some(numbers),
                        "value_planes" => layer.value_planes = Some(numbers),
                        "key_powers" => layer.powers.set(true, numbers),
                        _ => layer.powers.set(false, numbers),
                    }
                }
                _ => return Err(malformed(&format!("it has a tensor {name}"))),
            }
        }
        for (name, array) in contents.floats {
            let unknown = || malformed(&format!("it has a tensor {name}"));
            match place(&name) {
                None if name == COURSE => {
                    let course = Measurement::from_numbers(&array.values);
                    training.as_mut().ok_or_else(unknown)?.course =
                        course.ok_or_else(|| malformed("its course is cut"))?;
                }
                Some((index, part)) if part == "divergence_before" => {
                    training.as_mut().ok_or_else(unknown)?.before[index] = array.values;
                }
                Some((index, part)) if part == "divergence_after" => {
                    training.as_mut().ok_or_else(unknown)?.after[index] = array.values;
                }
                Some((index, part)) if part == "key_basis" => calibration.layers[index].key_basis = Some(array.values),
                Some((index, part)) if part == "value_basis" => {
                    calibration.layers[index].value_basis = Some(array.values);
                }
                Some((index, part)) if part == "feedback" => {
                    calibration.layers[index].key_feedback.get_or_insert_default().factors = array.values;
                }
                Some((index, part)) if part == "gates" => {
                    calibration.layers[index].adapters.get_or_insert_default().gates = array.values;
                }
                Some((index, part)) if part.starts_with("phi_") => {
                    let adapters = calibration.layers[index].adapters.get_or_insert_default();
                    adapters.features = 2 * array.shape[2];
                    let Some((_, map)) = maps_mut(adapters).into_iter().find(|(known, _)| *known == part) else {
                        return Err(malformed(&format!("it has a tensor {name}")));
                    };
                    *map = array.values;
                }
                _ => return Err(malformed(&format!("it has a tensor {name}"))),
            }
        }
        if let Some(Training { before, after, .. }) = &training
            && before.iter().zip(after).any(|(before, after)| before.len() != after.len())
        {
            return Err(malformed("it has divergences of other heads before training than after it"));
        }
        Ok(Artefact { fingerprint, source, calibration, training })
    }

    /// Gives a scheme the calibration in a file, where that was made for it and for this model.
    ///
    /// # Errors
    /// Those of [`Artefact::load`], and [`CalibrationError::Mismatch`]. The scheme is then as it was.
    pub fn attach(path: &Path, pretrained: &Pretrained, scheme: &mut CalibratedScheme) -> Result<(), CalibrationError> {
        Artefact::load(path)?.give(path, pretrained, scheme)
    }

    /// Gives a scheme this calibration, where it was made for it and for this model; `path` names it in errors.
    ///
    /// # Errors
    /// [`CalibrationError::Mismatch`], and [`CalibrationError::Malformed`] where it does not fit. The scheme is then as it
    /// was.
    pub fn give(
        self,
        path: &Path,
        pretrained: &Pretrained,
        scheme: &mut CalibratedScheme,
    ) -> Result<(), CalibrationError> {
        let expected = Fingerprint::new(pretrained, scheme);
        if let Some((what, difference)) = self.fingerprint.difference(&expected) {
            return Err(CalibrationError::Mismatch { path: path.to_owned(), what, difference });
        }
        let calibrated =
            CalibratedScheme { scheme: scheme.scheme.clone(), calibration: Some(Arc::new(self.calibration)) };
        // What does not fit is said here, by the file's name, and not when a cache is made.
        pretrained.config.cache_layout(&calibrated).map_err(|error| match error {
            SchemeError::Calibration { problem, .. } => CalibrationError::Malformed { path: path.to_owned(), problem },
            other => other.into(),
        })?;
        *scheme = calibrated;
        Ok(())
    }
}

/// The maps of adapters by their names in the file.
fn maps(adapters: &Adapters) -> [(&'static str, &Vec<f32>); 4] {
    let Adapters { query: [q1, q2], key: [k1, k2], .. } = adapters;
    [("phi_q.w1", q1), ("phi_q.w2", q2), ("phi_k.w1", k1), ("phi_k.w2", k2)]
}

/// [`maps`], to be written.
fn maps_mut(adapters: &mut Adapters) -> [(&'static str, &mut Vec<f32>); 4] {
    let Adapters { query: [q1, q2], key: [k1, k2], .. } = adapters;
    [("phi_q.w1", q1), ("phi_q.w2", q2), ("phi_k.w1", k1), ("phi_k.w2", k2)]
}
