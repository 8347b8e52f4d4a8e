//! Value rotation fused into the weights: `W_v <- H^T W_v`, `b_v <- b_v H` for each KV head and `W_o <- W_o H`
//! for each query head (QuaRot, section 4; KVLinC, section 3.1). Softmax weights commute with a rotation of
//! channels, so the model computes what it computed before.

use crate::weights::LinearWeights;
use crate::{LayerWeights, ModelError};
use dibit_device::{DType, Device, Output, Phase, Tensor};
use dibit_quant::Hadamard;

/// The rotated projections of one layer.
pub(crate) struct RotatedLayer {
    pub v: LinearWeights,
    pub o: LinearWeights,
}

/// Rotates the values of one layer. Sums are in f32; results are stored as the weights were,
/// or in bf16 where these were quantised.
pub(crate) fn rotate(layer: &LayerWeights, hadamard: &Hadamard) -> RotatedLayer {
    RotatedLayer {
        v: LinearWeights {
            weight: rotate_outputs(&layer.v.weight, hadamard),
            bias: layer.v.bias.as_ref().map(|bias| rotate_inputs(bias, hadamard)),
        },
        o: LinearWeights { weight: rotate_inputs(&layer.o.weight, hadamard), bias: layer.o.bias.clone() },
    }
}

/// `W <- W H` for each head's columns.
fn rotate_inputs(weight: &Tensor, hadamard: &Hadamard) -> Tensor {
    Tensor::from_blocks(weight.dtype(), weight.rows(), weight.cols(), 1, |row, block| {
        block.copy_from_slice(&weight.row(row));
        for head in block.chunks_exact_mut(hadamard.order()) {
            hadamard.apply(head);
        }
    })
}

/// `W <- H^T W` for each head's rows, so that `x W^T` becomes `x W^T H`.
fn rotate_outputs(weight: &Tensor, hadamard: &Hadamard) -> Tensor {
    let (d, cols) = (hadamard.order(), weight.cols());
    let mut column = vec![0.0; d];
    Tensor::from_blocks(weight.dtype(), weight.rows(), cols, d, |first, head| {
        for (i, row) in head.chunks_exact_mut(cols).enumerate() {
            row.copy_from_slice(&weight.row(first + i));
        }
        for c in 0..cols {
            for (i, value) in column.iter_mut().enumerate() {
                *value = head[i * cols + c];
            }
            hadamard.apply(&mut column);
            for (i, value) in column.iter().enumerate() {
                head[i * cols + c] = *value;
            }
        }
    })
}

/// Checks on numbers of its own that the rotated projections compute what the plain ones do.
///
/// # Errors
/// [`ModelError::RotationTest`].
pub(crate) fn self_test<D: Device>(
    device: &D,
    index: usize,
    plain: &LayerWeights,
    rotated: &RotatedLayer,
    hadamard: &Hadamard,
) -> Result<(), ModelError> {
    let d = hadamard.order();
    let run = |linear: &LinearWeights, x: &[f32]| -> Result<Vec<f32>, ModelError> {
        let (x, mut out) = (device.upload(x)?, device.buffer(linear.weight.rows())?);
        let bias = linear.bias.as_ref().map(|bias| device.upload(&bias.to_f32())).transpose()?;
        let matrix = device.matrix(linear.weight.clone())?;
        device.linear(Phase::Decode, &x, 1, &matrix, bias.as_ref(), &mut out, Output::Write(0));
        let mut result = Vec::new();
        device.download(&out, 0..linear.weight.rows(), &mut result)?;
        Ok(result)
    };
    let rotate_heads = |values: &mut Vec<f32>| values.chunks_exact_mut(d).for_each(|head| hadamard.apply(head));
    let probe = |len: usize| Tensor::random(index as u64, 1.0, DType::F32, 1, len).to_f32();

    let x = probe(plain.v.weight.cols());
    let mut values = run(&plain.v, &x)?;
    rotate_heads(&mut values);
    compare(index, "values", &values, &run(&rotated.v, &x)?, plain.v.weight.dtype())?;

    let mut x = probe(plain.o.weight.cols());
    let outputs = run(&plain.o, &x)?;
    rotate_heads(&mut x);
    compare(index, "outputs", &outputs, &run(&rotated.o, &x)?, plain.o.weight.dtype())
}

fn compare(layer: usize, part: &'static str, plain: &[f32], rotated: &[f32], dtype: DType) -> Result<(), ModelError> {
    // Rounding a weight to the storage type changes it by up to half a unit in the last place, and errors of
    // different sign add up slowly; a rotation that is wrong changes results by their own size.
    let tolerance = match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 5e-3,
        DType::Bf16 => 3e-2,
    };
    let largest = plain.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let difference = plain.iter().zip(rotated).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest;
    // A NaN fails the test too.
    if difference <= tolerance { Ok(()) } else { Err(ModelError::RotationTest { layer, part, difference, tolerance }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_device::Cpu;

    fn linear(seed: u64, rows: usize, cols: usize, bias: bool, dtype: DType) -> LinearWeights {
        LinearWeights {
            weight: Tensor::random(seed, 0.5, dtype, rows, cols),
            bias: bias.then(|| Tensor::random(seed + 1, 3.0, dtype, 1, rows)),
        }
    }

    /// 3 query heads on 1 KV head; only v and o matter here.
    fn layer(d: usize, dtype: DType) -> LayerWeights {
        let norm = Tensor::random(0, 1.0, dtype, 1, 48);
        let other = linear(1, 4, 48, false, dtype);
        LayerWeights {
            input_norm: norm.clone(),
            q: other.clone(),
            k: other.clone(),
            v: linear(2, d, 48, true, dtype),
            o: linear(4, 48, 3 * d, false, dtype),
            q_norm: None,
            k_norm: None,
            post_norm: norm,
            gate: other.clone(),
            up: other.clone(),
            down: other,
        }
    }

    #[test]
    fn the_self_test_passes_for_every_head_size_and_dtype() {
        let cpu = Cpu::new(Some(1)).unwrap();
        for d in (8..=256).step_by(8) {
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let (hadamard, plain) = (Hadamard::new(d).unwrap(), layer(d, dtype));
                self_test(&cpu, 0, &plain, &rotate(&plain, &hadamard), &hadamard).unwrap();
            }
        }
    }

    #[test]
    fn the_self_test_catches_wrong_fusions() {
        let cpu = Cpu::new(Some(1)).unwrap();
        let (hadamard, plain) = (Hadamard::new(80).unwrap(), layer(80, DType::F32));
        let part = |rotated: RotatedLayer| match self_test(&cpu, 3, &plain, &rotated, &hadamard) {
            Err(ModelError::RotationTest { layer: 3, part, .. }) => part,
            other => panic!("{other:?}"),
        };
        let good = rotate(&plain, &hadamard);
        let no_bias = LinearWeights { weight: good.v.weight.clone(), bias: plain.v.bias.clone() };
        assert_eq!(part(RotatedLayer { v: no_bias, o: good.o.clone() }), "values");
        assert_eq!(part(RotatedLayer { v: good.v, o: plain.o.clone() }), "outputs");
    }
}
