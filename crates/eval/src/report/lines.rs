//! A number by layer, a line for each way to quantise.

use super::number::number;
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
    /// One number for each layer.
    pub layers: &'a [f64],
}

/// The lines over their layers; the axis is logarithmic and says so where numbers differ tenfold, and begins at 0
/// otherwise.
pub(super) fn lines(lines: &[Line], label: &str, description: &str) -> String {
    let count = lines.iter().map(|line| line.layers.len()).max().unwrap_or(0);
    let values = || lines.iter().flat_map(|line| line.layers.iter().copied());
    let [low, high] = extent(values().filter(|x| *x > 0.0)).unwrap_or([0.1, 1.0]);
    let log = high > 10.0 * low;
    let range = [FRAME.bottom, FRAME.top];
    let y = if log { Scale::around(values(), range) } else { Scale::linear([0.0, high * 1.08], range) };
    let x = Scale::linear([0.0, count.saturating_sub(1) as f64], [FRAME.left + 8.0, FRAME.right - 4.0]);
    let mut svg = Svg::new(HEIGHT);
    svg.y_axis(FRAME, &y, &if log { format!("{label}, log scale") } else { label.to_string() });
    let step = [1, 2, 5, 10, 20, 50].into_iter().find(|step| count.div_ceil(*step) <= 10).unwrap_or(100);
    let ticks: Vec<f64> = (0..count).step_by(step).map(|layer| layer as f64).collect();
    svg.x_axis(FRAME, &x, &ticks, "layer, from the input to the output");
    for line in lines {
        let at = |(layer, value): (usize, &f64)| value.is_finite().then(|| [x.at(layer as f64), y.at(*value)]);
        let points = || line.layers.iter().enumerate().map(at);
        svg.add(format_args!("<g class=\"line {}\"><path d=\"{}\"/>", line.class, path(points())));
        for ((layer, value), point) in line.layers.iter().enumerate().zip(points()) {
            if let Some([x, y]) = point {
                let title = escape(&format!("{}, layer {layer}: {}", line.name, number(*value)));
                svg.add(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"><title>{title}</title></circle>"));
            }
        }
        svg.add(format_args!("</g>"));
    }
    svg.finish(description)
}
