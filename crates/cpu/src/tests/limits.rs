//! Limits of attention: windows, caps of logits, and learned sinks.

use super::*;

#[test]
fn every_scheme_equals_the_reference_within_its_limits() {
    let cpu = Cpu::new(Some(2)).unwrap();
    let mut tried = 0;
    for scheme in all_schemes() {
        for (seen, passes) in [(40, [300, 1, 70]), (200, [129, 333, 1]), (1, [5, 1, 300])] {
            let case = Case::new(scheme.clone(), 4, 2, 64).limited(Some(seen), Some(1.5), true);
            if scheme.layout(&case.model()).is_err() {
                continue;
            }
            tried += 1;
            let tokens = passes.iter().sum();
            let [q, k, v] = data(&case, tokens);
            let width = case.heads * case.head_dim;
            let out = run(&cpu, &case, Mode::Chunk, &passes, &q, &k, &v);
            for position in [passes[0] - 1, passes[0], tokens - 1] {
                let what = format!("{}, {seen} tokens seen, {position}", scheme.name);
                close(&what, &out[position * width..][..width], &case.reference(&q, &k, &v, position, &passes));
            }
            let streamed = run(&cpu, &case, Mode::Streaming, &passes, &q, &k, &v);
            let single = vec![1; tokens];
            assert!(streamed == run(&cpu, &case, Mode::Chunk, &single, &q, &k, &v), "{}, {seen}", scheme.name);
        }
    }
    assert!(tried > 60);
}

#[test]
fn sequences_with_windows_do_not_see_each_other() {
    for name in ["fp16", "kivi", "dibit"] {
        batch_equals_single(&Case::new(scheme(name), 4, 2, 64).limited(Some(100), Some(2.0), true));
    }
}
