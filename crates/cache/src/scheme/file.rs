//! From the text of a scheme to a [`Scheme`].

use super::Scheme;
use super::check::{
    Problem, Which, check_auto_sinks, check_classes, check_correction, check_features, check_pages, needs_chunks,
    unsupported,
};
use super::choices::{
    AutoSinks, Class, Correction, LayerOverride, Linear, Pivots, PlaneBudget, Pool, Sees, Side, Sinks, StateType,
};
use super::side_file::SideFile;
use crate::{PAGE_TOKENS, Planes, Schedule, SchemeError, Window};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ops::Range;

const MAX_WINDOW: usize = 4096;
const MAX_FIRST: usize = 1024;
const MAX_FOUND: usize = 64;
const MAX_CLASSES: usize = 8;

/// Planes of a channel, where a scheme does not say.
const MOST_PLANES: usize = 3;

/// Features of a linear correction (KVLinC, section 4.1).
const FEATURES: usize = 256;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SchemeFile {
    name: String,
    #[serde(default)]
    summary: String,
    correction: Option<CorrectionFile>,
    planes: Option<PlanesFile>,
    #[serde(default)]
    attention: Sees,
    keys: toml::Table,
    values: toml::Table,
    window: Option<WindowFile>,
    sinks: Option<SinksFile>,
    #[serde(default)]
    layers: BTreeMap<String, LayerFile>,
    #[serde(default)]
    classes: BTreeMap<String, ClassFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClassFile {
    #[serde(default)]
    keys: toml::Table,
    #[serde(default)]
    values: toml::Table,
    #[serde(default)]
    layers: BTreeMap<String, LayerFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LayerFile {
    #[serde(default)]
    keys: toml::Table,
    #[serde(default)]
    values: toml::Table,
    correction: Option<CorrectionFile>,
}

/// `correction = "linear"`, or a table with more to say.
#[derive(Deserialize)]
#[serde(untagged)]
enum CorrectionFile {
    Kind(CorrectionKind),
    Table(CorrectionTable),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CorrectionTable {
    kind: CorrectionKind,
    features: Option<usize>,
    states: Option<StateType>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
enum CorrectionKind {
    #[serde(rename = "none")]
    None,
    #[serde(rename = "linear")]
    Linear,
    #[serde(rename = "bias")]
    Bias,
    #[serde(rename = "linear+bias")]
    Both,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanesFile {
    #[serde(default)]
    pool: Pool,
    most: Option<usize>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowFile {
    tokens: usize,
    schedule: ScheduleFile,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ScheduleFile {
    Guaranteed,
    Kivi,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SinksFile {
    kind: SinkKind,
    count: usize,
    #[serde(default)]
    per_layer: bool,
    places: Option<usize>,
    share: Option<f32>,
}

#[derive(PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SinkKind {
    First,
    Auto,
    Massive,
    Pivots,
}

pub(super) fn parse(text: &str, origin: &str) -> Result<Scheme, SchemeError> {
    let scheme: Result<Scheme, Problem> =
        toml::from_str::<SchemeFile>(text).map_err(Problem::from).and_then(SchemeFile::validate);
    let scheme = scheme.map(|scheme| Scheme { origin: origin.to_owned(), ..scheme });
    scheme.map_err(|problem| match problem {
        Problem::Parse(message) => SchemeError::Parse { name: origin.to_owned(), message },
        Problem::Unsupported { problem, supported } => {
            SchemeError::Unsupported { name: origin.to_owned(), problem, supported }
        }
    })
}

impl SchemeFile {
    fn validate(self) -> Result<Scheme, Problem> {
        if self.name.trim().is_empty() {
            return unsupported("name = \"\"", "a name, which tables and files show");
        }
        let no_window = Window { tokens: 0, schedule: Schedule::None };
        let window = self.window.map(WindowFile::validate).transpose()?.unwrap_or(no_window);
        let sinks = self.sinks.map(SinksFile::validate).transpose()?.unwrap_or(Sinks::None);
        let side = |table: &toml::Table, which: Which| -> Result<Side, Problem> {
            let file: SideFile = table.clone().try_into().map_err(|error: toml::de::Error| {
                Problem::Parse(format!("[{}]: {}", which.name(), error.to_string().trim()))
            })?;
            let side = file.side(which)?;
            check_pages(side, which, window, sinks)?;
            Ok(side)
        };
        let mut scheme = Scheme {
            keys: side(&self.keys, Which::Keys)?,
            values: side(&self.values, Which::Values)?,
            name: self.name,
            origin: String::new(),
            summary: self.summary,
            window,
            sinks,
            sees: self.attention,
            correction: Correction::NONE,
            planes: PlaneBudget { pool: Pool::Model, most: MOST_PLANES },
            layers: Vec::new(),
            classes: Vec::new(),
        };
        scheme.correction = self.correction.map_or(Ok(Correction::NONE), CorrectionFile::validate)?;
        check_correction(scheme.correction, scheme.keys)?;
        scheme.layers = overrides(self.layers, &self.keys, &self.values, scheme.correction, &side)?;
        if self.classes.len() > MAX_CLASSES {
            return unsupported(format!("{} classes", self.classes.len()), format!("at most {MAX_CLASSES}"));
        }
        for (name, own) in self.classes {
            let (keys, values) = (merge(&self.keys, own.keys), merge(&self.values, own.values));
            let within = |problem: Problem| problem.within(&format!("classes.{name}"));
            let layers = overrides(own.layers, &keys, &values, Correction::NONE, &side).map_err(within)?;
            let keys = side(&keys, Which::Keys).map_err(within)?;
            let values = side(&values, Which::Values).map_err(within)?;
            scheme.classes.push(Class { name, keys, values, layers });
        }
        if !scheme.classes.is_empty() {
            check_classes(&scheme)?;
        }
        check_features(&scheme)?;
        check_auto_sinks(&scheme)?;
        if let Some(file) = self.planes {
            scheme.planes = file.validate()?;
            let most = 2.0 * scheme.planes.most as f32;
            let spent = |side: Side| side.average_bits().is_none_or(|average| average <= most);
            if !scheme.all_sides().all(spent) {
                return unsupported(
                    format!("average_bits of more than planes.most = {} planes", scheme.planes.most),
                    "two bits for each plane at most",
                );
            }
            if !scheme.has_planes() {
                return unsupported("[planes] without keys or values in planes", "bits = \"planes\"");
            }
        }
        if scheme.sees == Sees::Stored && scheme.all_sides().any(needs_chunks) {
            return unsupported("attention = \"stored\" with low_rank", "attention = \"exact\"");
        }
        Ok(scheme)
    }
}

/// Choices of single layers over those of all.
fn overrides(
    files: BTreeMap<String, LayerFile>,
    keys: &toml::Table,
    values: &toml::Table,
    correction: Correction,
    side: &impl Fn(&toml::Table, Which) -> Result<Side, Problem>,
) -> Result<Vec<LayerOverride>, Problem> {
    let mut all = Vec::new();
    for (name, own) in files {
        let within = |problem: Problem| problem.within(&format!("layers.\"{name}\""));
        let layers = range(&name)?;
        let keys = side(&merge(keys, own.keys), Which::Keys).map_err(within)?;
        let values = side(&merge(values, own.values), Which::Values).map_err(within)?;
        // A correction of all layers leaves those out that have nothing to correct.
        let inherited = if keys == Side::Half { Correction::NONE } else { correction };
        let correction = own.correction.map_or(Ok(inherited), CorrectionFile::validate).map_err(within)?;
        check_correction(correction, keys).map_err(within)?;
        all.push(LayerOverride { layers, keys, values, correction });
    }
    all.sort_by_key(|own| own.layers.start);
    if let Some(pair) = all.windows(2).find(|pair| pair[0].layers.end > pair[1].layers.start) {
        return unsupported(
            format!("layer {} in two ranges of [layers]", pair[1].layers.start),
            "ranges that do not overlap",
        );
    }
    Ok(all)
}

/// A side's own choices over those of all layers. Choices of packed codes say nothing about 16 bit.
fn merge(base: &toml::Table, own: toml::Table) -> toml::Table {
    if own.get("bits").and_then(toml::Value::as_integer) == Some(16) {
        return own;
    }
    let mut merged = base.clone();
    // What belongs to a choice goes with it.
    for (choice, parts) in [
        ("bits", &["average_bits"][..]),
        ("quantizer", &["clip", "include_zero"]),
        ("transform", &["heads", "permutation", "statistic"]),
        ("position", &["heads", "permutation", "statistic"]),
        ("permutation", &["statistic"]),
    ] {
        if own.contains_key(choice) {
            parts.iter().for_each(|part| drop(merged.remove(*part)));
        }
    }
    merged.extend(own);
    merged
}

/// `3` or `0..4`, the end excluded.
fn range(text: &str) -> Result<Range<usize>, Problem> {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let range = match text.split_once("..") {
        Some((start, end)) => number(start).zip(number(end)).map(|(start, end)| start..end),
        None => number(text).and_then(|layer| Some(layer..layer.checked_add(1)?)),
    };
    match range {
        Some(range) if !range.is_empty() => Ok(range),
        _ => unsupported(format!("layers.\"{text}\""), "a layer, or a range as in layers.\"0..4\" (4 excluded)"),
    }
}

impl PlanesFile {
    fn validate(self) -> Result<PlaneBudget, Problem> {
        let most = self.most.unwrap_or(MOST_PLANES);
        if !(1..=Planes::MOST).contains(&most) {
            return unsupported(format!("planes.most = {most}"), format!("1 to {}", Planes::MOST));
        }
        Ok(PlaneBudget { pool: self.pool, most })
    }
}

impl CorrectionFile {
    fn validate(self) -> Result<Correction, Problem> {
        let CorrectionTable { kind, features, states } = match self {
            CorrectionFile::Kind(kind) => CorrectionTable { kind, features: None, states: None },
            CorrectionFile::Table(table) => table,
        };
        let linear = matches!(kind, CorrectionKind::Linear | CorrectionKind::Both);
        if !linear && (features.is_some() || states.is_some()) {
            return unsupported("correction.features or states without a linear correction", "kind = \"linear\"");
        }
        let features = features.unwrap_or(FEATURES);
        if !(32..=512).contains(&features) || !features.is_multiple_of(32) {
            return unsupported(format!("correction.features = {features}"), "multiples of 32 from 32 to 512");
        }
        Ok(Correction {
            linear: linear.then_some(Linear { features, states: states.unwrap_or_default() }),
            bias: matches!(kind, CorrectionKind::Bias | CorrectionKind::Both),
        })
    }
}

impl WindowFile {
    fn validate(self) -> Result<Window, Problem> {
        let Self { tokens, schedule } = self;
        if tokens > MAX_WINDOW {
            return unsupported(format!("window.tokens = {tokens}"), format!("at most {MAX_WINDOW}"));
        }
        let schedule = match schedule {
            ScheduleFile::Guaranteed => Schedule::Guaranteed,
            ScheduleFile::Kivi if tokens == 0 || !tokens.is_multiple_of(PAGE_TOKENS) => {
                return unsupported(
                    format!("window.tokens = {tokens} under the kivi schedule"),
                    "multiples of 128 from 128 on",
                );
            }
            ScheduleFile::Kivi => Schedule::Kivi,
        };
        Ok(Window { tokens, schedule })
    }
}

impl SinksFile {
    fn validate(self) -> Result<Sinks, Problem> {
        let Self { kind, count, per_layer, places, share } = self;
        let (least, most) = match kind {
            SinkKind::First => (1, MAX_FIRST),
            SinkKind::Auto => (0, MAX_FIRST),
            SinkKind::Massive | SinkKind::Pivots => (1, MAX_FOUND),
        };
        if !(least..=most).contains(&count) {
            return unsupported(format!("sinks.count = {count}"), format!("{least} to {most}"));
        }
        if kind != SinkKind::Auto && (places.is_some() || share.is_some()) {
            return unsupported("sinks.places or share with this kind", "kind = \"auto\"");
        }
        match kind {
            SinkKind::Pivots => Ok(Sinks::Pivots(Pivots { count, per_layer })),
            _ if per_layer => unsupported("sinks.per_layer without pivots", "kind = \"pivots\""),
            SinkKind::First => Ok(Sinks::First(count)),
            SinkKind::Auto => {
                let (places, share) = (places.unwrap_or(AutoSinks::PLACES), share.unwrap_or(AutoSinks::SHARE));
                if places == 0 || places > AutoSinks::MOST {
                    return unsupported(format!("sinks.places = {places}"), format!("1 to {}", AutoSinks::MOST));
                }
                if !(share > 0.0 && share < 1.0) {
                    return unsupported(format!("sinks.share = {share}"), "above 0, below 1");
                }
                Ok(Sinks::Auto(AutoSinks { first: count, places, share }))
            }
            SinkKind::Massive => Ok(Sinks::Massive(count)),
        }
    }
}
