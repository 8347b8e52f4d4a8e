//! The encoder against the quantiser, one number at a time.

use super::*;
use crate::encode::{Encoder, Tokens};
use dibit_cache::{Along, CacheModel, CalibratedScheme, PackedSide, SideLayout};
use dibit_quant::{Parameters, QuantError, unpack};

/// Keys or values of a scheme with this quantiser.
fn side(keys: bool, channel: bool, bits: usize, group: usize, quantizer: usize, head_dim: usize) -> PackedSide {
    let axis = if channel { "channel" } else { "token" };
    let quantizer = [
        "quantizer = \"float-min\"",
        "quantizer = \"integer-zero\"\nclip = 0.8",
        "quantizer = \"integer-zero\"\ninclude_zero = true",
        "clip = \"mse\"",
        "quantizer = \"integer-zero\"\nclip = \"mse\"",
    ][quantizer];
    let own = format!("bits = {}\naxis = \"{axis}\"\ngroup = {group}\n{quantizer}", [2, 3, 4, 5, 6, 8][bits]);
    let window = "[window]\ntokens = 128\nschedule = \"guaranteed\"";
    let scheme =
        CalibratedScheme::parse(&format!("name = \"own\"\n[keys]\n{own}\n[values]\n{own}\n{window}"), "own").unwrap();
    let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim };
    let page = scheme.plan(&CacheModel::of_shape(shape)).unwrap().layers[0].pages[0];
    match if keys { page.keys } else { page.values } {
        SideLayout::Packed(side) => {
            PackedSide { codes: 0, scales: side.scales - side.codes, zeros: side.zeros - side.codes, ..side }
        }
        SideLayout::Half { .. } => unreachable!("both sides are packed"),
    }
}

fn half(page: &[u8], offset: usize, index: usize) -> f16 {
    f16::from_le_bytes([page[offset + 2 * index], page[offset + 2 * index + 1]])
}

/// The codes of a row of a page.
fn codes(side: &PackedSide, page: &[u8], row: usize) -> Vec<u8> {
    let mut codes = vec![0; side.lanes];
    for span in side.group_spans() {
        let start = side.codes + row * side.row_bytes;
        unpack(side.bits, &page[start + span.bytes.start..start + span.bytes.end], &mut codes[span.lanes]);
    }
    codes
}

/// Numbers of a slot and channel: some of them tiny, some far from zero, some equal.
fn number(kind: usize, seed: usize, slot: usize, channel: usize) -> f32 {
    let noise = ((slot * 131 + channel * 7919 + seed) * 2654435761 % 10007) as f32 / 5003.5 - 1.0;
    match kind {
        0 => noise,
        1 => 300.0 + noise,
        2 => noise * 1e-7,
        3 => (noise * 2.0).round() * -0.0,
        4 => (noise * 3.0).round() * 20000.0,
        _ => noise * 10f32.powi((channel % 9) as i32 - 4),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn codes_and_parameters_are_those_of_the_quantiser(
        keys: bool, channel: bool, bits in 0usize..6, group in 0usize..3, quantizer in 0usize..5, head_dim in 1usize..33,
        slots in (0usize..128, 1usize..129), kind in 0usize..6, seed in 0usize..1000, sinks in prop::collection::vec(0usize..128, 0..20),
    ) {
        let (group, head_dim) = ([32, 64, 128][group], 8 * head_dim);
        let side = side(keys, channel, bits, group, quantizer, head_dim);
        // Groups along tokens fill whole pages.
        let slots = if channel { 0..128 } else { slots.0..128.min(slots.0 + slots.1) };
        let values: Vec<f32> =
            slots.clone().flat_map(|slot| (0..head_dim).map(move |c| number(kind, seed, slot, c))).collect();
        let is_sink: Vec<bool> = slots.clone().map(|slot| sinks.contains(&slot)).collect();
        let value = |slot: usize, channel: usize| values[(slot - slots.start) * head_dim + channel];
        let before: Vec<u8> = (0..side.zeros + 2 * side.num_scales()).map(|i| (i * 89 % 251) as u8).collect();
        for isa in Isa::available() {
            let mut page = before.clone();
            let mut encoder = Encoder::default();
            let tokens = Tokens { values: &mut values.clone(), head_dim, slots: slots.clone(), sinks: &is_sink, order: None, feedback: None };
            encoder.encode(isa, &side, tokens, &mut page, None).unwrap();
            for row in 0..side.rows {
                let (got, old) = (codes(&side, &page, row), codes(&side, &before, row));
                for lane in 0..side.lanes {
                    let (slot, channel) = if keys { (lane, row) } else { (row, lane) };
                    if !slots.contains(&slot) {
                        prop_assert_eq!(got[lane], old[lane], "slot {} is not written", slot);
                        continue;
                    }
                    let first = match side.along {
                        Along::Lanes => lane / side.group * side.group,
                        Along::Rows => row / side.group * side.group,
                    };
                    let cell = |i: usize| if (side.along == Along::Lanes) == keys { (i, channel) } else { (slot, i) };
                    let end = first + side.group;
                    let end = end.min(if side.along == Along::Lanes { side.lanes } else { side.rows });
                    let seen = (first..end).map(cell).filter(|(slot, _)| !sinks.contains(slot));
                    let numbers: Vec<f32> = seen.map(|(slot, channel)| value(slot, channel)).collect();
                    let parameters = match side.quantizer.fit_clipped(side.clip, &numbers, side.bits) {
                        Err(QuantError::Empty) => Parameters { scale: f16::ZERO, zero: f16::ZERO },
                        fitted => fitted.unwrap(),
                    };
                    let index = side.parameter(row, lane);
                    let stored = [side.scales, side.zeros].map(|offset| half(&page, offset, index).to_bits());
                    prop_assert_eq!(stored, [parameters.scale.to_bits(), parameters.zero.to_bits()], "{:?} {} {}", isa, row, lane);
                    let expected = match sinks.contains(&slot) {
                        true => 0,
                        false => side.quantizer.code(parameters, value(slot, channel), side.bits),
                    };
                    prop_assert_eq!(got[lane], expected, "{:?}, slot {}, channel {}", isa, slot, channel);
                }
            }
        }
    }
}

#[test]
fn numbers_that_are_not_finite_are_named() {
    for (keys, channel, index) in [(true, true, 9), (true, false, 5), (false, true, 9), (false, false, 5)] {
        let side = side(keys, channel, 0, 32, 0, 64);
        let mut values = vec![1.0; 128 * 64];
        values[(32 + 10) * 64 + 37] = f32::NAN;
        let mut sinks = [false; 128];
        sinks[33] = true;
        let mut page = vec![0; side.zeros + 2 * side.num_scales()];
        for isa in Isa::available() {
            let tokens = Tokens {
                values: &mut values.clone(),
                head_dim: 64,
                slots: 0..128,
                sinks: &sinks,
                order: None,
                feedback: None,
            };
            let error = Encoder::default().encode(isa, &side, tokens, &mut page, None).unwrap_err();
            assert!(matches!(error, QuantError::NonFinite { index: found, .. } if found == index), "{error}");
        }
    }
}
