//! The sources of kernels.

/// A kernel file with what it is compiled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Source {
    /// Its name.
    pub file: &'static str,
    /// Its parts in order, the file itself last, without the headers that all files share.
    parts: &'static [Part],
    /// Whether products and sums stay apart, as on the CPU.
    pub exact: bool,
}

/// Name and text of a file among the kernels.
type Part = (&'static str, &'static str);

macro_rules! parts {
    ($($file:literal),* $(,)?) => { &[$(($file, include_str!(concat!("../kernels/", $file)))),*] };
}

/// What all kernel files begin with.
const HEADERS: &[Part] = parts!["prelude.cuh", "layout.cuh", "stored.cuh"];

/// Macros of one compilation of a file.
pub(crate) type Macros = &'static [(&'static str, i64)];

macro_rules! sources {
    ($($name:ident = $($part:literal),* => $file:literal, exact: $exact:literal, $variants:expr;)*) => {
        $(pub(crate) const $name: Source =
            Source { file: $file, parts: parts![$($part,)* $file], exact: $exact };)*

        /// Every file, with the macros that it is compiled with for built-in schemes and usual head sizes.
        pub(crate) const ALL: &[(Source, &[Macros])] = &[$(($name, $variants)),*];
    };
}

/// Functions without a word of where they run, such as generic lambdas, run on the GPU.
const DEVICE_CODE: &str = "--device-as-default-execution-space";

const NO_MACROS: &[Macros] = &[&[]];

/// How the weights of linear layers are stored.
const WEIGHTS: &[Macros] = &[&[("WEIGHT", 0)], &[("WEIGHT", 1)], &[("WEIGHT", 2)]];
/// Usual head sizes, and one that is no multiple of 16.
const HEAD_SIZES: &[Macros] =
    &[&[("HEAD_DIM", 64)], &[("HEAD_DIM", 72)], &[("HEAD_DIM", 80)], &[("HEAD_DIM", 128)], &[("HEAD_DIM", 256)]];

/// The same, and pages that protect tokens.
const TILE_FORMS: &[Macros] = &[
    &[("HEAD_DIM", 64)],
    &[("HEAD_DIM", 72)],
    &[("HEAD_DIM", 80)],
    &[("HEAD_DIM", 128)],
    &[("HEAD_DIM", 256)],
    &[("HEAD_DIM", 64), ("PAGE_SINKS", 1)],
    &[("HEAD_DIM", 128), ("PAGE_SINKS", 1)],
    &[("HEAD_DIM", 64), ("PAGE_SINKS", 1), ("SPAN", 1)],
    &[("HEAD_DIM", 256), ("SPAN", 1), ("SOFTCAP", 1)],
];

/// KIVI, KVLinC and their bias; and planes.
const PACKED_FORMS: &[Macros] = &[
    &[("HEAD_DIM", 64)],
    &[("HEAD_DIM", 128)],
    &[("HEAD_DIM", 64), ("BIAS", 1)],
    &[("HEAD_DIM", 128), ("BIAS", 1)],
    &[("HEAD_DIM", 128), ("LATE_VALUES", 1)],
    &[("HEAD_DIM", 64), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 1)],
    &[("HEAD_DIM", 64), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 2)],
    &[("HEAD_DIM", 128), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 1)],
    &[("HEAD_DIM", 128), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 2)],
    &[("HEAD_DIM", 128), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 3)],
    &[("HEAD_DIM", 64), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 1), ("PAGE_SINKS", 1)],
    &[("HEAD_DIM", 64), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 2), ("PAGE_SINKS", 1)],
    &[("HEAD_DIM", 128), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 2), ("PAGE_SINKS", 1)],
    &[("HEAD_DIM", 128), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 3), ("PAGE_SINKS", 1)],
    &[("HEAD_DIM", 64), ("SPAN", 1)],
    &[("HEAD_DIM", 128), ("BIAS", 1), ("SPAN", 1), ("SOFTCAP", 1)],
    &[("HEAD_DIM", 64), ("KEY_PLANES", 1), ("VALUE_COLUMNS", 1), ("PAGE_SINKS", 1), ("SPAN", 1)],
];

sources! {
    PACKED =
        "packed/constants.cuh", "packed/sums.cuh", "packed/sides.cuh", "packed/queries.cuh", "packed/copies.cuh",
        "packed/logits.cuh", "packed/values.cuh", "packed/rows.cuh", "packed/page_sinks.cuh",
        "packed/pages.cuh", "packed/plain.cuh", "packed/join.cuh" => "packed.cu", exact: false, PACKED_FORMS;
    TILES =
        "tiles/constants.cuh", "tiles/tasks.cuh", "tiles/fields.cuh", "tiles/expansion.cuh", "tiles/history.cuh",
        "tiles/sums.cuh", "tiles/biases.cuh", "tiles/products.cuh" => "tiles.cu", exact: false, TILE_FORMS;
    LINEAR = => "linear.cu", exact: false, WEIGHTS;
    EXPERTS = => "experts.cu", exact: false, WEIGHTS;
    ROWS = => "rows.cu", exact: false, NO_MACROS;
    SWEEP = => "sweep.cu", exact: false, NO_MACROS;
    TRAIN = => "train.cu", exact: false, NO_MACROS;
    STORE = => "store.cu", exact: true, NO_MACROS;
    ENCODE = => "encode.cu", exact: true, NO_MACROS;
    STATES = => "states.cu", exact: true, NO_MACROS;
    EXACT = => "exact.cu", exact: false, HEAD_SIZES;
}

impl Source {
    /// What the compiler gets.
    pub(crate) fn text(&self) -> String {
        let parts = HEADERS.iter().chain(self.parts);
        parts.map(|(file, text)| format!("#line 1 \"{file}\"\n{text}\n")).collect()
    }

    /// What the compiler is told.
    pub(crate) fn options(&self, architecture: &str, macros: &[(&'static str, i64)]) -> Vec<String> {
        let mut options =
            vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned(), DEVICE_CODE.to_owned()];
        options.extend(self.exact.then(|| "--fmad=false".to_owned()));
        options.extend(macros.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }
}
