//! Transforms of values fused into the weights: `W_v <- T^T W_v` and `b_v <- b_v T` for each KV head, and
//! `W_o <- W_o T^-T` for each query head that reads it. Values come as `v' = v T`, softmax weights commute with what
//! happens to channels, and `o = o' T^-1`, so the model computes what it computed before (QuaRot, section 4, and KVLinC,
//! section 3.1, for Hadamard matrices; T may be any matrix with an inverse).

use crate::linear::Linear;
use crate::weights::{BLOCK_ROWS, LinearWeights};
use crate::{LayerWeights, ModelError};
use dibit_cache::{Basis, CacheShape, Phase, ValueTransform};
use dibit_device::{DType, Device, Output, Tensor};
use dibit_quant::Hadamard;
use nalgebra::{DMatrix, DMatrixView};
use std::sync::Arc;

/// A transform of the values of a model with heads of this shape.
pub(crate) struct Fusion {
    shape: CacheShape,
    basis: Arc<Basis>,
}

/// The projections of values and of outputs of a layer, fused.
pub(crate) struct FusedWeights {
    pub v: LinearWeights,
    pub o: LinearWeights,
}

impl Fusion {
    /// # Errors
    /// [`ModelError::Unsupported`] where there is no Hadamard matrix for such heads.
    pub(crate) fn new(shape: CacheShape, transform: &ValueTransform) -> Result<Self, ModelError> {
        let basis = match transform {
            ValueTransform::Basis(basis) => basis.clone(),
            ValueTransform::Hadamard => {
                let hadamard = Hadamard::new(shape.head_dim).map_err(|error| ModelError::Unsupported {
                    what: format!("rotating values of head_dim {}", shape.head_dim),
                    supported: error.to_string(),
                })?;
                Arc::new(Basis::of_hadamard(&hadamard, shape.num_key_value_heads))
            }
        };
        Ok(Fusion { shape, basis })
    }

    /// T of a KV head, transposed.
    fn there(&self, kv_head: usize) -> DMatrix<f32> {
        self.transposed(&self.basis.there, kv_head)
    }

    /// T^-1 of a KV head.
    fn back(&self, kv_head: usize) -> DMatrix<f32> {
        self.transposed(&self.basis.back, kv_head)
    }

    /// A row-major matrix read column by column.
    fn transposed(&self, all: &[f32], kv_head: usize) -> DMatrix<f32> {
        let d = self.shape.head_dim;
        DMatrix::from_column_slice(d, d, &all[kv_head * d * d..(kv_head + 1) * d * d])
    }

    /// Fuses the transform into a layer whose weights are numbers. Sums are in f32; results are stored as the weights were.
    pub(crate) fn fuse(&self, layer: &LayerWeights) -> FusedWeights {
        let shared = layer.o.weight.cols() / self.shape.row();
        let there: Vec<_> = (0..self.shape.num_key_value_heads).map(|head| self.there(head)).collect();
        let back: Vec<_> = (0..self.shape.num_key_value_heads).map(|head| self.back(head)).collect();
        FusedWeights {
            v: LinearWeights {
                weight: self.rows(&layer.v.weight, &there),
                bias: layer.v.bias.as_ref().map(|bias| self.columns(bias, &there, 1)),
            },
            // A row w of a query head becomes w T^-T, as a column T^-1 w.
            o: LinearWeights { weight: self.columns(&layer.o.weight, &back, shared), bias: layer.o.bias.clone() },
        }
    }

    /// `W <- M W` for the rows of each KV head, M being its matrix.
    fn rows(&self, weight: &Tensor, matrices: &[DMatrix<f32>]) -> Tensor {
        let (d, cols) = (self.shape.head_dim, weight.cols());
        Tensor::from_blocks(weight.dtype(), weight.rows(), cols, d, |first, block| {
            for (i, row) in block.chunks_exact_mut(cols).enumerate() {
                row.copy_from_slice(&weight.row(first + i));
            }
            // What is row-major is the transpose column by column.
            let product = DMatrixView::from_slice(block, cols, d) * matrices[first / d].transpose();
            block.copy_from_slice(product.as_slice());
        })
    }

    /// `w <- M w` for the part of each row that belongs to a head, M being the matrix of its KV head, which `shared` heads
    /// have in common.
    fn columns(&self, weight: &Tensor, matrices: &[DMatrix<f32>], shared: usize) -> Tensor {
        let (d, cols) = (self.shape.head_dim, weight.cols());
        Tensor::from_blocks(weight.dtype(), weight.rows(), cols, BLOCK_ROWS, |first, block| {
            let rows = block.len() / cols;
            for (i, row) in block.chunks_exact_mut(cols).enumerate() {
                row.copy_from_slice(&weight.row(first + i));
            }
            for head in 0..cols / d {
                let product = &matrices[head / shared] * DMatrixView::from_slice(block, cols, rows).rows(head * d, d);
                for (row, new) in block.chunks_exact_mut(cols).zip(product.as_slice().chunks_exact(d)) {
                    row[head * d..(head + 1) * d].copy_from_slice(new);
                }
            }
        })
    }

