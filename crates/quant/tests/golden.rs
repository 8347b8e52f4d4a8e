//! Quantisers and rotations against values computed by NumPy (tools/golden_quant.py, tools/golden_schemes.py).

use dibit_quant::{Affine, Bits, Clip, Hadamard, Quantizer};
use half::f16;
use serde_json::Value;

fn golden(file: &str) -> Value {
    let path = format!("{}/../../fixtures/golden/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn codes(value: &Value) -> Vec<u8> {
    value.as_array().unwrap().iter().map(|code| code.as_u64().unwrap() as u8).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

#[test]
fn codes_scales_and_minimums_are_those_of_numpy() {
    let golden = golden("quant.json");
    let cases = golden["quantiser"].as_array().unwrap();
    assert!(cases.len() >= 100);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let bits = Bits::try_from(case["bits"].as_u64().unwrap() as u32).unwrap();
        let x = floats(&case["x"]);
        let mut codes = vec![0; x.len()];
        let affine = Affine::quantize(&x, bits, &mut codes).unwrap();
        assert_eq!(u64::from(affine.scale.to_bits()), case["s_bits"].as_u64().unwrap(), "{name}");
        assert_eq!(u64::from(affine.min.to_bits()), case["mn_bits"].as_u64().unwrap(), "{name}");
        assert_eq!(codes, self::codes(&case["codes"]), "{name}");
        for (code, expected) in codes.into_iter().zip(floats(&case["xhat"])) {
            let value = affine.value(code);
            assert!((value - expected).abs() <= 1e-6 * expected.abs().max(f16::MIN_POSITIVE.to_f32()), "{name}");
        }
    }
}

#[test]
fn clipped_groups_are_those_of_numpy() {
    let golden = golden("clip.json");
    let cases = golden["groups"].as_array().unwrap();
    assert!(cases.len() >= 150);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let bits = Bits::try_from(case["bits"].as_u64().unwrap() as u32).unwrap();
        let quantizer = match case["quantizer"].as_str().unwrap() {
            "float-min" => Quantizer::FloatMin,
            _ => Quantizer::IntegerZero { clip: 1.0, include_zero: false },
        };
        let x = floats(&case["x"]);
        let own = quantizer.fit_clipped(Clip::Mse, &x, bits).unwrap();
        let got: Vec<u8> = x.iter().map(|x| quantizer.code(own, *x, bits)).collect();
        assert_eq!(got, codes(&case["codes"]), "{name}");
        let values: Vec<f32> = got.iter().map(|code| quantizer.value(own, *code)).collect();
        assert_eq!(values, floats(&case["xhat"]), "{name}");
    }
}

#[test]
fn rotations_are_those_of_numpy() {
    let golden = golden("quant.json");
    let cases = golden["hadamard"].as_array().unwrap();
    assert!(cases.len() >= 5);
    for case in cases {
        let order = case["n"].as_u64().unwrap() as usize;
        let mut row = floats(&case["x"]);
        Hadamard::new(order).unwrap().apply(&mut row);
        for (value, expected) in row.into_iter().zip(floats(&case["y"])) {
            assert!((value - expected).abs() < 1e-5, "order {order}: {value} instead of {expected}");
        }
    }
}
