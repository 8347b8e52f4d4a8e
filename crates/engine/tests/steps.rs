//! The engine step by step: who waits for whom, what a failure costs, and what is given back.

mod common;

use common::{answer, calibrated, engine, go_on, options, pretrained, request};
use dibit_cache::{CacheError, CacheLayout, Mode, Sequence, Usage};
use dibit_cpu::Cpu;
use dibit_device::DeviceError;
use dibit_engine::{Completion, Engine, EngineError, Event, FinishReason, MemoryPlan, Request, RequestId, Sampling};
use dibit_model::{Model, ModelError, Pretrained};
use dibit_runner::{Capacity, Executor, Runner};
use std::collections::HashMap;
use std::sync::Arc;

/// Steps until all is answered.
fn finish(engine: &mut Engine) -> HashMap<RequestId, Result<Completion, EngineError>> {
    let mut all = HashMap::new();
    while !engine.is_idle() {
        for event in engine.step() {
            match event {
                Event::Text { .. } => {}
                Event::Done { request, completion } => drop(all.insert(request, Ok(completion))),
                Event::Failed { request, error } => drop(all.insert(request, Err(error))),
            }
        }
    }
    all
}

#[test]
fn a_long_prompt_does_not_stop_others() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(2)).unwrap()), pretrained("llama32-old-bf16"));
    let mut engine = engine(&cpu, &model, "kvlinc", 2);
    let short = engine.submit(request(1, 20, 30, Sampling::greedy())).unwrap();
    let long = engine.submit(request(2, 900, 5, Sampling::greedy())).unwrap();
    let mut order = Vec::new();
    while !engine.is_idle() {
        order.extend(engine.step().iter().map(Event::request));
    }
    // Four cells, and at least one token of the other one between two of them.
    let cells: Vec<usize> = (0..order.len()).filter(|at| order[*at] == long).take(4).collect();
    assert!(cells.windows(2).all(|pair| order[pair[0]..pair[1]].contains(&short)), "{order:?}");
}

#[test]
fn what_is_cancelled_is_given_back() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kivi", 1);
    let plain = request(1, 600, 4, Sampling::greedy());
    let expected = engine.generate(std::slice::from_ref(&plain), go_on).unwrap().remove(0);
    let [running, waiting] = [(); 2].map(|()| engine.submit(plain.clone()).unwrap());
    engine.step();
    let cancelled = engine.cancel(running).unwrap();
    assert_eq!((cancelled.finish, cancelled.tokens.len()), (FinishReason::Cancelled, 0));
    assert!(engine.cancel(running).is_none());
    let done = finish(&mut engine);
    assert_eq!(done.len(), 1);
    assert_eq!(answer(done[&waiting].as_ref().unwrap()), answer(&expected));
}

#[test]
fn an_open_sequence_has_one_request_at_a_time() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kvlinc", 2);
    let sequence = engine.open().unwrap();
    let first = engine.submit_to(sequence, request(1, 30, 4, Sampling::greedy())).unwrap();
    let busy = engine.submit_to(sequence, request(2, 30, 4, Sampling::greedy()));
    assert!(matches!(busy, Err(EngineError::Busy)));
    // Another request has a sequence of its own, and what happens to it is told later.
    let other = engine.submit(request(3, 10, 2, Sampling::greedy())).unwrap();
    let done = engine.finish(first, |_| std::ops::ControlFlow::Continue(())).unwrap();
    assert_eq!((done.tokens.len(), engine.len(sequence)), (4, 33));
    assert_eq!(finish(&mut engine)[&other].as_ref().unwrap().tokens.len(), 2);
    let [_, full] = [engine.open(), engine.open()];
    assert!(matches!(full, Err(EngineError::Cache(CacheError::TooManySequences { capacity: 2 }))));
    // Closed in the middle of an answer, it is free for the next one.
    engine.submit_to(sequence, request(2, 300, 4, Sampling::greedy())).unwrap();
    engine.step();
    engine.close(sequence);
    assert!(engine.is_idle() && engine.open().is_ok());
}

/// A runner that fails where a pass has this token behind so many others.
struct Faulty {
    runner: Runner<Cpu>,
    token: u32,
    behind: usize,
}

