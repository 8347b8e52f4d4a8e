//! What attention over a case yields by the reference.

use super::*;
use crate::reference::{self, Reference};

impl Case {
    pub(super) fn manager(&self, len: usize, sequences: usize) -> CacheManager {
        let layout = self.layout();
        let blocks = sequences * layout.blocks(len);
        CacheManager::new((*layout).clone(), blocks, sequences)
    }

    /// `[token][head][channel]` data by heads.
    fn by_head(&self, data: &[f32], heads: usize, tokens: usize) -> reference::Heads {
        let rows = || data.chunks_exact(heads * self.head_dim).take(tokens);
        let head = |head: usize| rows().map(|row| row[head * self.head_dim..][..self.head_dim].to_vec()).collect();
        (0..heads).map(head).collect()
    }

    /// Attention of the token at `position`, which sees `cached` tokens as stored, packed in these passes.
    pub(super) fn reference(&self, q: &[f32], k: &[f32], v: &[f32], position: usize, passes: &[usize]) -> Vec<f64> {
        let window = self.scheme.window;
        let layout = self.layout();
        let layer = &layout.layers[LAYER];
        let stored = self.scheme.sees == Sees::Stored;
        let ends = passes.iter().scan(0, |end, rows| {
            *end += rows;
            Some(*end)
        });
        let ends: Vec<usize> = ends.take_while(|end| *end <= position).collect();
        let cached = if stored { position + 1 } else { ends.last().copied().unwrap_or(0) };
        let borders: Vec<usize> = std::iter::once(0).chain(ends.iter().map(|end| window.packed_keys(*end))).collect();
        let calibration = self.scheme.calibration.as_ref().map(|all| all.layers[LAYER].clone());
        let mut reference = Reference {
            head_dim: self.head_dim,
            inv_freq: layout.tables().inv_freq.clone(),
            calibration: calibration.unwrap_or_default(),
            rotated_heads: layer.rotated_heads,
            sinks: match self.scheme.sinks {
                Sinks::None => Vec::new(),
                Sinks::First(count) | Sinks::Auto(AutoSinks { first: count, .. }) => (0..count).collect(),
                Sinks::Massive(_) | Sinks::Pivots(_) => self.sinks.clone(),
            },
            page_sinks: Vec::new(),
            chunks: borders.windows(2).map(|pair| pair[0]..pair[1]).filter(|chunk| !chunk.is_empty()).collect(),
        };
        if let (Sinks::Auto(auto), true) = (self.scheme.sinks, layer.pages[0].sinks.is_some()) {
            let exact = self.by_head(v, self.kv_heads, position + 1);
            let values = self.scheme.sides(0, LAYER).1;
            reference.page_sinks = reference.find_page_sinks(values, auto, &exact, window.packed_values(cached));
        }
        let seen = |is_keys: bool, data: &[f32]| {
            let exact = self.by_head(data, self.kv_heads, position + 1);
            let packed = if is_keys { window.packed_keys(cached) } else { window.packed_values(cached) };
            let of_class = |class: usize| {
                let (keys, values) = self.scheme.sides(class, LAYER);
                reference.seen(if is_keys { keys } else { values }, is_keys, &exact, cached, packed)
            };
            // Tokens of classes are quantised one by one, so each is what its class makes of it.
            let by_class: Vec<reference::Heads> = (0..=self.scheme.classes.len()).map(of_class).collect();
            let class = |token: usize| self.classes.get(token).map_or(0, |class| usize::from(*class));
            let head = |head: usize| (0..=position).map(|token| by_class[class(token)][head][token].clone()).collect();
            (0..self.kv_heads).map(head).collect::<reference::Heads>()
        };
        let (keys, values) = (seen(true, k), seen(false, v));
        let correction = self.scheme.correction(LAYER);
        let side = self.scheme.sides(0, LAYER);
        // The same in 16 bit, and which tokens are packed.
        let [stored_keys, stored_values] = [(side.0, true, k), (side.1, false, v)].map(|(side, is_keys, data)| {
            reference.seen(side, is_keys, &self.by_head(data, self.kv_heads, position + 1), cached, 0)
        });
        let queries = self.by_head(q, self.heads, position + 1);
        let mut out = Vec::new();
        for (head, queries) in queries.iter().enumerate() {
            let kv_head = head / (self.heads / self.kv_heads);
            let packed = 0..window.packed_keys(cached);
            let packed: Vec<usize> = packed.filter(|t| !reference.is_apart(kv_head, *t)).collect();
            let scale = (self.head_dim as f64).sqrt();
            let product = |key: &Vec<f32>| -> f64 {
                key.iter().zip(&queries[position]).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum()
            };
            let mut logits: Vec<f64> = keys[kv_head].iter().map(|key| product(key) / scale).collect();
            if let (true, Side::Packed(form)) = (correction.bias, side.0) {
                let bias = |t: usize| reference.bias(form, &stored_keys, kv_head, &queries[position], t);
                packed.iter().for_each(|t| logits[*t] -= bias(*t));
            }
            if let Some(cap) = self.softcap.map(f64::from) {
                logits.iter_mut().for_each(|l| *l = cap * (*l / cap).tanh());
            }
            let first = self.seen.map_or(0, |seen| (position + 1).saturating_sub(seen));
            logits[..first].fill(f64::NEG_INFINITY);
            let sink = self.head_sinks.as_ref().map(|own| f64::from(own[head]));
            let largest = logits.iter().copied().chain(sink).fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|l| (l - largest).exp()).collect();
            let mut total = weights.iter().sum::<f64>() + sink.map_or(0.0, |sink| (sink - largest).exp());
            let mut sums = vec![0.0; self.head_dim];
            let mut add = |weight: f64, value: &[f32]| {
                sums.iter_mut().zip(value).for_each(|(sum, x)| *sum += weight * f64::from(*x));
            };
            weights.iter().zip(&values[kv_head]).for_each(|(weight, value)| add(*weight, value));
            let adapters = reference.calibration.adapters.as_ref().filter(|_| layer.linear.is_some());
            if let Some(Adapters { features, query, key, gates }) = adapters {
                let phi_q = reference::features(query, head, *features, &queries[position]);
                for &token in &packed {
                    let pair = stored_keys[kv_head][token].iter().zip(&keys[kv_head][token]);
                    let missed: Vec<f32> = pair.map(|(key, seen)| key - seen).collect();
                    let phi_k = reference::features(key, kv_head, *features, &missed);
                    let product: f64 = phi_q.iter().zip(&phi_k).map(|(a, b)| a * b).sum();
                    let weight = f64::from(gates[head]) * product;
                    add(weight, &stored_values[kv_head][token]);
                    total += weight;
                }
            }
            out.extend(sums.into_iter().map(|sum| sum / total));
        }
        out
    }
}
