//! The GPU against values computed by NumPy.
#![cfg(feature = "gpu-tests")]

mod common;
#[path = "../../device/tests/numpy/mod.rs"]
mod numpy;

#[test]
fn decode_attention_of_every_method_is_that_of_numpy() {
    let Some(cuda) = common::cuda() else { return };
    numpy::compare(cuda, 3e-4);
}

#[test]
fn tensor_cores_compute_what_numpy_does() {
    let Some(cuda) = common::fast() else { return };
    // Queries and weights are rounded to 16 bits.
    numpy::compare(cuda, 1e-2);
}
