//! What a dibit key-value cache consists of: schemes, page layout, block pool, sequences, windows,
//! flush schedule and accounting.
//!
//! This crate decides where every byte lies and how many there are. It holds none of them and knows
//! no kernels: a device allocates the storage and fills it.
#![forbid(unsafe_code)]

mod basis;
mod batch;
mod block_pool;
mod cache_layout;
mod calibrated_scheme;
mod calibration;
mod error;
mod flush;
mod group;
mod layout;
mod manager;
mod notes;
mod page_sinks;
mod plan;
mod powers;
mod scheme;
mod sequence;
mod sequence_state;
mod shape;
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
pub use block_pool::BlockPool;
pub use cache_layout::CacheLayout;
pub use calibrated_scheme::CalibratedScheme;
pub use calibration::{Adapters, Calibration, KeyFeedback, LayerCalibration};
pub use error::{CacheError, SchemeError};
pub use flush::Run;
pub use group::{Group, Leaving};
pub use layout::{LayerLayout, PageLayout, SideLayout};
pub use manager::CacheManager;
pub use page_sinks::{PageSinks, square_norm};
pub use plan::CachePlan;
pub use powers::Powers;
pub use scheme::{
    AutoSinks, Axis, Class, Correction, LayerOverride, Linear, Packed, Permutation, Pivots, PlaneBudget, Pool, PreRope,
    Scheme, Sees, Side, Sinks, StateType, Statistic, Transform,
};
pub use sequence::{ClassTokens, Sequence};
pub use sequence_state::SequenceState;
pub use shape::{CacheModel, CacheShape};
pub use side::{Along, Factors, GroupSpan, High, Outliers, PackedSide, Planes};
pub use sink_tokens::SinkTokens;
pub use states::StateLayout;
pub use tables::Tables;
pub use transforms::{CodingOrder, FeatureMaps, HeadTransform, LayerTransforms, PreRopeTransform};
pub use usage::{Extras, Usage};
pub use value_transform::{TransformedValues, ValueTransform};
pub use window::{Schedule, Window};

/// Token slots of a page, and the spacing of the absolute grid on which pages begin.
pub const PAGE_TOKENS: usize = 128;

/// Bytes of a number in 16 bit.
pub(crate) const HALF_BYTES: usize = 2;
