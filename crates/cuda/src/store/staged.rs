//! What kernels are told of the tokens of a pass, in memory whose addresses never change.

use super::runs::Runs;
use crate::CudaError;
use crate::abi::{ClassSpan, Run, Span as DeviceSpan};
use crate::gpu::Gpu;
use crate::memory::Memory;
use bytemuck::NoUninit;
use dibit_cache::{CacheLayout, PAGE_TOKENS, PageLayout, SideLayout, Span, Transform};
use std::ops::Range;
use std::sync::Arc;

/// Bytes between two changes that are sent along with them.
const GAP: usize = 1 << 14;

/// Spans, tables and runs of a pass.
pub(crate) struct Staged {
    image: Image,
    /// Of each group of layers.
    groups: Vec<GroupRegions>,
    class_spans: Region,
    /// Block tables, and for each block the first one of its chunk.
    tables: Region,
    /// Positions of the tokens of classes.
    positions: Region,
    pre_rope: bool,
    has_chunks: bool,
    /// Keys that leave the window in a pass at most.
    pub most_leaving: usize,
    /// What launches for the spans in place depend on.
    pub shape: StagedShape,
    /// Rows of the spans in place that have the most, and the fewest.
    pub most_rows: usize,
    pub least_rows: usize,
    /// Cached tokens of the longest span.
    pub farthest: usize,
}

/// Rows of a span whose history is cut into splits, at most.
const FEW_ROWS: usize = 16;

/// What grids depend on. All but the number of spans is rounded up to powers of two, so that there are few shapes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(crate) struct StagedShape {
    pub spans: usize,
    /// What leaves the window: runs, and the tokens of the longest one.
    pub runs: usize,
    pub tokens: usize,
    /// Cached tokens of the spans of few rows, the most of them; a page at least.
    pub longest: usize,
}

/// What layers of a group have for themselves.
struct GroupRegions {
    run_count: Region,
    spans: Region,
    runs: Region,
    /// Angles by which keys are turned back, where they are stored before RoPE.
    angles: Region,
}

/// Memory of the GPU, and what it holds.
struct Image {
    memory: Memory,
    bytes: Vec<u8>,
    /// What the GPU does not know yet.
    changed: Vec<Range<usize>>,
}

/// A part of an image.
#[derive(Clone)]
struct Region {
    what: &'static str,
    bytes: Range<usize>,
}

impl Image {
    /// Replaces the first numbers of a region, where they differ.
    fn set<T: NoUninit>(&mut self, region: &Region, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        assert!(bytes.len() <= region.bytes.len(), "{} bytes of {}", bytes.len(), region.what);
        let range = region.bytes.start..region.bytes.start + bytes.len();
        if self.bytes[range.clone()] == *bytes {
            return;
        }
        self.bytes[range.clone()].copy_from_slice(bytes);
        match self.changed.last_mut() {
            Some(last) if range.start >= last.end && range.start - last.end < GAP => last.end = range.end,
            _ => self.changed.push(range),
        }
    }

    /// Tells the GPU what has changed, in one copy where that lies together.
    fn send(&mut self) -> Result<(), CudaError> {
        self.changed.drain(..).try_for_each(|range| self.memory.write(range.start, &self.bytes[range]))
    }

    fn at(&self, region: &Region) -> u64 {
        self.memory.at(region.bytes.start)
    }
}

impl Staged {
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, CudaError> {
        let window = layout.window;
        let slots = window.key_slots().max(window.value_slots());
        let most_leaving = max_rows + num_sequences * slots;
        let classes = if layout.classes.is_empty() { 0 } else { layout.classes.len() + 1 };
        let most_runs = 2 * (most_leaving / PAGE_TOKENS + 2 * num_sequences * classes.max(1) + 1);
        let pre_rope = layout.layers.iter().any(|layer| matches!(layer.keys, Transform::PreRope(_)));
        let has_factors = |side: SideLayout| matches!(side, SideLayout::Packed(side) if side.factors.is_some());
        let factors = |page: &PageLayout| has_factors(page.keys) || has_factors(page.values);
        let has_chunks = layout.layers.iter().flat_map(|layer| &layer.pages).any(factors);
        let positions = if classes > 0 { num_blocks * PAGE_TOKENS + most_leaving } else { 0 };
        let angles = if pre_rope { most_leaving * layout.shape.head_dim } else { 0 };
        let mut end = 0;
        let mut region = |what, count: usize, bytes: usize| {
            let start = end;
            end += (count * bytes).next_multiple_of(256);
            Region { what, bytes: start..start + count * bytes }
        };
        // What changes with every token comes first, and close together.
        let groups = layout.groups.iter().map(|_| GroupRegions {
            run_count: region("runs", 1, size_of::<i32>()),
            spans: region("spans", num_sequences, size_of::<DeviceSpan>()),
            runs: region("runs", most_runs, size_of::<Run>()),
            angles: region("angles", angles, size_of::<f32>()),
        });
        Ok(Staged {
            groups: groups.collect(),
            class_spans: region("spans", num_sequences * classes, size_of::<ClassSpan>()),
            tables: region("block tables", 2 * num_blocks, size_of::<i32>()),
            positions: region("positions", positions, size_of::<i32>()),
            image: Image { memory: Memory::zeros(gpu, "spans", end)?, bytes: vec![0; end], changed: Vec::new() },
            pre_rope,
            has_chunks,
            most_leaving,
            shape: StagedShape::default(),
            most_rows: 0,
            least_rows: 0,
            farthest: 0,
        })
    }

