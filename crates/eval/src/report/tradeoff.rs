//! What accuracy costs in bits: a point for each scheme.

use super::label::{Piece, place};
use super::number::number;
use super::scale::{Scale, extent};
use super::svg::{Anchor, FONT, Frame, Svg, WIDTH, escape, path, shortened, text_width};
use crate::{Comparison, ComparisonRow};

const HEIGHT: f64 = 330.0;
const FRAME: Frame = Frame { left: 54.0, right: WIDTH - 8.0, top: 28.0, bottom: HEIGHT - 46.0 };

/// Width of the longest label.
const LABEL: f64 = 150.0;

/// A picture, and the schemes that it cannot show.
pub(super) struct Tradeoff {
    pub svg: String,
    /// Names and what is to be said instead.
    pub missing: Vec<String>,
    /// Whether schemes lie above the axis.
    pub clipped: bool,
}

struct Point<'a> {
    row: &'a ComparisonRow,
    at: [f64; 2],
    clipped: bool,
    label: String,
}

/// Perplexity against bits, with the Pareto front. The axis ends where one scheme would flatten all others.
pub(super) fn perplexity(comparison: &Comparison) -> Tradeoff {
    let rows = comparison.sorted();
    let shown: Vec<&ComparisonRow> = rows
        .iter()
        .copied()
        .filter(|row| row.perplexity.is_finite() && row.bits > 0.0 && row.bits.is_finite())
        .collect();
    let mut perplexities: Vec<f64> = shown.iter().map(|row| row.perplexity).collect();
    perplexities.sort_by(f64::total_cmp);
    let [best, worst] = extent(perplexities.iter().copied()).unwrap_or([1.0, 2.0]);
    let limit = (1.5 * best).max(perplexities.get(perplexities.len() / 2).map_or(best, |median| 1.1 * median));
    let clipped = worst > limit;
    let top = extent(perplexities.iter().copied().filter(|x| *x <= limit)).map_or(worst, |[_, high]| high);
    let air = (top - best) * 0.12;
    // Room above the highest point that is drawn where it belongs, for those that are not.
    let above = if clipped { (top - best).max(best * 0.02) * 0.35 } else { air };
    let y = Scale::linear([best - air, top + above], [FRAME.bottom, FRAME.top]);
    let x = Scale::around(shown.iter().map(|row| row.bits), [FRAME.left, FRAME.right]);
    let mut svg = Svg::new(HEIGHT);
    svg.y_axis(FRAME, &y, "perplexity (lower is better)");
    svg.x_axis(FRAME, &x, &x.bit_ticks(34.0), "bits for a cached number, log scale");
    let mut lines = Vec::new();
    if let Some(reference) = super::reference(comparison).filter(|row| y.holds(row.perplexity)) {
        let y = y.at(reference.perplexity);
        svg.line([FRAME.left, y], [FRAME.right, y], "reference");
        lines.push([[FRAME.left, y], [FRAME.right, y]]);
    }
    lines.extend(front(&mut svg, &comparison.pareto(), &x, &y));
    let point = |row| {
        let row: &ComparisonRow = row;
        let clipped = row.perplexity > limit;
        let name = shortened(&row.scheme, LABEL);
        let label = if clipped { format!("{name} {}", number(row.perplexity)) } else { name };
        let height = if clipped { FRAME.top + 6.0 } else { y.at(row.perplexity) };
        Point { row, at: [x.at(row.bits), height], clipped, label }
    };
    points(&mut svg, comparison, shown.into_iter().map(point).collect(), &lines);
    let missing = rows
        .iter()
        .filter(|row| !row.perplexity.is_finite())
        .map(|row| format!("{}, whose perplexity is not a number", row.scheme))
        .collect();
    Tradeoff {
        svg: svg.finish("Perplexity against bits for a cached number, one point for each scheme"),
        missing,
        clipped,
    }
}

