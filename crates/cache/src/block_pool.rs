//! The blocks of a cache, and how many hold each.

/// Hands out blocks, the lowest numbers first. A block is free when nobody holds it any more.
#[derive(Debug, Clone)]
pub struct BlockPool {
    /// Blocks that nobody holds; the last one is the next.
    free: Vec<u32>,
    /// How many hold each block.
    holders: Vec<u32>,
}

impl BlockPool {
    /// A pool of free blocks.
    pub fn new(count: usize) -> Self {
        BlockPool { free: (0..count as u32).rev().collect(), holders: vec![0; count] }
    }

    /// Blocks in all.
    pub fn capacity(&self) -> usize {
        self.holders.len()
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// How many hold a block.
    pub fn holders(&self, block: u32) -> u32 {
        self.holders[block as usize]
    }

    /// So many free blocks, each with one holder.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn take(&mut self, count: usize) -> Vec<u32> {
        let taken: Vec<u32> = self.free.drain(self.free.len() - count..).rev().collect();
        taken.iter().for_each(|block| self.holders[*block as usize] = 1);
        taken
    }

    /// Adds a holder to a block that has one.
    ///
    /// # Panics
    /// If nobody holds it.
    pub fn share(&mut self, block: u32) {
        let holders = &mut self.holders[block as usize];
        assert!(*holders > 0, "a block that is shared is held");
        *holders += 1;
    }

    /// Takes a holder from each of these blocks; what nobody holds then is free.
    ///
    /// # Panics
    /// If nobody holds one of them.
    pub fn release(&mut self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            let holders = &mut self.holders[block as usize];
            *holders = holders.checked_sub(1).expect("a block that is released is held");
            if *holders == 0 {
                self.free.push(block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_are_free_once_their_last_holder_is_gone(
            steps in prop::collection::vec((0usize..3, 0usize..4, 0usize..5), 1..80),
        ) {
            let mut pool = BlockPool::new(12);
            // What each of four holders has; a block may be with several.
            let mut held: [Vec<u32>; 4] = Default::default();
            for (what, who, count) in steps {
                match what {
                    0 if pool.free() >= count => held[who].extend(pool.take(count)),
                    1 => {
                        let shared: Vec<u32> = held[(who + 1) % 4].iter().take(count).copied().collect();
                        shared.iter().for_each(|block| pool.share(*block));
                        held[who].extend(shared);
                    }
                    _ => {
                        let gone = held[who].len().min(count);
                        pool.release(held[who].drain(..gone));
                    }
                }
                let all = held.concat();
                for block in 0..12 {
                    let holders = all.iter().filter(|own| **own == block).count();
                    prop_assert_eq!(pool.holders(block) as usize, holders);
                }
                let free = (0..12).filter(|block| pool.holders(*block) == 0).count();
                prop_assert_eq!((pool.free(), pool.capacity()), (free, 12));
            }
        }
    }

    #[test]
    #[should_panic = "a block that is released is held"]
    fn what_nobody_holds_is_not_released() {
        BlockPool::new(2).release([1]);
    }

    #[test]
    #[should_panic = "a block that is shared is held"]
    fn what_nobody_holds_is_not_shared() {
        BlockPool::new(2).share(0);
    }
}
