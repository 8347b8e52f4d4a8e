//! Places labels beside their points so that nothing covers anything.

use super::svg::{FONT, Frame};

/// A rectangle that is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Area {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

/// A level or upright piece of a line, from end to end.
pub(super) type Piece = [[f64; 2]; 2];

impl Area {
    /// Half the side of the area that a point takes.
    const POINT: f64 = 6.0;

    fn of_point([x, y]: [f64; 2]) -> Self {
        Area { left: x - Self::POINT, right: x + Self::POINT, top: y - Self::POINT, bottom: y + Self::POINT }
    }

    fn of_piece([[x1, y1], [x2, y2]]: Piece) -> Self {
        Area { left: x1.min(x2) - 1.0, right: x1.max(x2) + 1.0, top: y1.min(y2) - 1.0, bottom: y1.max(y2) + 1.0 }
    }

    fn covered(&self, other: &Area) -> f64 {
        let width = self.right.min(other.right) - self.left.max(other.left);
        let height = self.bottom.min(other.bottom) - self.top.max(other.top);
        width.max(0.0) * height.max(0.0)
    }

    /// Baseline of the text in this area.
    pub fn baseline(&self) -> [f64; 2] {
        [self.left, self.bottom - FONT * 0.2]
    }

    /// The point of the area that is nearest to `point`.
    pub fn nearest(&self, [x, y]: [f64; 2]) -> [f64; 2] {
        [x.clamp(self.left, self.right), y.clamp(self.top, self.bottom)]
    }
}

/// An area for the label of each point, whose widths are given: the nearest one that covers no point, no other label
/// and nothing of the lines, and lies in the frame, or what covers least where there is none.
pub(super) fn place(points: &[[f64; 2]], widths: &[f64], lines: &[Piece], frame: Frame) -> Vec<Area> {
    let mut taken: Vec<Area> = points.iter().map(|point| Area::of_point(*point)).collect();
    taken.extend(lines.iter().copied().map(Area::of_piece));
    let mut areas = Vec::with_capacity(points.len());
    for (&point, &width) in points.iter().zip(widths) {
        let mut best: Option<(f64, Area)> = None;
        for area in candidates(point, width) {
            let outside = (frame.left - area.left).max(0.0)
                + (area.right - frame.right).max(0.0)
                + (frame.top - area.top).max(0.0)
                + (area.bottom - frame.bottom).max(0.0);
            let cost = outside * 100.0 + taken.iter().map(|other| other.covered(&area)).sum::<f64>();
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, area));
            }
        }
        let (_, area) = best.expect("there are candidates");
        taken.push(area);
        areas.push(area);
    }
    areas
}

/// Areas around a point, near ones first.
fn candidates([x, y]: [f64; 2], width: f64) -> impl Iterator<Item = Area> {
    let straight = [(1.0, 0.0), (-1.0, 0.0), (0.0, -1.0), (0.0, 1.0)];
    let slanted = [1.0, 0.5].into_iter().flat_map(|down| [(1.0, -down), (1.0, down), (-1.0, -down), (-1.0, down)]);
    let directions: Vec<(f64, f64)> = straight.into_iter().chain(slanted).collect();
    (0..20).flat_map(move |ring| {
        let far = Area::POINT + 2.0 + f64::from(ring) * 8.0;
        directions.clone().into_iter().map(move |(across, down)| {
            let (cx, cy) = (x + across * (far + width / 2.0), y + down * (far + FONT / 2.0));
            Area { left: cx - width / 2.0, right: cx + width / 2.0, top: cy - FONT * 0.53, bottom: cy + FONT * 0.53 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_a_crowd_do_not_touch() {
        let frame = Frame { left: 40.0, right: 410.0, top: 20.0, bottom: 260.0 };
        let points: Vec<[f64; 2]> =
            (0..12).map(|i| [60.0 + f64::from(i % 4) * 9.0, 240.0 - f64::from(i / 4) * 7.0]).collect();
        let areas = place(&points, &[70.0; 12], &[], frame);
        for (index, area) in areas.iter().enumerate() {
            assert!(area.left >= frame.left && area.right <= frame.right, "{area:?}");
            assert!(area.top >= frame.top && area.bottom <= frame.bottom, "{area:?}");
            assert!(areas[..index].iter().all(|other| area.covered(other) == 0.0), "{area:?}");
            assert!(points.iter().all(|point| area.covered(&Area::of_point(*point)) == 0.0), "{area:?}");
        }
    }

    #[test]
    fn a_lone_label_is_at_the_right() {
        let frame = Frame { left: 0.0, right: 400.0, top: 0.0, bottom: 200.0 };
        let area = place(&[[100.0, 100.0]], &[50.0], &[], frame)[0];
        assert_eq!((area.left, area.right), (108.0, 158.0));
        assert_eq!(area.nearest([100.0, 100.0]), [108.0, 100.0]);
        let stairs = [[[100.0, 0.0], [100.0, 100.0]], [[100.0, 100.0], [400.0, 100.0]]];
        let area = place(&[[100.0, 100.0]], &[50.0], &stairs, frame)[0];
        assert!((area.left, area.right) == (42.0, 92.0), "{area:?}");
    }
}
