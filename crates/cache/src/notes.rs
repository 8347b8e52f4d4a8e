//! What a model's shape changes of what a scheme asks for, in words.

use crate::{Along, CachePlan, LayerLayout, PackedSide, SideLayout, Transform};
use dibit_quant::Hadamard;

impl CachePlan {
    /// What the model's shape changes of what the scheme asks for, as sentences: fewer heads that are rotated together,
    /// rotations by blocks, groups that end short.
    pub fn notes(&self) -> Vec<String> {
        let mut notes: Vec<String> = Vec::new();
        for layer in self.layers.iter().chain(self.classes.iter().flatten()) {
            for note in self.of_layer(layer).map(|note| format!("{}: {note}", self.scheme_name())) {
                if !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
        notes
    }

    fn of_layer(&self, layer: &LayerLayout) -> impl Iterator<Item = String> {
        let head_dim = self.shape.head_dim;
        let (mut fewer, mut orders) = (None, [None, None]);
        match layer.keys {
            Transform::PreRope(choice) => {
                let (heads, rotated) = (self.shape.num_key_value_heads, layer.rotated_heads);
                fewer = (choice.heads > rotated).then(|| {
                    let wanted = choice.heads;
                    format!("keys are rotated over {rotated} heads, not {wanted}: the model has {heads} KV heads")
                });
                orders[0] = (choice.heads > 0).then_some(rotated * head_dim);
            }
            Transform::Hadamard => orders[0] = Some(head_dim),
            _ => {}
        }
        orders[1] = (layer.values == Transform::Hadamard).then_some(head_dim);
        let sides = layer.pages.first().map(|page| [page.keys, page.values]);
        let groups = sides.into_iter().flatten().zip(["key", "value"]).filter_map(|(side, what)| match side {
            SideLayout::Packed(side) => short_group(&side, what),
            SideLayout::Half { .. } => None,
        });
        let rotations = orders.into_iter().zip(["keys", "values"]).filter_map(|(order, what)| by_blocks(order?, what));
        fewer.into_iter().chain(rotations).chain(groups)
    }
}

/// What is said of a Hadamard matrix that is made of blocks.
fn by_blocks(order: usize, what: &str) -> Option<String> {
    let blocks: Vec<String> = Hadamard::new(order).ok()?.blocks().map(|block| block.to_string()).collect();
    (blocks.len() > 1).then(|| {
        let blocks = blocks.join(" + ");
        format!(
            "{what} are rotated by a block-diagonal Hadamard matrix ({blocks}): there is none of order {order} here"
        )
    })
}

/// What is said of groups of channels that do not divide a head.
fn short_group(side: &PackedSide, what: &str) -> Option<String> {
    let channels = match (side.along, side.tokens_are_lanes) {
        (Along::Lanes, false) => side.lanes,
        (Along::Rows, true) => side.rows,
        _ => return None,
    };
    let rest = channels % side.group;
    let group = side.group;
    (rest > 0).then(|| {
        format!("of the {channels} packed {what} channels of a head, groups have {group}, the last one {rest}")
    })
}

#[cfg(test)]
mod tests {
    use crate::{CacheModel, CacheShape, Scheme};

    fn notes(name: &str, num_key_value_heads: usize, head_dim: usize) -> Vec<String> {
        let shape = CacheShape { num_layers: 2, num_key_value_heads, head_dim };
        Scheme::load(name).unwrap().plan(&CacheModel::of_shape(shape)).unwrap().notes()
    }

    #[test]
    fn what_fits_is_not_spoken_of() {
        for head_dim in [8, 32, 48, 64, 80, 96, 128, 256] {
            for name in ["kivi", "kvlinc", "fp16", "dibit"] {
                assert_eq!(notes(name, 4, head_dim), [""; 0], "{name} {head_dim}");
            }
        }
    }

    #[test]
    fn fewer_heads_are_named() {
        for (heads, expected) in [(8, 0), (4, 0), (3, 1), (2, 1)] {
            assert_eq!(notes("rotatekv", heads, 64).len(), expected, "{heads} heads");
        }
        assert!(notes("rotatekv", 2, 64)[0].contains("over 2 heads, not 4"));
    }

    #[test]
    fn blocks_of_rotations_are_named() {
        let expected =
            "kvlinc: values are rotated by a block-diagonal Hadamard matrix (40 + 32): there is none of order 72 here";
        assert_eq!(notes("kvlinc", 4, 72), [expected]);
        // Four heads are rotated together.
        assert!(notes("rotatekv", 4, 72)[0].contains("(160 + 128): there is none of order 288"));
    }

    #[test]
    fn short_groups_are_named() {
        let all = notes("kivi", 4, 136);
        assert_eq!(all, ["kivi: of the 136 packed value channels of a head, groups have 128, the last one 8"]);
        assert_eq!(notes("kivi", 4, 256), [""; 0]);
    }
}
