//! What schemes need to know of a model: permutations of key channels (RotateKV) and orthogonal bases (ResQ), found by
//! running the model on a text, and the adapters of a linear correction (KVLinC), trained on what the model computes.
//!
//! [`calibrate`] runs the model and returns an [`Artefact`], a file with a [`Fingerprint`] of the model and the
//! scheme that it was made for. It is loaded by [`Artefact::load`] and refused where its fingerprint differs.
#![forbid(unsafe_code)]

mod artefact;
mod basis;
mod error;
mod feedback;
mod file;
mod fingerprint;
mod gathered;
mod key;
mod linear;
mod permutation;
mod planes;
mod progress;
mod run;

pub use artefact::Artefact;
pub use error::CalibrationError;
pub use fingerprint::Fingerprint;
pub use key::ModelKey;
pub use linear::{Measurement, RateSchedule, Recipe, Start, Training};
pub use progress::Source;
pub use run::{Options, Phase, Progress, Text, calibrate, passes};
