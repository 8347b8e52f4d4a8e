//! Attention on tensor cores, which rounds queries and weights to fp16.

use super::*;
use made_up::{custom, own, scheme};

/// For what is seen exactly, and for what is packed. Some channels are six times as large as others, and their products with
/// queries in fp16 are what is off.
const TOLERANCES: [f64; 2] = [2e-2, 2e-2];

/// What the kernel of two-bit codes takes, and what it leaves to tiles of tokens.
fn all() -> Vec<CalibratedScheme> {
    let mut schemes: Vec<CalibratedScheme> = ["fp16", "kivi", "kvlinc", "dibit", "quarot", "resq"].map(scheme).into();
    schemes.extend([
        custom(2, 2, 128, "tokens = 128\nschedule = \"kivi\""),
        custom(4, 2, 32, "tokens = 100\nschedule = \"guaranteed\""),
        custom(3, 8, 64, "tokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 4"),
        own("correction = \"bias\"", "bits = 2", "bits = 2"),
        own("", "bits = 2\nquantizer = \"integer-zero\"\nclip = 0.9", "bits = 2\nquantizer = \"integer-zero\""),
        own("", "bits = \"planes\"\naverage_bits = 2.5\ntransform = \"hadamard\"", "bits = 2"),
        own("correction = \"linear\"", "bits = \"planes\"\nfeedback = true", "bits = 2"),
        own("correction = \"bias\"", "bits = 2", "bits = \"planes\"\naxis = \"channel\"\ntransform = \"basis\""),
    ]);
    let only = std::env::var("DIBIT_TEST_SCHEME").unwrap_or_default();
    schemes.retain(|scheme| scheme.origin.contains(&only));
    schemes
}

#[test]
fn tensor_cores_compute_what_the_cpu_does() {
    let Some(cuda) = cuda() else { return };
    for scheme in all() {
        for (heads, kv_heads, head_dim) in [(4, 2, 64), (3, 1, 128)] {
            let case = Case::new(scheme.clone(), heads, kv_heads, head_dim).fast();
            println!("{} {head_dim}", case.scheme.origin);
            compare_within(TOLERANCES, cuda, &case.scheme.origin, &case, Mode::Chunk, &[300, 1, 37, 1]);
        }
    }
}

#[test]
fn tensor_cores_keep_limits_of_what_is_seen_and_of_logits() {
    let Some(cuda) = cuda() else { return };
    let cases = [
        ("fp16", 4, 2, 64, 40),
        ("fp16", 2, 1, 256, 130),
        ("kivi", 4, 2, 64, 200),
        ("dibit", 4, 2, 64, 130),
        ("dibit", 3, 1, 128, 200),
    ];
    for (name, heads, kv_heads, head_dim, seen) in cases {
        let case = Case::new(scheme(name), heads, kv_heads, head_dim).fast().limited(Some(seen), Some(2.0), true);
        println!("{name} {head_dim}");
        compare_within(TOLERANCES, cuda, name, &case, Mode::Chunk, &[300, 1, 37, 60, 1]);
    }
}

#[test]
fn tokens_that_pages_protect_are_seen_on_tensor_cores() {
    let Some(cuda) = cuda() else { return };
    for scheme in schemes::with_page_sinks() {
        for (heads, kv_heads, head_dim) in [(4, 2, 64), (3, 1, 128)] {
            let case = Case::new(scheme.clone(), heads, kv_heads, head_dim).fast();
            println!("{} {head_dim}", case.scheme.origin);
            // Keys whose groups are tokens are off by nearly as much without such tokens.
            compare_within([2e-2, 2.5e-2], cuda, &case.scheme.origin, &case, Mode::Chunk, &[300, 33, 260, 1, 1]);
        }
    }
}

#[test]
fn tiles_are_of_heads_of_any_size() {
    let Some(cuda) = cuda() else { return };
    let schemes = ["fp16", "kivi", "quarot", "resq", "dibit"].map(scheme);
    let custom = custom(3, 8, 64, "tokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 4");
    for scheme in schemes.into_iter().chain([custom]) {
        for head_dim in [32, 72, 144, 248] {
            let case = Case::new(scheme.clone(), 3, 1, head_dim).fast();
            let what = format!("{} {head_dim}", case.scheme.origin);
            // A page is packed before the second pass.
            compare_within(TOLERANCES, cuda, &what, &case, Mode::Chunk, &[300, 1, 20]);
        }
    }
}

#[test]
fn prompts_and_single_tokens_share_a_pass() {
    let Some(cuda) = cuda() else { return };
    for scheme in ["kivi", "dibit", "quarot"].map(scheme) {
        let case = Case::new(scheme, 4, 2, 64);
        let fast = Case::new(case.scheme.clone(), 4, 2, 64).fast();
        let (prompt, other) = (case.data(0, 900), case.data(1, 101));
        let mut reference = Machine::new(cuda, &case, 900, 2, 601);
        let mut machine = Machine::new(cuda, &fast, 900, 2, 601);
        let expected = mixed(&mut reference, [&prompt, &other]);
        let got = mixed(&mut machine, [&prompt, &other]);
        close(&case.scheme.origin, TOLERANCES[1], &got, &expected);
    }
}

/// A pass that goes on with one prompt and decodes behind another.
fn mixed<D: Device>(machine: &mut Machine<D>, [prompt, other]: [&Data; 2]) -> Vec<f32> {
    let mut sequences = [(); 2].map(|()| machine.cache.open().unwrap());
    let [first, second] = &mut sequences;
    machine.pass(&mut [(first, 300, prompt), (second, 100, other)], Mode::Chunk).unwrap();
    machine.pass(&mut [(first, 600, prompt), (second, 1, other)], Mode::Chunk).unwrap()
}
