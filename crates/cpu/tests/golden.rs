//! Decode attention over a packed cache against values computed by NumPy (tools/golden_quant.py).

use dibit_cache::{Batch, CacheModel, CacheShape, CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_device::{Arithmetic, DeviceError, KvCache, Memory, Pass, QueryHeads};
use serde_json::Value;

fn rows(value: &Value) -> Vec<Vec<f32>> {
    let row = |row: &Value| row.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
    value.as_array().unwrap().iter().map(row).collect()
}

#[test]
fn decode_attention_is_that_of_numpy() {
    let cpu = Cpu::new(Some(2)).unwrap();
    for head_dim in [64, 80, 128] {
        let path = format!("{}/../../fixtures/golden/attention_{head_dim}.json", env!("CARGO_MANIFEST_DIR"));
        let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let (q, k, v) = (rows(&golden["q"]), rows(&golden["k"]), rows(&golden["v"]));

        let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim };
        let layout = CalibratedScheme::load("kvlinc").unwrap().layout(&CacheModel::of_shape(shape)).unwrap();
        let cached = golden["cached"].as_u64().unwrap() as usize;
        assert_eq!(layout.window.packed_keys(cached), golden["quantised"].as_u64().unwrap() as usize);
        let mut cache = KvCache::new(&cpu, layout, 2, 1, cached, Arithmetic::Exact).unwrap();
        let mut sequence = cache.open().unwrap();
        let mut out = cpu.buffer(cached * q.len() * head_dim).unwrap();
        for tokens in [0..cached, cached..cached + 1] {
            cache.reserve(&mut sequence, tokens.end).unwrap();
            let mut batch = Batch::new(Mode::Chunk);
            batch.push(cache.manager(), &sequence, tokens.len());
            let (keys, values) = (k[tokens.clone()].concat(), v[tokens.clone()].concat());
            let queries = q.concat().repeat(tokens.len());
            let attend = |pass: &mut Pass<Cpu>| {
                pass.whole_layer((&Vec::new(), 1), QueryHeads::plain(q.len()), [&queries, &keys, &values], &mut out)
            };
            cache.pass_once::<DeviceError>(&cpu, &batch, attend).unwrap();
            cache.advance(&mut sequence, tokens.len());
        }
        for (head, expected) in rows(&golden["out"]).into_iter().enumerate() {
            let got = &out[head * head_dim..][..head_dim];
            let scale = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
            for (got, expected) in got.iter().zip(expected) {
                assert!((*got - expected).abs() < 1e-3 * scale, "head_dim {head_dim}: {got} instead of {expected}");
            }
        }
    }
}
