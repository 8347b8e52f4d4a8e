use super::schemes::calibrated_schemes;
use super::{announce, evaluation_progress, go_on, interrupt_flag, schemes};
use crate::args::RulerArgs;
use crate::device::on_device;
use crate::output::{STDOUT, bar, check_writable, note, table, write_complete};
use crate::retrieval::{self, Answer};
use crate::{Outcome, source};
use anyhow::{Context, Result, bail};
use dibit_cache::CalibratedScheme;
use dibit_device::Device;
use dibit_engine::{EngineError, Options};
use dibit_eval::csv_field;
use dibit_eval::ruler::{
    COPYING, Copying, CopyingOptions, Haystack, Sample, SampleOptions, Task, copying, copying_context,
};
use dibit_model::Pretrained;
use dibit_runner::Models;
use serde_json::{Value, json};
use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// What is asked for.
struct Tasks {
    ruler: Vec<Task>,
    copying: bool,
}

/// Figures of a run.
struct Report<'a> {
    tasks: &'a [Task],
    rows: Vec<Row<'a>>,
    copying: Option<Copying>,
}

/// The prompts of one length, task after task.
struct Prompts {
    context: usize,
    samples: Vec<Sample>,
}

/// How a scheme did at one length.
struct Row<'a> {
    scheme: &'a str,
    prompts: &'a Prompts,
    /// One for each prompt.
    answers: Vec<Answer>,
}

pub fn run(args: &RulerArgs) -> Result<Outcome> {
    schemes(&args.kv)?;
    args.conversation.check(args.chat)?;
    let tasks = tasks(&args.tasks)?;
    match tasks.ruler.is_empty() {
        true => args.prefill.check_without("--tasks copying")?,
        false => args.prefill.check()?,
    }
    let haystack = args.haystack.haystack.as_deref().map(retrieval::haystack).transpose()?;
    for path in [&args.json, &args.csv, &args.dump].into_iter().flatten() {
        check_writable(path)?;
    }
    on_device!(&args.run.open_device()?, |device| run_on(device, args, tasks, haystack))
}

fn run_on<D: Device + 'static>(
    device: &Arc<D>,
    args: &RulerArgs,
    tasks: Tasks,
    haystack: Option<Haystack>,
) -> Result<Outcome> {
    let pretrained = Arc::new(source::load(device, &args.run.model)?);
    let schemes = calibrated_schemes(&args.kv, &args.calibration.calibration, &pretrained)?;
    check(args, &tasks, &pretrained, &schemes)?;
    let Tasks { ruler: tasks, copying: copies } = &tasks;
    let name = pretrained.name.clone();
    let stand_in = haystack.is_none() && tasks.iter().any(|task| task.takes_essay());
    if stand_in {
        tracing::info!(
            "without --haystack, RULER's noise sentences stand in for essays; that is easier than essays are"
        );
    }
    let prompts = prompts(args, &pretrained, tasks, &haystack.unwrap_or_else(Haystack::noise))?;
    let interrupted = interrupt_flag(true)?;
    if let Some(path) = &args.dump {
        write_complete(path, dump(&prompts).as_bytes())?;
    }

    let options = CopyingOptions { samples: args.samples as usize, seed: args.seed };
    let copying = match *copies {
        true => {
            let bar = bar(0);
            let done = copying(device, &pretrained, &schemes, options, evaluation_progress(&bar, &interrupted));
            bar.finish_and_clear();
            done?
        }
        false => None,
    };
    let bar = bar(schemes.len() * prompts.iter().map(|prompts| prompts.samples.len()).sum::<usize>());
    let mut rows = Vec::new();
    let mut models = Models::new(device, &pretrained);
    for scheme in schemes.iter().filter(|_| !tasks.is_empty()) {
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
        let done: usize = rows.iter().map(|row: &Row| row.answers.len()).sum();
        rows.extend(run_scheme(args, (&pretrained, &mut models), scheme, &prompts, |prompts, sample, before| {
            bar.set_message(format!("{} at {}: {}", scheme.name, prompts.context, sample.task));
            bar.set_position((done + before) as u64);
            go_on(&interrupted)
        })?);
    }
    bar.finish_and_clear();

    let report = Report { tasks, rows, copying };
    // Copying is always read as decoding would.
    let read = (!tasks.is_empty()).then(|| args.prefill.on(&device.budget()).to_string());
    let stopped = interrupted.load(Ordering::Relaxed);
    if let Some(path) = args.json.as_deref().filter(|_| !stopped) {
        write_complete(path, serde_json::to_string(&to_json(args, &name, read, &report)?)?.as_bytes())?;
    }
    if let Some(path) = args.csv.as_deref().filter(|_| !stopped) {
        write_complete(path, to_csv(&report).as_bytes())?;
    }
    if !report.rows.is_empty() {
        write!(std::io::stdout(), "{}", render(args, &report, stand_in)).context(STDOUT)?;
    }
    if let Some(copying) = &report.copying {
        let gap = if report.rows.is_empty() { "" } else { "\n" };
        write!(std::io::stdout(), "{gap}{}", render_copying(args, copying)).context(STDOUT)?;
    }
    if stopped {
        note("interrupted: what was not finished is left out, and no figures are written to files");
        return Ok(Outcome::Interrupted);
    }
    Ok(Outcome::Done)
}

