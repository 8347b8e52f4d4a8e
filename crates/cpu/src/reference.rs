//! What a cache holds, written one number at a time from the methods' equations. Only tests use it.

use dibit_cache::{AutoSinks, Axis, LayerCalibration, PAGE_TOKENS, Packed, Permutation, PreRope, Side, Transform};
use dibit_quant::{Bits, Clip, Hadamard, Quantizer};
use half::f16;
use nalgebra::DMatrix;
use std::ops::Range;

/// Keys or values: `[kv head][token][channel]`.
pub(super) type Heads = Vec<Vec<Vec<f32>>>;

/// One layer of one sequence.
pub(super) struct Reference {
    pub head_dim: usize,
    pub inv_freq: Vec<f32>,
    pub calibration: LayerCalibration,
    /// KV heads that share a Hadamard matrix before RoPE.
    pub rotated_heads: usize,
    /// Tokens that are protected outside of pages.
    pub sinks: Vec<usize>,
    /// Tokens that the pages of each KV head protect; none where the scheme does not ask for it.
    pub page_sinks: Vec<Vec<usize>>,
    /// Tokens that were packed together.
    pub chunks: Vec<Range<usize>>,
}

fn half(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

fn times(row: &[f32], matrix: impl Fn(usize, usize) -> f32) -> Vec<f32> {
    (0..row.len()).map(|j| (0..row.len()).map(|i| row[i] * matrix(i, j)).sum()).collect()
}

impl Reference {
    /// What attention sees of the tokens, in the original frame: `packed` of them quantised, the others up to `cached`
    /// in 16 bit, the rest exactly.
    pub(super) fn seen(&self, side: Side, is_keys: bool, exact: &Heads, cached: usize, packed: usize) -> Heads {
        let mut stored: Heads = exact
            .iter()
            .enumerate()
            .map(|(head, rows)| {
                let cached = rows.iter().take(cached);
                cached.map(|row| self.framed(side, is_keys, head, row).into_iter().map(half).collect()).collect()
            })
            .collect();
        if let (Side::Packed(form), 1..) = (side, packed) {
            self.quantise(form, is_keys, &mut stored, packed);
        }
        for (head, rows) in stored.iter_mut().enumerate() {
            let back = (side.transform() == Transform::Basis).then(|| self.inverse(is_keys, head));
            for row in rows.iter_mut() {
                *row = self.unframed(side, back.as_ref(), row);
            }
            rows.extend_from_slice(&exact[head][rows.len()..]);
        }
        stored
    }

    fn basis(&self, is_keys: bool, head: usize) -> &[f32] {
        let d = self.head_dim;
        let all = if is_keys { &self.calibration.key_basis } else { &self.calibration.value_basis };
        &all.as_ref().unwrap()[head * d * d..(head + 1) * d * d]
    }

    fn framed(&self, side: Side, is_keys: bool, head: usize, row: &[f32]) -> Vec<f32> {
        let mut row = row.to_vec();
        match side.transform() {
            Transform::Hadamard => Hadamard::new(row.len()).unwrap().apply(&mut row),
            Transform::Basis => row = times(&row, |i, j| self.basis(is_keys, head)[i * self.head_dim + j]),
            _ => {}
        }
        row
    }

    fn inverse(&self, is_keys: bool, head: usize) -> DMatrix<f64> {
        let numbers = self.basis(is_keys, head).iter().map(|x| f64::from(*x));
        DMatrix::from_row_iterator(self.head_dim, self.head_dim, numbers).try_inverse().unwrap()
    }

    fn unframed(&self, side: Side, back: Option<&DMatrix<f64>>, row: &[f32]) -> Vec<f32> {
        let mut row = row.to_vec();
        match back {
            Some(back) => row = times(&row, |i, j| back[(i, j)] as f32),
            None if side.transform() == Transform::Hadamard => {
                Hadamard::new(row.len()).unwrap().apply_inverse(&mut row);
            }
            None => {}
        }
        row
    }

    /// Replaces the first `packed` tokens by what their codes stand for.
    fn quantise(&self, form: Packed, is_keys: bool, heads: &mut Heads, packed: usize) {
        let kept: Heads = heads.clone();
        match form.transform {
            Transform::TokenHadamard => along_tokens(heads, packed),
            Transform::PreRope(choice) => self.before_rope(choice, heads, packed),
            _ => {}
        }
        for (head, rows) in heads.iter_mut().enumerate() {
            let original = rows.clone();
            let codes_of_sinks = self.page_sinks_of(head).iter().filter(|t| **t < packed).map(|t| {
                let form = Packed { quantizer: Quantizer::FloatMin, clip: Clip::None, ..form };
                (*t, fake_quantise(form, Bits::Eight, &original[*t]))
            });
            let codes_of_sinks: Vec<(usize, Vec<f32>)> = codes_of_sinks.collect();
            let aside = self.set_outliers_aside(form, is_keys, head, rows, packed);
            let replaced = rows.clone();
            self.groups(form, is_keys, head, rows, packed);
            for &(t, c) in &aside {
                rows[t][c] = original[t][c];
            }
            codes_of_sinks.into_iter().for_each(|(t, seen)| rows[t] = seen);
            if form.low_rank > 0 {
                let mut error: Vec<Vec<f32>> =
                    (0..packed).map(|t| (0..self.head_dim).map(|c| replaced[t][c] - rows[t][c]).collect()).collect();
                for &(t, c) in &aside {
                    error[t][c] = 0.0;
                }
                self.sinks.iter().filter(|t| **t < packed).for_each(|t| error[*t].fill(0.0));
                for chunk in &self.chunks {
                    let product = power_iteration(&error[chunk.clone()], form.low_rank);
                    for (row, product) in rows[chunk.clone()].iter_mut().zip(product) {
                        row.iter_mut().zip(product).for_each(|(x, e)| *x += e);
                    }
                }
            }
        }
        match form.transform {
            Transform::TokenHadamard => along_tokens(heads, packed),
            Transform::PreRope(choice) => self.after_rope(choice, heads, packed),
            _ => {}
        }
        for (rows, kept) in heads.iter_mut().zip(kept) {
            for &token in self.sinks.iter().filter(|t| **t < packed) {
                rows[token] = kept[token].clone();
            }
        }
    }

    /// Channels that are quantised.
    fn low_channels(&self, form: Packed) -> usize {
        self.head_dim - (f64::from(form.high_precision) * self.head_dim as f64).round_ties_even() as usize
    }

    /// Smallest and largest values of each vector become its mean; returns where they were.
    fn set_outliers_aside(
        &self,
        form: Packed,
        is_keys: bool,
        head: usize,
        rows: &mut [Vec<f32>],
        packed: usize,
    ) -> Vec<(usize, usize)> {
        let mut aside = Vec::new();
        if form.outliers == 0.0 {
            return aside;
        }
        let low = self.low_channels(form);
        let mut vectors: Vec<Vec<(usize, usize)>> = Vec::new();
        if is_keys {
            for page in (0..packed).step_by(PAGE_TOKENS) {
                vectors.extend((0..low).map(|c| (page..page + PAGE_TOKENS).map(|t| (t, c)).collect()));
            }
        } else {
            vectors.extend((0..packed).map(|t| (0..low).map(|c| (t, c)).collect()));
        }
        for vector in vectors {
            let per_end = ((form.outliers * vector.len() as f32) as usize).max(1);
            let mut cells: Vec<(usize, usize)> = vector.into_iter().filter(|(t, _)| !self.is_apart(head, *t)).collect();
            if cells.is_empty() {
                continue;
            }
            let mean = cells.iter().map(|&(t, c)| rows[t][c]).sum::<f32>() / cells.len() as f32;
            // Of equals the first one, at either end.
            let mut descending = cells.clone();
            descending.sort_by(|a, b| rows[b.0][b.1].total_cmp(&rows[a.0][a.1]));
            cells.sort_by(|a, b| rows[a.0][a.1].total_cmp(&rows[b.0][b.1]));
            let chosen: Vec<_> = cells.into_iter().take(per_end).chain(descending.into_iter().take(per_end)).collect();
            for &(t, c) in &chosen {
                rows[t][c] = mean;
            }
            aside.extend(chosen);
        }
        aside
    }

    /// Bits of a channel; none where it has no plane.
    fn bits(&self, form: Packed, is_keys: bool, head: usize, channel: usize) -> Option<Bits> {
        let counts = if is_keys { &self.calibration.key_planes } else { &self.calibration.value_planes };
        let counts = counts.as_ref().filter(|_| form.planes.is_some());
        match counts.map(|counts| counts[head * self.head_dim + channel]) {
            None => Some(form.bits),
            Some(0) => None,
            Some(planes) => Some(Bits::try_from(2 * u32::from(planes)).unwrap()),
        }
    }

    /// What rounding adds to the logit of a packed token on average, by the ranges of its channels' groups.
    pub(super) fn bias(&self, form: Packed, keys: &Heads, head: usize, query: &[f32], token: usize) -> f64 {
        let keys: Vec<Vec<f32>> =
            keys[head].iter().map(|row| self.framed(Side::Packed(form), true, head, row)).collect();
        let query = self.framed(Side::Packed(form), true, head, query);
        let first = token / form.group * form.group;
        let group = (first..first + form.group).filter(|t| !self.is_apart(head, *t));
        let of_channel = |c: usize| {
            let Some(bits) = self.bits(form, true, head, c) else { return 0.0 };
            let values = group.clone().map(|t| half(keys[t][c]));
            let (min, max) = values.fold((f32::MAX, f32::MIN), |(min, max), x| (min.min(x), max.max(x)));
            let step = half((max - min) / f32::from(bits.max_code()));
            let a = f64::from(query[c]) * f64::from(step) / 2.0 / (self.head_dim as f64).sqrt();
            if a.abs() < 1e-3 { a * a / 6.0 } else { (a.sinh() / a).ln() }
        };
        (0..self.head_dim).map(of_channel).sum()
    }

    fn page_sinks_of(&self, head: usize) -> &[usize] {
        self.page_sinks.get(head).map_or(&[], |own| own)
    }

    /// Whether the codes of a head say nothing of a token.
    pub(super) fn is_apart(&self, head: usize, token: usize) -> bool {
        self.sinks.contains(&token) || self.page_sinks_of(head).contains(&token)
    }

    /// What the page sinks of each KV head are, by values in 16 bit of `packed` tokens.
    pub(super) fn find_page_sinks(&self, side: Side, auto: AutoSinks, exact: &Heads, packed: usize) -> Vec<Vec<usize>> {
        let of_head = |(head, rows): (usize, &Vec<Vec<f32>>)| {
            let back = (side.transform() == Transform::Basis).then(|| self.inverse(false, head));
            let norm = |t: usize| -> f32 {
                let row: Vec<f32> = self.framed(side, false, head, &rows[t]).into_iter().map(half).collect();
                // Of the model's own frame.
                let row = if back.is_some() { self.unframed(side, back.as_ref(), &row) } else { row };
                row.into_iter().fold(0.0, |sum, x| sum + x * x)
            };
            let of_page = |start: usize| {
                let mut norms: Vec<(f32, usize)> =
                    (start..start + PAGE_TOKENS).filter(|t| !self.sinks.contains(t)).map(|t| (norm(t), t)).collect();
                norms.sort_by(|a, b| a.partial_cmp(b).unwrap());
                let limit = auto.share * auto.share * norms[norms.len() / 2].0;
                norms.into_iter().filter(move |(norm, _)| *norm < limit).take(auto.places).map(|(_, t)| t)
            };
            (0..packed).step_by(PAGE_TOKENS).flat_map(of_page).collect()
        };
        exact.iter().enumerate().map(of_head).collect()
    }

    /// Quantises the channels of a page one after the other, each changed by what those before it miss.
    fn with_feedback(&self, form: Packed, head: usize, rows: &mut [Vec<f32>], page: Range<usize>) {
        let d = self.head_dim;
        let feedback = self.calibration.key_feedback.as_ref().unwrap();
        let order = &feedback.order[head * d..(head + 1) * d];
        let tokens: Vec<usize> = page.filter(|t| !self.is_apart(head, *t)).collect();
        let mut left: Vec<Vec<f32>> = rows.to_vec();
        for (i, &c) in order.iter().enumerate() {
            let c = c as usize;
            let values: Vec<f32> = tokens.iter().map(|t| rows[*t][c]).collect();
            let (min, max) = values.iter().fold((f32::MAX, f32::MIN), |(min, max), x| (min.min(*x), max.max(*x)));
            let bits = self.bits(form, true, head, c);
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            for &t in &tokens {
                let seen = match bits {
                    None => half(mean),
                    Some(bits) => {
                        let top = f32::from(bits.max_code());
                        let (scale, zero) = (half((max - min) / top), half(min));
                        let steps = if scale == 0.0 { 0.0 } else { (left[t][c] - zero) / scale };
                        steps.clamp(0.0, top).round_ties_even() * scale + zero
                    }
                };
                let missed = left[t][c] - seen;
                for (j, &later) in order.iter().enumerate().skip(i + 1) {
                    left[t][later as usize] -= missed * feedback.factors[(head * d + i) * d + j];
                }
                left[t][c] = seen;
            }
        }
        tokens.into_iter().for_each(|t| rows[t].clone_from(&left[t]));
    }

    /// Quantises every group.
    fn groups(&self, form: Packed, is_keys: bool, head: usize, rows: &mut [Vec<f32>], packed: usize) {
        let low = self.low_channels(form);
        let group = form.group;
        if form.feedback {
            for start in (0..packed).step_by(group) {
                self.with_feedback(form, head, rows, start..start + group);
            }
            return;
        }
        let mut quantise = |cells: Vec<(usize, usize)>, bits: Option<Bits>| {
            let cells: Vec<_> = cells.into_iter().filter(|(t, _)| !self.is_apart(head, *t)).collect();
            let values: Vec<f32> = cells.iter().map(|&(t, c)| rows[t][c]).collect();
            let mean = values.iter().sum::<f32>() / values.len() as f32;
            let means = || vec![half(mean); values.len()];
            let replaced = bits.map_or_else(means, |bits| fake_quantise(form, bits, &values));
            for ((t, c), value) in cells.into_iter().zip(replaced) {
                rows[t][c] = value;
            }
        };
        if form.axis == Axis::Channel {
            for start in (0..packed).step_by(group) {
                for c in 0..low {
                    let bits = self.bits(form, is_keys, head, c);
                    quantise((start..packed.min(start + group)).map(|t| (t, c)).collect(), bits);
                }
            }
        } else {
            for t in 0..packed {
                for start in (0..low).step_by(group.min(low)) {
                    quantise((start..low.min(start + group)).map(|c| (t, c)).collect(), Some(form.bits));
                }
            }
        }
    }

    fn order(&self, choice: PreRope) -> Option<&Vec<u32>> {
        self.calibration.permutation.as_ref().filter(|_| choice.permutation != Permutation::None)
    }

    /// RoPE undone, heads rotated together, channels reordered.
    fn before_rope(&self, choice: PreRope, heads: &mut Heads, packed: usize) {
        for t in 0..packed {
            let mut all = self.turned(heads, t, -1.0);
            if choice.heads > 0 {
                let hadamard = Hadamard::new(self.rotated_heads * self.head_dim).unwrap();
                all.chunks_exact_mut(hadamard.order()).for_each(|heads| hadamard.apply(heads));
            }
            if let Some(order) = self.order(choice) {
                all = order.iter().map(|channel| all[*channel as usize]).collect();
            }
            self.put(heads, t, &all);
        }
    }

    fn after_rope(&self, choice: PreRope, heads: &mut Heads, packed: usize) {
        for t in 0..packed {
            let mut all: Vec<f32> = heads.iter().flat_map(|rows| rows[t].clone()).collect();
            if let Some(order) = self.order(choice) {
                let stored = all.clone();
                order.iter().zip(stored).for_each(|(channel, x)| all[*channel as usize] = x);
            }
            if choice.heads > 0 {
                let hadamard = Hadamard::new(self.rotated_heads * self.head_dim).unwrap();
                all.chunks_exact_mut(hadamard.order()).for_each(|heads| hadamard.apply_inverse(heads));
            }
            self.put(heads, t, &all);
            let turned = self.turned(heads, t, 1.0);
            self.put(heads, t, &turned);
        }
    }

    /// All heads of a token side by side, each turned by its rotary angle, forwards or backwards.
    fn turned(&self, heads: &Heads, t: usize, direction: f32) -> Vec<f32> {
        let half = self.head_dim / 2;
        let mut all = Vec::new();
        for rows in heads {
            let mut row = rows[t].clone();
            for (c, frequency) in self.inv_freq.iter().enumerate() {
                let (sine, cosine) = (t as f32 * frequency).sin_cos();
                let (a, b, sine) = (row[c], row[c + half], direction * sine);
                (row[c], row[c + half]) = (a * cosine - b * sine, b * cosine + a * sine);
            }
            all.extend(row);
        }
        all
    }

    fn put(&self, heads: &mut Heads, t: usize, all: &[f32]) {
        for (rows, row) in heads.iter_mut().zip(all.chunks_exact(self.head_dim)) {
            rows[t] = row.to_vec();
        }
    }
}

/// `phi(x) = [softmax(x W1), softmax(x W2)]` by the maps of one head.
pub(super) fn features(maps: &[Vec<f32>; 2], head: usize, features: usize, x: &[f32]) -> Vec<f64> {
    let (d, half) = (x.len(), features / 2);
    let of_map = |map: &Vec<f32>| {
        let map = &map[head * d * half..(head + 1) * d * half];
        let logit = |j: usize| -> f64 { (0..d).map(|c| f64::from(x[c]) * f64::from(map[c * half + j])).sum() };
        let logits: Vec<f64> = (0..half).map(logit).collect();
        let largest = logits.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = logits.iter().map(|l| (l - largest).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.into_iter().map(move |w| w / total).collect::<Vec<f64>>()
    };
    maps.iter().flat_map(of_map).collect()
}

/// `H X` along the tokens of each page; its own inverse.
fn along_tokens(heads: &mut Heads, packed: usize) {
    let hadamard = Hadamard::new(PAGE_TOKENS).unwrap();
    for rows in heads {
        for page in rows[..packed].chunks_exact_mut(PAGE_TOKENS) {
            for c in 0..page[0].len() {
                let mut column: Vec<f32> = page.iter().map(|row| row[c]).collect();
                hadamard.apply(&mut column);
                page.iter_mut().zip(column).for_each(|(row, x)| row[c] = x);
            }
        }
    }
}

/// QF or QI on one group, or on as much of its range as misses least.
fn fake_quantise(form: Packed, bits: Bits, values: &[f32]) -> Vec<f32> {
    if values.is_empty() {
        return Vec::new();
    }
    let (max, min) = (values.iter().copied().fold(f32::MIN, f32::max), values.iter().copied().fold(f32::MAX, f32::min));
    let mut best = fake_quantise_within(form.quantizer, bits, values, min, max);
    if form.clip == Clip::Mse {
        let error = |own: &[f32]| values.iter().zip(own).fold(0f32, |sum, (x, own)| sum + (x - own) * (x - own));
        for share in [0.92, 0.84, 0.76, 0.68, 0.6, 0.5f32] {
            let (middle, half) = ((min + max) / 2.0, share * ((max - min) / 2.0));
            let own = fake_quantise_within(form.quantizer, bits, values, middle - half, middle + half);
            if error(&own) < error(&best) {
                best = own;
            }
        }
    }
    best
}

fn fake_quantise_within(quantizer: Quantizer, bits: Bits, values: &[f32], mut min: f32, mut max: f32) -> Vec<f32> {
    let top = f32::from(bits.max_code());
    match quantizer {
        Quantizer::FloatMin => {
            let (scale, min) = (half((max - min) / top), half(min));
            let code = |x: f32| if scale == 0.0 { 0.0 } else { ((x - min) / scale).clamp(0.0, top).round_ties_even() };
            values.iter().map(|x| code(*x) * scale + min).collect()
        }
        Quantizer::IntegerZero { clip, include_zero } => {
            (max, min) = (clip * max, clip * min);
            if include_zero {
                (max, min) = (max.max(0.0), min.min(0.0));
            }
            let scale = half((max - min) / top);
            if scale == 0.0 {
                return vec![half(min); values.len()];
            }
            let zero = half((-min / scale).round_ties_even());
            let code = |x: f32| ((x / scale).round_ties_even() + zero).clamp(0.0, top);
            values.iter().map(|x| scale * (code(*x) - zero)).collect()
        }
    }
}

/// GEAR's `L = Q P^T`: three rounds from a fixed start, factors rounded to fp16.
fn power_iteration(error: &[Vec<f32>], rank: usize) -> Vec<Vec<f32>> {
    let d = error[0].len();
    let uniform = |counter: u64| {
        let mut x = counter.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 40) as f64 / (1u64 << 24) as f64
    };
    // Columns of the factors.
    let mut p: Vec<Vec<f64>> = (0..rank).map(|r| (0..d).map(|c| uniform((c * rank + r) as u64)).collect()).collect();
    let mut q = Vec::new();
    for round in 0..3 {
        if round == 2 {
            gram_schmidt(&mut p);
        }
        q = p
            .iter()
            .map(|p| error.iter().map(|e| e.iter().zip(p).map(|(e, p)| f64::from(*e) * p).sum()).collect())
            .collect::<Vec<Vec<f64>>>();
        if round == 2 {
            gram_schmidt(&mut q);
        }
        p = q
            .iter()
            .map(|q| (0..d).map(|c| error.iter().zip(q).map(|(e, q)| f64::from(e[c]) * q).sum()).collect())
            .collect();
    }
    let round = |x: f64| half(x as f32);
    (0..error.len())
        .map(|t| (0..d).map(|c| (0..rank).map(|r| round(q[r][t]) * round(p[r][c])).sum()).collect())
        .collect()
}

fn gram_schmidt(columns: &mut [Vec<f64>]) {
    for i in 0..columns.len() {
        let (before, rest) = columns.split_at_mut(i);
        let own = &mut rest[0];
        for other in before {
            let dot: f64 = own.iter().zip(&*other).map(|(a, b)| a * b).sum();
            own.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * *b);
        }
        let norm = own.iter().map(|x| x * x).sum::<f64>().sqrt();
        own.iter_mut().for_each(|x| *x = if norm > 0.0 { *x / norm } else { 0.0 });
    }
}
