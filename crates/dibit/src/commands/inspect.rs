use super::schemes;
use super::schemes::{Found as Calibration, command, find};
use crate::args::{InspectArgs, LoadFormat};
use crate::device::{self, AnyDevice, DeviceChoice, on_device};
use crate::output::{STDOUT, bytes, columns, table};
use crate::{Outcome, memory, source};
use anyhow::{Context, Result};
use dibit_cache::{CachePlan, Scheme, TransformedValues};
use dibit_device::{Arithmetic, Budget, DType, Device};
use dibit_engine::{MemoryPlan, Options};
use dibit_model::{Checkpoint, ModelConfig, ModelFiles, Pretrained, WeightSource};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::sync::Arc;
use tracing::subscriber::NoSubscriber;

/// All that is shown.
struct Report {
    files: ModelFiles,
    config: ModelConfig,
    options: Options,
    /// Bytes of the weights.
    weights: usize,
    /// How they are stored.
    formats: String,
    /// The device in words.
    device: String,
    /// Bytes of its memory that are free.
    available: usize,
    rows: Vec<Row>,
    /// What was found of devices, where that is asked for.
    found: Option<Found>,
}

/// Devices, and how operations run on the one that is planned for.
struct Found {
    /// What was looked for, and what was found.
    parts: Vec<(String, String)>,
    /// For each scheme, operations and how they run.
    paths: Vec<(String, Vec<(String, String)>)>,
}

/// What one scheme takes.
struct Row {
    scheme: String,
    plan: MemoryPlan,
    /// Bytes that each further token takes once the window is full.
    token_bytes: f64,
    /// Bits in use for a scalar at the whole context.
    bits: f64,
    /// Bits allocated for it.
    allocated_bits: f64,
    /// Tokens of one sequence that fit beside the weights.
    fitting_tokens: usize,
    /// Sequences of the whole context that fit beside the weights.
    fitting_batch: usize,
    /// Where values are transformed.
    values: TransformedValues,
    /// What the model's shape changes of the scheme.
    notes: Vec<String>,
    /// Layers that see no more than so many tokens, and what the cache would take if all saw all of them.
    spans: Vec<(usize, usize)>,
    full_bytes: usize,
    /// The calibration of a scheme that takes one, where the weights are here to look for it.
    calibration: Lookup,
}

/// What became of looking for a calibration.
enum Lookup {
    /// The scheme takes none.
    NotNeeded,
    Found(Calibration),
    /// There is none; the command that makes it.
    Missing(String),
    /// It was not looked for, and why.
    Unknown(String),
}

/// What plans depend on.
struct Machine {
    name: String,
    /// Bytes of memory that are free.
    available: usize,
    budget: Budget,
}

impl Machine {
    fn of<D: Device>(device: &Arc<D>) -> Self {
        let available = device.memory().map_or_else(memory::available, |own| own.free);
        Machine { name: device.describe(), available, budget: device.budget() }
    }
}

pub fn run(args: &InspectArgs) -> Result<Outcome> {
    args.prefill.check()?;
    let schemes = schemes(&args.kv)?;
    let files = source::describe(&args.model)?;
    let config = source::config(&files)?;
    let Stored { bytes: weights, formats, arithmetic, takes_fused_values } = Stored::of(args, &files, &config)?;
    let device = device::open(args.device.unwrap_or(DeviceChoice::Auto), None, None)?;
    let Machine { name, available, budget } = on_device!(&device, |device| Machine::of(device));
    let options = Options {
        context: args.context.map_or(config.max_position_embeddings, |context| context as usize),
        sequences: args.batch as usize,
        prefill: args.prefill.on(&budget),
    };
    let free = available.saturating_sub(weights);
    let row = |scheme: &Scheme| {
        let model = config.cache_model().fusing(|layer| takes_fused_values[layer]);
        let full = MemoryPlan::new(&config, &scheme.plan(&model.clone().seeing_all())?, options, &budget);
        Ok(Row { full_bytes: full.cache_bytes, ..row(scheme.plan(&model)?, &config, options, &budget, free) })
    };
    let mut rows = schemes.iter().map(row).collect::<Result<Vec<_>>>()?;
    for (row, calibration) in rows.iter_mut().zip(calibrations(args, &files, &schemes)?) {
        row.calibration = calibration;
    }
    let found = args.device.map(|choice| found(choice, &device, &name, &schemes, &config, arithmetic)).transpose()?;
    let report = Report { files, config, options, weights, formats, device: name, available, rows, found };
    let mut stdout = std::io::stdout().lock();
    if args.json {
        writeln!(stdout, "{}", serde_json::to_string_pretty(&report.to_json())?).context(STDOUT)?;
    } else {
        write!(stdout, "{}", report.render()).context(STDOUT)?;
    }
    Ok(Outcome::Done)
}

