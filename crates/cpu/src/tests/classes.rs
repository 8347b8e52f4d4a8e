//! Classes of tokens.

use super::*;

/// Text at 4 bit in the layer, everything else at 2 bit: AKVQ-VL's text-salient layers.
pub(super) fn with_classes(window: &str) -> Case {
    let text = format!(
        "name = \"vl\"\n[keys]\nbits = 2\naxis = \"token\"\ngroup = 64\ntransform = \"hadamard\"\n[values]\nbits = 2\n\
         group = 64\n[sinks]\nkind = \"massive\"\ncount = 4\n{window}[classes.text.layers.1]\nkeys = {{ bits = 4 }}\n\
         values = {{ bits = 3 }}\n"
    );
    let mut case = Case::new(CalibratedScheme::parse(&text, "vl").unwrap(), 4, 2, 64);
    case.classes = (0..700).map(|token| u8::from(token % 7 < 3 || token / 100 == 2)).collect();
    case
}

#[test]
fn classes_of_tokens_have_bits_and_pages_of_their_own() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for window in ["", "[window]\ntokens = 128\nschedule = \"guaranteed\"\n"] {
        let case = with_classes(window);
        let [q, k, v] = data(&case, 700);
        let passes = [350, 300, 49, 1];
        let out = run(&cpu, &case, Mode::Chunk, &passes, &q, &k, &v);
        let width = case.heads * case.head_dim;
        for position in [0, 349, 350, 649, 650, 699] {
            let expected = case.reference(&q, &k, &v, position, &passes);
            close(&format!("{window} at {position}"), &out[position * width..][..width], &expected);
        }
    }
    // Decoding token by token finds the same places.
    let case = with_classes("").protecting(&[0]);
    let [q, k, v] = data(&case, 300);
    let single = run(&cpu, &case, Mode::Chunk, &[1; 300], &q, &k, &v);
    assert_eq!(run(&cpu, &case, Mode::Streaming, &[300], &q, &k, &v), single);
}

#[test]
fn classes_take_the_bytes_of_their_own_bits() {
    let case = with_classes("");
    let mut manager = case.manager(700, 1);
    let mut sequence = manager.open().unwrap();
    assert!(manager.classify(&mut sequence, &[2]).unwrap_err().to_string().contains("1 classes"));
    manager.classify(&mut sequence, &case.classes).unwrap();
    manager.reserve(&mut sequence, 700).unwrap();
    manager.advance(&mut sequence, 700);
    let of_text = case.classes.iter().filter(|class| **class == 1).count();
    assert_eq!(sequence.num_blocks(), of_text.div_ceil(128) + (700 - of_text).div_ceil(128));
    let usage = manager.plan().sequence_usage(&sequence, Default::default());
    // Layer 0 has 2 bit for all; scales and zeros take half a bit in groups of 64.
    let side = |bits: usize| 2 * (64 * bits / 8 + 4);
    let others = 2 * side(2) * (700 - of_text);
    let texts = (side(2) + (side(4) + side(3)) / 2) * of_text;
    assert_eq!(usage.used_bytes, 2 * (others + texts));
    manager.clear(&mut sequence);
    assert_eq!((sequence.num_blocks(), manager.free_blocks()), (0, manager.num_blocks()));
}
