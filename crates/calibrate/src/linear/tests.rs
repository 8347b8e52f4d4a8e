//! The gradient of a layer against central differences of a plain reference in f64.

use super::adapter::{Adapter, AdapterShape, Gates};
use super::layer_pass::{Attended, Input, LayerPass, Sums, Task};
use super::recipe::{Recipe, Start};
use super::start::{Seen, start};
use super::tiles::Tiles;
use dibit_cache::{CacheLayout, CacheModel, CacheShape, CalibratedScheme};
use dibit_cpu::{Cpu, Isa};
use dibit_device::{Memory, Train};

const CONTEXT: usize = 300;

fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next() + next()).collect()
}

fn layout(shape: AdapterShape, sinks: usize) -> CacheLayout {
    let sinks = if sinks > 0 { format!("[sinks]\nkind = \"first\"\ncount = {sinks}\n") } else { String::new() };
    let text = format!(
        "name = \"x\"\ncorrection = \"linear\"\n[keys]\nbits = 2\naxis = \"channel\"\ngroup = 128\n\
         [values]\nbits = 2\naxis = \"token\"\ngroup = 128\n[window]\ntokens = 128\nschedule = \"guaranteed\"\n{sinks}"
    );
    let cache = CacheShape { num_layers: 1, num_key_value_heads: shape.kv_heads, head_dim: shape.head_dim };
    CalibratedScheme::parse(&text, "x").unwrap().layout(&CacheModel::of_shape(cache)).unwrap()
}

