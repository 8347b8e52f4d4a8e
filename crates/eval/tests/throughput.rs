//! Generation of whole batches, on the CPU. No test looks at how fast anything is.

use dibit_cache::CalibratedScheme;
use dibit_cpu::Cpu;
use dibit_eval::bench::{BatchSize, ThroughputBench, ThroughputOptions, throughput};
use dibit_model::{ModelFiles, Pretrained, WeightSource};
use dibit_runner::Prefill;
use std::path::Path;
use std::sync::Arc;

fn load(pooled: bool) -> Pretrained {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/llama32-old-bf16/config.json");
    let files = ModelFiles::without_weights(&config).unwrap();
    Pretrained::load(&files, WeightSource::Dummy { seed: 1, pooled }, None).unwrap()
}

fn run(pretrained: &Pretrained, schemes: &[&str], batches: &[BatchSize], host_bytes: usize) -> ThroughputBench {
    run_as(pretrained, schemes, batches, host_bytes, Prefill::Cells(256))
}

fn run_as(
    pretrained: &Pretrained,
    schemes: &[&str],
    batches: &[BatchSize],
    host_bytes: usize,
    prefill: Prefill,
) -> ThroughputBench {
    let schemes: Vec<CalibratedScheme> = schemes.iter().map(|name| CalibratedScheme::load(name).unwrap()).collect();
    let options = ThroughputOptions {
        batches: batches.to_vec(),
        prompt: 200,
        generate: 70,
        // Two prompts share a pass.
        prefill_rows: 450,
        prefill,
        host_bytes,
        made_up: true,
    };
    throughput(&Arc::new(Cpu::new(Some(2)).unwrap()), pretrained, &schemes, &options, |_, _| {}).unwrap()
}

#[test]
fn batches_end_where_memory_does() {
    use BatchSize::{Max, Number};
    let pretrained = load(false);
    let plenty = run(&pretrained, &["fp16", "kvlinc-rotation"], &[Number(2), Number(1), Number(2)], usize::MAX >> 1);
    let batches = |bench: &ThroughputBench, scheme: usize| -> Vec<usize> {
        bench.schemes[scheme].points.iter().map(|point| point.batch).collect()
    };
    assert_eq!((batches(&plenty, 0), batches(&plenty, 1)), (vec![1, 2], vec![1, 2]));
    for point in plenty.schemes.iter().flat_map(|own| &own.points) {
        assert!(point.decode_tokens_per_s > point.tokens_per_s / 2.0 && point.tokens_per_s > 0.0, "{point:?}");
        assert!(point.peak_bytes > plenty.weight_bytes, "{point:?}");
    }
    let [one, two] = [0, 1].map(|index| plenty.schemes[0].points[index].peak_bytes - plenty.weight_bytes);
    assert!(two - one >= plenty.schemes[0].sequence_bytes, "{one}, {two}");

    // Room for two sequences in 16 bit, and a little.
    let little =
        run(&pretrained, &["fp16", "kvlinc-rotation"], &[Number(1), Number(4), Number(8), Max], two + two / 20);
    let [half, packed] = [0, 1].map(|scheme| &little.schemes[scheme]);
    assert_eq!((batches(&little, 0), half.largest), (vec![1, 2], Some(2)));
    let lack = half.out_of_memory.as_ref().unwrap();
    assert!(lack.batch == 4 && lack.reason.contains("caches and activations"), "{lack:?}");
    // What was not planned to fit was not tried.
    assert!(packed.largest >= Some(2) && packed.points.iter().all(|point| point.peak_bytes <= little.memory_bytes));
}

#[test]
fn schemes_run_whole_on_made_up_weights() {
    let bench = run(&load(false), &["dibit", "kvlinc", "rotatekv", "resq"], &[BatchSize::Number(2)], usize::MAX >> 1);
    assert!(bench.schemes.iter().all(|own| own.points.len() == 1 && own.out_of_memory.is_none()), "{bench:?}");
}

#[test]
fn prompts_are_read_as_they_are_asked_to_be() {
    for prefill in [Prefill::Cells(128), Prefill::Exact, Prefill::streaming(200)] {
        let bench = run_as(&load(false), &["kivi"], &[BatchSize::Number(5)], usize::MAX >> 1, prefill);
        assert_eq!((bench.schemes[0].points.len(), bench.prompt_read), (1, prefill.to_string()));
    }
}

#[test]
fn pooled_weights_are_as_many_as_others() {
    let (pooled, plain) = (load(true), load(false));
    assert_eq!(pooled.weights.num_bytes(), plain.weights.num_bytes());
    let [first, second] = [0, 1].map(|layer| pooled.weights.layers[layer].q.weight.row(0));
    assert_ne!(first, second);
    let bench = run(&pooled, &["kvlinc"], &[BatchSize::Number(1)], usize::MAX >> 1);
    assert_eq!(bench.schemes[0].points.len(), 1);
}
