use super::panel::Step;
use super::{STEP, TILE};
use half::bf16;
use std::arch::asm;

/// Products of two tiles of weights and two of activations, `[weights][activations]`: a row for each row of weights.
#[repr(C, align(64))]
pub(super) struct Products(pub [[[f32; TILE]; TILE]; 4]);

/// The layout that `ldtilecfg` reads: palette 1, all eight tiles 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Config([u8; 64]);

const CONFIG: Config = {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        bytes[16 + 2 * tile] = 64;
        bytes[48 + tile] = TILE as u8;
        tile += 1;
    }
    Config(bytes)
};

/// Rows that are asked for while a product is computed.
pub(super) const NEXT_ROWS: usize = 8;

/// Multiplies `steps` steps: weights are 16 rows, `stride` numbers apart. Meanwhile as many numbers of the
/// [`NEXT_ROWS`] rows that begin at `next` are brought into the cache.
///
/// # Panics
/// If there are fewer numbers than that. The processor must have AMX.
pub(super) fn multiply(
    weights: [&[bf16]; 2],
    stride: usize,
    next: *const bf16,
    activations: [&[Step]; 2],
    steps: usize,
) -> Products {
    assert!(weights.iter().all(|w| w.len() >= (TILE - 1) * stride + steps * STEP) && steps > 0, "weights");
    assert!(activations.iter().all(|x| x.len() >= steps), "activations");
    let mut products = Products([[[0.0; TILE]; TILE]; 4]);
    // SAFETY: the caller has asked for AMX. What is read lies in the slices by the assertions above: 16 rows of 64 bytes
    // for each step, and steps of two tiles of 1024 bytes. Four tiles of 1024 bytes are written to `products`. A prefetch
    // may have any address. The state of the tiles is made and released here.
    unsafe {
        asm!(
            "ldtilecfg [{config}]",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{w0} + {stride}]",
            "tileloadd tmm5, [{w1} + {stride}]",
            "prefetcht1 [{next}]",
            "prefetcht1 [{next} + {stride}]",
            "tileloadd tmm6, [{x0} + {row}]",
            "tileloadd tmm7, [{x1} + {row}]",
            "prefetcht1 [{next} + 2*{stride}]",
            "prefetcht1 [{next} + {stride3}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetcht1 [{next4}]",
            "prefetcht1 [{next4} + {stride}]",
            "tileloadd tmm6, [{x0} + {row} + 1024]",
            "tileloadd tmm7, [{x1} + {row} + 1024]",
            "prefetcht1 [{next4} + 2*{stride}]",
            "prefetcht1 [{next4} + {stride3}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {w0}, 64",
            "add {w1}, 64",
            "add {next}, 64",
            "add {next4}, 64",
            "add {x0}, 2048",
            "add {x1}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{out} + {row}], tmm0",
            "tilestored [{out} + {row} + 1024], tmm1",
            "tilestored [{out} + {row} + 2048], tmm2",
            "tilestored [{out} + {row} + 3072], tmm3",
            "tilerelease",
            config = in(reg) CONFIG.0.as_ptr(),
            w0 = inout(reg) weights[0].as_ptr() => _,
            w1 = inout(reg) weights[1].as_ptr() => _,
            x0 = inout(reg) activations[0].as_ptr() => _,
            x1 = inout(reg) activations[1].as_ptr() => _,
            next = inout(reg) next => _,
            next4 = inout(reg) next.wrapping_add(4 * stride) => _,
            stride = in(reg) stride * size_of::<bf16>(),
            stride3 = in(reg) 3 * stride * size_of::<bf16>(),
            row = in(reg) 64usize,
            steps = inout(reg) steps => _,
            out = in(reg) products.0.as_mut_ptr(),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
    products
}
