//! The file of a calibration.

use crate::file::{Array, Contents};
use crate::{CalibrationError, Fingerprint};
use dibit_cache::{Calibration, LayerCalibration, Scheme, SchemeError};
use dibit_model::Pretrained;
use std::path::Path;
use std::sync::Arc;

const FINGERPRINT: &str = "dibit.fingerprint";
const SOURCE: &str = "dibit.source";

/// A calibration with what it was made for.
#[derive(Debug, Clone, PartialEq)]
pub struct Artefact {
    /// What it was made for.
    pub fingerprint: Fingerprint,
    /// What it was made from, in words.
    pub source: String,
    /// The numbers.
    pub calibration: Calibration,
}

impl Artefact {
    /// Writes the file: it is complete, or not there.
    ///
    /// Tensors are `layers.{i}.permutation` (u32), `layers.{i}.key_basis` and `layers.{i}.value_basis` (f32), all of one
    /// dimension: the numbers of [`LayerCalibration`] in their order. The fingerprint is JSON in the metadata.
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
            if let Some(values) = layer.permutation.clone() {
                let array = Array { shape: vec![values.len()], values };
                contents.integers.push((format!("layers.{index}.permutation"), array));
            }
            for (name, basis) in [("key_basis", &layer.key_basis), ("value_basis", &layer.value_basis)] {
                if let Some(values) = basis.clone() {
                    let array = Array { shape: vec![values.len()], values };
                    contents.floats.push((format!("layers.{index}.{name}"), array));
                }
            }
        }
        contents.write(path)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`CalibrationError::Read`] and [`CalibrationError::Malformed`].
    pub fn load(path: &Path) -> Result<Self, CalibrationError> {
        let malformed = |problem: &str| CalibrationError::Malformed { path: path.to_owned(), problem: problem.into() };
        let mut contents = Contents::read(path)?;
        let fingerprint = contents.metadata.get(FINGERPRINT).ok_or_else(|| malformed("it has no fingerprint"))?;
        let fingerprint = serde_json::from_str(fingerprint).map_err(|_| malformed("its fingerprint cannot be read"))?;
        let layers = contents.metadata.get("dibit.layers").and_then(|count| count.parse().ok());
        let layers: usize = layers.filter(|count| *count <= 4096).ok_or_else(|| malformed("it has no layers"))?;
        let source = contents.metadata.remove(SOURCE).unwrap_or_default();
        let mut calibration = Calibration { layers: vec![LayerCalibration::default(); layers] };
        let place = |name: &str| -> Option<(usize, String)> {
            let (index, part) = name.strip_prefix("layers.")?.split_once('.')?;
            let number = index.parse::<usize>().ok().filter(|number| *number < layers)?;
            // One spelling, so that no tensor occurs twice.
            (number.to_string() == index).then(|| (number, part.to_owned()))
        };
        let shapes = contents.integers.iter().map(|(name, array)| (name, array.shape.len()));
        let shapes = shapes.chain(contents.floats.iter().map(|(name, array)| (name, array.shape.len())));
        if let Some((name, _)) = shapes.into_iter().find(|(_, dimensions)| *dimensions != 1) {
            return Err(malformed(&format!("tensor {name} has not one dimension")));
        }
        if let Some((name, _)) = contents.doubles.first() {
            return Err(malformed(&format!("it has a tensor {name} of 64-bit numbers")));
        }
        for (name, array) in contents.integers {
            match place(&name) {
                Some((index, part)) if part == "permutation" => {
                    calibration.layers[index].permutation = Some(array.values);
                }
                _ => return Err(malformed(&format!("it has a tensor {name}"))),
            }
        }
        for (name, array) in contents.floats {
            match place(&name) {
                Some((index, part)) if part == "key_basis" => calibration.layers[index].key_basis = Some(array.values),
                Some((index, part)) if part == "value_basis" => {
                    calibration.layers[index].value_basis = Some(array.values);
                }
                _ => return Err(malformed(&format!("it has a tensor {name}"))),
            }
        }
        Ok(Artefact { fingerprint, source, calibration })
    }

    /// Gives a scheme the calibration in a file, where that was made for it and for this model.
    ///
    /// # Errors
    /// Those of [`Artefact::load`], and [`CalibrationError::Mismatch`]. The scheme is then as it was.
    pub fn attach(path: &Path, pretrained: &Pretrained, scheme: &mut Scheme) -> Result<(), CalibrationError> {
        let artefact = Artefact::load(path)?;
        let expected = Fingerprint::new(pretrained, scheme);
        if let Some((what, found, expected)) = artefact.fingerprint.difference(&expected) {
            return Err(CalibrationError::Mismatch {
                path: path.to_owned(),
                what,
                found: found.to_owned(),
                expected: expected.to_owned(),
            });
        }
        let calibrated = Scheme { calibration: Some(Arc::new(artefact.calibration)), ..scheme.clone() };
        // What does not fit is said here, by the file's name, and not when a cache is made.
        pretrained.config.cache_layout(&calibrated).map_err(|error| match error {
            SchemeError::Calibration { problem, .. } => CalibrationError::Malformed { path: path.to_owned(), problem },
            other => other.into(),
        })?;
        *scheme = calibrated;
        Ok(())
    }
}
