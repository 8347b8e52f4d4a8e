//! Which tokens of which requests run next: a state machine over lengths and blocks.

use crate::Prefill;
use std::collections::VecDeque;

/// What there is to be shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Sequences at once.
    pub sequences: usize,
    /// Blocks of the cache.
    pub blocks: usize,
    /// Prompt tokens of a pass of several sequences; one sequence may have more.
    pub shared_rows: usize,
    /// How prompts are cut into passes.
    pub prefill: Prefill,
}

/// A request as it is scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Job {
    /// Its number; those of later requests are larger.
    pub id: u64,
    /// Tokens that its sequence holds before the prompt.
    pub cached: usize,
    /// Tokens of the prompt, at least one.
    pub prompt: usize,
    /// Blocks that it may need in all; 0 where its sequence is held by somebody who has asked for them.
    pub blocks: usize,
    /// Whether its sequence is held.
    pub is_held: bool,
}

/// What a pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Reading prompts.
    Prefill,
    /// One token for each sequence.
    Decode,
}

/// The tokens of one request in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    /// The request.
    pub id: u64,
    /// Tokens.
    pub rows: usize,
    /// Whether its next token is chosen after the pass.
    pub chooses: bool,
}

/// A pass that is due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pass {
    /// What it is for.
    pub kind: Kind,
    /// Its parts, by rising numbers of the requests.
    pub parts: Vec<Part>,
}

/// A request that has a sequence.
#[derive(Debug, Clone, Copy)]
struct Running {
    job: Job,
    /// Tokens of its sequence that are cached.
    at: usize,
}

impl Running {
    fn prompt_end(&self) -> usize {
        self.job.cached + self.job.prompt
    }

    fn is_reading(&self) -> bool {
        self.at < self.prompt_end()
    }
}

/// Requests that wait and requests that run.
///
/// Requests are admitted in their order, each with all blocks that it may need, so that what runs never lacks one; those on
/// sequences that are held need none, and at once. While
/// anything decodes, a decoding pass comes between two prefill passes; prompts and single tokens never share a pass, for a
/// device may compute them differently.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Job>,
    /// By rising numbers.
    running: Vec<Running>,
    free_blocks: usize,
    free_sequences: usize,
    /// Whether a prefill pass was the last one.
    prefilled: bool,
}

impl Scheduler {
    /// A scheduler of nothing.
    pub fn new(limits: Limits) -> Self {
        let Limits { sequences, blocks, .. } = limits;
        Scheduler {
            limits,
            waiting: VecDeque::new(),
            running: Vec::new(),
            free_blocks: blocks,
            free_sequences: sequences,
            prefilled: false,
        }
    }

    /// Takes a sequence with so many blocks out of what is shared; false where they are not free.
    pub fn hold(&mut self, blocks: usize) -> bool {
        let fits = self.fits(blocks);
        if fits {
            self.free_sequences -= 1;
            self.free_blocks -= blocks;
        }
        fits
    }

    /// Gives back what [`Scheduler::hold`] took.
    pub fn release(&mut self, blocks: usize) {
        self.free_sequences += 1;
        self.free_blocks += blocks;
    }

    /// Adds a request, which waits.
    ///
    /// # Panics
    /// If it can never run: more blocks than there are, or no prompt.
    pub fn submit(&mut self, job: Job) {
        assert!(job.blocks <= self.limits.blocks && job.prompt > 0, "a request that can run");
        self.waiting.push_back(job);
    }

    /// Takes a request out, wherever it is.
    pub fn remove(&mut self, id: u64) {
        self.waiting.retain(|job| job.id != id);
        if let Some(index) = self.running.iter().position(|own| own.job.id == id) {
            let Running { job, .. } = self.running.remove(index);
            if !job.is_held {
                self.release(job.blocks);
            }
        }
    }

    /// Admits what fits, in order; those that were admitted. Requests on sequences that are held need no room, and pass by
    /// those that wait for some.
    pub fn admit(&mut self) -> Vec<u64> {
        let mut admitted = Vec::new();
        let mut is_full = false;
        for job in std::mem::take(&mut self.waiting) {
            is_full |= !job.is_held && !is_full && !self.hold(job.blocks);
            if is_full && !job.is_held {
                self.waiting.push_back(job);
                continue;
            }
            let place = self.running.partition_point(|own| own.job.id < job.id);
            self.running.insert(place, Running { job, at: job.cached });
            admitted.push(job.id);
        }
        admitted
    }

    /// Whether all that is left waits for room that only those who hold sequences can give.
    pub fn is_stuck(&self) -> bool {
        let first = self.waiting.front().filter(|_| self.waiting.iter().all(|job| !job.is_held));
        self.running.is_empty() && first.is_some_and(|job| !self.fits(job.blocks))
    }

    fn fits(&self, blocks: usize) -> bool {
        self.free_sequences > 0 && blocks <= self.free_blocks
    }