/// Mean KL divergence against bits, on a logarithmic axis.
pub(super) fn divergence(comparison: &Comparison) -> Tradeoff {
    let (shown, others): (Vec<_>, Vec<_>) =
        comparison.sorted().into_iter().partition(|row| row.kl_mean > 0.0 && row.kl_mean.is_finite() && row.bits > 0.0);
    let y = Scale::around(shown.iter().map(|row| row.kl_mean), [FRAME.bottom, FRAME.top]);
    let x = Scale::around(comparison.rows.iter().map(|row| row.bits), [FRAME.left, FRAME.right]);
    let mut svg = Svg::new(HEIGHT);
    svg.y_axis(FRAME, &y, "KL divergence, nats per token, log scale");
    svg.x_axis(FRAME, &x, &x.bit_ticks(34.0), "bits for a cached number, log scale");
    let point = |row: &'_ ComparisonRow| [x.at(row.bits), y.at(row.kl_mean)];
    let at = |row| Point { at: point(row), row, clipped: false, label: shortened(&row.scheme, LABEL) };
    points(&mut svg, comparison, shown.into_iter().map(at).collect(), &[]);
    let missing = others
        .iter()
        .map(|row| match row.kl_mean {
            0.0 => format!("{}, whose divergence is 0", row.scheme),
            _ => format!("{}, whose divergence is not a number", row.scheme),
        })
        .collect();
    Tradeoff {
        svg: svg.finish("KL divergence against bits for a cached number, one point for each scheme"),
        missing,
        clipped: false,
    }
}

/// Draws the Pareto front as stairs, what perplexity is to be had for at most so many bits, and gives its pieces.
fn front(svg: &mut Svg, rows: &[&ComparisonRow], x: &Scale, y: &Scale) -> Vec<Piece> {
    let mut stairs = Vec::new();
    let mut height = FRAME.top;
    for row in rows.iter().filter(|row| row.bits > 0.0) {
        let next = if y.holds(row.perplexity) { y.at(row.perplexity) } else { FRAME.top };
        stairs.extend([[x.at(row.bits), height], [x.at(row.bits), next]]);
        height = next;
    }
    stairs.push([FRAME.right, height]);
    if !rows.is_empty() {
        svg.add(format_args!("<path d=\"{}\" class=\"front\"/>", path(stairs.iter().copied().map(Some))));
    }
    stairs.windows(2).map(|ends| [ends[0], ends[1]]).collect()
}

/// Draws the points, and their labels where they cover neither each other nor the lines.
fn points(svg: &mut Svg, comparison: &Comparison, points: Vec<Point>, lines: &[Piece]) {
    let pareto = comparison.pareto();
    let places: Vec<[f64; 2]> = points.iter().map(|point| point.at).collect();
    let widths: Vec<f64> = points.iter().map(|point| text_width(&point.label)).collect();
    let frame = Frame { top: FRAME.top - 6.0, ..FRAME };
    let areas = place(&places, &widths, lines, frame);
    for (point, area) in points.iter().zip(&areas) {
        let end = area.nearest(point.at);
        if (end[0] - point.at[0]).hypot(end[1] - point.at[1]) > FONT {
            svg.line(point.at, end, "leader");
        }
    }
    for Point { row, at: [x, y], clipped, .. } in &points {
        let class = if pareto.iter().any(|other| std::ptr::eq(*other, *row)) { "best" } else { "other" };
        let title = format!(
            "{}: {} bits, perplexity {}, KL {} nats",
            row.scheme,
            number(row.bits),
            number(row.perplexity),
            number(row.kl_mean)
        );
        let title = escape(&title);
        if *clipped {
            svg.add(format_args!(
                "<path d=\"M{x:.1} {:.1}l6 10h-12z\" class=\"{class}\"><title>{title}</title></path>",
                y - 6.0
            ));
        } else {
            svg.add(format_args!(
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" class=\"{class}\"><title>{title}</title></circle>"
            ));
        }
    }
    for (point, area) in points.iter().zip(&areas) {
        let [x, y] = area.baseline();
        svg.text(x, y, Anchor::Start, "label", &escape(&point.label));
    }
}
