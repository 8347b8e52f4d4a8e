//! Heads that are divided by powers of two before they are stored.

use super::*;
use dibit_cache::{LayerCalibration, Powers};

/// The case with a calibration that divides heads by powers of two.
fn divided(case: Case) -> Case {
    let heads = case.kv_heads as u8;
    let calibration = case.scheme.calibration.as_ref();
    let mut layers = calibration.map_or_else(|| vec![LayerCalibration::default(); 2], |own| own.layers.clone());
    let mut powers = Powers::default();
    if case.scheme.linear().is_none() {
        powers.set(true, (0..heads).map(|head| 3 * head).collect());
    }
    powers.set(false, (0..heads).map(|head| 2 + head).collect());
    layers.iter_mut().for_each(|layer| layer.powers = powers.clone());
    let mut scheme = case.scheme.clone();
    scheme.calibration = Some(Arc::new(Calibration { layers }));
    Case { scheme, ..case }
}

#[test]
fn heads_that_are_divided_attend_as_they_would() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for scheme in all_schemes() {
        let name = scheme.origin.clone();
        let plain = Case::new(scheme, 4, 2, 64);
        let [q, k, v] = data(&plain, 420);
        let own = divided(Case::new(plain.scheme.clone(), 4, 2, 64));
        for (mode, passes) in [(Mode::Chunk, &[300, 119, 1][..]), (Mode::Streaming, &[420])] {
            let expected = run(&cpu, &plain, mode, passes, &q, &k, &v);
            let got = run(&cpu, &own, mode, passes, &q, &k, &v);
            let expected: Vec<f64> = expected.into_iter().map(f64::from).collect();
            close(&format!("{name}, {mode:?}"), &got, &expected);
        }
    }
}

/// A pass of one sequence whose keys and values are multiplied.
fn pass_of(
    cpu: &Cpu,
    cache: &mut KvCache<Cpu>,
    sequence: &mut Sequence,
    [q, k, v]: [f32; 3],
) -> Result<Vec<f32>, DeviceError> {
    let rows = 140;
    let case = Case::new(scheme("kivi"), 2, 2, 64);
    let [queries, keys, values] = data(&case, rows);
    let times = |factor: f32, data: Vec<f32>| data.into_iter().map(|x| x * factor).collect::<Vec<f32>>();
    let [q, k, v] = [times(q, queries), times(k, keys), times(v, values)];
    let mut batch = Batch::new(Mode::Chunk);
    cache.reserve(sequence, sequence.len() + rows).unwrap();
    batch.push(cache.manager(), sequence, rows);
    let hidden = vec![1.0; rows];
    let mut out = vec![f32::NAN; rows * 2 * 64];
    cache.pass_once::<DeviceError>(cpu, &batch, |pass| {
        (0..LAYER).try_for_each(|_| pass.layer(&hidden, 1).map(drop))?;
        pass.whole_layer((&hidden, 1), QueryHeads::plain(2), [&q, &k, &v], &mut out)
    })?;
    cache.advance(sequence, rows);
    Ok(out)
}

#[test]
fn what_fp16_cannot_hold_is_divided_from_then_on() {
    let cpu = Cpu::new(Some(1)).unwrap();
    let case = Case::new(scheme("kivi"), 2, 2, 64);
    let plain = {
        let mut cache = case.cache(&cpu, 280, 1, 140);
        let mut sequence = cache.open().unwrap();
        (0..2).map(|_| pass_of(&cpu, &mut cache, &mut sequence, [1.0; 3]).unwrap()).collect::<Vec<_>>()
    };
    let mut cache = case.cache(&cpu, 280, 2, 140);
    let [mut sequence, mut other] = [(); 2].map(|()| cache.open().unwrap());
    pass_of(&cpu, &mut cache, &mut other, [1.0; 3]).unwrap();
    let large = [2f32.powi(-20), 2f32.powi(20), 2f32.powi(25)];
    // Both heads, keys and values, each at its first refusal.
    let mut refused = Vec::new();
    let first = loop {
        match pass_of(&cpu, &mut cache, &mut sequence, large) {
            Ok(out) => break out,
            Err(DeviceError::Overflow { side, layer: LAYER, kv_head, exponent, value, .. }) => {
                assert!(value.abs() > 65_504.0 && exponent > 0);
                refused.push((side, kv_head));
            }
            Err(other) => panic!("{other}"),
        }
        cache.clear(&mut sequence);
    };
    refused.sort_unstable();
    refused.dedup();
    assert_eq!(refused, [("key", 0), ("key", 1), ("value", 0), ("value", 1)]);
    let second = pass_of(&cpu, &mut cache, &mut sequence, large).unwrap();
    for (got, expected) in [first, second].iter().zip(&plain) {
        let expected: Vec<f64> = expected.iter().map(|x| f64::from(*x) * 2f64.powi(25)).collect();
        close("divided", got, &expected);
    }
    // What was stored before is told apart, until it is run again.
    let error = pass_of(&cpu, &mut cache, &mut other, [1.0; 3]).unwrap_err();
    assert!(matches!(error, DeviceError::Stale), "{error}");
    cache.clear(&mut other);
    let again = pass_of(&cpu, &mut cache, &mut other, [1.0; 3]).unwrap();
    close("again", &again, &plain[0].iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
    // No power of two helps a number that is none.
    cache.clear(&mut other);
    let error = pass_of(&cpu, &mut cache, &mut other, [1.0, f32::NAN, 1.0]).unwrap_err();
    assert!(matches!(error, DeviceError::NotFinite { side: "key", kv_head: 0, token: 0, .. }), "{error}");
}
