//! Which attention rows are computed together.

use dibit_cache::Window;
use std::ops::Range;

/// Rows of all query heads of a KV head that are computed together, about.
const TILE_ROWS: usize = 384;

/// Positions of a sequence of `context` tokens whose queries see corrected keys: packed ones beyond the `exact` first.
pub(crate) fn corrected_rows(window: Window, context: usize, exact: usize) -> Vec<u32> {
    let corrected = |position: &u32| window.packed_keys(*position as usize) > exact;
    (0..context as u32).filter(corrected).collect()
}

/// Queries that are computed together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tile {
    /// Their places among the sampled ones.
    pub places: Range<usize>,
    /// Keys that the last of them sees.
    pub visible: usize,
    /// How many of these are packed.
    pub packed: usize,
}

/// Sampled queries of a sequence, in tiles.
pub(crate) struct Tiles {
    /// Positions of the queries, ascending.
    pub rows: Vec<u32>,
    /// Keys that each sees.
    pub visible: Vec<u32>,
    /// How many of these are packed.
    pub packed: Vec<u32>,
    pub tiles: Vec<Tile>,
}

impl Tiles {
    /// Cuts rows into tiles for `group` query heads of a KV head.
    pub(crate) fn new(rows: Vec<u32>, window: Window, group: usize) -> Self {
        let visible: Vec<u32> = rows.iter().map(|row| row + 1).collect();
        // A query sees what was packed before it came.
        let packed: Vec<u32> = rows.iter().map(|row| window.packed_keys(*row as usize) as u32).collect();
        let step = Self::most_rows(group);
        let tile = |first: usize| {
            let places = first..rows.len().min(first + step);
            let last = places.end - 1;
            Tile { places, visible: visible[last] as usize, packed: packed[last] as usize }
        };
        let tiles = (0..rows.len()).step_by(step).map(tile).collect();
        Tiles { rows, visible, packed, tiles }
    }

    /// Most queries of one head in a tile.
    pub(crate) fn most_rows(group: usize) -> usize {
        (TILE_ROWS / group).clamp(16, 128)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_cache::Schedule;

    #[test]
    fn rows_see_what_was_packed_before_them() {
        let window = Window { tokens: 128, schedule: Schedule::Guaranteed };
        let rows = corrected_rows(window, 600, 0);
        assert!(rows.iter().copied().eq(256..600));
        assert!(corrected_rows(window, 256, 0).is_empty());
        assert!(corrected_rows(window, 600, 128).into_iter().eq(384..600));
        let tiles = Tiles::new(rows, window, 3);
        let packed = |row: usize| tiles.packed[row - 256];
        assert_eq!((packed(256), packed(383), packed(384), packed(599)), (128, 128, 256, 384));
        assert_eq!(tiles.visible[0], 257);
        let cut: Vec<(Range<usize>, usize, usize)> =
            tiles.tiles.iter().map(|tile| (tile.places.clone(), tile.visible, tile.packed)).collect();
        assert_eq!(cut, [(0..128, 384, 128), (128..256, 512, 256), (256..344, 600, 384)]);
    }
}