impl Executor for Faulty {
    fn layout(&self) -> &CacheLayout {
        self.runner.layout()
    }

    fn open(&mut self) -> Result<Sequence, CacheError> {
        self.runner.open()
    }

    fn clear(&mut self, sequence: &mut Sequence) {
        self.runner.clear(sequence);
    }

    fn close(&mut self, sequence: Sequence) {
        self.runner.close(sequence);
    }

    fn usage(&self, sequence: &Sequence) -> Usage {
        self.runner.usage(sequence)
    }

    fn step(&mut self, mode: Mode, rows: &mut [(&mut Sequence, &[u32])]) -> Result<(), ModelError> {
        let is_bad =
            |(sequence, ids): &(&mut Sequence, &[u32])| sequence.len() >= self.behind && ids.contains(&self.token);
        if rows.iter().any(is_bad) {
            rows.iter_mut().for_each(|(sequence, _)| self.runner.clear(sequence));
            return Err(DeviceError::Failed("a fault".into()).into());
        }
        self.runner.step(mode, rows)
    }

    fn logits(&mut self, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError> {
        self.runner.logits(rows, out)
    }

    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError> {
        self.runner.most_likely(rows)
    }
}

fn faulty(cpu: &Arc<Cpu>, model: &Arc<Pretrained>, scheme: &str, token: u32, behind: usize) -> Engine {
    let options = options(3);
    let layout = model.cache_layout(&calibrated(model, scheme)).unwrap();
    let plan = MemoryPlan::new(&model.config, &layout, options, &dibit_device::Memory::budget(&**cpu));
    let capacity = Capacity { blocks: 3 * plan.sequence_blocks, sequences: 3, rows: plan.pass_rows.max(3), outputs: 3 };
    let on_device = Model::for_cache(cpu, &model.config, &model.weights, &layout).unwrap();
    let runner = Runner::new(Arc::new(on_device), layout, capacity).unwrap();
    Engine::with_executor(model.clone(), Box::new(Faulty { runner, token, behind }), plan, options)
}

#[test]
fn a_failure_ends_the_request_that_caused_it_alone() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(2)).unwrap()), pretrained("llama32-old-bf16"));
    let good = [
        request(1, 400, 40, Sampling::greedy()),
        request(2, 30, 60, Sampling { temperature: 1.0, ..Sampling::greedy() }),
    ];
    for scheme in ["kvlinc", "dibit", "gear", "rotatekv-window", "akvq-vl", "quarot"] {
        let alone: Vec<Completion> = good
            .iter()
            .map(|own| engine(&cpu, &model, scheme, 1).generate(std::slice::from_ref(own), go_on).unwrap().remove(0))
            .collect();
        // A token that none of them has, in the prompt of the third request, and where it is told to be generated.
        let others = || good.iter().map(|own| &own.prompt).chain(alone.iter().map(|own| &own.tokens)).flatten();
        let is_free = |id: &u32| !others().any(|other| other == id) && !model.stop_token_ids.contains(id);
        let token = (5..model.config.vocab_size as u32).find(is_free).expect("a token that nobody has");
        let sampling = Sampling { logit_bias: vec![(token, 100.0)], ..Sampling::greedy() };
        let in_prompt = Request { prompt: vec![5, token, 6], ..request(3, 3, 5, Sampling::greedy()) };
        for (bad, behind) in [(in_prompt, 0), (request(3, 20, 50, sampling), 45)] {
            let mut engine = faulty(&cpu, &model, scheme, token, behind);
            let ids = good.each_ref().map(|own| engine.submit(own.clone()).unwrap());
            let bad = engine.submit(bad).unwrap();
            let mut done = finish(&mut engine);
            assert!(matches!(done.remove(&bad), Some(Err(EngineError::Model(ModelError::Device(_))))), "{scheme}");
            for (id, alone) in ids.iter().zip(&alone) {
                assert_eq!(answer(done[id].as_ref().unwrap()), answer(alone), "{scheme}, behind {behind}");
            }
            // All rooms are free again.
            assert_eq!([(); 3].map(|()| engine.open().is_ok()), [true; 3]);
        }
    }
}
