//! Tokens per second and memory by the number of sequences: figure 7 of the KVLinC paper, arXiv 2510.05373.

use super::figure::{Figure, line_key};
use super::number::{count, number, times};
use super::scale::{Scale, extent};
use super::svg::{Anchor, Frame, Svg, WIDTH, escape, path};
use crate::bench::{ThroughputBench, ThroughputPoint, ThroughputScheme};

const HEIGHT: f64 = 290.0;
const FRAME: Frame = Frame { left: 54.0, right: WIDTH - 12.0, top: 28.0, bottom: HEIGHT - 46.0 };

/// Colours and dashes of schemes, in their order.
const CLASSES: [&str; 6] = ["blue", "red", "violet", "blue dashed", "red dashed", "violet dashed"];

/// Bytes of a unit of the vertical axis.
const GIB: f64 = (1u64 << 30) as f64;

/// A page with both pictures.
pub fn throughput_html(bench: &ThroughputBench) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{model}: throughput</title>\n\
         <style>\n{style}</style>\n</head>\n<body>\n<main>\n<h1>{model}: what a smaller cache is worth in tokens</h1>\n{figure}\
         <footer>Made by <code>dibit bench throughput</code>.</footer>\n</main>\n</body>\n</html>\n",
        model = escape(&bench.model),
        style = include_str!("style.css"),
        figure = figure(bench).html(),
    )
}

/// Both pictures beside each other, as a file of its own.
pub fn throughput_svg(bench: &ThroughputBench) -> String {
    let gap = 30.0;
    let width = 2.0 * WIDTH + gap;
    let placed = |(index, svg): (usize, String)| {
        let x = index as f64 * (WIDTH + gap);
        svg.replacen("<svg ", &format!("<svg x=\"{x:.0}\" y=\"40\" width=\"{WIDTH:.0}\" height=\"{HEIGHT:.0}\" "), 1)
    };
    let pictures: String = pictures(bench).into_iter().enumerate().map(placed).collect();
    let mut names = Svg::new(0.0);
    let mut x = 4.0;
    for (own, class) in bench.schemes.iter().zip(CLASSES.iter().cycle()) {
        names.add(format_args!("<g class=\"line {class}\"><path d=\"M{x:.0} 18H{:.0}\"/></g>", x + 28.0));
        names.text(x + 34.0, 22.0, Anchor::Start, "", &escape(&own.scheme));
        x += 60.0 + super::svg::text_width(&own.scheme);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {:.0}\" font-family=\"system-ui, sans-serif\">\n\
         <style>{}svg:root {{ max-width: none; }}</style>\n<rect width=\"100%\" height=\"100%\" style=\"fill: var(--card)\"/>\n{}{pictures}</svg>\n",
        HEIGHT + 48.0,
        include_str!("style.css"),
        names.inner(),
    )
}

fn figure(bench: &ThroughputBench) -> Figure {
    let [speed, memory] = pictures(bench);
    let legend =
        bench.schemes.iter().zip(CLASSES.iter().cycle()).map(|(own, class)| line_key(class, &escape(&own.scheme)));
    Figure {
        question: "How many tokens a second, and how many sequences at once?",
        answer: answer(bench),
        panels: vec![("Speed".to_owned(), speed), ("Memory".to_owned(), memory)],
        legend: legend.collect(),
        caption: format!(
            "Each sequence has a prompt of {} tokens and gets {} more. Speed is that of decoding, all sequences together; \
             memory is the most that was in use. {}.",
            count(bench.prompt),
            count(bench.generate),
            bench.device
        ),
        note: bench.schemes.iter().filter_map(lack).collect::<Vec<_>>().join(" "),
        more: String::new(),
    }
}

/// What a scheme lacked memory for.
fn lack(own: &ThroughputScheme) -> Option<String> {
    let lack = own.out_of_memory.as_ref()?;
    Some(format!("{}: a batch of {} does not fit.", own.scheme, count(lack.batch)))
}

/// The best scheme against the first one.
fn answer(bench: &ThroughputBench) -> String {
    let [first, others @ ..] = bench.schemes.as_slice() else { return String::new() };
    let most = |own: &ThroughputScheme| own.points.iter().map(|point| point.decode_tokens_per_s).fold(0.0, f64::max);
    let best = others.iter().max_by(|a, b| most(a).total_cmp(&most(b)));
    match best {
        Some(best) if most(first) > 0.0 && most(best) > 0.0 => format!(
            "{} decodes at most {} tokens a second, {} what {} does at its best ({}).",
            best.scheme,
            number(most(best)),
            times(most(best), most(first)),
            first.scheme,
            number(most(first))
        ),
        _ => format!("{} decodes at most {} tokens a second.", first.scheme, number(most(first))),
    }
}

