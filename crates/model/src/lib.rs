//! Checkpoints, tokenizers, chat templates and the forward pass.
//!
//! A model is defined once, over [`dibit_device::Device`], and runs on any device.

mod chat;
mod checkpoint;
mod config;
mod distribution;
mod error;
mod exact;
mod files;
mod generation_config;
mod gguf;
#[cfg(feature = "hub")]
mod hub;
mod mixture;
mod model;
mod pretrained;
mod rope;
mod rotation;
mod tokenizer;
mod weights;
mod windows;
mod workspace;

pub use chat::{ChatTemplate, Message, RenderOptions};
pub use checkpoint::Checkpoint;
pub use config::{Architecture, ModelConfig, SUPPORTED_HEAD_DIMS};
pub use distribution::Distribution;
pub use error::ModelError;
pub use exact::ExactPass;
pub use files::{ModelFiles, WeightFile};
pub use generation_config::GenerationConfig;
#[cfg(feature = "hub")]
pub use hub::download;
pub use model::{Model, Observation, Observer, argmax};
pub use pretrained::Pretrained;
pub use rope::{Rope, RopeScaling};
pub use tokenizer::{TextStream, Tokenizer};
pub use weights::{LayerWeights, LinearWeights, WeightSource, Weights};
pub use windows::windows;
pub use workspace::{Workspace, pass_bytes, pass_row_bytes};