fn found(
    choice: DeviceChoice,
    device: &AnyDevice,
    name: &str,
    schemes: &[Scheme],
    config: &ModelConfig,
    arithmetic: Arithmetic,
) -> Result<Found> {
    let mut parts = vec![("device".to_owned(), name.to_owned())];
    if choice != DeviceChoice::Cpu {
        parts.extend(dibit_cuda::probe().lines());
    }
    let mut paths = Vec::new();
    for scheme in schemes {
        let layout = scheme.plan(&config.cache_model())?;
        let own = match device {
            AnyDevice::Cpu(cpu) => cpu.paths(&layout, config.num_attention_heads),
            AnyDevice::Cuda(cuda) => cuda.paths(&layout, arithmetic, config.num_attention_heads),
        };
        paths.push((scheme.name.clone(), own));
    }
    Ok(Found { parts, paths })
}

impl Found {
    fn render(&self) -> String {
        let of_scheme = |(scheme, paths): &(String, Vec<(String, String)>)| {
            let indented: Vec<_> = paths.iter().map(|(name, path)| (format!("  {name}"), path.clone())).collect();
            format!("{scheme}\n{}", columns(&indented))
        };
        let paths: Vec<String> = self.paths.iter().map(of_scheme).collect();
        format!("\n{}{}{}", columns(&self.parts), if paths.is_empty() { "" } else { "\n" }, paths.concat())
    }

    fn to_json(&self) -> Value {
        let object = |rows: &[(String, String)]| -> Value {
            rows.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect::<Map<_, _>>().into()
        };
        let paths: Map<_, _> = self.paths.iter().map(|(scheme, paths)| (scheme.clone(), object(paths))).collect();
        json!({"found": object(&self.parts), "paths": paths})
    }
}

/// How weights are stored.
struct Stored {
    bytes: usize,
    formats: String,
    arithmetic: Arithmetic,
    /// For each layer, whether a transform of values can be fused into its projections.
    takes_fused_values: Vec<bool>,
}

impl Stored {
    fn of(args: &InspectArgs, files: &ModelFiles, config: &ModelConfig) -> Result<Self> {
        let layers = config.num_hidden_layers;
        let of_dtype = |dtype: DType| Stored {
            bytes: config.num_parameters() * dtype.size(),
            formats: dtype.name().to_owned(),
            arithmetic: if dtype == DType::F32 { Arithmetic::Exact } else { Arithmetic::Fast },
            takes_fused_values: vec![true; layers],
        };
        Ok(match args.model.dtype.dtype() {
            Some(dtype) => of_dtype(dtype),
            None if files.weights.is_empty() => of_dtype(config.dtype.unwrap_or(DType::Bf16)),
            None => {
                // Opening checks the headers, so that a damaged checkpoint is known here already.
                let checkpoint = Checkpoint::open(&files.weights)?;
                Stored {
                    bytes: files.weights.iter().map(|file| file.bytes.len()).sum::<usize>()
                        + checkpoint.widening_bytes(),
                    formats: checkpoint.formats(),
                    arithmetic: checkpoint.arithmetic(),
                    takes_fused_values: (0..layers).map(|layer| checkpoint.takes_fused_values(layer)).collect(),
                }
            }
        })
    }
}

