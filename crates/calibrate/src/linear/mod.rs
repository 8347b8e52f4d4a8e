//! Training of the adapters of a linear correction (KVLinC, section 3.2): feature maps of queries and of what the codes
//! of keys miss, from the model's own queries and keys, each layer for itself.

mod adapter;
mod batches;
mod collect;
mod layer_pass;
mod recipe;
mod run;
mod schedule;
mod start;
mod state;
#[cfg(test)]
mod tests;
mod tiles;
mod trainer;
mod training;

pub(crate) use batches::pack;
pub use recipe::{RateSchedule, Recipe, Start};
pub(crate) use run::{Material, Outcome, Watch, train};
pub(crate) use state::{Progressed, load, save};
pub(crate) use trainer::Trainer;
pub use training::{Measurement, Training};