/// Speed and memory.
fn pictures(bench: &ThroughputBench) -> [String; 2] {
    let speed = |point: &ThroughputPoint| point.decode_tokens_per_s;
    let memory = |point: &ThroughputPoint| point.peak_bytes as f64 / GIB;
    [
        picture(
            bench,
            speed,
            None,
            "decoded tokens per second",
            "Decoded tokens per second by the number of sequences.",
        ),
        picture(
            bench,
            memory,
            Some(bench.memory_bytes as f64 / GIB),
            "GiB of memory in use",
            "Memory in use by the number of sequences.",
        ),
    ]
}

fn picture(
    bench: &ThroughputBench,
    value: impl Fn(&ThroughputPoint) -> f64,
    limit: Option<f64>,
    label: &str,
    description: &str,
) -> String {
    let points = || bench.schemes.iter().flat_map(|own| &own.points);
    let batches = extent(points().map(|point| point.batch as f64)).unwrap_or([1.0, 2.0]);
    let x = Scale::log(batches, [FRAME.left + 8.0, FRAME.right - 4.0]);
    let most = points().map(&value).fold(0.0, f64::max);
    // Where little of it is used, a picture of the rest shows nothing.
    let limit = limit.filter(|limit| most > limit / 4.0);
    let most = limit.into_iter().fold(most, f64::max);
    let y = Scale::linear([0.0, most * 1.08], [FRAME.bottom, FRAME.top]);
    let doubled: Vec<f64> = (0..17).map(|power| f64::from(1 << power)).filter(|batch| x.holds(*batch)).collect();
    let mut svg = Svg::new(HEIGHT);
    svg.y_axis(FRAME, &y, label);
    svg.x_axis(FRAME, &x, &doubled, "sequences at once, log scale");
    if let Some(limit) = limit {
        svg.line([FRAME.left, y.at(limit)], [FRAME.right, y.at(limit)], "reference");
        svg.text(FRAME.left + 4.0, y.at(limit) - 5.0, Anchor::Start, "soft", "all there is");
    }
    for (own, class) in bench.schemes.iter().zip(CLASSES.iter().cycle()) {
        let at = |point: &ThroughputPoint| [x.at(point.batch as f64), y.at(value(point))];
        let line = path(own.points.iter().map(|point| Some(at(point))));
        svg.add(format_args!("<g class=\"line {class}\"><path d=\"{line}\"/>"));
        for point in &own.points {
            let [x, y] = at(point);
            let title = escape(&format!("{}, batch {}: {}", own.scheme, count(point.batch), number(value(point))));
            svg.add(format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"><title>{title}</title></circle>"));
        }
        svg.add(format_args!("</g>"));
    }
    svg.finish(description)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::OutOfMemory;

    fn bench() -> ThroughputBench {
        let point = |batch: usize, speed: f64| ThroughputPoint {
            batch,
            prefill_seconds: 1.0,
            decode_seconds: 2.0,
            decode_tokens_per_s: speed,
            tokens_per_s: speed / 2.0,
            peak_bytes: batch << 30,
        };
        let scheme = |name: &str, points: Vec<ThroughputPoint>, lack: Option<usize>| ThroughputScheme {
            scheme: name.to_owned(),
            sequence_bytes: 1 << 30,
            points,
            out_of_memory: lack.map(|batch| OutOfMemory { batch, reason: "none left".to_owned() }),
            largest: None,
        };
        ThroughputBench {
            model: "<model>".to_owned(),
            device: "a GPU".to_owned(),
            dtype: "bf16".to_owned(),
            weight_bytes: 1,
            memory_bytes: 80 << 30,
            prompt: 256,
            prompt_read: "cells of 1024".to_owned(),
            prefill_rows: 0,
            generate: 1024,
            schemes: vec![
                scheme("fp16", vec![point(1, 50.0), point(16, 400.0)], Some(32)),
                scheme("kvlinc", vec![point(1, 45.0), point(16, 700.0), point(70, 1200.0)], None),
            ],
        }
    }

    #[test]
    fn both_pictures_show_every_point() {
        let page = throughput_html(&bench());
        assert_eq!(page.matches("<circle cx").count(), 2 * 5 + 2, "points and keys");
        for part in ["&lt;model&gt;", "3.0 times what fp16 does", "fp16: a batch of 32 does not fit.", "256 tokens"] {
            assert!(page.contains(part), "'{part}' is not in {page}");
        }
        let svg = throughput_svg(&bench());
        assert!(
            svg.starts_with("<svg xmlns=") && svg.matches("<svg ").count() == 3 && svg.contains(">kvlinc<"),
            "{svg}"
        );
    }

    #[test]
    fn nothing_measured_is_an_empty_picture() {
        let none = ThroughputBench { schemes: Vec::new(), ..bench() };
        assert!(throughput_html(&none).contains("<svg"));
    }
}
