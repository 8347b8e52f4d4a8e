//! Weights of mixtures of experts, as families have them.

use crate::gguf::Packed;
use crate::spec::ExpertNames;
use crate::weights::Loader;
use crate::{ExpertSpec, LinearWeights, ModelError};
use dibit_device::{Routing, Tensor};

/// Weights of a mixture of experts.
#[derive(Clone)]
pub struct ExpertWeights {
    /// `[experts, hidden_size]`
    pub router: LinearWeights,
    /// For each expert `[intermediate_size, hidden_size]`; biases are `[experts, intermediate_size]`.
    pub gate: StackWeights,
    /// The same.
    pub up: StackWeights,
    /// For each expert `[hidden_size, intermediate_size]`; biases are `[experts, hidden_size]`.
    pub down: StackWeights,
    /// How a token's experts are chosen.
    pub routing: Routing,
}

/// Matrices of all experts.
#[derive(Clone)]
pub struct StackWeights {
    /// One for each.
    pub matrices: Vec<Tensor>,
    /// A row for each.
    pub bias: Option<Tensor>,
}

impl ExpertWeights {
    /// The matrices of all experts.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        [&self.gate, &self.up, &self.down].into_iter().flat_map(|stack| &stack.matrices)
    }
}

impl Loader<'_> {
    /// The experts of the layer whose names begin so.
    pub(crate) fn experts(&self, prefix: &str, spec: &ExpertSpec) -> Result<ExpertWeights, ModelError> {
        let (hidden, inner, routing) = (self.config.hidden_size, spec.intermediate_size, spec.routing);
        let experts = routing.experts;
        let each = |names: [&str; 2], rows, cols| -> Result<StackWeights, ModelError> {
            let [before, behind] = names;
            let matrix = |expert| self.matrix(&format!("{prefix}.{before}.{expert}.{behind}.weight"), rows, cols);
            Ok(StackWeights { matrices: (0..experts).map(matrix).collect::<Result<_, _>>()?, bias: None })
        };
        let router = |name: &str, bias| self.linear(&format!("{prefix}.{name}"), experts, hidden, Some(bias));
        let apart = |gate: &str, all: &str, parts: [&str; 3]| -> Result<_, ModelError> {
            Ok(ExpertWeights {
                router: router(gate, false)?,
                gate: each([all, parts[0]], inner, hidden)?,
                up: each([all, parts[1]], inner, hidden)?,
                down: each([all, parts[2]], hidden, inner)?,
                routing,
            })
        };
        let biased = |part: &str, rows, cols| -> Result<StackWeights, ModelError> {
            let bias = self.matrix(&format!("{prefix}.mlp.experts.{part}.bias"), experts, rows)?;
            Ok(StackWeights { bias: Some(bias), ..each(["mlp.experts", part], rows, cols)? })
        };
        match spec.names {
            ExpertNames::Mixtral => apart("block_sparse_moe.gate", "block_sparse_moe.experts", ["w1", "w3", "w2"]),
            ExpertNames::Qwen => apart("mlp.gate", "mlp.experts", ["gate_proj", "up_proj", "down_proj"]),
            ExpertNames::GptOss => {
                let [gate, up, down] = match self.is_gguf() {
                    true => [
                        biased("gate_proj", inner, hidden)?,
                        biased("up_proj", inner, hidden)?,
                        biased("down_proj", hidden, inner)?,
                    ],
                    false => {
                        let [gate, up] = self.halves(prefix, spec)?;
                        [gate, up, self.downs(prefix, spec)?]
                    }
                };
                Ok(ExpertWeights { router: router("mlp.router", true)?, gate, up, down, routing })
            }
        }
    }

    /// Gates and other halves of gpt-oss, whose rows take turns.
    fn halves(&self, prefix: &str, spec: &ExpertSpec) -> Result<[StackWeights; 2], ModelError> {
        let (hidden, inner, experts) = (self.config.hidden_size, spec.intermediate_size, spec.routing.experts);
        let (joint, format) = self.together(prefix, "gate_up_proj", experts, [2 * inner, hidden])?;
        let biases = self.read(&format!("{prefix}.mlp.experts.gate_up_proj_bias"), experts, 2 * inner)?;
        Ok([(0, "gate_proj"), (1, "up_proj")].map(|(half, part)| {
            let matrix = |joint: &Tensor| {
                Tensor::from_blocks(joint.dtype(), inner, hidden, 1, |row, out| joint.widen_row(2 * row + half, out))
            };
            let bias = Tensor::from_blocks(biases.dtype(), experts, inner, 1, |expert, out| {
                let row = biases.row(expert);
                out.iter_mut().zip(row.iter().skip(half).step_by(2)).for_each(|(out, x)| *out = *x);
            });
            self.noted(prefix, part, joint.iter().map(matrix).collect(), format, bias)
        }))
    }

    /// Down projections of gpt-oss.
    fn downs(&self, prefix: &str, spec: &ExpertSpec) -> Result<StackWeights, ModelError> {
        let (hidden, inner, experts) = (self.config.hidden_size, spec.intermediate_size, spec.routing.experts);
        let (matrices, format) = self.together(prefix, "down_proj", experts, [hidden, inner])?;
        let bias = self.read(&format!("{prefix}.mlp.experts.down_proj_bias"), experts, hidden)?;
        Ok(self.noted(prefix, "down_proj", matrices, format, bias))
    }

    /// What was read of tensors that a GGUF file has in parts, by its names, so that the model is known again.
    fn noted(&self, prefix: &str, part: &str, matrices: Vec<Tensor>, format: &str, bias: Tensor) -> StackWeights {
        let name = |own: &str| format!("{prefix}.mlp.experts.{own}");
        for (expert, matrix) in matrices.iter().enumerate() {
            self.sketch(&name(&format!("{expert}.{part}.weight")), matrix, format);
        }
        self.sketch(&name(&format!("{part}.bias")), &bias, bias.format());
        let matrices = matrices.into_iter().map(|matrix| self.converted(matrix)).collect();
        StackWeights { matrices, bias: Some(self.converted(bias)) }
    }

    /// A matrix `[rows, cols]` of each expert, of a tensor of all: in MXFP4, or in numbers, which lie as `[cols, rows]`. And
    /// how the checkpoint stores them.
    fn together(
        &self,
        prefix: &str,
        part: &str,
        experts: usize,
        [rows, cols]: [usize; 2],
    ) -> Result<(Vec<Tensor>, &'static str), ModelError> {
        let name = format!("{prefix}.mlp.experts.{part}");
        if self.is_dummy() {
            let one = |expert| self.read(&format!("{name}.{expert}"), rows, cols);
            return Ok(((0..experts).map(one).collect::<Result<_, _>>()?, "made up"));
        }
        let has_blocks = self.has(&format!("{name}_blocks"));
        if has_blocks && !cols.is_multiple_of(Packed::GROUP) {
            return Err(ModelError::Unsupported {
                what: format!("'{name}' in MXFP4 with rows of {cols} numbers"),
                supported: format!("multiples of {}", Packed::GROUP),
            });
        }
        if let Some(all) = self.bytes(&format!("{name}_blocks"), experts * rows * cols / 2)? {
            let scales = self.bytes(&format!("{name}_scales"), experts * rows * cols / Packed::GROUP)?;
            let scales = scales.ok_or_else(|| self.missing(&format!("{name}_scales")))?;
            let one = |expert: usize| {
                let of = |numbers: usize| {
                    let each = rows * cols / numbers;
                    expert * each..(expert + 1) * each
                };
                Packed::widen_mxfp4(&all[of(2)], &scales[of(Packed::GROUP)], rows, cols)
            };
            return Ok(((0..experts).map(one).collect(), Packed::Mxfp4.name()));
        }
        let all = self.read(&name, experts * cols, rows)?;
        let one = |expert: usize| {
            let own = all.part_rows(expert * cols..(expert + 1) * cols).to_f32();
            Tensor::from_blocks(all.dtype(), rows, cols, 1, |row, out| {
                out.iter_mut().enumerate().for_each(|(col, out)| *out = own[col * rows + row]);
            })
        };
        Ok(((0..experts).map(one).collect(), all.format()))
    }
}
