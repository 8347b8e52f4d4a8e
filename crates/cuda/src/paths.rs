//! How operations run, in words.

use crate::Cuda;
use crate::attention;
use crate::linear::FEW_ROWS;
use crate::store::{packs_on_host, refuses_graphs};
use dibit_cache::{CachePlan, Phase};
use dibit_device::Arithmetic;

impl Cuda {
    /// Operations of a model with so many query heads over a cache, and how each of them runs.
    pub fn paths(
        &self,
        layout: &CachePlan,
        arithmetic: Arithmetic,
        num_attention_heads: usize,
    ) -> Vec<(String, String)> {
        let shared = num_attention_heads / layout.shape.num_key_value_heads;
        let attention = |phase: Phase| {
            format!("{}; {shared} query heads to a KV head", attention::describe(layout, arithmetic, phase))
        };
        let packing = if packs_on_host(layout) { "on the host" } else { "on the GPU" };
        let correction = match layout.layers.iter().find_map(|layer| layer.linear.as_ref()) {
            Some(linear) => format!("{} features, f32", linear.features),
            None => "none".to_owned(),
        };
        let graphs = refuses_graphs(layout).map_or_else(
            || "decoding, from the third pass of a shape on".to_owned(),
            |reason| format!("none: {reason}"),
        );
        let line = |operation: &str, path: String| (operation.to_owned(), path);
        vec![
            line("linear layers of prompts", "cuBLASLt, in the type of the weights".to_owned()),
            line("linear layers of single tokens", format!("own kernels in f32, up to {FEW_ROWS} rows")),
            line("attention of prompts", attention(Phase::Prefill)),
            line("attention of single tokens", format!("{}, long histories in parts", attention(Phase::Decode))),
            line("packing", packing.to_owned()),
            line("correction", correction),
            line("graphs", graphs),
        ]
    }
}
