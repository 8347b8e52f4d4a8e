//! Requests, batches and conversations on small checkpoints.

mod common;

use common::{CELLS, answer, engine, go_on, pretrained, request};
use dibit_cache::{CalibratedScheme, Scheme};
use dibit_cpu::Cpu;
use dibit_engine::{
    Chat, ChatOptions, Completion, Dry, Engine, EngineError, FinishReason, Options, Prefill, Request, Sampling,
};
use dibit_model::{ChatFormat, SpecialTokens};
use std::ops::ControlFlow;
use std::sync::Arc;

fn conversation(engine: &mut Engine, system: Option<&str>, context_shift: bool) -> Chat {
    let template = engine.pretrained().chat_template(None).unwrap().expect("the model has a template");
    let format = ChatFormat { template, arguments: Default::default(), special_tokens: SpecialTokens::Refuse };
    Chat::new(engine, ChatOptions { format, system: system.map(str::to_owned), context_shift }).unwrap()
}

#[test]
fn each_answer_in_a_batch_is_the_one_it_gets_alone() {
    let warm = Sampling {
        temperature: 1.5,
        top_p: 0.95,
        top_k: 50,
        min_p: 0.01,
        repetition_penalty: 1.1,
        frequency_penalty: 0.2,
        dry: Dry { multiplier: 0.5, ..Dry::default() },
        seed: 3,
        ..Sampling::greedy()
    };
    let requests: Vec<Request> = [(1, 5, 300), (2, 400, 20), (3, 129, 1), (4, 255, 40), (5, 1, 150)]
        .into_iter()
        .enumerate()
        .map(|(i, (seed, prompt, max))| {
            request(seed, prompt, max, if i % 2 == 0 { warm.clone() } else { Sampling::greedy() })
        })
        .collect();
    for scheme in Scheme::built_in() {
        let model = pretrained("llama32-old-bf16");
        let single = Arc::new(Cpu::new(Some(1)).unwrap());
        let alone: Vec<Completion> = requests
            .iter()
            .map(|r| engine(&single, &model, scheme, 1).generate(std::slice::from_ref(r), go_on).unwrap().remove(0))
            .collect();
        for (threads, sequences) in [(1, 5), (3, 2)] {
            let cpu = Arc::new(Cpu::new(Some(threads)).unwrap());
            let together = engine(&cpu, &model, scheme, sequences).generate(&requests, go_on).unwrap();
            for (alone, together) in alone.iter().zip(&together) {
                assert_eq!(answer(alone), answer(together), "{scheme}, {threads} threads, {sequences} at once");
            }
        }
    }
}

#[test]
fn an_engine_gives_back_what_its_requests_took() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kvlinc", 2);
    let requests = [request(1, 300, 5, Sampling::greedy()), request(2, 20, 5, Sampling::greedy())];
    let first = engine.generate(&requests, go_on).unwrap();
    // A request that is ended, at once or behind some passes, leaves nothing behind either.
    for most in [0, 1, 3] {
        let mut asked = [0, 0];
        let ended = |index: usize, _: &str| {
            asked[index] += 1;
            if asked[index] > most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let cancelled = engine.generate(&requests, ended).unwrap();
        assert!(cancelled.iter().all(|c| c.finish == FinishReason::Cancelled && (c.usage.tokens > 0) == (most > 0)));
    }
    for _ in 0..3 {
        let again = engine.generate(&requests, go_on).unwrap();
        assert!(first.iter().zip(&again).all(|(a, b)| answer(a) == answer(b)));
    }
}

#[test]
fn texts_end_for_the_reason_they_say() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "fp16", 1);
    let mut run = |request: &Request| engine.generate(std::slice::from_ref(request), go_on).unwrap().remove(0);
    let plain = run(&request(1, 10, 8, Sampling::greedy()));
    assert_eq!((plain.finish, plain.tokens.len(), plain.usage.tokens), (FinishReason::Length, 8, 17));
    let none = run(&request(1, 10, 0, Sampling::greedy()));
    assert_eq!((none.finish, none.tokens.len(), none.text.as_str()), (FinishReason::Length, 0, ""));
    let full = run(&request(1, 1020, 100, Sampling::greedy()));
    assert_eq!((full.finish, full.usage.tokens), (FinishReason::Context, 1024));
    let piece: String = plain.text.chars().skip(2).take(2).collect();
    let stopped = run(&Request { stop: vec![piece.clone()], ..request(1, 10, 8, Sampling::greedy()) });
    assert_eq!((stopped.finish, Some(stopped.text.as_str())), (FinishReason::Stop, plain.text.split(&piece).next()));
}

