//! How rows of a cache are read, in words.

use super::Cpu;
use super::simd::WIDTH;
use dibit_cache::{CachePlan, PackedSide, SideLayout};

/// Inputs of a step of AMX.
#[cfg(target_arch = "x86_64")]
const AMX_STEP: usize = super::amx::STEP;
#[cfg(not(target_arch = "x86_64"))]
const AMX_STEP: usize = 1;

impl Cpu {
    /// How a model with so many query heads attends over a cache: where rows are no whole steps of vectors, the rest goes
    /// another way, and so do output projections that are no whole steps of AMX.
    pub fn paths(&self, layout: &CachePlan, num_attention_heads: usize) -> Vec<(String, String)> {
        let line = |what: &str, path: String| (what.to_owned(), path);
        let pages = layout.layers.iter().chain(layout.classes.iter().flatten()).flat_map(|layer| &layer.pages);
        let sides: Vec<SideLayout> = pages.flat_map(|page| [page.keys, page.values]).collect();
        let is_packed = |side: &SideLayout| matches!(side, SideLayout::Packed(_));
        let mut paths = vec![line("rows in 16 bit", of_half(layout.shape.head_dim))];
        if sides.iter().any(is_packed) {
            let rest = |side: &SideLayout| matches!(side, SideLayout::Packed(side) if has_rest(side));
            let rest = if sides.iter().any(rest) { ", the rest of a row byte by byte" } else { "" };
            paths.push(line("packed rows", format!("{WIDTH} bytes at once{rest}")));
        }
        let inputs = num_attention_heads * layout.shape.head_dim;
        if self.isa != self.isa.without_matrices() && !inputs.is_multiple_of(AMX_STEP) {
            let path = format!("without AMX: {inputs} inputs are no multiple of {AMX_STEP}");
            paths.push(line("output projections of prompts", path));
        }
        paths
    }
}

fn of_half(head_dim: usize) -> String {
    match head_dim % WIDTH {
        _ if head_dim < WIDTH => format!("one of the {head_dim} channels after the other"),
        0 => format!("{WIDTH} channels at once"),
        rest => format!("{WIDTH} channels at once, the last {rest} by themselves"),
    }
}

/// Whether some plane of a packed row is no whole number of steps.
fn has_rest(side: &PackedSide) -> bool {
    let planes = side.bits.planes();
    side.group_spans().any(|span| planes.iter().any(|plane| !plane.stride(span.lanes.len()).is_multiple_of(WIDTH)))
}

#[cfg(test)]
mod tests {
    use crate::{Cpu, Isa};
    use dibit_cache::{CacheModel, CacheShape, CalibratedScheme};

    #[test]
    fn what_is_left_of_rows_is_named() {
        let cpu = Cpu::new(Some(1)).unwrap().with_isa(Isa::Baseline).unwrap();
        let paths = |name: &str, head_dim: usize| -> Vec<String> {
            let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim };
            let layout = CalibratedScheme::load(name).unwrap().plan(&CacheModel::of_shape(shape)).unwrap();
            cpu.paths(&layout, 3).into_iter().map(|(_, path)| path).collect()
        };
        assert_eq!(paths("fp16", 64), ["16 channels at once"]);
        assert_eq!(paths("kivi", 128), ["16 channels at once", "16 bytes at once"]);
        let rest = "16 bytes at once, the rest of a row byte by byte";
        assert_eq!(paths("kivi", 80), ["16 channels at once", rest]);
        assert_eq!(paths("kivi", 72), ["16 channels at once, the last 8 by themselves", rest]);
        assert_eq!(paths("kivi", 8), ["one of the 8 channels after the other", rest]);
    }
}