fn row(layout: CachePlan, config: &ModelConfig, options: Options, budget: &Budget, free: usize) -> Row {
    let plan = MemoryPlan::new(config, &layout, options, budget);
    let usage = layout.planned_usage(options.context, options.prefill.chunk(options.context));
    let fits = |options: Options| {
        let plan = MemoryPlan::new(config, &layout, options, budget);
        plan.cache_bytes.saturating_add(plan.pass_bytes) <= free
    };
    Row {
        scheme: layout.scheme_name().to_owned(),
        plan,
        token_bytes: layout.token_bytes(),
        bits: usage.bits(),
        allocated_bits: usage.allocated_bits(),
        fitting_tokens: largest(|context| {
            // Where all layers have a window, a longer text takes no more.
            let ends = layout.token_bytes() > 0.0 || context <= config.max_position_embeddings;
            ends && fits(Options { context, sequences: 1, ..options })
        }),
        fitting_batch: largest(|sequences| fits(Options { sequences, ..options })),
        values: layout.transformed_values(config.num_attention_heads),
        notes: layout.notes(),
        spans: layout.spans(),
        full_bytes: plan.cache_bytes,
        calibration: Lookup::NotNeeded,
    }
}

/// The largest number that fits, where all below it do.
fn largest(fits: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (0usize, 1 << 40);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if fits(middle) { low = middle } else { high = middle - 1 }
    }
    low
}

/// Looks for the calibration of each scheme.
fn calibrations(args: &InspectArgs, files: &ModelFiles, schemes: &[Scheme]) -> Result<Vec<Lookup>> {
    let pretrained = if !schemes.iter().any(Scheme::takes_calibration) {
        Err(String::new())
    } else if args.model.load_format == LoadFormat::Dummy {
        Err("made-up weights have none".to_owned())
    } else if files.weights.is_empty() {
        Err("the weights are not on this machine".to_owned())
    } else {
        // What loading warns of is said when the model runs.
        let load = || Pretrained::load(files, WeightSource::Checkpoint, None);
        tracing::subscriber::with_default(NoSubscriber::default(), load).map_err(|error| error.to_string())
    };
    let lookup = |scheme: &Scheme| {
        Ok(match &pretrained {
            _ if !scheme.takes_calibration() => Lookup::NotNeeded,
            Err(reason) => Lookup::Unknown(reason.clone()),
            Ok(pretrained) => match find(&mut scheme.clone().into(), pretrained)? {
                Some(found) => Lookup::Found(found),
                None => Lookup::Missing(command(scheme, pretrained)),
            },
        })
    };
    schemes.iter().map(lookup).collect()
}

impl Row {
    /// What layers with a sliding window save, as a line.
    fn windows(&self) -> Option<String> {
        let of_span = |(tokens, layers): &(usize, usize)| format!("{layers} layers see the last {tokens} tokens");
        let all: Vec<String> = self.spans.iter().map(of_span).collect();
        (!all.is_empty()).then(|| {
            let (own, full) = (bytes(self.plan.cache_bytes), bytes(self.full_bytes));
            format!("{}: {}: a cache of {own}, which would be {full} with full attention", self.scheme, all.join(", "))
        })
    }
}

impl Lookup {
    /// As a line about a scheme.
    fn line(&self, scheme: &str) -> Option<String> {
        match self {
            Lookup::NotNeeded => None,
            Lookup::Found(found) => Some(format!("{scheme}: calibration {found}")),
            Lookup::Missing(command) => Some(format!("{scheme}: no calibration of this model; `{command}` makes one")),
            Lookup::Unknown(reason) => Some(format!("{scheme}: calibration not looked for, {reason}")),
        }
    }

