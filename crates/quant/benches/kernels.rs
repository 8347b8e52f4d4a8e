//! Packing, quantising and rotating, against copying the same numbers. One thread; all fits the processor's caches.

use dibit_quant::{Bits, Hadamard, Quantizer, pack, packed_len, splitmix, unpack};
use dibit_timing::Kernels;
use std::hint::black_box;

/// Rows of a turn.
const ROWS: usize = 1024;

/// Numbers of a row: the tokens of a page, or the channels of a head.
const LANES: usize = 128;

const QUANTIZERS: [(&str, Quantizer); 2] = [
    ("float minimum", Quantizer::FloatMin),
    ("integer zero", Quantizer::IntegerZero { clip: 1.0, include_zero: false }),
];

fn main() {
    packing();
    quantising();
    rotating();
}

fn packing() {
    let codes: Vec<u8> = (0..ROWS * LANES).map(|lane| splitmix(lane as u64) as u8).collect();
    let gb = codes.len() as f64 / 1e9;
    for bits in Bits::ALL {
        let own: Vec<u8> = codes.iter().map(|code| code & bits.max_code()).collect();
        let stride = packed_len(bits, LANES);
        let mut packed = vec![0; ROWS * stride];
        own.chunks(LANES).zip(packed.chunks_mut(stride)).for_each(|(codes, out)| pack(bits, codes, out));
        let (source, mut copied, mut out, mut unpacked) =
            (packed.clone(), own.clone(), packed.clone(), vec![0; own.len()]);
        let kernels = Kernels::new(format!("{bits:?} bits, GB of codes"), "GB/s")
            .add("copy", gb, || copied.copy_from_slice(black_box(&own)))
            .add("pack", gb, || {
                black_box(&own).chunks(LANES).zip(out.chunks_mut(stride)).for_each(|(row, out)| pack(bits, row, out));
            })
            .add("unpack", gb, || {
                let rows = black_box(&source).chunks(stride).zip(unpacked.chunks_mut(LANES));
                rows.for_each(|(row, out)| unpack(bits, row, out));
            });
        println!("{}", kernels.table());
    }
}

fn numbers() -> Vec<f32> {
    (0..ROWS * LANES).map(|lane| (splitmix(lane as u64) % 4096) as f32 / 1024.0 - 2.0).collect()
}

fn quantising() {
    let numbers = numbers();
    let gb = (numbers.len() * size_of::<f32>()) as f64 / 1e9;
    let mut copied = numbers.clone();
    let mut kernels = Kernels::new("to 2 bits in groups of 128, GB of f32", "GB/s")
        .add("copy", gb, || copied.copy_from_slice(black_box(&numbers)));
    for (name, quantizer) in QUANTIZERS {
        let (numbers, mut codes) = (&numbers, vec![0; numbers.len()]);
        kernels = kernels.add(name, gb, move || {
            for (group, codes) in black_box(numbers).chunks(LANES).zip(codes.chunks_mut(LANES)) {
                let parameters = quantizer.fit(group, Bits::Two).expect("finite numbers");
                for (code, value) in codes.iter_mut().zip(group) {
                    *code = quantizer.code(parameters, *value, Bits::Two);
                }
            }
            black_box(&codes);
        });
    }
    println!("{}", kernels.table());
}

fn rotating() {
    for order in [64, 80, 128, 1024] {
        let hadamard = Hadamard::new(order).expect("an order of a Hadamard matrix");
        let numbers = &numbers()[..ROWS * LANES / order * order];
        let (mut copied, mut rotated) = (numbers.to_vec(), numbers.to_vec());
        let gb = size_of_val(numbers) as f64 / 1e9;
        let kernels = Kernels::new(format!("Hadamard rotations of order {order}, GB of f32"), "GB/s")
            .add("copy", gb, || copied.copy_from_slice(black_box(numbers)))
            .add("rotate", gb, || black_box(&mut rotated).chunks_mut(order).for_each(|row| hadamard.apply(row)));
        println!("{}", kernels.table());
    }
}
