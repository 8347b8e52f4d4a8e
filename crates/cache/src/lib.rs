//! What a dibit key-value cache consists of: schemes, page layout, block pool, sequences, windows,
//! flush schedule and accounting.
//!
//! This crate decides where every byte lies and how many there are. It holds none of them and knows
//! no kernels: a device allocates the storage and fills it.
#![forbid(unsafe_code)]

mod basis;
mod batch;
mod calibrated_scheme;
mod error;
mod flush;
mod layout;
mod manager;
mod notes;
mod page_sinks;
mod plan;
mod scheme;
mod sequence_state;
mod side;
mod sink_tokens;
mod states;
mod tables;
mod transforms;
mod usage;
mod value_transform;
mod window;

pub use basis::Basis;
pub use batch::{Batch, Mode, Phase, Span};
pub use calibrated_scheme::CalibratedScheme;
pub use error::{CacheError, SchemeError};
pub use flush::Run;
pub use layout::{CacheLayout, LayerLayout, PageLayout, SideLayout};
pub use manager::{CacheManager, ClassTokens, Sequence};
pub use page_sinks::PageSinks;
pub use plan::{CacheModel, CachePlan, CacheShape};
pub use scheme::{
    AutoSinks, Axis, Class, Correction, LayerOverride, Linear, Packed, Permutation, Pivots, PlaneBudget, Pool, PreRope,
    Scheme, Sees, Side, Sinks, StateType, Statistic, Transform,
};
pub use sequence_state::SequenceState;
pub use side::{Along, Factors, GroupSpan, High, Outliers, PackedSide, Planes};
pub use sink_tokens::SinkTokens;
pub use states::StateLayout;
pub use tables::{Adapters, Calibration, KeyFeedback, LayerCalibration, Tables};
pub use transforms::{CodingOrder, FeatureMaps, HeadTransform, LayerTransforms, PreRopeTransform};
pub use usage::{Extras, Usage};
pub use value_transform::{TransformedValues, ValueTransform};
pub use window::{Schedule, Window};

/// Token slots of a page, and the spacing of the absolute grid on which pages begin.
pub const PAGE_TOKENS: usize = 128;