#[test]
fn impossible_requests_are_refused_before_anything_runs() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kvlinc", 1);
    let good = request(1, 10, 2, Sampling::greedy());
    for (bad, expected) in [
        (request(1, 0, 2, Sampling::greedy()), "empty"),
        (request(1, 1025, 2, Sampling::greedy()), "1025 tokens and the model supports 1024"),
        (request(1, 10, 2, Sampling { temperature: -1.0, ..Sampling::greedy() }), "temperature"),
        (Request { prompt: vec![384], ..good.clone() }, "token id 384"),
    ] {
        let error = engine.generate(&[bad], go_on).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(engine.generate(std::slice::from_ref(&good), go_on).unwrap().len(), 1);
    }
    let options = Options { context: 1025, sequences: 1, prefill: CELLS };
    let model = pretrained("qwen2-bias-bf16");
    let refused =
        |options| Engine::new(&cpu, model.clone(), &CalibratedScheme::load("kivi").unwrap(), options).err().unwrap();
    assert!(matches!(refused(options), EngineError::ContextTooLong { context: 1025, limit: 1024 }));
    assert!(matches!(refused(Options { context: 8, sequences: 0, prefill: CELLS }), EngineError::NoRoom));
}

#[test]
fn a_prompt_in_several_passes_attends_to_its_packed_beginning() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let request = request(7, 700, 10, Sampling::greedy());
    let run = |scheme: &str, prefill| {
        let model = pretrained("llama32-old-bf16");
        let options = Options { context: 1024, sequences: 1, prefill };
        let mut engine = Engine::new(&cpu, model.clone(), &CalibratedScheme::load(scheme).unwrap(), options).unwrap();
        engine.generate(std::slice::from_ref(&request), go_on).unwrap().remove(0)
    };
    let (whole, parts) = (run("kvlinc", Prefill::Exact), run("kvlinc", Prefill::Cells(128)));
    assert_eq!((whole.usage, parts.usage.tokens), (parts.usage, 709));
    // In 16 bit the passes differ by the rounding of the cache alone, which does not change these tokens.
    assert_eq!(run("fp16", Prefill::Exact).tokens, run("fp16", Prefill::Cells(128)).tokens);
}

#[test]
fn a_conversation_feeds_only_what_is_new() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(2)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kvlinc", 1);
    let mut chat = conversation(&mut engine, Some("Be brief."), false);
    let mut fed = Vec::new();
    for text in ["Hello there, how are you?", "And now?", "A third thing."] {
        let before = chat.usage(&engine).tokens;
        let done = chat.answer(&mut engine, text, 40, &Sampling::greedy(), |_| ControlFlow::Continue(())).unwrap();
        fed.push(done.prompt_tokens);
        // The last id of an answer is not cached before the next turn.
        assert_eq!(chat.usage(&engine).tokens, before + done.prompt_tokens + done.tokens.len() - 1);
    }
    assert_eq!(chat.messages().len(), 7);
    assert!(fed[1] < fed[0] && fed[2] < fed[0] + 10, "{fed:?}");

    // The same conversation read at once ends in the same text as the one that grew, in 16 bit exactly enough.
    let first = chat.messages()[2].content.clone();
    chat.reset(&mut engine);
    assert_eq!((chat.usage(&engine).tokens, chat.messages().len()), (0, 1));
    let again = chat
        .answer(&mut engine, "Hello there, how are you?", 40, &Sampling::greedy(), |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(again.text, first);
}

#[test]
fn a_cancelled_answer_stays_as_far_as_it_came() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    let mut engine = engine(&cpu, &model, "kvlinc", 1);
    let mut chat = conversation(&mut engine, None, false);
    let mut pieces = 0;
    let done = chat
        .answer(&mut engine, "Tell me everything.", 100, &Sampling::greedy(), |_| {
            pieces += 1;
            if pieces == 5 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!(done.finish, FinishReason::Cancelled);
    assert_eq!(chat.messages().last().unwrap().content, done.text);
    let next = chat.answer(&mut engine, "Go on.", 10, &Sampling::greedy(), |_| ControlFlow::Continue(())).unwrap();
    assert!(next.prompt_tokens > 1);
    // A turn that does not fit changes nothing.
    let (messages, tokens) = (chat.messages().to_vec(), chat.usage(&engine).tokens);
    let error = chat.answer(&mut engine, &"word ".repeat(2000), 10, &Sampling::greedy(), |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(EngineError::ConversationTooLong { .. })));
    assert_eq!((chat.messages(), chat.usage(&engine).tokens), (&messages[..], tokens));
}