    fn to_json(&self) -> Value {
        if let Lookup::Found(found) = self { found.to_json() } else { Value::Null }
    }
}

impl Report {
    fn render(&self) -> String {
        let Report { files, config, options, weights, formats, device, available, rows, found } = self;
        let header = [
            "scheme",
            "per token",
            "cache",
            "of fp16",
            "bits",
            "allocated",
            "prefill pass",
            "tokens that fit",
            "batch that fits",
        ];
        let cells: Vec<Vec<String>> = rows
            .iter()
            .map(|row| {
                vec![
                    row.scheme.clone(),
                    bytes(row.token_bytes.round() as usize),
                    bytes(row.plan.cache_bytes),
                    format!("1/{:.2}", row.plan.fp16_bytes as f64 / row.plan.cache_bytes as f64),
                    format!("{:.2}", row.bits),
                    format!("{:.2}", row.allocated_bits),
                    format!("{} in {}", row.plan.pass_rows, bytes(row.plan.pass_bytes)),
                    format!("{}", row.fitting_tokens),
                    format!("{}", row.fitting_batch),
                ]
            })
            .collect();
        let values = |row: &Row| {
            let text = row.values.to_string();
            (!text.is_empty()).then(|| format!("{}: {text}", row.scheme))
        };
        let lines = |row: &Row| {
            let own = row.notes.iter().cloned();
            own.chain(row.windows()).chain(values(row)).chain(row.calibration.line(&row.scheme)).collect::<Vec<_>>()
        };
        let notes: Vec<String> = rows.iter().flat_map(lines).map(|note| format!("{note}\n")).collect();
        let gap = if notes.is_empty() { "" } else { "\n" };
        let limit = config.max_position_embeddings;
        let beyond = if options.context > limit { format!(" (the model supports {limit})") } else { String::new() };
        format!(
            "{}: {}, {} layers, {} query heads on {} KV heads of {}, vocabulary {}\n\
         weights {} ({formats}); memory available {} on {device}; context {} tokens{beyond}, batch {}\n\n{}{gap}{}{}",
            files.origin,
            config.architecture.name(),
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.vocab_size,
            bytes(*weights),
            bytes(*available),
            options.context,
            options.sequences,
            table(&header, &cells),
            notes.concat(),
            found.as_ref().map(Found::render).unwrap_or_default()
        )
    }

    fn to_json(&self) -> Value {
        let Report { files, config, options, weights, formats, device, available, rows, found } = self;
        let schemes: Vec<Value> = rows
            .iter()
            .map(|row| {
                json!({
                    "scheme": row.scheme,
                    "bytes_per_token": row.token_bytes,
                    "cache_bytes": row.plan.cache_bytes,
                    "fp16_bytes": row.plan.fp16_bytes,
                    "full_attention_bytes": row.full_bytes,
                    "bits": row.bits,
                    "allocated_bits": row.allocated_bits,
                    "pass_rows": row.plan.pass_rows,
                    "pass_bytes": row.plan.pass_bytes,
                    "tokens_that_fit": row.fitting_tokens,
                    "batch_that_fits": row.fitting_batch,
                    "values": {
                        "fused_layers": row.values.fused,
                        "online_layers": row.values.online,
                        "multiply_adds_per_token": row.values.multiply_adds,
                    },
                    "notes": row.notes,
                    "calibration": row.calibration.to_json(),
                })
            })
            .collect();
        let mut report = json!({
            "model": files.origin,
            "architecture": config.architecture.name(),
            "parameters": config.num_parameters(),
            "weights_bytes": weights,
            "weights_formats": formats,
            "device": device,
            "available_bytes": available,
            "context": options.context,
            "prefill": options.prefill.to_string(),
            "batch": options.sequences,
            "schemes": schemes,
        });
        if let Some(found) = found {
            report["devices"] = found.to_json();
        }
        report
    }
}
