use super::{begin_windows, go_on, interrupt_flag, window_begin};
use crate::args::{CalibrateArgs, HeldOut, RecipeName, TrainingArgs};
use crate::device::on_device;
use crate::output::{STDOUT, bar, check_writable, note, table};
use crate::text::{self, Document};
use crate::{Outcome, source};
use anyhow::{Context, Result, bail};
use dibit_cache::{CacheLayout, Scheme};
use dibit_calibrate::{CalibrationError, Options, Phase, Progress, Recipe, Text, Training, calibrate};
use dibit_device::Train;
use dibit_model::{ChatFormat, Pretrained, SpecialTokens};
use indicatif::ProgressBar;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

/// Tokens of a sequence, where the user does not say and the model is made for so many.
const CONTEXT: usize = 2048;

/// Tokens that statistics are gathered from, where the user does not say.
const TOKENS: usize = 131_072;

/// Share of a text that training is measured on, where the user does not say.
const HELD_OUT: f32 = 0.05;

pub fn run(args: &CalibrateArgs) -> Result<Outcome> {
    let scheme = Scheme::load(&args.kv)?;
    if !scheme.takes_calibration() {
        return Err(CalibrationError::NotNeeded(args.kv.clone()).into());
    }
    if let Some(option) = args.training.given().filter(|_| scheme.linear().is_none()) {
        bail!("{option} is for training a linear correction, and scheme {} has none; leave it out", args.kv);
    }
    let documents = |paths: &[PathBuf]| -> Result<Vec<Document>> {
        let all = paths.iter().map(|path| text::read_documents(path)).collect::<Result<Vec<_>>>()?;
        Ok(all.into_iter().flatten().collect())
    };
    let texts = documents(&args.text)?;
    let held_out = match &args.training.heldout {
        Some(HeldOut::File(path)) => documents(std::slice::from_ref(path))?,
        _ => Vec::new(),
    };
    check_place(args)?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args, &scheme, &texts, &held_out))
}

fn run_on<D: Train>(
    device: &D,
    args: &CalibrateArgs,
    scheme: &Scheme,
    texts: &[Document],
    held_out: &[Document],
) -> Result<Outcome> {
    let trains = scheme.linear().is_some();
    let mut pretrained = source::load(device, &args.run.model)?;
    begin_windows(&args.window, &mut pretrained);
    CacheLayout::new(scheme, pretrained.config.cache_shape())?;
    let text =
        Text { documents: encode(&pretrained, texts, !trains)?, held_out: encode(&pretrained, held_out, !trains)? };
    let state = state_path(&args.out);
    let options = options(args, &pretrained, state.clone());
    let interrupted = interrupt_flag(true)?;
    let bar = bar(0);
    let mut told = Told::default();
    let artefact = calibrate(device, &pretrained, scheme, &text, &options, |progress| {
        told.tell(progress, &options, &state, &bar);
        go_on(&interrupted)
    })?;
    bar.finish_and_clear();
    let Some(artefact) = artefact else {
        note(&format!("stopped; the same command goes on from {}", state.display()));
        return Ok(Outcome::Interrupted);
    };
    artefact.save(&args.out)?;
    if state.exists() {
        std::fs::remove_file(&state).with_context(|| format!("cannot remove {}", state.display()))?;
    }
    let found = artefact.training.as_ref().map(render).unwrap_or_default();
    writeln!(
        std::io::stdout(),
        "{}: {} for {} from {}, {}{found}",
        args.out.display(),
        scheme.name,
        pretrained.name,
        artefact.source,
        window_begin(&pretrained, pretrained.window_bos)
    )
    .context(STDOUT)?;
    Ok(Outcome::Done)
}

/// Token ids of documents; all `joined` to one where documents play no part.
fn encode(pretrained: &Pretrained, documents: &[Document], joined: bool) -> Result<Vec<Vec<u32>>> {
    let template = pretrained.chat_template(None)?;
    let format = template.map(|template| ChatFormat {
        template,
        arguments: Default::default(),
        special_tokens: SpecialTokens::Refuse,
    });
    let render = |document: &Document| document.render(format.as_ref(), &pretrained.tokenizer);
    let texts = documents.iter().map(render).collect::<Result<Vec<_>>>()?;
    let texts = if joined { vec![texts.join("\n\n")] } else { texts };
    texts.iter().map(|text| Ok(pretrained.tokenizer.encode_rendered(text)?)).collect()
}

fn options(args: &CalibrateArgs, pretrained: &Pretrained, state: PathBuf) -> Options {
    let paper = args.training.recipe == Some(RecipeName::Paper);
    let usual = if paper { Recipe::PAPER_CONTEXT } else { CONTEXT };
    let context = args.context.unwrap_or(usual.min(pretrained.config.max_position_embeddings));
    Options {
        context,
        tokens: Some(args.tokens.unwrap_or(TOKENS)),
        seed: args.seed,
        state: Some(state),
        recipe: recipe(&args.training, args.tokens, context),
        held_out: if let Some(HeldOut::Share(share)) = args.training.heldout { share } else { HELD_OUT },
    }
}

