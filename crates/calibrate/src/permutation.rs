//! RotateKV's order of key channels.

use dibit_cache::{LayerLayout, Permutation, PreRope, Statistic};
use dibit_quant::{Hadamard, turn_back};

/// Sums over tokens of the rotated key channels of one layer, before RoPE.
pub(crate) struct ChannelSums {
    choice: PreRope,
    hadamard: Option<Hadamard>,
    /// Channels that are ordered together.
    frame: usize,
    head_dim: usize,
    pub(crate) sums: Vec<f64>,
    buffer: Vec<f32>,
}

impl ChannelSums {
    pub(crate) fn new(layer: &LayerLayout, choice: PreRope, num_key_value_heads: usize, head_dim: usize) -> Self {
        let hadamard = (choice.heads > 0).then(|| Hadamard::new(layer.rotated_heads * head_dim).ok()).flatten();
        ChannelSums {
            choice,
            hadamard,
            frame: layer.frame * head_dim,
            head_dim,
            sums: vec![0.0; num_key_value_heads * head_dim],
            buffer: Vec::new(),
        }
    }

    /// Adds the key after RoPE of all heads of the token at `position`.
    pub(crate) fn add(&mut self, key: &[f32], position: usize, inv_freq: &[f32]) {
        self.buffer.clear();
        self.buffer.extend_from_slice(key);
        let angles = inv_freq.iter().map(|frequency| position as f32 * frequency);
        turn_back(&mut self.buffer, self.head_dim, angles.map(|angle| (angle.cos(), angle.sin())));
        if let Some(hadamard) = &self.hadamard {
            self.buffer.chunks_exact_mut(hadamard.order()).for_each(|heads| hadamard.apply(heads));
        }
        for (sum, value) in self.sums.iter_mut().zip(&self.buffer) {
            *sum += f64::from(if self.choice.statistic == Statistic::Magnitude { value.abs() } else { *value });
        }
    }

    /// Channels in ascending order of their sums, within each frame; of equals the first comes first.
    pub(crate) fn permutation(&self) -> Option<Vec<u32>> {
        if self.choice.permutation == Permutation::None {
            return None;
        }
        let mut order: Vec<u32> = (0..self.sums.len() as u32).collect();
        for frame in order.chunks_mut(self.frame) {
            frame.sort_by(|a, b| self.sums[*a as usize].total_cmp(&self.sums[*b as usize]));
        }
        Some(order)
    }
}