    /// Checks on numbers of its own that fused projections compute what plain ones do.
    ///
    /// # Errors
    /// [`ModelError::FusionTest`], and those of the device.
    pub(crate) fn self_test<D: Device>(
        &self,
        device: &D,
        index: usize,
        [plain_v, plain_o]: [&Linear<D>; 2],
        [fused_v, fused_o]: [&Linear<D>; 2],
        plain: &LayerWeights,
    ) -> Result<(), ModelError> {
        let run = |linear: &Linear<D>, x: &[f32], rows: usize| -> Result<Vec<f32>, ModelError> {
            let (x, mut out) = (device.upload(x)?, device.buffer(rows)?);
            linear.run(device, Phase::Decode, &x, 1, &mut out, Output::Write(0));
            let mut result = Vec::new();
            device.download(&out, 0..rows, &mut result)?;
            Ok(result)
        };
        let probe = |len: usize| Tensor::random(index as u64, 1.0, DType::F32, 1, len).to_f32();
        let d = self.shape.head_dim;
        // `x T` of each head.
        let transformed = |x: &[f32], shared: usize| -> Vec<f32> {
            let heads = x.chunks_exact(d).enumerate();
            heads
                .flat_map(|(head, x)| {
                    let product = self.there(head / shared) * DMatrix::from_column_slice(d, 1, x);
                    product.as_slice().to_vec()
                })
                .collect()
        };
        let [v, o] = [&plain.v.weight, &plain.o.weight];
        let x = probe(v.cols());
        let mut expected = transformed(&run(plain_v, &x, v.rows())?, 1);
        let mut found = run(fused_v, &x, v.rows())?;
        // Channels are as large as the columns of T are: each is looked at in its own size.
        for kv_head in 0..self.shape.num_key_value_heads {
            for (channel, column) in self.there(kv_head).row_iter().enumerate() {
                let (at, size) = (kv_head * d + channel, column.norm());
                (expected[at], found[at]) = (expected[at] / size, found[at] / size);
            }
        }
        compare(index, "values", &expected, &found, v.dtype())?;

        let x = probe(o.cols());
        let expected = run(plain_o, &x, o.rows())?;
        let found = run(fused_o, &transformed(&x, o.cols() / self.shape.row()), o.rows())?;
        compare(index, "outputs", &expected, &found, o.dtype())
    }
}

fn compare(layer: usize, part: &'static str, plain: &[f32], fused: &[f32], dtype: DType) -> Result<(), ModelError> {
    // Results are sums of thousands of products of weights that were rounded once more, whose errors of different sign
    // add up slowly; a fusion that is wrong changes results by their own size.
    let tolerance = match dtype {
        DType::F32 => 1e-3,
        DType::F16 => 5e-3,
        DType::Bf16 => 3e-2,
    };
    let largest = plain.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let difference = plain.iter().zip(fused).fold(0f32, |m, (a, b)| m.max(or_infinite((a - b).abs()))) / largest;
    if difference <= tolerance { Ok(()) } else { Err(ModelError::FusionTest { layer, part, difference, tolerance }) }
}

