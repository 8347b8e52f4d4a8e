//! Numbers over layers or over features, a line for each series.

use super::number::{count, number};
use super::scale::{Scale, extent};
use super::svg::{Frame, Svg, WIDTH, escape, path};

const HEIGHT: f64 = 270.0;
const FRAME: Frame = Frame { left: 50.0, right: WIDTH - 12.0, top: 28.0, bottom: HEIGHT - 46.0 };

/// One line.
pub(super) struct Line<'a> {
    /// Its name.
    pub name: &'a str,
    /// Classes of its colour and dashes.
    pub class: &'a str,
    /// Its numbers, in the order of the horizontal axis.
    pub values: &'a [f64],
}

/// What the lines go over.
#[derive(Clone, Copy)]
pub(super) enum Across<'a> {
    /// Layers, from 0. The vertical axis is logarithmic and says so where numbers differ tenfold, and begins at 0 otherwise.
    Layers,
    /// Layers, from 0, of numbers that may be below 0. The vertical axis is linear and holds 0.
    SignedLayers,
    /// Numbers of features, on a logarithmic axis. The vertical axis shows the range of the numbers, and little more.
    Features(&'a [usize]),
}

impl Across<'_> {
    /// Where the numbers stand, the scale, its ticks and its label.
    fn axis(self, count: usize) -> (Vec<f64>, Scale, Vec<f64>, &'static str) {
        let range = [FRAME.left + 8.0, FRAME.right - 4.0];
        match self {
            Across::Layers | Across::SignedLayers => {
                let places: Vec<f64> = (0..count).map(|layer| layer as f64).collect();
                let step = [1, 2, 5, 10, 20, 50].into_iter().find(|step| count.div_ceil(*step) <= 10).unwrap_or(100);
                let ticks = places.iter().copied().step_by(step).collect();
                let scale = Scale::linear([0.0, count.saturating_sub(1) as f64], range);
                (places, scale, ticks, "layer, from the input to the output")
            }
            Across::Features(features) => {
                let places: Vec<f64> = features.iter().map(|features| *features as f64).collect();
                let scale = Scale::log(extent(places.iter().copied()).unwrap_or([1.0, 2.0]), range);
                (places.clone(), scale, places, "features D, log scale")
            }
        }
    }

    /// The vertical axis for these numbers, and whether it is logarithmic.
    fn scale(self, values: impl Iterator<Item = f64> + Clone) -> (Scale, bool) {
        let range = [FRAME.bottom, FRAME.top];
        let [low, high] = extent(values.clone().filter(|x| *x > 0.0)).unwrap_or([0.1, 1.0]);
        match self {
            Across::SignedLayers => {
                let [low, high] = extent(values.chain([0.0])).unwrap_or([0.0, 1.0]);
                let air = (high - low) * 0.08;
                (Scale::linear([low - air, high + air], range), false)
            }
            _ if high > 10.0 * low => (Scale::around(values, range), true),
            Across::Layers => (Scale::linear([0.0, high * 1.08], range), false),
            Across::Features(_) => {
                let air = (high - low) * 0.12;
                (Scale::linear([low - air, high + air], range), false)
            }
        }
    }

    /// A place of the horizontal axis in words.
    fn place(self, index: usize) -> String {
        match self {
            Across::Layers | Across::SignedLayers => format!("layer {index}"),
            Across::Features(features) => format!("D = {}", count(features[index])),
        }
    }
}

/// The picture of some lines.
pub(super) fn lines(lines: &[Line], across: Across, label: &str, description: &str) -> String {
    let count = lines.iter().map(|line| line.values.len()).max().unwrap_or(0);
    let (places, x, ticks, across_label) = across.axis(count);
    let (y, log) = across.scale(lines.iter().flat_map(|line| line.values.iter().copied()));
    let mut svg = Svg::new(HEIGHT);
    svg.y_axis(FRAME, &y, &if log { format!("{label}, log scale") } else { label.to_string() });
    svg.x_axis(FRAME, &x, &ticks, across_label);
    for line in lines {
        let at = |(place, value): (&f64, &f64)| value.is_finite().then(|| [x.at(*place), y.at(*value)]);
        let points = || places.iter().zip(line.values).map(at);
        svg.add(format_args!("<g class=\"line {}\"><path d=\"{}\"/>", line.class, path(points())));
        for ((index, value), point) in line.values.iter().enumerate().zip(points()) {
            if let Some([x, y]) = point {
                let title = escape(&format!("{}, {}: {}", line.name, across.place(index), number(*value)));
                svg.add(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"><title>{title}</title></circle>"));
            }
        }
        svg.add(format_args!("</g>"));
    }
    svg.finish(description)
}
