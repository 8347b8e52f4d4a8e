//! The GPU against values computed by NumPy.
#![cfg(feature = "gpu-tests")]

mod common;
#[path = "../../cpu/tests/numpy/mod.rs"]
mod numpy;

use dibit_device::Arithmetic;

#[test]
fn decode_attention_of_every_method_is_that_of_numpy() {
    let Some(cuda) = common::cuda() else { return };
    numpy::compare(cuda, Arithmetic::Exact, 3e-4);
}

#[test]
fn tensor_cores_compute_what_numpy_does() {
    let Some(cuda) = common::cuda() else { return };
    // Queries and weights are rounded to 16 bits.
    numpy::compare(cuda, Arithmetic::Fast, 1e-2);
}