/// A layer of a sequence, and adapters.
struct Case {
    shape: AdapterShape,
    layout: CacheLayout,
    tiles: Tiles,
    task: Task,
    /// `[row][head][head_dim]`
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    maps: Vec<f32>,
    logits: Option<Vec<f32>>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, exact: usize, output_weight: f32, gated: bool, seed: u64) -> Self {
        let shape = AdapterShape { heads, kv_heads, head_dim: 16, features: 8 };
        let layout = layout(shape, exact);
        let rows: Vec<u32> = (256..CONTEXT as u32).step_by(if heads > kv_heads { 3 } else { 1 }).collect();
        let tiles = Tiles::new(rows, layout.window, shape.group());
        Case {
            queries: noise(tiles.rows.len() * heads * 16, seed).iter().map(|x| 2.0 * x).collect(),
            keys: noise(CONTEXT * kv_heads * 16, seed + 1),
            values: noise(CONTEXT * kv_heads * 16, seed + 2),
            maps: noise(shape.numbers(), seed + 3),
            logits: gated.then(|| noise(heads, seed + 4)),
            task: Task { train: true, output_weight, exact },
            shape,
            layout,
            tiles,
        }
    }

    fn attended(&self) -> Attended {
        let AdapterShape { heads, kv_heads, head_dim, .. } = self.shape;
        let group = heads / kv_heads;
        let mut queries = Vec::new();
        for kv_head in 0..kv_heads {
            for tile in &self.tiles.tiles {
                for head in kv_head * group..(kv_head + 1) * group {
                    for row in tile.places.clone() {
                        queries.extend_from_slice(&self.queries[(row * heads + head) * head_dim..][..head_dim]);
                    }
                }
            }
        }
        Attended { queries, keys: self.keys.clone(), values: self.values.clone() }
    }

    /// Sums, the gradient by the maps, and that by the logits of gates, as the device computes them.
    fn run(&self, cpu: &Cpu) -> (Sums, Vec<f32>, Vec<f64>) {
        let outputs = self.task.output_weight > 0.0;
        let recipe = Recipe { gate: self.logits.is_some(), ..Recipe::default() };
        let mut adapter = Adapter::new(cpu, self.shape, &recipe).unwrap();
        adapter.maps.copy_from_slice(&self.maps);
        if let (Some(Gates { logits, .. }), Some(own)) = (&mut adapter.gates, &self.logits) {
            logits.copy_from_slice(own);
        }
        let mut pass = LayerPass::new(cpu, self.shape, CONTEXT, outputs).unwrap();
        let mut sums = Sums::new(self.shape.heads);
        let attended = self.attended();
        // Twice: gradients and sums add up, and nothing else is left over.
        for _ in 0..2 {
            let input = Input { layout: &self.layout, layer: 0, attended: &attended, tiles: &self.tiles };
            cpu.scope(|| pass.run(cpu, input, &mut adapter, self.task, &mut sums)).unwrap();
        }
        let gates = adapter.gates.map(|gates| gates.gradient).unwrap_or_default();
        (sums, adapter.gradient, gates)
    }

    /// What the codes miss, `[token][KV head][head_dim]`.
    fn missed(&self, cpu: &Cpu) -> Vec<f32> {
        let mut keys = self.keys.clone();
        keys.resize(384 * self.shape.kv_heads * self.shape.head_dim, 0.0);
        let mut out = vec![0.0; keys.len()];
        cpu.missed_keys(&self.layout, 0, &keys, 256, &mut out).unwrap();
        out
    }

    /// Losses of a query head: cross-entropy, divergence, divergence without a correction and output error, summed over rows,
    /// from the equations.
    fn reference(&self, missed: &[f32], maps: &[f64], gate: f64, head: usize) -> [f64; 4] {
        let AdapterShape { heads, kv_heads, head_dim: d, features } = self.shape;
        let kv_head = head / (heads / kv_heads);
        let numbers =
            |all: &[f32], at: usize| -> Vec<f64> { all[at * d..(at + 1) * d].iter().map(|x| (*x).into()).collect() };
        let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let phi = |x: &[f64], map: usize| -> Vec<f64> {
            let map = &maps[map * d * features..(map + 1) * d * features];
            let z: Vec<f64> = (0..features).map(|f| (0..d).map(|i| x[i] * map[i * features + f]).sum()).collect();
            let softmax = |z: &[f64]| {
                let powers: Vec<f64> = z.iter().map(|z| z.exp()).collect();
                let sum: f64 = powers.iter().sum();
                powers.into_iter().map(move |power| power / sum).collect::<Vec<f64>>()
            };
            [softmax(&z[..features / 2]), softmax(&z[features / 2..])].concat()
        };
        let token = |all: &[f32], token: usize| numbers(all, token * kv_heads + kv_head);
        let keys: Vec<Vec<f64>> = (0..CONTEXT).map(|t| token(&self.keys, t)).collect();
        let missed: Vec<Vec<f64>> = (0..CONTEXT).map(|t| token(missed, t)).collect();
        let values: Vec<Vec<f64>> = (0..CONTEXT).map(|t| token(&self.values, t)).collect();
        let key_features: Vec<Vec<f64>> = missed.iter().map(|e| phi(e, heads + kv_head)).collect();
        let mut sums = [0.0; 4];
        for (index, &row) in self.tiles.rows.iter().enumerate() {
            let packed = self.layout.window.packed_keys(row as usize);
            let query = numbers(&self.queries, index * heads + head);
            let query_features = phi(&query, head);
            let scale = 1.0 / (d as f64).sqrt();
            let exact: Vec<f64> = (0..=row as usize).map(|t| scale * dot(&query, &keys[t])).collect();
            let mixed = |t: usize| exact[t] - if t < packed { scale * dot(&query, &missed[t]) } else { 0.0 };
            let mixed: Vec<f64> = (0..exact.len()).map(mixed).collect();
            let most = mixed.iter().copied().fold(f64::MIN, f64::max);
            let weights = |gate: f64| {
                let corrected = |t: usize| (self.task.exact..packed).contains(&t);
                let added = |t: usize| if corrected(t) { gate * dot(&query_features, &key_features[t]) } else { 0.0 };
                normalised(mixed.iter().enumerate().map(|(t, l)| (l - most).exp() + added(t)).collect())
            };
            let target = normalised(exact.iter().map(|l| l.exp()).collect());
            let cross = |p: &[f64]| -> f64 { target.iter().zip(p).map(|(a, p)| -a * p.max(1e-12).ln()).sum() };
            let (with, without) = (weights(gate), weights(0.0));
            let error = |channel: usize| -> f64 {
                (0..exact.len()).map(|t| (with[t] - target[t]) * values[t][channel]).sum::<f64>().powi(2)
            };
            let output = (0..d).map(error).sum::<f64>() / d as f64;
            let entropy = cross(&target);
            for (sum, own) in
                sums.iter_mut().zip([cross(&with), cross(&with) - entropy, cross(&without) - entropy, output])
            {
                *sum += own;
            }
        }
        sums
    }

    fn gate(&self, logits: &[f64], head: usize) -> f64 {
        if logits.is_empty() { 1.0 } else { 1.0 / (1.0 + (-logits[head]).exp()) }
    }

    /// The loss that is differentiated.
    fn loss(&self, missed: &[f32], maps: &[f64], logits: &[f64], head: usize) -> f64 {
        let [cross, _, _, output] = self.reference(missed, maps, self.gate(logits, head), head);
        cross + f64::from(self.task.output_weight) * output
    }

    #[track_caller]
    fn check(&self, cpu: &Cpu) {
        let AdapterShape { heads, kv_heads, head_dim, features } = self.shape;
        let missed = self.missed(cpu);
        let (sums, gradient, gate_gradient) = self.run(cpu);
        let mut maps: Vec<f64> = self.maps.iter().map(|x| f64::from(*x)).collect();
        let mut logits: Vec<f64> = self.logits.iter().flatten().map(|x| f64::from(*x)).collect();
        assert_eq!(sums.rows, 2 * self.tiles.rows.len());
        let outputs = self.task.output_weight > 0.0;
        for head in 0..heads {
            let expected = self.reference(&missed, &maps, self.gate(&logits, head), head);
            let found = [&sums.cross_entropy, &sums.divergence, &sums.uncorrected, &sums.output];
            for (place, (found, expected)) in
                found.into_iter().zip(expected).enumerate().take(if outputs { 4 } else { 3 })
            {
                let (found, rows) = (found[head] / 2.0, self.tiles.rows.len() as f64);
                assert!((found - expected).abs() < 4e-6 * rows, "head {head}, sum {place}: {found}, not {expected}");
            }
        }
        let step = 1e-5;
        let close = |found: f64, expected: f64, what: &str| {
            let error = (found / 2.0 - expected).abs();
            assert!(error < 2e-4 * expected.abs().max(0.05), "{what}: {}, not {expected}", found / 2.0);
        };
        for at in 0..maps.len() {
            // A map of keys is in the losses of all query heads of its KV head.
            let map = at / (head_dim * features);
            let group = heads / kv_heads;
            let own = if map < heads { map..map + 1 } else { (map - heads) * group..(map - heads + 1) * group };
            let mut moved = |by: f64| {
                maps[at] += by;
                let loss: f64 = own.clone().map(|head| self.loss(&missed, &maps, &logits, head)).sum();
                maps[at] -= by;
                loss
            };
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            close(gradient[at].into(), expected, &format!("number {at} of the maps"));
        }
        for head in 0..logits.len() {
            let mut moved = |by: f64| {
                logits[head] += by;
                let loss = self.loss(&missed, &maps, &logits, head);
                logits[head] -= by;
                loss
            };
            let expected = (moved(step) - moved(-step)) / (2.0 * step);
            close(gate_gradient[head], expected, &format!("gate {head}"));
        }
    }
}

