//! Checkpoints, tokenizers, chat templates and the forward pass.
//!
//! A model is defined once, over [`dibit_device::Device`], and runs on any device.

mod architecture;
mod chat;
mod chat_format;
mod checkpoint;
mod config;
mod distribution;
mod error;
mod expert_weights;
mod families;
mod files;
mod fusion;
mod generation_config;
mod gguf;
mod head_places;
#[cfg(feature = "hub")]
mod hub;
mod impostor;
mod json;
mod layer;
mod linear;
mod mixture;
mod mlp;
mod model;
mod partial;
mod pretrained;
mod quiet_panic;
mod rope;
mod rope_parameters;
mod sketch;
mod spec;
mod stop_tokens;
mod tokenizer;
mod unread_keys;
mod unread_tensors;
mod weights;
mod windows;
mod workspace;

pub use architecture::Architecture;
pub use chat::{ChatTemplate, Message, RenderOptions};
pub use chat_format::{ChatFormat, SpecialTokens};
pub use checkpoint::Checkpoint;
pub use config::{ModelConfig, SUPPORTED_HEAD_DIMS, supports_head_dim};
pub use distribution::Distribution;
pub use error::ModelError;
pub use expert_weights::{ExpertWeights, StackWeights};
pub use files::{ModelFiles, WeightFile};
pub use generation_config::{GenerationConfig, GenerationProblem};
#[cfg(feature = "hub")]
pub use hub::download;
pub use layer::{Observation, Observer};
pub use mlp::{GatedWeights, MlpWeights};
pub use model::{Model, argmax};
pub use pretrained::Pretrained;
pub use rope::{Rope, RopeScaling};
pub use sketch::{Sketch, WeightDifference};
pub use spec::{DecoderSpec, ExpertSpec, NormPlaces, QkNorm};
pub use tokenizer::{TextStream, Tokenizer, TokenizerSettings};
pub use weights::{LayerWeights, LinearWeights, WeightSource, Weights};
pub use windows::windows;
pub use workspace::{Workspace, pass_bytes};
