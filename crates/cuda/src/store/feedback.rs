//! Error feedback of keys, on a GPU.

use crate::CudaError;
use crate::abi;
use crate::gpu::Gpu;
use crate::memory::Memory;
use dibit_cache::KeyFeedback;
use std::sync::Arc;

/// What channels of a layer's keys take up of what others miss.
pub(crate) struct Feedback {
    /// Number in storage of each channel, in the order of coding, `[kv head][head_dim]`.
    places: Memory,
    factors: Memory,
}

impl Feedback {
    /// `storage` has the channels of each KV head in the order of storage, where that is not their own.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        all: &KeyFeedback,
        head_dim: usize,
        storage: Option<&[i32]>,
    ) -> Result<Self, CudaError> {
        let mut stored: Vec<i32> = (0..all.order.len()).map(|at| (at % head_dim) as i32).collect();
        for (at, channel) in storage.into_iter().flatten().enumerate() {
            stored[at / head_dim * head_dim + *channel as usize] = (at % head_dim) as i32;
        }
        let place = |(at, channel): (usize, &u32)| stored[at / head_dim * head_dim + *channel as usize];
        let places: Vec<i32> = all.order.iter().enumerate().map(place).collect();
        Ok(Feedback {
            places: Memory::of(gpu, "error feedback", &places)?,
            factors: Memory::of(gpu, "error feedback", &all.factors)?,
        })
    }

    pub(super) fn for_kernels(&self) -> abi::Feedback {
        abi::Feedback { places: self.places.at(0), factors: self.factors.at(0) }
    }
}
