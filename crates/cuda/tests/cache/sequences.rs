//! Sequences beside and after one another, streaming, classes, and what is refused.

use super::*;
use made_up::scheme;

/// Tokens of two classes, in a layer that gives them different bits.
fn with_classes(window: &str) -> Case {
    let text = format!(
        "name = \"vl\"\n[keys]\nbits = 2\naxis = \"token\"\ngroup = 64\ntransform = \"hadamard\"\n[values]\nbits = 2\n\
         group = 64\n[sinks]\nkind = \"massive\"\ncount = 4\n{window}[classes.text.layers.1]\nkeys = {{ bits = 4 }}\n\
         values = {{ bits = 3 }}\n"
    );
    let mut case = Case::new(CalibratedScheme::parse(&text, "vl").unwrap(), 4, 2, 64);
    case.classes = (0..700).map(|token| u8::from(token % 7 < 3 || token / 100 == 2)).collect();
    case
}

fn same(what: &str, got: &[f32], expected: &[f32]) {
    let equal = |(got, expected): (&f32, &f32)| got.to_bits() == expected.to_bits();
    assert!(got.len() == expected.len() && got.iter().zip(expected).all(equal), "{what}");
}

/// Three sequences in one batch, and each of them alone.
fn batch_equals_single(cuda: &Cuda, case: &Case) {
    const LENGTHS: [usize; 3] = [300, 70, 140];
    let data: [Data; 3] = std::array::from_fn(|i| case.data(i, LENGTHS[i] + 1));
    let mut machine = Machine::new(cuda, case, 301, 3, 510);
    let mut sequences = LENGTHS.map(|_| machine.cache.open().unwrap());
    let mut batched: [Vec<f32>; 3] = Default::default();
    for passes in [LENGTHS, [1; 3]] {
        let mut all: Vec<_> = sequences
            .iter_mut()
            .zip(passes)
            .zip(&data)
            .map(|((sequence, rows), data)| (sequence, rows, data))
            .collect();
        let out = machine.pass(&mut all, Mode::Chunk).unwrap();
        let mut rest = &out[..];
        for (batched, rows) in batched.iter_mut().zip(passes) {
            let (own, others) = rest.split_at(rows * case.widths()[0]);
            batched.extend_from_slice(own);
            rest = others;
        }
    }
    for ((len, data), batched) in LENGTHS.into_iter().zip(&data).zip(&batched) {
        let mut machine = Machine::new(cuda, case, 301, 1, 300);
        let mut sequence = machine.cache.open().unwrap();
        let alone = machine.run(&mut sequence, Mode::Chunk, &[len, 1], data);
        same(&format!("{}, {len} tokens", case.scheme.origin), batched, &alone);
    }
}

#[test]
fn sequences_in_a_batch_do_not_see_each_other() {
    let Some(cuda) = cuda() else { return };
    for name in ["kivi", "kvlinc", "dibit", "gear", "rotatekv-window", "akvq-vl", "quarot"] {
        batch_equals_single(cuda, &Case::new(scheme(name), 4, 2, 64));
    }
}

#[test]
fn sequences_in_a_batch_do_not_see_each_other_on_tensor_cores() {
    let Some(cuda) = cuda() else { return };
    for name in ["kivi", "kvlinc", "dibit", "gear", "rotatekv-window", "quarot"] {
        batch_equals_single(cuda, &Case::new(scheme(name), 4, 2, 64).fast());
    }
}

#[test]
fn streaming_equals_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for name in ["kivi", "kvlinc", "gear", "rotatekv-window", "quarot", "akvq-vl"] {
        let case = Case::new(scheme(name), 2, 1, 64).protecting(&[0]);
        // What all channels are off by alike lies in one of them where a Hadamard rotation is taken back.
        compare_within([EXACT, 1.5e-2], cuda, name, &case, Mode::Streaming, &[130, 150]);
    }
}

#[test]
fn sanitized_classes_equal_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for window in ["", "[window]\ntokens = 128\nschedule = \"guaranteed\"\n"] {
        let case = with_classes(window);
        compare(cuda, &format!("classes {window}"), &case, Mode::Chunk, &[350, 149, 1]);
        compare(cuda, &format!("classes {window}"), &case.protecting(&[0]), Mode::Streaming, &[150]);
    }
}

#[test]
fn a_sequence_finds_nothing_of_the_one_before_it() {
    let Some(cuda) = cuda() else { return };
    let names = ["fp16", "kvlinc", "gear", "akvq-vl", "rotatekv-window", "resq"];
    let cases = names.map(|name| Case::new(scheme(name), 4, 2, 64)).into_iter().chain([with_classes("")]);
    for case in cases {
        let data = case.data(0, 430);
        let loud = case.data(1, 430).map(|numbers| numbers.iter().map(|x| -100.0 * x).collect());
        let run = |before: bool| {
            let mut machine = Machine::new(cuda, &case, 430, 1, 430);
            if before {
                let mut sequence = machine.cache.open().unwrap();
                machine.run(&mut sequence, Mode::Chunk, &[429, 1], &loud);
                machine.cache.close(sequence);
            }
            let mut sequence = machine.cache.open().unwrap();
            machine.run(&mut sequence, Mode::Chunk, &[300, 129, 1], &data)
        };
        same(&case.scheme.origin, &run(true), &run(false));
    }
}

