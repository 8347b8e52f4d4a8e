//! The engine step by step: who waits for whom, what a failure costs, and what is given back.

mod common;

use common::{CELLS, answer, calibrated, engine, go_on, options, pretrained, request};
use dibit_cache::{CacheError, CacheLayout, Mode, Sequence, Usage};
use dibit_cpu::Cpu;
use dibit_device::DeviceError;
use dibit_engine::{
    Completion, Engine, EngineError, Event, FinishReason, MemoryPlan, Options, Prefill, Request, RequestId, Sampling,
};
use dibit_model::{Model, ModelError, Pretrained};
use dibit_runner::{Executor, Runner};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

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
    // Admitted first, it has four cells, and at least one token of the other one between two of them.
    let cells: Vec<usize> = (0..order.len()).filter(|at| order[*at] == long).skip(1).take(4).collect();
    assert!(cells.windows(2).all(|pair| order[pair[0]..pair[1]].contains(&short)), "{order:?}");
}

#[test]
fn what_is_cancelled_is_given_back() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kivi", 1);
    let plain = request(1, 600, 4, Sampling::greedy());
    let expected = engine.generate(std::slice::from_ref(&plain), go_on).unwrap().remove(0);
    let [running, waiting] = [(); 2].map(|()| engine.submit(plain.clone()).unwrap());
    // Admitted, and a cell is read.
    (0..2).for_each(|_| drop(engine.step()));
    let cancelled = engine.cancel(running).unwrap();
    assert_eq!((cancelled.finish, cancelled.tokens.len()), (FinishReason::Cancelled, 0));
    assert_eq!(cancelled.usage.tokens, 256);
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
    let done = engine.finish(first, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!((done.tokens.len(), engine.len(sequence)), (4, 33));
    assert_eq!(finish(&mut engine)[&other].as_ref().unwrap().tokens.len(), 2);
    let [_, full] = [engine.open(), engine.open()];
    assert!(matches!(full, Err(EngineError::Cache(CacheError::TooManySequences { capacity: 2 }))));
    // Closed in the middle of an answer, it is free for the next one.
    engine.submit_to(sequence, request(2, 300, 4, Sampling::greedy())).unwrap();
    (0..2).for_each(|_| drop(engine.step()));
    engine.close(sequence);
    assert!(engine.is_idle() && engine.open().is_ok());
}

/// A runner that fails behind a pass that had this token behind so many others.
struct Faulty {
    runner: Runner<Cpu>,
    token: u32,
    behind: usize,
    /// Whether it is the outputs of the pass that fail.
    in_outputs: bool,
    is_bad: bool,
    passes: Arc<AtomicUsize>,
}

fn fault() -> ModelError {
    DeviceError::Failed("a fault".into()).into()
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
        self.passes.fetch_add(1, Ordering::Relaxed);
        let is_bad =
            |(sequence, ids): &(&mut Sequence, &[u32])| sequence.len() >= self.behind && ids.contains(&self.token);
        self.is_bad = rows.iter().any(is_bad);
        // The windows are overwritten when it fails.
        self.runner.step(mode, rows)?;
        if self.is_bad && !self.in_outputs {
            rows.iter_mut().for_each(|(sequence, _)| self.runner.clear(sequence));
            return Err(fault());
        }
        Ok(())
    }

    fn logits(&mut self, rows: &[usize], out: &mut Vec<f32>) -> Result<(), ModelError> {
        if self.is_bad { Err(fault()) } else { self.runner.logits(rows, out) }
    }

    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<Option<u32>>, ModelError> {
        if self.is_bad { Err(fault()) } else { self.runner.most_likely(rows) }
    }
}

struct Fault {
    token: u32,
    behind: usize,
    in_outputs: bool,
}

