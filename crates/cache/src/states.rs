use crate::{Adapters, CacheShape, Linear, StateType};

/// States of the linear correction of one layer and sequence: for each KV head that is corrected `S`, `[D][head_dim]`,
/// and behind it `P`, `[D]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateLayout {
    /// D.
    pub features: usize,
    /// Type of the numbers.
    pub states: StateType,
    /// Place of each KV head among those that are corrected.
    pub places: Vec<Option<usize>>,
    /// Numbers of a KV head.
    pub numbers: usize,
    /// Offset of the layer's states in those of a sequence, in bytes.
    pub offset: usize,
}

impl StateLayout {
    /// The states of a layer with these adapters; `None` where no head is corrected.
    pub(crate) fn new(Linear { features, states }: Linear, adapters: &Adapters, shape: CacheShape) -> Option<Self> {
        let mut next = 0..;
        let enabled = adapters.enabled(shape.num_key_value_heads).into_iter();
        let places: Vec<Option<usize>> =
            enabled.map(|enabled| enabled.then(|| next.next().expect("numbers do not end"))).collect();
        let any = places.iter().any(Option::is_some);
        any.then(|| StateLayout { features, states, places, numbers: features * (shape.head_dim + 1), offset: 0 })
    }

    /// Bytes of the layer's states.
    pub fn bytes(&self) -> usize {
        self.places.iter().flatten().count() * self.head_bytes()
    }

    /// Bytes of the state of a KV head, a multiple of 64.
    pub fn head_bytes(&self) -> usize {
        (self.numbers * self.states.bytes()).next_multiple_of(64)
    }
}
