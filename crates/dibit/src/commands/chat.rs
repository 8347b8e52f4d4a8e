use super::schemes;
use super::{announce, cache_line, interrupt_flag, model_line, sampling};
use crate::args::{ChatArgs, LoadFormat};
use crate::device::on_device;
use crate::output::{TextStream, note};
use crate::{Outcome, source};
use anyhow::{Context, Result};
use dibit_device::Train;
use dibit_engine::{Chat, ChatOptions, Completion, Engine, FinishReason, Options, Sampling};
use rustyline::error::ReadlineError;
use rustyline::history::DefaultHistory;
use rustyline::{Config, Editor};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const HELP: &str = "/reset forgets the conversation, /stats shows the cache, /quit ends";

pub fn run(args: &ChatArgs) -> Result<Outcome> {
    schemes::check(&args.cache)?;
    args.cache.prefill.check()?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args))
}

fn run_on<D: Train + 'static>(device: &Arc<D>, args: &ChatArgs) -> Result<Outcome> {
    let mut pretrained = source::load(device, &args.run.model)?;
    let sampling = sampling(&args.sampling, &pretrained.generation_config, false)?;
    sampling.validate(pretrained.config.vocab_size)?;
    let limit = pretrained.config.max_position_embeddings;
    let options = Options {
        context: args.cache.context.map_or(limit, |context| context as usize),
        sequences: 1,
        prefill: args.cache.prefill.on(&device.budget()),
    };
    options.check(&pretrained.config)?;
    pretrained.set_context(options.context);
    let pretrained = Arc::new(pretrained);
    // The editor takes SIGINT for itself when it is made; a calibration and an answer need it.
    let mut editor: Editor<(), DefaultHistory> = Editor::with_config(Config::builder().auto_add_history(true).build())?;
    let interrupted = interrupt_flag(false)?;
    let made_up = args.run.model.load_format == LoadFormat::Dummy;
    let chosen = schemes::chosen(device, &args.cache, &pretrained, made_up, &interrupted)?;
    let mut engine = Engine::new(device, pretrained.clone(), &chosen.scheme, options)?;
    let chat_options = ChatOptions {
        format: args.conversation.format(&pretrained)?,
        system: args.system.clone(),
        context_shift: args.context_shift,
    };
    let mut chat = Chat::new(&mut engine, chat_options)?;
    note(&format!("{}\n{HELP}", model_line(&pretrained, &device.describe())));

    announce(&chosen.scheme, &pretrained.config)?;
    loop {
        let line = match editor.readline("> ") {
            // Some systems begin a piped text with a mark.
            Ok(line) => line.trim_start_matches('\u{feff}').to_owned(),
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(error).context("cannot read the conversation"),
        };
        match line.trim() {
            "" => {}
            "/quit" | "/exit" => break,
            "/reset" => {
                chat.reset(&mut engine);
                note("forgotten");
            }
            "/stats" => {
                let usage = chat.usage(&engine);
                let (turns, context) = (chat.messages().len(), engine.options().context);
                let cache = cache_line(&chosen, &usage, &engine);
                note(&format!("{turns} messages, {} of {context} tokens\n{cache}", usage.tokens));
            }
            _ => match answer(&mut chat, &mut engine, &line, args.max_tokens, &sampling, &interrupted) {
                Ok(done) => note(&turn_line(&done)),
                // The conversation is as it was: a person can go on, or /reset.
                Err(error) if std::io::stdin().is_terminal() && error.downcast_ref::<std::io::Error>().is_none() => {
                    note(&format!("error: {error:#}"));
                }
                Err(error) => return Err(error),
            },
        }
    }
    chat.close(&mut engine);
    Ok(Outcome::Done)
}

fn answer(
    chat: &mut Chat,
    engine: &mut Engine,
    line: &str,
    max_tokens: usize,
    sampling: &Sampling,
    interrupted: &AtomicBool,
) -> Result<Completion> {
    interrupted.store(false, Ordering::Relaxed);
    let mut stream = TextStream::new(interrupted);
    let done = chat.answer(engine, line, max_tokens, sampling, |text| stream.push(text))?;
    stream.finish()?;
    Ok(done)
}

fn turn_line(done: &Completion) -> String {
    let end = match done.finish {
        FinishReason::Stop => "",
        FinishReason::Length => ", cut at --max-tokens",
        FinishReason::Context => ", the context is full",
        FinishReason::Cancelled => ", stopped",
    };
    format!(
        "{} + {} tokens, {:.1} tokens/s, {} in the cache at {:.2} bits{end}",
        done.prompt_tokens,
        done.tokens.len(),
        done.decode_rate(),
        done.usage.tokens,
        done.usage.bits()
    )
}