#[test]
fn the_oldest_turns_go_where_a_conversation_outgrows_its_context() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(2)).unwrap()), pretrained("qwen2-bias-bf16"));
    let options = Options { context: 300, sequences: 1, prefill: CELLS };
    let scheme = CalibratedScheme::load("kivi").unwrap();
    let mut engine = Engine::new(&cpu, model.clone(), &scheme, options).unwrap();
    let mut chat = conversation(&mut engine, Some("Be brief."), true);
    let mut dropped = false;
    for turn in 0..8 {
        let text = format!("{turn}: {}", "a few words ".repeat(4));
        let before = chat.messages().len();
        let done = chat.answer(&mut engine, &text, 20, &Sampling::greedy(), |_| ControlFlow::Continue(())).unwrap();
        dropped |= chat.messages().len() < before + 2;
        // There was room for the answer.
        assert_ne!(done.finish, FinishReason::Context);
        let messages = chat.messages();
        assert_eq!((messages[0].role.as_str(), messages[1].role.as_str()), ("system", "user"));
        assert_eq!(messages[messages.len() - 2].content, text);
    }
    assert!(dropped);
    // What leaves little room for an answer goes alone: nothing else is left to drop.
    let large = "word ".repeat(72);
    chat.answer(&mut engine, &large, 20, &Sampling::greedy(), |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(chat.messages().len(), 3);
    // What does not fit alone changes nothing, and says what to do.
    let messages = chat.messages().to_vec();
    let long = "word ".repeat(2000);
    let error = chat.answer(&mut engine, &long, 10, &Sampling::greedy(), |_| ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains("last message alone is too long"), "{error}");
    assert_eq!(chat.messages(), messages);
}

#[test]
fn requests_of_one_seed_differ_by_their_stream() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("llama32-old-bf16"));
    let mut engine = engine(&cpu, &model, "kivi", 3);
    let warm = Sampling { temperature: 1.5, seed: 3, ..Sampling::greedy() };
    let of = |stream| Request { stream, ..request(1, 9, 12, warm.clone()) };
    let done = engine.generate(&[of(0), of(1), of(0)], go_on).unwrap();
    assert_eq!(done[0].tokens, done[2].tokens);
    assert_ne!(done[0].tokens, done[1].tokens);
}

#[test]
fn a_stop_string_that_is_a_special_token_is_that_token() {
    let (cpu, mut model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("qwen2-bias-bf16"));
    Arc::get_mut(&mut model).unwrap().stop_token_ids.clear();
    let vocabulary = 0..model.config.vocab_size as u32;
    let special = vocabulary.filter_map(|id| Some((id, model.tokenizer.token(id)?)));
    let special: Vec<(u32, String)> =
        special.filter(|(id, token)| model.tokenizer.special_token(token) == Some(*id)).collect();
    let (id, token) = special.last().expect("the fixture has special tokens").clone();
    let mut engine = engine(&cpu, &model, "kivi", 1);
    // A bias makes the model choose it.
    let sampling = Sampling { logit_bias: vec![(id, 100.0)], ..Sampling::greedy() };
    let plain = request(1, 9, 5, sampling);
    let done = engine.generate(&[plain.clone(), Request { stop: vec![token], ..plain }], go_on).unwrap();
    assert_eq!((&done[0].tokens[..], done[0].finish), (&[id; 5][..], FinishReason::Length));
    assert_eq!((&done[1].tokens[..], done[1].finish, &done[1].text[..]), (&[id][..], FinishReason::Stop, ""));
}

#[test]
fn log_probabilities_are_those_of_the_model_whatever_is_chosen() {
    let (cpu, model) = (Arc::new(Cpu::new(Some(1)).unwrap()), pretrained("llama32-old-bf16"));
    let mut engine = engine(&cpu, &model, "kivi", 1);
    let greedy = Request { logprobs: Some(3), ..request(1, 9, 6, Sampling::greedy()) };
    let done = engine.generate(std::slice::from_ref(&greedy), go_on).unwrap().remove(0);
    assert_eq!(done.logprobs.len(), done.tokens.len());
    for (own, id) in done.logprobs.iter().zip(&done.tokens) {
        assert_eq!((own.id, own.top.len(), own.top[0]), (*id, 3, (*id, own.logprob)));
        assert!(own.logprob < 0.0 && own.top[0].1 >= own.top[1].1);
    }
    // Another choice of the first token has the same distribution before it.
    let second = done.logprobs[0].top[1];
    let sampling = Sampling { logit_bias: vec![(second.0, 100.0)], ..Sampling::greedy() };
    let other = engine.generate(&[Request { sampling, max_tokens: 1, ..greedy.clone() }], go_on).unwrap().remove(0);
    assert_eq!((other.logprobs[0].id, other.logprobs[0].logprob), second);
    assert_eq!(other.logprobs[0].top, done.logprobs[0].top);
    // Without them, the same tokens.
    let plain = engine.generate(&[Request { logprobs: None, ..greedy }], go_on).unwrap().remove(0);
    assert_eq!((plain.tokens, plain.logprobs), (done.tokens, Vec::new()));
}