/// An engine for three sequences with a fault in it, and the number of its passes.
fn faulty(
    cpu: &Arc<Cpu>,
    model: &Arc<Pretrained>,
    scheme: &str,
    prefill: Prefill,
    fault: Fault,
) -> (Engine, Arc<AtomicUsize>) {
    let options = Options { prefill, ..options(3) };
    let layout = model.cache_layout(&calibrated(model, scheme)).unwrap();
    let plan = MemoryPlan::new(&model.config, &layout, options, &dibit_device::Memory::budget(&**cpu));
    let on_device = Model::for_cache(cpu, &model.config, &model.weights, &layout).unwrap();
    let runner = Runner::new(Arc::new(on_device), layout, plan.capacity(options)).unwrap();
    let passes = Arc::new(AtomicUsize::new(0));
    let Fault { token, behind, in_outputs } = fault;
    let executor = Faulty { runner, token, behind, in_outputs, is_bad: false, passes: passes.clone() };
    (Engine::with_executor(model.clone(), Box::new(executor), plan, options).unwrap(), passes)
}

/// A token of which none of these texts has any, and that ends no text.
fn free_token(model: &Pretrained, texts: &[&[u32]]) -> u32 {
    let is_free = |id: &u32| !texts.iter().any(|text| text.contains(id)) && !model.stop_token_ids.contains(id);
    (5..model.config.vocab_size as u32).find(is_free).expect("a token that nobody has")
}

#[test]
fn a_failure_ends_the_request_that_caused_it_alone() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(2)).unwrap()), pretrained("llama32-old-bf16"));
    let good = [
        request(1, 400, 40, Sampling::greedy()),
        request(2, 30, 60, Sampling { temperature: 1.0, ..Sampling::greedy() }),
    ];
    let schemes = ["kvlinc", "dibit", "gear", "rotatekv-window", "akvq-vl", "quarot"];
    let others = [("kivi", Prefill::Exact), ("dibit", Prefill::streaming(256))];
    for (index, (scheme, prefill)) in schemes.map(|scheme| (scheme, CELLS)).into_iter().chain(others).enumerate() {
        let alone: Vec<Completion> = good
            .iter()
            .map(|own| {
                let options = Options { prefill, ..options(1) };
                let mut engine = Engine::new(&cpu, model.clone(), &calibrated(&model, scheme), options).unwrap();
                engine.generate(std::slice::from_ref(own), go_on).unwrap().remove(0)
            })
            .collect();
        let texts: Vec<&[u32]> =
            good.iter().map(|own| &own.prompt[..]).chain(alone.iter().map(|own| &own.tokens[..])).collect();
        // In the prompt of the third request, and where it is told to be generated.
        let token = free_token(&model, &texts);
        let sampling = Sampling { logit_bias: vec![(token, 100.0)], ..Sampling::greedy() };
        let in_prompt = Request { prompt: vec![5, token, 6], ..request(3, 3, 5, Sampling::greedy()) };
        for (bad, behind) in [(in_prompt, 0), (request(3, 20, 50, sampling), 45)] {
            let fault = Fault { token, behind, in_outputs: index % 2 == 1 };
            let (mut engine, _) = faulty(&cpu, &model, scheme, prefill, fault);
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

/// Turns whose answers leave nothing in the cache: their prompts follow each other, and were passes of their own.
#[test]
fn turns_are_read_again_as_they_came() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(2)).unwrap()), pretrained("llama32-old-bf16"));
    let turns =
        [(1, 300, 1), (2, 1, 1), (3, 200, 60)].map(|(seed, prompt, n)| request(seed, prompt, n, Sampling::greedy()));
    let talk = |engine: &mut Engine, before_the_last: &mut dyn FnMut(&mut Engine)| {
        let sequence = engine.open().unwrap();
        let [.., last] = &turns;
        for turn in &turns[..2] {
            let id = engine.submit_to(sequence, turn.clone()).unwrap();
            engine.finish(id, |_| ControlFlow::Continue(())).unwrap();
        }
        let id = engine.submit_to(sequence, last.clone()).unwrap();
        before_the_last(engine);
        engine.finish(id, |_| ControlFlow::Continue(())).unwrap()
    };
    for (scheme, prefill) in [("kivi", CELLS), ("gear", CELLS), ("akvq-vl", CELLS), ("dibit", Prefill::Exact)] {
        let options = Options { prefill, ..options(1) };
        let mut alone = Engine::new(&cpu, model.clone(), &calibrated(&model, scheme), options).unwrap();
        let expected = talk(&mut alone, &mut |_| {});
        let texts: Vec<&[u32]> = turns.iter().map(|own| &own.prompt[..]).chain([&expected.tokens[..]]).collect();
        let token = free_token(&model, &texts);
        let sampling = Sampling { logit_bias: vec![(token, 100.0)], ..Sampling::greedy() };
        let fault = Fault { token, behind: 45, in_outputs: false };
        let (mut engine, _) = faulty(&cpu, &model, scheme, prefill, fault);
        let mut bad = None;
        let got = talk(&mut engine, &mut |engine| {
            bad = Some(engine.submit(request(4, 20, 50, sampling.clone())).unwrap());
        });
        assert_eq!(answer(&got), answer(&expected), "{scheme}");
        assert!(finish(&mut engine).remove(&bad.unwrap()).unwrap().is_err());
    }
}