/// The tasks of these names, each once.
fn tasks(names: &[String]) -> Result<Tasks> {
    let mut tasks = Tasks { ruler: Vec::new(), copying: false };
    for name in names.iter().map(|name| name.trim()) {
        tasks.copying |= ["all", COPYING].contains(&name);
        let named = match name {
            "all" => Task::ALL.to_vec(),
            COPYING => Vec::new(),
            name => vec![name.parse()?],
        };
        for task in named {
            if !tasks.ruler.contains(&task) {
                tasks.ruler.push(task);
            }
        }
    }
    Ok(tasks)
}

/// Refuses what cannot run before anything does.
fn check(args: &RulerArgs, tasks: &Tasks, pretrained: &Pretrained, schemes: &[CalibratedScheme]) -> Result<()> {
    let limit = pretrained.config.max_position_embeddings;
    let needed = copying_context(pretrained);
    if tasks.copying && needed > limit {
        bail!("{COPYING} needs {needed} tokens, and the model takes {limit}; leave the task out of --tasks");
    }
    for &context in args.context.iter().filter(|_| !tasks.ruler.is_empty()) {
        let context = context as usize;
        if context > limit {
            return Err(EngineError::ContextTooLong { context, limit }.into());
        }
    }
    for scheme in schemes {
        pretrained.config.cache_layout(scheme)?;
        announce(scheme, &pretrained.config)?;
    }
    Ok(())
}

fn prompts(args: &RulerArgs, pretrained: &Pretrained, tasks: &[Task], haystack: &Haystack) -> Result<Vec<Prompts>> {
    let format = args.chat.then(|| args.conversation.format(pretrained)).transpose()?;
    let of_length = |context: &u32| {
        let context = *context as usize;
        let options = SampleOptions { length: context, count: args.samples as usize, seed: args.seed };
        Ok(Prompts { context, samples: retrieval::samples(pretrained, tasks, options, haystack, format.as_ref())? })
    };
    args.context.iter().map(of_length).collect()
}

/// Runs one scheme at all lengths. `progress` gets the prompt that is about to run, and how many have run before
/// it; it says whether to go on. Lengths that were not finished are left out.
fn run_scheme<'a, D: Device + 'static>(
    args: &RulerArgs,
    (pretrained, models): (&Arc<Pretrained>, &mut Models<D>),
    scheme: &'a CalibratedScheme,
    prompts: &'a [Prompts],
    mut progress: impl FnMut(&Prompts, &Sample, usize) -> ControlFlow<()>,
) -> Result<Vec<Row<'a>>> {
    let options = Options {
        context: args.context.iter().copied().max().unwrap_or(1) as usize,
        sequences: usize::from(args.parallel).min(prompts[0].samples.len()),
        prefill: args.prefill.on(&models.device().budget()),
    };
    models.keep_first();
    let mut engine = retrieval::engine(pretrained, models, scheme, options)?;
    let longest = prompts.iter().flat_map(|prompts| &prompts.samples).map(|sample| sample.prompt.len()).max();
    if let Some(note) = options.prefill.note(0..longest.unwrap_or(0)) {
        tracing::info!("{}: {note}", scheme.name);
    }
    let (mut rows, mut before) = (Vec::new(), 0);
    for prompts in prompts {
        let answers = retrieval::run(&mut engine, &prompts.samples, |begun| {
            progress(prompts, &prompts.samples[begun - 1], before + begun - 1)
        })?;
        let Some(answers) = answers else { break };
        before += answers.len();
        rows.push(Row { scheme: &scheme.name, prompts, answers });
    }
    Ok(rows)
}

