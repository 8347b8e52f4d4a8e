//! Codes of keys with error feedback against tools/golden_dibit.py.

use super::*;
use crate::encode::{Encoder, Tokens};
use crate::feedback::HeadFeedback;
use dibit_cache::{CacheModel, CodingOrder, KeyFeedback, LayerCalibration, PackedSide, Planes, SideLayout};
use dibit_quant::{Bits, unpack};

fn numbers(golden: &serde_json::Value, name: &str) -> Vec<f32> {
    golden[name].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

fn half(page: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([page[at], page[at + 1]]).to_f32()
}

/// The code of a channel and token from its planes: channels that have a plane come first in each.
fn code(side: &PackedSide, page: &[u8], place: usize, token: usize) -> u32 {
    let planes = side.planes.unwrap();
    let mut codes = vec![0; side.lanes];
    let mut code = 0;
    let mut first = 0;
    for (plane, count) in planes.with.iter().enumerate().take_while(|(_, count)| place < **count) {
        unpack(Bits::Two, &page[side.codes + (first + place) * side.row_bytes..][..side.row_bytes], &mut codes);
        code += u32::from(codes[token]) << (2 * plane);
        first += count;
    }
    code
}

#[test]
fn codes_with_feedback_are_those_of_numpy() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../../../fixtures/golden/dibit.json")).unwrap();
    let integers = |name: &str| numbers(&golden, name).into_iter().map(|x| x as u32).collect::<Vec<_>>();
    let (d, first) = (golden["shape"]["d"].as_u64().unwrap() as usize, golden["shape"]["first"].as_u64().unwrap());
    let counts: Vec<u8> = integers("planes").into_iter().map(|count| count as u8).collect();
    let feedback = KeyFeedback { order: integers("feedback_order"), factors: numbers(&golden, "feedback") };
    let mut scheme = own("", "bits = \"planes\"\nfeedback = true", "bits = 2");
    let layer = LayerCalibration { key_planes: Some(counts.clone()), ..Default::default() };
    scheme.calibration = Some(Arc::new(Calibration { layers: vec![layer] }));
    let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim: d };
    let page_layout = scheme.plan(&CacheModel::of_shape(shape)).unwrap().layers[0].pages[0];
    let orders = [Planes::order(&counts)];
    let feedback = HeadFeedback::all(&CodingOrder::new(&feedback, Some(&orders), d), d);
    let SideLayout::Packed(side) = page_layout.keys else { unreachable!("packed keys") };
    let order = &orders[0];
    let sinks = integers("sinks");
    let apart: Vec<bool> = (0..128).map(|slot| u64::from(slot) < first || sinks.contains(&slot)).collect();
    let (expected, scales, zeros) = (integers("codes"), numbers(&golden, "scales"), numbers(&golden, "zeros"));
    for isa in Isa::available() {
        let mut page = vec![0xa5; page_layout.bytes];
        let tokens = Tokens {
            values: &mut numbers(&golden, "keys"),
            head_dim: d,
            slots: 0..128,
            sinks: &apart,
            order: Some(order),
            feedback: Some(&feedback[0]),
        };
        Encoder::default().encode(isa, &side, tokens, &mut page, None).unwrap();
        for (place, &channel) in order.iter().enumerate() {
            assert_eq!(half(&page, side.zeros + 2 * place), zeros[channel], "{isa:?}, channel {channel}");
            if counts[channel] > 0 {
                assert_eq!(half(&page, side.scales + 2 * place), scales[channel], "{isa:?}, channel {channel}");
            }
            for token in 0..128 {
                let code = code(&side, &page, place, token);
                assert_eq!(code, expected[channel * 128 + token], "{isa:?}, channel {channel}, token {token}");
            }
        }
    }
}