#[test]
fn who_is_stopped_at_once_reads_no_prompt() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let none = Fault { token: u32::MAX, behind: 0, in_outputs: false };
    let (mut engine, passes) = faulty(&cpu, &model, "kivi", CELLS, none);
    let all: Vec<Request> = (0..20).map(|seed| request(seed, 300, 4, Sampling::greedy())).collect();
    let mut begun = Vec::new();
    let done = engine.generate(&all, |index, _| {
        begun.push(index);
        ControlFlow::Break(())
    });
    assert!(done.unwrap().iter().all(|own| own.finish == FinishReason::Cancelled && own.tokens.is_empty()));
    assert_eq!((passes.load(Ordering::Relaxed), begun), (0, (0..20).collect()));
}

#[test]
fn requests_that_only_open_sequences_stop_are_told_so() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kivi", 1);
    let sequence = engine.open().unwrap();
    let plain = request(1, 20, 4, Sampling::greedy());
    let full = |result: Result<_, EngineError>| {
        matches!(result, Err(EngineError::Cache(CacheError::TooManySequences { capacity: 1 })))
    };
    assert!(full(engine.generate(&[plain.clone(), plain.clone()], go_on).map(drop)));
    assert!(engine.is_idle() && !engine.is_stuck());
    let waiting = engine.submit(plain.clone()).unwrap();
    assert!(engine.step().is_empty() && engine.is_stuck());
    // A turn of the open sequence passes by.
    let turn = engine.submit_to(sequence, plain.clone()).unwrap();
    assert_eq!(engine.finish(turn, |_| ControlFlow::Continue(())).unwrap().tokens.len(), 4);
    assert!(engine.is_stuck());
    engine.close(sequence);
    assert_eq!(engine.finish(waiting, |_| ControlFlow::Continue(())).unwrap().tokens.len(), 4);
    // What is over is over.
    for id in [waiting, turn] {
        assert!(matches!(engine.finish(id, |_| ControlFlow::Continue(())), Err(EngineError::Answered)));
    }
    assert!(matches!(engine.submit_to(sequence, plain), Err(EngineError::Closed)));
}

#[test]
fn a_break_is_final_and_leaves_nothing_to_be_told() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kivi", 2);
    let no_end = model.stop_token_ids.iter().map(|id| (*id, -100.0)).collect();
    let sampling = Sampling { logit_bias: no_end, ..Sampling::greedy() };
    let [long, short] = [30, 3].map(|n| engine.submit(request(n, 20, n as usize, sampling.clone())).unwrap());
    // What happens to the short one is kept, its end too.
    engine.finish(long, |_| ControlFlow::Continue(())).unwrap();
    let mut asked = 0;
    let done = engine.finish(short, |_| {
        asked += 1;
        ControlFlow::Break(())
    });
    assert_eq!((done.unwrap().tokens.len(), asked), (3, 1));
    let [first, second] = [30, 31].map(|n| engine.submit(request(n, 20, 30, sampling.clone())).unwrap());
    let mut left = 8;
    engine
        .finish(first, |_| {
            left -= 1;
            if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    let cancelled = engine.cancel(second).unwrap();
    assert!(cancelled.finish == FinishReason::Cancelled && !cancelled.tokens.is_empty());
    assert!(engine.is_idle() && engine.step().is_empty());
}