/// The recipe that the options name, with what they change; so many steps as `tokens` take.
fn recipe(args: &TrainingArgs, tokens: Option<usize>, context: usize) -> Recipe {
    let mut recipe = if args.recipe == Some(RecipeName::Paper) { Recipe::paper() } else { Recipe::default() };
    let set = |place: &mut f32, value: Option<f32>| *place = value.unwrap_or(*place);
    recipe.batch_tokens = args.batch_tokens.unwrap_or(recipe.batch_tokens);
    set(&mut recipe.rate, args.learning_rate);
    set(&mut recipe.clip, args.clip);
    set(&mut recipe.output_weight, args.mse);
    set(&mut recipe.rows, args.queries);
    recipe.schedule = args.schedule.map_or(recipe.schedule, Into::into);
    recipe.start = args.init.map_or(recipe.start, Into::into);
    recipe.gate = (recipe.gate || args.gate) && !args.no_gate;
    let of_tokens = tokens.map(|tokens| tokens.div_ceil(recipe.sequences(context) * context.max(1)));
    recipe.steps = args.steps.or(of_tokens).unwrap_or(recipe.steps);
    recipe
}

/// What training found, as a table.
fn render(training: &Training) -> String {
    let percent = |before: f32, after: f32| format!("{:+.1} %", 100.0 * (after / before - 1.0));
    let mut rows = Vec::new();
    let mut sums = [0.0; 2];
    for layer in 0..training.before.len() {
        let Some((before, after)) = training.layer(layer) else { continue };
        let heads = training.before[layer].len();
        let off = (0..heads).filter(|head| !training.improves(layer, *head)).count();
        let off = if off == 0 { "-".to_owned() } else { format!("{off} of {heads}") };
        let figures = [format!("{before:.5}"), format!("{after:.5}"), percent(before, after), off];
        rows.push([&[layer.to_string()], &figures[..]].concat());
        sums = [sums[0] + before, sums[1] + after];
    }
    let [before, after] = sums.map(|sum| sum / rows.len() as f32);
    rows.push(
        ["all".into(), format!("{before:.5}"), format!("{after:.5}"), percent(before, after), String::new()].into(),
    );
    let header = ["layer", "held-out KL before", "after", "change", "heads switched off"];
    format!("\n\n{}KL of attention rows in nats", table(&header, &rows))
}

/// What was told of a calibration so far.
#[derive(Default)]
struct Told {
    phase: Option<Phase>,
    measured: Option<[f32; 2]>,
}

impl Told {
    fn tell(&mut self, progress: Progress, options: &Options, state: &Path, bar: &ProgressBar) {
        if self.phase.replace(progress.phase) != Some(progress.phase) {
            announce(progress, options, state);
            bar.reset_eta();
        }
        bar.set_length(progress.sequences as u64);
        bar.set_position(progress.done as u64);
        if progress.phase == Phase::Gathering {
            return bar.set_message(format!("sequences of {} tokens", options.context));
        }
        let steps = format!("step {} of {}", progress.steps, options.recipe.steps);
        let loss = progress.loss.map(|loss| format!(", loss {loss:.4}")).unwrap_or_default();
        let held_out =
            progress.divergence.map(|[without, with]| format!(", held-out KL {with:.5} ({without:.5} without)"));
        let line = format!("{steps}{loss}{}", held_out.unwrap_or_default());
        // Without a terminal there is no bar; then every measurement takes a line.
        if progress.divergence != self.measured && !std::io::stderr().is_terminal() {
            note(&line);
        }
        self.measured = progress.divergence;
        bar.set_message(line);
    }
}

/// Checks that the file can be written, and that nothing is lost by it.
fn check_place(args: &CalibrateArgs) -> Result<()> {
    let out = &args.out;
    check_writable(out)?;
    if out.exists() && !out.is_file() {
        bail!("cannot write {}: it is not a file, and a calibration must be one", out.display());
    }
    let same = |a: &Path, b: &Path| Some(a.canonicalize().ok()? == b.canonicalize().ok()?);
    let held_out = if let Some(HeldOut::File(path)) = &args.training.heldout { Some(path) } else { None };
    if args.text.iter().chain(held_out).any(|text| same(out, text) == Some(true)) {
        bail!("cannot write {}: it is the text; choose another place for the calibration", out.display());
    }
    Ok(())
}

/// Says what is about to run.
fn announce(progress: Progress, options: &Options, state: &Path) {
    let Progress { phase, done, sequences, steps, .. } = progress;
    let context = options.context;
    let (what, so_far) = match phase {
        Phase::Gathering => {
            (format!("running {sequences} sequences of {context} tokens"), format!("{done} of {sequences} sequences"))
        }
        Phase::Training => {
            let each = sequences / options.recipe.steps;
            let each = if each == 1 { "one sequence".into() } else { format!("{each} sequences") };
            let all = options.recipe.steps;
            (format!("training {all} steps of {each} of {context} tokens"), format!("{steps} of {all} steps"))
        }
    };
    match done {
        0 => note(&what),
        _ => note(&format!("going on from {}: {so_far} are done", state.display())),
    }
}

/// Where a calibration keeps its state while it runs.
fn state_path(out: &Path) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    name.push(".partial");
    PathBuf::from(name)
}
