//! What a training keeps in a file, so that it goes on bit for bit where it was stopped.

use super::trainer::Trainer;
use super::training::Measurement;
use crate::file::{Array, Contents};
use dibit_device::{DeviceError, Train};

/// How far a training is, beside its adapters.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Progressed {
    /// Steps done.
    pub steps: usize,
    /// Sum of the losses of the steps since the last measurement, and their number.
    pub losses: [f64; 2],
    pub course: Vec<Measurement>,
}

/// Numbers of one layer, by their names in the file.
fn name(layer: usize, part: &str) -> String {
    format!("training.{layer}.{part}")
}

/// Adds a training to a file.
pub(crate) fn save<D: Train>(
    contents: &mut Contents,
    device: &D,
    trainer: &Trainer<D>,
    progressed: &Progressed,
) -> Result<(), DeviceError> {
    let mut add = |name: String, values: Vec<f32>| {
        contents.floats.push((name, Array { shape: vec![values.len()], values }));
    };
    for (layer, adapter) in trainer.layers.iter().enumerate() {
        let Some(adapter) = adapter else { continue };
        let buffers = [("maps", &adapter.maps), ("first", &adapter.first), ("second", &adapter.second)];
        for (part, buffer) in buffers {
            let mut values = Vec::new();
            device.download(buffer, 0..adapter.shape.numbers(), &mut values)?;
            add(name(layer, part), values);
        }
        if let Some(gates) = &adapter.gates {
            let parts = [("gates", &gates.logits), ("gates.first", &gates.first), ("gates.second", &gates.second)];
            parts.into_iter().for_each(|(part, values)| add(name(layer, part), values.clone()));
        }
    }
    let course = progressed.course.iter().flat_map(Measurement::numbers).collect();
    add("training.course".into(), course);
    let mut double = |name: &str, values: Vec<f64>| {
        contents.doubles.push((name.into(), Array { shape: vec![values.len()], values }));
    };
    double("training.steps", vec![progressed.steps as f64]);
    double("training.losses", progressed.losses.to_vec());
    Ok(())
}

/// Reads a training; `None` where the file has none yet.
///
/// # Errors
/// What is missing.
pub(crate) fn load<D: Train>(
    contents: &Contents,
    device: &D,
    trainer: &mut Trainer<D>,
) -> Result<Option<Progressed>, String> {
    let doubles = |name: &str| contents.doubles.iter().find(|(own, _)| own == name).map(|(_, array)| &array.values);
    let floats = |name: &str| contents.floats.iter().find(|(own, _)| own == name).map(|(_, array)| &array.values);
    let Some(steps) = doubles("training.steps") else { return Ok(None) };
    let missing = |name: &str| format!("{name} is missing");
    let of =
        |name: String, len: usize| floats(&name).filter(|values| values.len() == len).ok_or_else(|| missing(&name));
    for (layer, adapter) in trainer.layers.iter_mut().enumerate() {
        let Some(adapter) = adapter else { continue };
        let numbers = adapter.shape.numbers();
        device.write(&mut adapter.maps, 0, of(name(layer, "maps"), numbers)?);
        device.write(&mut adapter.first, 0, of(name(layer, "first"), numbers)?);
        device.write(&mut adapter.second, 0, of(name(layer, "second"), numbers)?);
        let count = adapter.shape.heads;
        if let Some(gates) = &mut adapter.gates {
            gates.logits.copy_from_slice(of(name(layer, "gates"), count)?);
            gates.first.copy_from_slice(of(name(layer, "gates.first"), count)?);
            gates.second.copy_from_slice(of(name(layer, "gates.second"), count)?);
        }
    }
    let steps = steps.first().filter(|steps| **steps >= 0.0 && steps.fract() == 0.0);
    let steps = *steps.ok_or_else(|| missing("training.steps"))? as usize;
    let losses = doubles("training.losses").and_then(|values| <[f64; 2]>::try_from(values.as_slice()).ok());
    let losses = losses.ok_or_else(|| missing("training.losses"))?;
    let course = floats("training.course").and_then(|values| Measurement::from_numbers(values));
    let course = course.ok_or_else(|| missing("training.course"))?;
    Ok(Some(Progressed { steps, losses, course }))
}
