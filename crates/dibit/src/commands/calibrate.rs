use super::{begin_windows, go_on, interrupt_flag, window_begin};
use crate::args::{CalibrateArgs, HeldOut, RecipeName, TrainingArgs};
use crate::device::on_device;
use crate::output::{STDOUT, bar, check_writable, duration, note, table};
use crate::text::{self, Document};
use crate::{Outcome, bundled, calibration_folder, source};
use anyhow::{Context, Result, bail};
use dibit_cache::Scheme;
use dibit_calibrate::{CalibrationError, Options, Phase, Progress, Recipe, Text, Training, calibrate, passes};
use dibit_device::Train;
use dibit_model::{ChatFormat, Pretrained, SpecialTokens};
use indicatif::ProgressBar;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens of a sequence, where the user does not say and the model is made for so many.
const CONTEXT: usize = 2048;

/// Tokens that statistics are gathered from, where the user does not say.
const TOKENS: usize = 16_384;

/// Share of a text that training is measured on, where the user does not say.
const HELD_OUT: f32 = 0.05;

/// Where there is no bar, a line says how far it is, so often.
const SAY_EVERY: Duration = Duration::from_secs(5);

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
    let texts = if args.text.is_empty() { bundled::calibration_text()? } else { documents(&args.text)? };
    let held_out = match &args.training.heldout {
        Some(HeldOut::File(path)) => documents(std::slice::from_ref(path))?,
        _ => Vec::new(),
    };
    check_place(args)?;
    on_device!(&args.run.open_device()?, |device| run_on(device, args, &scheme, &texts, &held_out))
}

fn run_on<D: Train>(
    device: &Arc<D>,
    args: &CalibrateArgs,
    scheme: &Scheme,
    texts: &[Document],
    held_out: &[Document],
) -> Result<Outcome> {
    let trains = scheme.linear().is_some();
    let mut pretrained = source::load(device, &args.run.model)?;
    begin_windows(&args.window, &mut pretrained);
    scheme.plan(&pretrained.config.cache_model())?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => folder_place(scheme, &pretrained)?,
    };
    let text =
        Text { documents: encode(&pretrained, texts, !trains)?, held_out: encode(&pretrained, held_out, !trains)? };
    let mut options = options(args, &pretrained, &text);
    let state = state_path(&out, &options, &text, args.out.is_some());
    options.state = Some(state.clone());
    let interrupted = interrupt_flag(true)?;
    let bar = bar(0);
    let mut told = Told::default();
    let artefact = calibrate(device, &pretrained, scheme, &text, &options, |progress| {
        told.tell(progress, &options, &bar);
        go_on(&interrupted)
    })?;
    bar.finish_and_clear();
    let Some(artefact) = artefact else {
        note(&format!("stopped; the same command goes on from {}", state.display()));
        return Ok(Outcome::Interrupted);
    };
    artefact.save(&out)?;
    match std::fs::remove_file(&state) {
        // There was none, or another process that made the same took it away.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        other => other.with_context(|| format!("cannot remove {}", state.display()))?,
    }
    let found = artefact.training.as_ref().map(render).unwrap_or_default();
    writeln!(
        std::io::stdout(),
        "{}: {} for {} from {}, {}{found}",
        out.display(),
        scheme.name,
        pretrained.name,
        artefact.source,
        window_begin(&pretrained, pretrained.window_bos)
    )
    .context(STDOUT)?;
    Ok(Outcome::Done)
}

/// The place of a calibration in the user's folder, where it can be written.
fn folder_place(scheme: &Scheme, pretrained: &Pretrained) -> Result<PathBuf> {
    let place = calibration_folder::place(scheme, pretrained).and_then(|place| {
        calibration_folder::make_folder(&place)?;
        check_writable(&place)?;
        Ok(place)
    });
    place.with_context(|| {
        format!(
            "calibrations cannot be kept in the user's folder; give --out FILE, or set {}",
            calibration_folder::VARIABLE
        )
    })
}

/// What is run where nothing else is asked for.
pub struct Job {
    pub text: Text,
    pub options: Options,
}

impl Job {
    /// The bundled text, and the options that `dibit calibrate` has by default; without a state.
    pub fn of_bundled_text(pretrained: &Pretrained, scheme: &Scheme) -> Result<Self> {
        let documents = encode(pretrained, &bundled::calibration_text()?, scheme.linear().is_none())?;
        let context = CONTEXT.min(pretrained.config.max_position_embeddings);
        let tokens = Some(bundled_tokens(pretrained, &documents, context));
        let text = Text { documents, held_out: Vec::new() };
        let recipe = Recipe::default();
        Ok(Job { text, options: Options { context, tokens, seed: 0, state: None, recipe, held_out: HELD_OUT } })
    }

    /// Tokens that it runs before any training; those that are run several times count each time.
    pub fn tokens(&self, scheme: &Scheme, pretrained: &Pretrained) -> usize {
        let Options { context, tokens, .. } = self.options;
        passes(scheme, &pretrained.config, tokens.unwrap_or(0).div_ceil(context)) * context
    }
}

