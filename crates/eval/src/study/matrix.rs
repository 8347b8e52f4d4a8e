use super::{Axis, GROUP, Rotation, Variant};
use dibit_quant::{Affine, Bits, Hadamard, QuantError};

/// Width of every code of the study.
pub(super) const BITS: Bits = Bits::Two;

/// A matrix that went through two bits and came back to its own frame.
pub(super) struct Quantized {
    /// `[tokens][head_dim]`; tokens behind the last complete group are as they were.
    pub values: Vec<f32>,
    /// Sum of the scales of all groups.
    pub scales: f64,
    /// Number of groups.
    pub groups: usize,
}

/// Quantises the complete groups of 128 tokens of a matrix `[tokens][head_dim]` and dequantises them again.
pub(super) fn quantized(matrix: &[f32], hadamard: &Hadamard, variant: Variant) -> Result<Quantized, QuantError> {
    let head_dim = hadamard.order();
    let tokens = Hadamard::new(GROUP).expect("128 is a power of two");
    let mut result = Quantized { values: matrix.to_vec(), scales: 0.0, groups: 0 };
    let Quantized { values, scales, groups } = &mut result;
    let mut round = |group: &mut [f32]| {
        let affine = Affine::fit(group, BITS)?;
        group.iter_mut().for_each(|x| *x = affine.value(affine.code(*x, BITS)));
        *scales += f64::from(affine.scale.to_f32());
        *groups += 1;
        Ok::<(), QuantError>(())
    };
    for block in values.chunks_exact_mut(GROUP * head_dim) {
        match variant.rotation {
            Rotation::None => {}
            Rotation::Channels => block.chunks_exact_mut(head_dim).for_each(|row| hadamard.apply(row)),
            Rotation::Tokens => columns(block, head_dim, |column| {
                tokens.apply(column);
                Ok(())
            })?,
        }
        match variant.axis {
            Axis::Channel => columns(block, head_dim, &mut round)?,
            Axis::Token => {
                for row in block.chunks_exact_mut(head_dim) {
                    row.chunks_mut(GROUP).try_for_each(&mut round)?;
                }
            }
        }
        match variant.rotation {
            Rotation::None => {}
            Rotation::Channels => block.chunks_exact_mut(head_dim).for_each(|row| hadamard.apply_inverse(row)),
            Rotation::Tokens => columns(block, head_dim, |column| {
                tokens.apply_inverse(column);
                Ok(())
            })?,
        }
    }
    Ok(result)
}

/// Shows each channel of a block of 128 tokens as one slice.
fn columns(
    block: &mut [f32],
    head_dim: usize,
    mut each: impl FnMut(&mut [f32]) -> Result<(), QuantError>,
) -> Result<(), QuantError> {
    let mut column = [0f32; GROUP];
    for channel in 0..head_dim {
        for (lane, row) in column.iter_mut().zip(block.chunks_exact(head_dim)) {
            *lane = row[channel];
        }
        each(&mut column)?;
        for (lane, row) in column.iter().zip(block.chunks_exact_mut(head_dim)) {
            row[channel] = *lane;
        }
    }
    Ok(())
}
