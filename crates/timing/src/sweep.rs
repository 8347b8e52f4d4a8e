use memmap2::MmapMut;
use rayon::prelude::*;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Words that a thread reads before it may take over some of another's.
const PIECE_WORDS: usize = 1 << 17;

/// A large piece of memory that is read from one end to the other: how fast memory can be read, and a way to evict
/// what was read before from the processor's caches.
pub struct Sweep {
    memory: MmapMut,
}

impl Sweep {
    /// Memory of this size, rounded up to whole words, written once so that all of it is resident.
    ///
    /// # Errors
    /// Where there is not so much memory.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        let mut memory = MmapMut::map_anon(bytes.next_multiple_of(size_of::<u64>()).max(size_of::<u64>()))?;
        // Like the cache's pages. Advice: a kernel without huge pages is slower and nothing else.
        #[cfg(target_os = "linux")]
        memory.advise(memmap2::Advice::HugePage).ok();
        memory.fill(1);
        Ok(Sweep { memory })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.memory.len()
    }

    /// Reads all of it once, with the threads of the rayon pool that this is called in.
    pub fn read(&self) -> Duration {
        let words: &[u64] = bytemuck::cast_slice(&self.memory);
        let start = Instant::now();
        // The compiler makes vectors of this sum; unrolling it by hand is no faster.
        let sum = |piece: &[u64]| piece.iter().fold(0, |sum: u64, word| sum.wrapping_add(*word));
        black_box(words.par_chunks(PIECE_WORDS).map(sum).reduce(|| 0, u64::wrapping_add));
        start.elapsed()
    }
}