    /// Puts spans in place, with what leaves the window once their rows are stored, where that is wanted.
    pub(super) fn fill(&mut self, layout: &CacheLayout, spans: &[Span], leaves: bool) -> Result<(), CudaError> {
        let window = layout.window;
        let (mut classes, mut tables, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let numbers = |values: &[u32]| values.iter().map(|value| *value as i32).collect::<Vec<_>>();
        let mut longest = 0;
        let mut own: Vec<Vec<DeviceSpan>> = layout.groups.iter().map(|_| Vec::new()).collect();
        let mut runs: Vec<Runs> = layout.groups.iter().map(|_| Runs::default()).collect();
        for (index, span) in spans.iter().enumerate() {
            if span.rows.len() <= FEW_ROWS && span.classes.is_empty() {
                longest = longest.max(span.cached);
            }
            let first_class = classes.len();
            let mut starts = Vec::new();
            for class in &span.classes {
                starts.push(positions.len() as i32);
                classes.push(ClassSpan {
                    tokens: positions.len() as i32,
                    count: class.tokens.len() as i32,
                    packed: class.packed(window.packed_keys(span.cached)) as i32,
                    blocks: tables.len() as i32,
                });
                positions.extend(numbers(&class.tokens));
                tables.extend(numbers(&class.blocks));
            }
            for (number, group) in layout.groups.iter().enumerate() {
                let own_blocks = &span.blocks[number];
                let blocks = tables.len();
                tables.extend(numbers(own_blocks));
                let chunk_starts = tables.len();
                if self.has_chunks {
                    tables.extend((0..own_blocks.len()).map(|index| span.chunk_start(index) as i32));
                }
                own[number].push(DeviceSpan {
                    slot: span.slot as i32,
                    first_row: span.rows.start as i32,
                    rows: span.rows.len() as i32,
                    cached: span.cached as i32,
                    packed_keys: window.packed_keys(span.cached) as i32,
                    packed_values: window.packed_values(span.cached) as i32,
                    blocks: blocks as i32,
                    block_count: own_blocks.len().max(1) as i32,
                    chunks: chunk_starts as i32,
                    classes: first_class as i32,
                    class_count: span.classes.len() as i32,
                });
                if leaves {
                    runs[number].add(layout, group, index, span, &starts);
                }
            }
        }
        let rows = || spans.iter().map(|span| span.rows.len());
        (self.most_rows, self.least_rows) = (rows().max().unwrap_or(0), rows().min().unwrap_or(0));
        self.farthest = spans.iter().map(|span| span.cached).max().unwrap_or(0);
        let rounded = |count: usize| if count == 0 { 0 } else { count.next_power_of_two() };
        let all_runs = runs.iter().flat_map(|own| &own.all);
        self.shape = StagedShape {
            spans: spans.len(),
            runs: rounded(runs.iter().map(|own| own.all.len()).max().unwrap_or(0)),
            tokens: rounded(all_runs.map(|run| run.count as usize).max().unwrap_or(0)),
            longest: longest.next_power_of_two().max(PAGE_TOKENS),
        };
        let image = &mut self.image;
        for ((regions, own), runs) in self.groups.iter().zip(&own).zip(&runs) {
            image.set(&regions.run_count, &[runs.all.len() as i32]);
            image.set(&regions.spans, own);
            image.set(&regions.runs, &runs.all);
            if self.pre_rope {
                image.set(&regions.angles, &angles(layout, &runs.all));
            }
        }
        image.set(&self.class_spans, &classes);
        image.set(&self.tables, &tables);
        image.set(&self.positions, &positions);
        image.send()
    }

    pub(crate) fn run_count(&self, group: usize) -> u64 {
        self.image.at(&self.groups[group].run_count)
    }

    pub(crate) fn spans(&self, group: usize) -> u64 {
        self.image.at(&self.groups[group].spans)
    }

    pub(crate) fn class_spans(&self) -> u64 {
        self.image.at(&self.class_spans)
    }

    pub(crate) fn runs(&self, group: usize) -> u64 {
        self.image.at(&self.groups[group].runs)
    }

    pub(crate) fn tables(&self) -> u64 {
        self.image.at(&self.tables)
    }

    pub(crate) fn positions(&self) -> u64 {
        self.image.at(&self.positions)
    }

    pub(crate) fn angles(&self, group: usize) -> u64 {
        self.image.at(&self.groups[group].angles)
    }
}

/// Cosines and sines of the angles of all keys of runs, as the model made them.
fn angles(layout: &CacheLayout, runs: &[Run]) -> Vec<f32> {
    let frequencies = &layout.tables().inv_freq;
    let keys = runs.iter().filter(|run| run.keys == 1).flat_map(|run| run.first..run.first + run.count);
    let angle = |position: i32| frequencies.iter().map(move |frequency| position as f32 * frequency);
    keys.flat_map(angle).flat_map(|angle| [angle.cos(), angle.sin()]).collect()
}
