//! What the codes of keys miss.

use super::*;
use dibit_device::Train;
use made_up::{own, scheme};

#[test]
fn codes_of_keys_miss_the_same() {
    let Some(cuda) = cuda() else { return };
    let cpu = Cpu::new(Some(2)).unwrap();
    let planes = own("correction = \"linear\"", "bits = \"planes\"\ntransform = \"basis\"", "bits = 2");
    let feedback = own("correction = \"linear\"", "bits = 3\nfeedback = true", "bits = 2");
    for scheme in [scheme("kvlinc"), planes, feedback] {
        let case = Case::new(scheme, 4, 2, 80);
        let [_, keys, _] = case.data(0, 256);
        let mut expected = vec![0.0; keys.len()];
        cpu.missed_keys(&case.layout(), LAYER, &keys, 256, &mut expected).unwrap();
        let mut out = cuda.upload(&vec![f32::NAN; keys.len()]).unwrap();
        cuda.missed_keys(&case.layout(), LAYER, &cuda.upload(&keys).unwrap(), 256, &mut out).unwrap();
        let mut got = Vec::new();
        cuda.download(&out, 0..keys.len(), &mut got).unwrap();
        assert!(got == expected && got.iter().any(|x| *x != 0.0), "{}", case.scheme.origin);
    }
}