/// Tokens of the bundled text that are run: the usual number, or whole sequences of all that there are.
fn bundled_tokens(pretrained: &Pretrained, documents: &[Vec<u32>], context: usize) -> usize {
    let own = context.saturating_sub(pretrained.window_bos.iter().len()).max(1);
    let there: usize = documents.iter().map(Vec::len).sum();
    TOKENS.min((there / own * context).max(1))
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

/// The options of a run, without a state.
fn options(args: &CalibrateArgs, pretrained: &Pretrained, text: &Text) -> Options {
    let paper = args.training.recipe == Some(RecipeName::Paper);
    let usual = if paper { Recipe::PAPER_CONTEXT } else { CONTEXT };
    let context = args.context.unwrap_or(usual.min(pretrained.config.max_position_embeddings));
    let usual = match args.text.is_empty() {
        true => bundled_tokens(pretrained, &text.documents, context),
        false => TOKENS,
    };
    Options {
        context,
        tokens: Some(args.tokens.unwrap_or(usual)),
        seed: args.seed,
        state: None,
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
pub struct Told {
    phase: Option<Phase>,
    measured: Option<[f32; 2]>,
    /// When the phase began, and at which sequence.
    began: Option<(Instant, usize)>,
    /// When the last line was.
    said: Option<Instant>,
}

impl Told {
    /// Tells how far a calibration is: by a bar, or without a terminal by a line every few seconds.
    pub fn tell(&mut self, progress: Progress, options: &Options, bar: &ProgressBar) {
        if self.phase != Some(progress.phase) {
            announce(progress, options);
            bar.reset_eta();
        }
        bar.set_length(progress.sequences as u64);
        bar.set_position(progress.done as u64);
        bar.set_message(match progress.phase {
            Phase::Gathering => format!("sequences of {} tokens", options.context),
            Phase::Training => training_line(progress, options),
        });
        let line = self.line(progress, options, Instant::now());
        if let Some(line) = line.filter(|_| !std::io::stderr().is_terminal()) {
            note(&line);
        }
    }

    /// The line that is due now, if one is: every few seconds, and for every measurement of a training.
    fn line(&mut self, progress: Progress, options: &Options, now: Instant) -> Option<String> {
        let Progress { phase, done, sequences, divergence, .. } = progress;
        if self.phase.replace(phase) != Some(phase) {
            (self.began, self.said) = (Some((now, done)), Some(now));
        }
        let measured = std::mem::replace(&mut self.measured, divergence) != divergence;
        if !measured && self.said.is_some_and(|said| now - said < SAY_EVERY) {
            return None;
        }
        self.said = Some(now);
        let (began, first) = self.began?;
        let line = match phase {
            Phase::Gathering => format!("{done} of {sequences} sequences"),
            Phase::Training => training_line(progress, options),
        };
        if done <= first {
            return Some(line);
        }
        let left = (now - began).mul_f64(sequences.saturating_sub(done) as f64 / (done - first) as f64);
        Some(format!("{line}, about {} left", duration(left)))
    }
}

fn training_line(progress: Progress, options: &Options) -> String {
    let steps = format!("step {} of {}", progress.steps, options.recipe.steps);
    let loss = progress.loss.map(|loss| format!(", loss {loss:.4}")).unwrap_or_default();
    let held_out = progress.divergence.map(|[without, with]| format!(", held-out KL {with:.5} ({without:.5} without)"));
    format!("{steps}{loss}{}", held_out.unwrap_or_default())
}

/// Checks that the file can be written, and that nothing is lost by it.
fn check_place(args: &CalibrateArgs) -> Result<()> {
    let Some(out) = &args.out else { return Ok(()) };
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
fn announce(progress: Progress, options: &Options) {
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
    match &options.state {
        Some(state) if done > 0 => note(&format!("going on from {}: {so_far} are done", state.display())),
        _ => note(&what),
    }
}

/// Where a calibration keeps its state while it runs. In the user's folder, where runs with other texts and options write the
/// same file, each has a state of its own.
fn state_path(out: &Path, options: &Options, text: &Text, named: bool) -> PathBuf {
    let mut name = out.as_os_str().to_owned();
    if !named {
        let mut hash = DefaultHasher::new();
        let Options { context, tokens, seed, held_out, ref recipe, .. } = *options;
        (context, tokens, seed, held_out.to_bits(), recipe.to_string()).hash(&mut hash);
        (&text.documents, &text.held_out).hash(&mut hash);
        name.push(format!(".{:016x}", hash.finish()));
    }
    name.push(".partial");
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_terminal_a_line_comes_every_few_seconds() {
        let options =
            Options { context: 64, tokens: None, seed: 0, state: None, recipe: Recipe::default(), held_out: HELD_OUT };
        let (mut told, start) = (Told::default(), Instant::now());
        let mut after = |seconds, phase, done, divergence| {
            let progress = Progress { phase, done, sequences: 100, steps: 7, loss: None, divergence };
            told.line(progress, &options, start + Duration::from_secs(seconds))
        };
        let gathering = Phase::Gathering;
        assert_eq!(after(0, gathering, 20, None), None);
        assert_eq!(after(4, gathering, 22, None), None);
        assert_eq!(after(6, gathering, 24, None).unwrap(), "24 of 100 sequences, about 2 min left");
        assert_eq!(after(8, gathering, 26, None), None);
        assert_eq!(after(11, gathering, 60, None).unwrap(), "60 of 100 sequences, about 11 s left");
        // Training counts from its own beginning, and tells every measurement.
        assert_eq!(after(12, Phase::Training, 0, None), None);
        let line = after(13, Phase::Training, 10, Some([0.5, 0.25])).unwrap();
        assert_eq!(line, "step 7 of 300, held-out KL 0.25000 (0.50000 without), about 9 s left");
        assert_eq!(after(14, Phase::Training, 11, Some([0.5, 0.25])), None);
    }
}
