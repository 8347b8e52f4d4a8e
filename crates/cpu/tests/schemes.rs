//! The CPU against values computed by NumPy.

use dibit_cpu::Cpu;
use dibit_device::Arithmetic;

mod numpy;

#[test]
fn decode_attention_of_every_method_is_that_of_numpy() {
    // Weights have 16 bits here.
    numpy::compare(&Cpu::new(Some(2)).unwrap(), Arithmetic::Exact, 5e-3);
}