impl Row<'_> {
    /// Prompts of a task with their answers.
    fn of(&self, task: Task) -> impl Iterator<Item = (&Sample, &Answer)> {
        self.prompts.samples.iter().zip(&self.answers).filter(move |(sample, _)| sample.task == task)
    }

    /// Per cent of what was to be found in a task.
    fn score(&self, task: Task) -> f64 {
        100.0 * mean(self.of(task).map(|(_, answer)| answer.score))
    }

    fn mean(&self, tasks: &[Task]) -> f64 {
        mean(tasks.iter().map(|&task| self.score(task)))
    }
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count.max(1))
}

fn render(args: &RulerArgs, report: &Report, stand_in: bool) -> String {
    let Report { tasks, rows, .. } = report;
    let names = tasks.iter().map(|task| task.name().trim_start_matches("niah_"));
    let header: Vec<&str> = ["scheme", "context"].into_iter().chain(names).chain(["mean"]).collect();
    let cells = |row: &Row| {
        let scores = tasks.iter().map(|&task| row.score(task)).chain([row.mean(tasks)]);
        let start = [row.scheme.to_owned(), row.prompts.context.to_string()];
        start.into_iter().chain(scores.map(|score| format!("{score:.1}"))).collect()
    };
    let essays = if stand_in { "; noise stands in for essays" } else { "" };
    format!(
        "{}per cent of what was to be found; --samples {} --seed {}{}{essays}\n",
        table(&header, &rows.iter().map(cells).collect::<Vec<_>>()),
        args.samples,
        args.seed,
        if args.chat { " --chat" } else { "" },
    )
}

fn render_copying(args: &RulerArgs, copying: &Copying) -> String {
    let cells = |of: &dibit_eval::ruler::CopyingResult| {
        let shares = [of.copied, of.top1_agreement].map(|share| format!("{:.1}", 100.0 * share));
        let [copied, agreement] = shares;
        vec![of.scheme.clone(), copied, agreement, format!("{:.4}", of.kl_mean)]
    };
    format!(
        "{}copying {} random tokens: per cent of the second copy that is the most likely token, and whose most likely token \
         is that of fp16; KL in nats against fp16; --samples {} --seed {}\n",
        table(&["scheme", "copied", "top-1", "KL mean"], &copying.schemes.iter().map(cells).collect::<Vec<_>>()),
        copying.copied_tokens,
        args.samples,
        args.seed,
    )
}

fn to_json(args: &RulerArgs, model: &str, read: Option<String>, report: &Report) -> Result<Value> {
    let Report { tasks, rows, copying } = report;
    let answer = |(sample, answer): (&Sample, &Answer)| {
        json!({
            "index": sample.index,
            "score": answer.score,
            "outputs": sample.answers,
            "prediction": answer.prediction,
            "prompt_tokens": sample.prompt.len(),
            "generated_tokens": answer.generated_tokens,
        })
    };
    let task = |row: &Row, task: Task| {
        let samples: Vec<Value> = row.of(task).map(answer).collect();
        json!({"task": task.name(), "score": row.score(task), "samples": samples})
    };
    let row = |row: &Row| {
        json!({
            "scheme": row.scheme,
            "context": row.prompts.context,
            "mean": row.mean(tasks),
            "tasks": tasks.iter().map(|&name| task(row, name)).collect::<Vec<_>>(),
        })
    };
    Ok(json!({
        "model": model,
        "samples": args.samples,
        "seed": args.seed,
        "prefill": read,
        "chat": args.chat,
        "haystack": args.haystack.haystack,
        "results": rows.iter().map(row).collect::<Vec<_>>(),
        "copying": serde_json::to_value(copying)?,
    }))
}

fn to_csv(report: &Report) -> String {
    let Report { tasks, rows, copying } = report;
    let mut csv = "scheme,context,task,score\n".to_owned();
    for row in rows {
        for &task in *tasks {
            csv += &format!("{},{},{task},{:.2}\n", csv_field(row.scheme), row.prompts.context, row.score(task));
        }
    }
    for (own, context) in copying.iter().flat_map(|all| all.schemes.iter().map(|own| (own, all.context))) {
        csv += &format!("{},{context},{COPYING},{:.2}\n", csv_field(&own.scheme), 100.0 * own.copied);
    }
    csv
}

/// The prompts as JSON lines; the fields of the original have its names.
fn dump(prompts: &[Prompts]) -> String {
    let line = |context: usize, sample: &Sample| {
        let value = json!({
            "task": sample.task.name(),
            "context": context,
            "index": sample.index,
            "input": sample.input,
            "answer_prefix": sample.answer_prefix,
            "outputs": sample.answers,
            "length": sample.prompt.len() + sample.task.max_new_tokens(),
        });
        format!("{value}\n")
    };
    prompts.iter().flat_map(|p| p.samples.iter().map(move |sample| line(p.context, sample))).collect()
}