fn normalised(weights: Vec<f64>) -> Vec<f64> {
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / sum).collect()
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let cpu = Cpu::new(Some(2)).unwrap();
    Case::new(1, 1, 0, 0.0, false, 1).check(&cpu);
    Case::new(4, 2, 0, 0.0, true, 2).check(&cpu);
    Case::new(2, 2, 4, 0.0, true, 3).check(&cpu);
    Case::new(2, 1, 4, 5.0, true, 4).check(&cpu);
}

/// The script needs a Python with PyTorch: that which `DIBIT_PYTHON` names, or else `python3`.
#[test]
fn gradients_are_those_of_autograd() {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tools/train_oracle.py");
    let python = std::env::var_os("DIBIT_PYTHON").unwrap_or_else(|| "python3".into());
    let folder = tempfile::TempDir::new().unwrap();
    let path = folder.path().join("case.json");
    let cpu = Cpu::new(Some(1)).unwrap();
    for case in [Case::new(4, 2, 0, 0.0, true, 11), Case::new(2, 1, 4, 3.0, false, 12)] {
        let (sums, maps_gradient, gates_gradient) = case.run(&cpu);
        let weight = f64::from(case.task.output_weight);
        let loss = sums.cross_entropy.iter().sum::<f64>() + weight * sums.output.iter().sum::<f64>();
        // The run goes over the sequence twice.
        let numbers = serde_json::json!({
            "heads": case.shape.heads, "kv_heads": case.shape.kv_heads, "head_dim": case.shape.head_dim,
            "features": case.shape.features, "exact": case.task.exact, "output_weight": weight,
            "rows": case.tiles.rows, "packed": case.tiles.packed,
            "queries": case.queries, "keys": case.keys, "values": case.values,
            "missed": case.missed(&cpu)[..case.keys.len()],
            "maps": case.maps, "gates": case.logits.clone().unwrap_or_default(), "loss": loss / 2.0,
            "maps_gradient": maps_gradient.iter().map(|x| x / 2.0).collect::<Vec<f32>>(),
            "gates_gradient": gates_gradient.iter().map(|x| x / 2.0).collect::<Vec<f64>>(),
        });
        std::fs::write(&path, numbers.to_string()).unwrap();
        let run = std::process::Command::new(&python).arg(&script).arg(&path).env("OMP_NUM_THREADS", "1").output();
        let Ok(run) = run else { return println!("skipped: there is no {}", python.display()) };
        if run.status.code() == Some(77) {
            return println!("skipped: {} has no PyTorch", python.display());
        }
        let said = String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned();
        assert!(run.status.success(), "{said}");
        println!("{said}");
    }
}

