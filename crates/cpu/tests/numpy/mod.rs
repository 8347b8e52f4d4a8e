//! Decode attention of every method against values computed by NumPy (tools/golden_schemes.py), on any device.

use dibit_cache::{Batch, CacheModel, CacheShape, CalibratedScheme, Calibration, LayerCalibration, Mode, Sinks};
use dibit_device::{Arithmetic, Device, DeviceError, KvCache, Pass, QueryHeads};
use dibit_quant::Hadamard;
use half::f16;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::sync::Arc;

/// Layer that is run; the one before it is there because pivots are not looked for in the first.
const LAYER: usize = 1;

struct Golden<'a> {
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl Golden<'_> {
    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        let bytes = self.tensors.tensor(name).ok()?.data().to_vec();
        Some(bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
    }

    fn integers(&self, name: &str) -> Option<Vec<u32>> {
        Some(self.floats(name)?.into_iter().map(f32::to_bits).collect())
    }

    fn halves(&self, name: &str) -> Vec<f32> {
        let bytes = self.tensors.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
    }

    fn text(&self, case: &str, key: &str) -> &str {
        &self.metadata[&format!("{case}.{key}")]
    }
}

/// `row <- row U` for each head, `U` being the matrix of its KV head.
fn rotate(out: &mut [f32], basis: &[f32], d: usize, kv_heads: usize) {
    let shared = out.len() / d / kv_heads;
    for (head, row) in out.chunks_exact_mut(d).enumerate() {
        let matrix = &basis[head / shared * d * d..][..d * d];
        let product: Vec<f32> = (0..d).map(|j| (0..d).map(|i| row[i] * matrix[i * d + j]).sum()).collect();
        row.copy_from_slice(&product);
    }
}

/// Prefills all tokens but the last, decodes the last and returns its output.
fn run<D: Device>(device: &D, arithmetic: Arithmetic, golden: &Golden, case: &str, shape: [usize; 4]) -> Vec<f32> {
    let [tokens, heads, kv_heads, d] = shape;
    let set = golden.text(case, "set");
    let mut scheme = CalibratedScheme::parse(golden.text(case, "scheme"), case).unwrap();
    let tensor = |name: &str| format!("{case}.{name}");
    let layer = LayerCalibration {
        // Within a frame the script counts from the frame's first channel.
        permutation: golden.integers(&tensor("perm")),
        key_basis: golden.floats(&tensor("key_basis")),
        value_basis: golden.floats(&tensor("value_basis")),
        ..LayerCalibration::default()
    };
    let shape = CacheShape { num_layers: 2, num_key_value_heads: kv_heads, head_dim: d };
    let frame = scheme.plan(&CacheModel::of_shape(shape)).unwrap().layers[LAYER].frame * d;
    let permutation = layer.permutation.map(|order| {
        order.iter().enumerate().map(|(place, channel)| channel + (place / frame * frame) as u32).collect()
    });
    let layer = LayerCalibration { permutation, ..layer };
    scheme.calibration = scheme.is_calibrated().then(|| Arc::new(Calibration { layers: vec![layer.clone(), layer] }));
    let inv_freq = golden.floats(&format!("{set}.inv_freq")).unwrap();
    let layout = scheme.layout(&CacheModel::new(shape, inv_freq)).unwrap();

    let (q, k, v) =
        (golden.halves(&format!("{set}.q")), golden.halves(&format!("{set}.k")), golden.halves(&format!("{set}.v")));
    // Activations that make the layer protect the case's tokens.
    let mut hidden = vec![1.0; tokens];
    for token in golden.integers(&tensor("sinks")).unwrap_or_default() {
        hidden[token as usize] = 1000.0;
    }
    if let Sinks::Massive(count) = scheme.sinks {
        assert_eq!(hidden.iter().filter(|x| **x > 1.0).count(), count, "{case}");
    }
    let blocks = layout.window.blocks(tokens);
    let mut cache = KvCache::new(device, layout, blocks, 1, tokens, arithmetic).unwrap();
    let mut sequence = cache.open().unwrap();
    let mut out = device.buffer(tokens * heads * d).unwrap();
    for range in [0..tokens - 1, tokens - 1..tokens] {
        cache.reserve(&mut sequence, range.end).unwrap();
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(cache.manager(), &sequence, range.len());
        let kv = range.start * kv_heads * d..range.end * kv_heads * d;
        let upload = |values: &[f32]| device.upload(values).unwrap();
        let (hidden, queries) = (upload(&hidden[range.clone()]), upload(&q.repeat(range.len())));
        let (keys, values) = (upload(&k[kv.clone()]), upload(&v[kv]));
        let attend = |pass: &mut Pass<D>| {
            pass.skip_to(LAYER);
            pass.whole_layer((&hidden, 1), QueryHeads::plain(heads), [&queries, &keys, &values], &mut out)
        };
        cache.pass_once::<DeviceError>(device, &batch, attend).unwrap();
        cache.advance(&mut sequence, range.len());
    }
    let mut last = Vec::new();
    device.download(&out, 0..heads * d, &mut last).unwrap();
    // The script's outputs are in the frame of stored values.
    match golden.text(case, "value_frame") {
        "basis" => rotate(&mut last, &golden.floats(&tensor("value_basis")).unwrap(), d, kv_heads),
        "hadamard" => last.chunks_exact_mut(d).for_each(|head| Hadamard::new(d).unwrap().apply(head)),
        _ => {}
    }
    last
}

/// Compares a device with NumPy, which keeps weights in 32 bits; `tolerance` is a share of the outputs' root mean square.
pub fn compare<D: Device>(device: &D, arithmetic: Arithmetic, tolerance: f32) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/golden/schemes.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().clone().unwrap();
    let golden = Golden { tensors: SafeTensors::deserialize(&bytes).unwrap(), metadata };
    let cases: Vec<&str> = golden.metadata["cases"].split(' ').collect();
    assert!(cases.len() >= 40);
    let mut wrong = Vec::new();
    for case in cases {
        let shape: Vec<usize> =
            golden.text(golden.text(case, "set"), "shape").split(' ').map(|number| number.parse().unwrap()).collect();
        let out = run(device, arithmetic, &golden, case, shape.try_into().unwrap());
        let expected = golden.floats(&format!("{case}.out")).unwrap();
        let rms: f32 = golden.text(case, "rms").parse().unwrap();
        assert_eq!(out.len(), expected.len(), "{case}");
        let worst = out
            .iter()
            .zip(&expected)
            .fold(0f32, |most, (a, b)| if most >= (a - b).abs() { most } else { (a - b).abs() });
        if worst.is_nan() || worst > tolerance * rms {
            wrong.push(format!("{case}: {worst} of {rms}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