/// `f32::max` passes over a NaN.
fn or_infinite(x: f32) -> f32 {
    if x.is_nan() { f32::INFINITY } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GatedWeights, MlpWeights};
    use dibit_cache::{CacheModel, CalibratedScheme, Calibration, KeyFeedback, LayerCalibration};
    use dibit_cpu::Cpu;

    const HIDDEN: usize = 48;

    fn linear(seed: u64, rows: usize, cols: usize, bias: bool, dtype: DType) -> LinearWeights {
        LinearWeights {
            weight: Tensor::random(seed, 0.5, dtype, rows, cols),
            bias: bias.then(|| Tensor::random(seed + 1, 3.0, dtype, 1, rows)),
        }
    }

    /// 6 query heads on 2 KV heads; only v and o matter here.
    fn layer(d: usize, dtype: DType) -> LayerWeights {
        let norm = Tensor::random(0, 1.0, dtype, 1, HIDDEN);
        let other = linear(1, 4, HIDDEN, false, dtype);
        LayerWeights {
            input_norm: Some(norm.clone()),
            attention_output_norm: None,
            q: other.clone(),
            k: other.clone(),
            v: linear(2, 2 * d, HIDDEN, true, dtype),
            o: linear(4, HIDDEN, 6 * d, true, dtype),
            q_norm: None,
            k_norm: None,
            sinks: None,
            mlp_norm: Some(norm),
            mlp_output_norm: None,
            mlp: MlpWeights::Gated(GatedWeights { gate: other.clone(), up: other.clone(), down: other }),
        }
    }

    fn shape(d: usize) -> CacheShape {
        CacheShape { num_layers: 1, num_key_value_heads: 2, head_dim: d }
    }

    /// Random matrices whose columns differ in size by a factor of 64, one for each KV head.
    fn basis(d: usize) -> ValueTransform {
        let mut numbers = Tensor::random(9, 1.0, DType::F32, 2 * d, d).to_f32();
        for (i, row) in numbers.chunks_exact_mut(d).enumerate() {
            // Far from singular.
            row[i % d] += 2.0 * (d as f32).sqrt();
            for (channel, x) in row.iter_mut().enumerate() {
                *x *= 64f32.powf(-(channel as f32) / d as f32);
            }
        }
        let mut scheme = CalibratedScheme::load("dibit").unwrap();
        let planes = Some(vec![1; 2 * d]);
        let own = LayerCalibration {
            value_basis: Some(numbers),
            key_planes: planes.clone(),
            value_planes: planes,
            key_feedback: Some(KeyFeedback::none(2, d)),
            ..Default::default()
        };
        scheme.calibration = Some(Arc::new(Calibration { layers: vec![own] }));
        let layout = scheme.layout(&CacheModel::of_shape(shape(d))).unwrap();
        layout.online_values(0).unwrap()
    }

    /// Layer 3 of a model.
    fn test(cpu: &Cpu, fusion: &Fusion, plain: &LayerWeights, fused: FusedWeights) -> Result<(), ModelError> {
        let linear = |weights: &LinearWeights| Linear::new(cpu, weights).unwrap();
        let [plain_v, plain_o, fused_v, fused_o] = [&plain.v, &plain.o, &fused.v, &fused.o].map(linear);
        fusion.self_test(cpu, 3, [&plain_v, &plain_o], [&fused_v, &fused_o], plain)
    }

    #[test]
    fn the_self_test_passes_for_every_head_size_and_dtype() {
        let cpu = Cpu::new(Some(1)).unwrap();
        for d in (8..=256).step_by(8) {
            for transform in [ValueTransform::Hadamard, basis(d)] {
                let fusion = Fusion::new(shape(d), &transform).unwrap();
                for dtype in [DType::F32, DType::F16, DType::Bf16] {
                    let plain = layer(d, dtype);
                    let fused = fusion.fuse(&plain);
                    assert_eq!((fused.v.weight.dtype(), fused.o.weight.dtype()), (dtype, dtype));
                    test(&cpu, &fusion, &plain, fused).unwrap();
                }
            }
        }
    }

    #[test]
    fn the_self_test_catches_wrong_fusions() {
        let cpu = Cpu::new(Some(1)).unwrap();
        let d = 80;
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let plain = layer(d, dtype);
            let transforms = [ValueTransform::Hadamard, basis(d)];
            let fusions = transforms.each_ref().map(|transform| Fusion::new(shape(d), transform).unwrap());
            for (own, other) in [(0, 1), (1, 0)].map(|(own, other)| (&fusions[own], &fusions[other])) {
                let part = |v: &LinearWeights, o: &LinearWeights| match test(
                    &cpu,
                    own,
                    &plain,
                    FusedWeights { v: v.clone(), o: o.clone() },
                ) {
                    Err(ModelError::FusionTest { layer: 3, part, .. }) => part,
                    other => panic!("{other:?}"),
                };
                let (good, wrong) = (own.fuse(&plain), other.fuse(&plain));
                let (weight, bias) = (good.v.weight.clone(), good.v.bias.clone());
                assert_eq!(
                    part(&LinearWeights { weight: weight.clone(), bias: plain.v.bias.clone() }, &good.o),
                    "values"
                );
                assert_eq!(part(&LinearWeights { weight: weight.clone(), bias: None }, &good.o), "values");
                assert_eq!(part(&LinearWeights { weight: plain.v.weight.clone(), bias }, &good.o), "values");
                assert_eq!(part(&wrong.v, &good.o), "values");
                assert_eq!(part(&good.v, &wrong.o), "outputs");
                assert_eq!(part(&good.v, &plain.o), "outputs");
            }
            // Matrices of one KV head for another, the inverse for its transpose, and heads of one group for those of
            // the next.
            let own = &fusions[1];
            let good = own.fuse(&plain);
            let swapped = [own.back(1), own.back(0)];
            let transposed = [own.back(0).transpose(), own.back(1).transpose()];
            let in_turn: Vec<_> = (0..6).map(|head| own.back(head % 2)).collect();
            for (matrices, shared) in [(&swapped[..], 3), (&transposed, 3), (&in_turn, 1)] {
                let o = own.columns(&plain.o.weight, matrices, shared);
                let fused =
                    FusedWeights { v: good.v.clone(), o: LinearWeights { weight: o, bias: plain.o.bias.clone() } };
                assert!(matches!(test(&cpu, own, &plain, fused), Err(ModelError::FusionTest { part: "outputs", .. })));
            }
        }
    }

    #[test]
    fn numbers_that_are_none_fail() {
        assert!(compare(0, "values", &[1.0, f32::NAN], &[1.0, 2.0], DType::Bf16).is_err());
        assert!(compare(0, "values", &[1.0, 2.0], &[f32::NAN, 2.0], DType::Bf16).is_err());
        compare(0, "values", &[1.0, 2.0], &[1.0, 2.0], DType::F32).unwrap();
    }
}