#[test]
fn every_instruction_set_computes_the_gradient() {
    let case = Case::new(2, 1, 2, 1.0, true, 5);
    let of = |isa: Isa| case.run(&Cpu::new(Some(1)).unwrap().with_isa(isa).unwrap());
    let (_, expected, _) = of(Isa::Baseline);
    for isa in Isa::available() {
        let (_, found, _) = of(isa);
        let scale = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-4 * scale), "{isa:?}");
    }
}

#[test]
fn a_measurement_leaves_the_gradient_alone() {
    let cpu = Cpu::new(Some(1)).unwrap();
    let mut case = Case::new(4, 2, 0, 0.0, true, 6);
    let (trained, ..) = case.run(&cpu);
    case.task.train = false;
    let (measured, gradient, gates) = case.run(&cpu);
    assert_eq!(measured, trained);
    assert!(gradient.iter().all(|x| *x == 0.0) && gates.iter().all(|x| *x == 0.0));
}

#[test]
fn zero_maps_add_the_same_to_every_packed_key() {
    // Features are then all alike: 2 halves of D / 2 products of 2 / D each, 4 / D.
    let cpu = Cpu::new(Some(1)).unwrap();
    let mut case = Case::new(1, 1, 0, 0.0, false, 7);
    case.maps.fill(0.0);
    let [cross, ..] = case.reference(&case.missed(&cpu), &vec![0.0; case.shape.numbers()], 1.0, 0);
    let (sums, ..) = case.run(&cpu);
    assert!((sums.cross_entropy[0] / 2.0 - cross).abs() < 1e-4);
    let uniform = vec![1.0 / 4.0; 8];
    let product: f64 = uniform.iter().zip(&uniform).map(|(a, b): (&f64, &f64)| a * b).sum();
    assert_eq!(product, 4.0 / 8.0);
}

#[test]
fn starts_are_reproducible_and_as_they_say() {
    let shape = AdapterShape { heads: 4, kv_heads: 2, head_dim: 16, features: 32 };
    let seen = Seen { mean_query: noise(64, 1), query_norm: vec![4.0; 4], missed_norm: vec![2.0, 0.0] };
    let map = 16 * 32;
    for kind in [Start::Uniform, Start::Aligned, Start::Apart] {
        let of = |seed, layer| start(shape, kind, seed, layer, Some(&seen));
        assert_eq!(of(1, 0), of(1, 0));
        assert_ne!(of(1, 0), of(2, 0));
        assert_ne!(of(1, 0), of(1, 1));
        assert_eq!(of(1, 0).len(), shape.numbers());
        assert!(of(1, 0).iter().all(|x| x.is_finite()));
    }
    let uniform = start(shape, Start::Uniform, 1, 0, None);
    let bound = (6.0f32 / (16.0 * 16.0)).sqrt();
    let most = uniform.iter().fold(0f32, |most, x| most.max(x.abs()));
    assert!(most <= bound && most > 0.98 * bound, "{most} {bound}");
    // The same directions, in the size of each side.
    let aligned = start(shape, Start::Aligned, 1, 0, Some(&seen));
    let close = |a: f32, b: f32| (a - b).abs() < 1e-6;
    assert_eq!(aligned[..map], aligned[map..2 * map]);
    assert!(aligned[..map].iter().zip(&aligned[4 * map..]).all(|(query, key)| close(2.0 * query, *key)));
    assert!(aligned[5 * map..].iter().all(|x| *x == 0.0));
    // At the mean, a query has more of the first half's features than of the others.
    let apart = start(shape, Start::Apart, 1, 0, Some(&seen));
    let product = |feature: usize| -> f32 { (0..16).map(|i| seen.mean_query[i] * apart[i * 32 + feature]).sum() };
    for feature in 0..32 {
        assert_eq!(product(feature) > 0.0, feature % 16 < 8, "{feature}");
    }
}
