//! Gathers what one layer shows of a sequence.

use super::adapter::AdapterShape;
use super::layer_pass::Attended;
use super::tiles::Tiles;
use dibit_model::Observation;

/// Rows of one layer that come in tiles, until they are all there.
pub(crate) struct Collector {
    shape: AdapterShape,
    context: usize,
    /// Whether values are wanted.
    values: bool,
    /// Sampled queries that have come.
    queries: usize,
    pub attended: Attended,
}

impl Collector {
    pub(crate) fn new(shape: AdapterShape, context: usize, values: bool) -> Self {
        Collector { shape, context, values, queries: 0, attended: Attended::default() }
    }

    /// Takes what is seen; says whether the layer is complete.
    pub(crate) fn take(&mut self, seen: &Observation, tiles: &Tiles) -> bool {
        let AdapterShape { heads, kv_heads, head_dim, .. } = self.shape;
        let row = kv_heads * head_dim;
        if seen.first_row == 0 {
            self.queries = 0;
            self.attended.keys.clear();
            self.attended.values.clear();
            self.attended.queries.resize(tiles.rows.len() * heads * head_dim, 0.0);
        }
        self.attended.keys.extend_from_slice(seen.k);
        if self.values {
            self.attended.values.extend_from_slice(seen.v);
        }
        let end = self.attended.keys.len() / row;
        while let Some(position) = tiles.rows.get(self.queries).filter(|position| (**position as usize) < end) {
            let first = (*position as usize - seen.first_row) * heads * head_dim;
            self.place(&seen.q[first..first + heads * head_dim], tiles);
            self.queries += 1;
        }
        end == self.context
    }

    /// Puts all heads of the next sampled query into their tile.
    fn place(&mut self, query: &[f32], tiles: &Tiles) {
        let AdapterShape { kv_heads, head_dim, .. } = self.shape;
        let group = self.shape.group();
        let step = Tiles::most_rows(group);
        let tile = &tiles.tiles[self.queries / step].places;
        for (head, query) in query.chunks_exact(head_dim).enumerate() {
            let (kv_head, within) = (head / group, head % group);
            debug_assert!(kv_head < kv_heads);
            let row =
                group * (kv_head * tiles.rows.len() + tile.start) + within * tile.len() + self.queries - tile.start;
            self.attended.queries[row * head_dim..(row + 1) * head_dim].copy_from_slice(query);
        }
    }
}