    /// What runs next of what was admitted; `None` where nothing is left to do. The same until it is [`Scheduler::done`].
    pub fn due(&self) -> Option<Pass> {
        let decoding: Vec<Part> = self
            .running
            .iter()
            .filter(|own| !own.is_reading())
            .map(|own| Part { id: own.job.id, rows: 1, chooses: true })
            .collect();
        let reads = self.running.iter().any(Running::is_reading);
        if reads && (decoding.is_empty() || !self.prefilled) {
            return Some(Pass { kind: Kind::Prefill, parts: self.prefill() });
        }
        (!decoding.is_empty()).then_some(Pass { kind: Kind::Decode, parts: decoding })
    }

    /// The next tokens of prompts, as many as fit. Those of the oldest request are among them.
    fn prefill(&self) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut rows = 0;
        for own in self.running.iter().filter(|own| own.is_reading()) {
            let end = self.limits.prefill.end(own.at..own.prompt_end());
            let part = Part { id: own.job.id, rows: end - own.at, chooses: end == own.prompt_end() };
            // A single token would turn the pass into one of single tokens.
            let alike = parts.first().is_none_or(|first| (first.rows == 1) == (part.rows == 1));
            if alike && (parts.is_empty() || rows + part.rows <= self.limits.shared_rows) {
                rows += part.rows;
                parts.push(part);
            }
        }
        parts
    }

    /// Records that a pass has run. Requests that ended by it are taken out by [`Scheduler::remove`].
    pub fn done(&mut self, pass: &Pass) {
        self.prefilled = pass.kind == Kind::Prefill;
        for part in &pass.parts {
            if let Some(own) = self.running.iter_mut().find(|own| own.job.id == part.id) {
                own.at += part.rows;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn limits(sequences: usize, blocks: usize) -> Limits {
        Limits { sequences, blocks, shared_rows: 512, prefill: Prefill::Cells(256) }
    }

    fn job(id: u64, prompt: usize, blocks: usize) -> Job {
        Job { id, cached: 0, prompt, blocks, is_held: false }
    }

    #[test]
    fn a_long_prompt_does_not_stop_others() {
        let mut scheduler = Scheduler::new(limits(4, 100));
        scheduler.submit(job(0, 10, 1));
        scheduler.submit(job(1, 1000, 9));
        assert_eq!(scheduler.admit(), [0, 1]);
        let mut kinds = Vec::new();
        for _ in 0..8 {
            let pass = scheduler.due().unwrap();
            assert_eq!(scheduler.due().as_ref(), Some(&pass));
            scheduler.done(&pass);
            kinds.push((pass.kind, pass.parts.iter().map(|part| part.rows).collect::<Vec<_>>()));
        }
        let (prefill, decode) = (|rows: &[usize]| (Kind::Prefill, rows.to_vec()), |n| (Kind::Decode, vec![1; n]));
        let expected = [
            prefill(&[10, 256]),
            decode(1),
            prefill(&[256]),
            decode(1),
            prefill(&[256]),
            decode(1),
            prefill(&[232]),
            decode(2),
        ];
        assert_eq!(kinds, expected);
    }

    #[test]
    fn single_tokens_of_prompts_are_passes_of_their_own() {
        let mut scheduler = Scheduler::new(limits(4, 100));
        [1, 300, 1].into_iter().zip(0..).for_each(|(prompt, id)| scheduler.submit(job(id, prompt, 1)));
        let ids = |pass: &Pass| pass.parts.iter().map(|part| part.id).collect::<Vec<_>>();
        scheduler.admit();
        let first = scheduler.due().unwrap();
        assert_eq!(ids(&first), [0, 2]);
        scheduler.done(&first);
        let decode = scheduler.due().unwrap();
        assert_eq!((decode.kind, ids(&decode)), (Kind::Decode, vec![0, 2]));
        scheduler.done(&decode);
        assert_eq!(ids(&scheduler.due().unwrap()), [1]);
    }

    #[test]
    fn rows_of_several_prompts_share_no_pass_where_they_would_change_each_other() {
        let mut scheduler = Scheduler::new(Limits { shared_rows: 0, ..limits(4, 100) });
        [300, 20, 1, 1].into_iter().zip(0..).for_each(|(prompt, id)| scheduler.submit(job(id, prompt, 1)));
        scheduler.admit();
        let mut prefills = Vec::new();
        while let Some(pass) = scheduler.due().filter(|_| prefills.len() < 5) {
            scheduler.done(&pass);
            if pass.kind == Kind::Prefill {
                prefills.push(pass.parts.iter().map(|part| (part.id, part.rows)).collect::<Vec<_>>());
            }
        }
        assert_eq!(prefills, [[(0, 256)], [(0, 44)], [(1, 20)], [(2, 1)], [(3, 1)]]);
    }

    #[test]
    fn what_does_not_fit_waits_in_order() {
        let mut scheduler = Scheduler::new(limits(2, 10));
        assert!(scheduler.hold(4) && !scheduler.hold(7));
        [(0, 5), (1, 3), (2, 1)].into_iter().for_each(|(id, blocks)| scheduler.submit(job(id, 5, blocks)));
        // There is a block for the last one, but no sequence; the second one lacks both.
        assert_eq!((scheduler.admit(), scheduler.free_blocks), (vec![0], 1));
        scheduler.remove(0);
        assert_eq!((scheduler.admit(), scheduler.free_blocks), (vec![1], 3));
        // A request on a sequence that is held asks for nothing, and need not wait.
        scheduler.submit(Job { is_held: true, blocks: 0, cached: 100, ..job(3, 5, 0) });
        assert_eq!((scheduler.admit(), scheduler.waiting.len()), (vec![3], 1));
        [1, 3].into_iter().for_each(|id| scheduler.remove(id));
        assert!(scheduler.hold(1) && scheduler.is_stuck() && scheduler.admit().is_empty());
        scheduler.release(1);
        assert!(!scheduler.is_stuck());
        assert_eq!(scheduler.admit(), [2]);
        scheduler.remove(2);
        scheduler.release(4);
        assert_eq!((scheduler.free_blocks, scheduler.due()), (10, None));
    }

    proptest! {
        /// Whatever comes and goes, on sequences of its own or held ones: blocks are taken and given back once, prompts are
        /// read from their first token to their last in cells, no two prefill passes follow each other while anything
        /// decodes, and all requests come to an end.
        #[test]
        fn nothing_is_lost_and_nobody_starves(
            sequences in 1usize..5,
            requests in prop::collection::vec((1usize..1500, 0usize..600, 1usize..6, 1usize..8), 1..20),
            holds in 0usize..3,
            cancelled in prop::collection::vec((0usize..20, 0usize..40), 0..5),
        ) {
            let limits = Limits { sequences, ..limits(sequences, 8) };
            let mut scheduler = Scheduler::new(limits);
            let mut left: HashMap<u64, (Job, usize, usize)> = HashMap::new();
            // At least one sequence is left for the others.
            let holds = holds.min(sequences - 1);
            prop_assert!((0..holds).all(|_| scheduler.hold(1)));
            for (id, &(prompt, cached, blocks, tokens)) in (0..).zip(&requests) {
                let is_held = (id as usize) < requests.len().min(2 * holds) && id % 2 == 1;
                let job = match is_held {
                    true => Job { cached, is_held, ..job(id, prompt, 0) },
                    false => Job { cached, ..job(id, prompt, blocks) },
                };
                left.insert(id, (job, cached, tokens));
                scheduler.submit(job);
            }
            let bound = requests.iter().map(|(prompt, _, _, tokens)| 2 * (prompt / 256 + 2) + tokens).sum::<usize>();
            let (mut step, mut last) = (0, Kind::Decode);
            loop {
                scheduler.admit();
                prop_assert!(left.values().all(|(job, ..)| !job.is_held
                    || scheduler.running.iter().any(|own| own.job.id == job.id)), "a turn waits");
                let Some(pass) = scheduler.due() else { break };
                prop_assert!(step < bound, "it does not end");
                prop_assert!(scheduler.running.iter().filter(|own| !own.job.is_held).count() + holds <= sequences);
                let decodes = left.values().any(|(job, at, _)| {
                    *at >= job.cached + job.prompt && scheduler.running.iter().any(|own| own.job.id == job.id)
                });
                prop_assert!(!(pass.kind == Kind::Prefill && last == Kind::Prefill && decodes));
                let rows: usize = pass.parts.iter().map(|part| part.rows).sum();
                prop_assert!(rows <= limits.shared_rows && !pass.parts.is_empty());
                prop_assert!(pass.parts.is_sorted_by_key(|part| part.id));
                scheduler.done(&pass);
                for part in &pass.parts {
                    let (job, at, tokens) = left.get_mut(&part.id).expect("a request that is there");
                    let end = job.cached + job.prompt;
                    *at += part.rows;
                    match pass.kind {
                        Kind::Prefill => {
                            prop_assert!(*at == end || (*at < end && *at % 256 == 0));
                            prop_assert_eq!(part.chooses, *at == end);
                        }
                        Kind::Decode => prop_assert!(*at > end && part.rows == 1 && part.chooses),
                    }
                    if part.chooses {
                        *tokens -= 1;
                    }
                    if *tokens == 0 {
                        left.remove(&part.id);
                        scheduler.remove(part.id);
                    }
                }
                for &(id, when) in &cancelled {
                    if when == step && left.remove(&(id as u64)).is_some() {
                        scheduler.remove(id as u64);
                    }
                }
                let taken: usize = scheduler.running.iter().map(|own| own.job.blocks).sum();
                prop_assert_eq!(taken + holds + scheduler.free_blocks, limits.blocks);
                let own = scheduler.running.iter().filter(|own| !own.job.is_held).count();
                prop_assert_eq!(own + holds + scheduler.free_sequences, sequences);
                (step, last) = (step + 1, pass.kind);
            }
            prop_assert!(left.is_empty());
            (0..holds).for_each(|_| scheduler.release(1));
            prop_assert_eq!((scheduler.free_blocks, scheduler.free_sequences), (limits.blocks, sequences));
        }
    }
}