#[test]
fn numbers_that_fp16_cannot_hold_are_refused_by_name() {
    let Some(cuda) = cuda() else { return };
    for (name, side) in [("fp16", "key"), ("kivi", "value"), ("gear", "value")] {
        let case = Case::new(scheme(name), 2, 1, 64);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut machine = Machine::new(cuda, &case, 140, 2, 140);
            let mut sequences = [0, 1].map(|_| machine.cache.open().unwrap());
            let [first, second] = &mut sequences;
            let good = case.data(0, 140);
            machine.pass(&mut [(&mut *first, 20, &good), (&mut *second, 30, &good)], Mode::Chunk).unwrap();
            let mut wrong = good.clone();
            wrong[if side == "key" { 1 } else { 2 }][35 * 64 + 7] = bad;
            let result = machine.pass(&mut [(first, 10, &good), (&mut *second, 10, &wrong)], Mode::Chunk);
            match result.unwrap_err() {
                DeviceError::NotFinite { side: found, layer: LAYER, kv_head: 0, token: 35, value } => {
                    assert!(found == side && value.is_nan() == bad.is_nan(), "{name}: {found}, {value}");
                }
                other => panic!("{name}: {other}"),
            }
            // What was wrong is forgotten.
            machine.pass(&mut [(second, 10, &good)], Mode::Chunk).unwrap();
        }
    }
}

#[test]
fn numbers_beyond_fp16_are_divided_from_then_on() {
    let Some(cuda) = cuda() else { return };
    let times = |data: &Data, factors: [f32; 3]| -> Data {
        std::array::from_fn(|side| data[side].iter().map(|x| x * factors[side]).collect())
    };
    for name in ["fp16", "kivi", "kvlinc-rotation", "dibit"] {
        for fast in [false, true] {
            let case = Case::new(scheme(name), 4, 2, 64);
            let case = if fast { case.fast() } else { case };
            let data = case.data(0, 300);
            // The same attention, of numbers of another size.
            let large = times(&data, [2f32.powi(-16), 2f32.powi(16), 2f32.powi(20)]);
            let mut machine = Machine::new(cuda, &case, 300, 2, 300);
            let mut sequences = [0, 1].map(|_| machine.cache.open().unwrap());
            let [first, second] = &mut sequences;
            machine.pass(&mut [(&mut *second, 280, &data)], Mode::Chunk).unwrap();
            let mut refused = 0;
            let mut got = loop {
                match machine.pass(&mut [(&mut *first, 290, &large)], Mode::Chunk) {
                    Ok(out) => break out,
                    Err(DeviceError::Overflow { layer: LAYER, value, .. }) => assert!(value.abs() > 65_504.0),
                    Err(other) => panic!("{name}: {other}"),
                }
                // Each side of each head, and once more where a larger number comes later.
                refused += 1;
                machine.cache.clear(first);
            };
            assert!((4..20).contains(&refused), "{name}: {refused}");
            for _ in 0..10 {
                got.extend(machine.pass(&mut [(&mut *first, 1, &large)], Mode::Chunk).unwrap());
            }
            let mut plain = Machine::new(cuda, &case, 300, 1, 300);
            let mut sequence = plain.cache.open().unwrap();
            let expected = plain.run(&mut sequence, Mode::Chunk, &[&[290][..], &[1; 10]].concat(), &data);
            let expected: Vec<f32> = expected.iter().map(|x| x * 2f32.powi(20)).collect();
            close(&format!("{name}, fast: {fast}"), if fast { TOLERANCE } else { EXACT }, &got, &expected);
            // What was stored before is told apart.
            let error = machine.pass(&mut [(&mut *second, 10, &data)], Mode::Chunk).unwrap_err();
            assert!(matches!(error, DeviceError::Stale), "{name}: {error}");
            machine.cache.clear(second);
            machine.pass(&mut [(second, 10, &data)], Mode::Chunk).unwrap();
        }
    }
}

/// Where the host packs the pages of a pass, it meets the number before the GPU is asked what it noted.
#[test]
fn numbers_that_leave_the_window_in_their_own_pass_are_refused_by_name_too() {
    let Some(cuda) = cuda() else { return };
    for name in ["kivi", "gear"] {
        let case = Case::new(scheme(name), 2, 1, 64);
        let mut wrong = case.data(0, 300);
        wrong[2][35 * 64 + 7] = f32::NAN;
        let mut machine = Machine::new(cuda, &case, 300, 1, 300);
        let mut sequence = machine.cache.open().unwrap();
        match machine.pass(&mut [(&mut sequence, 300, &wrong)], Mode::Chunk).unwrap_err() {
            DeviceError::NotFinite { side: "value", layer: LAYER, token: 35, .. } => {}
            other => panic!("{name}: {other}"),
        }
    }
}
