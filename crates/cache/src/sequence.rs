//! One sequence and its block tables.

/// One sequence of tokens in the cache.
///
/// It must be given back to its manager by [`crate::CacheManager::close`]; dropped, its blocks stay taken.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) slot: u32,
    pub(crate) len: usize,
    /// A table for each group of layers.
    pub(crate) blocks: Vec<Vec<u32>>,
    pub(crate) classes: Option<Classes>,
}

/// The tokens of a sequence by their classes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Classes {
    /// Class of each token from the first on; the others have class 0.
    pub of_tokens: Vec<u8>,
    /// Block table of each class.
    pub blocks: Vec<Vec<u32>>,
}

/// The tokens of one class in a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassTokens {
    /// Positions of the tokens; the `i`-th packed one lies in slot `i % 128` of block `i / 128`.
    pub tokens: Vec<u32>,
    /// Its block table.
    pub blocks: Vec<u32>,
}

impl ClassTokens {
    /// How many of them are among the first `packed` tokens of the sequence.
    pub fn packed(&self, packed: usize) -> usize {
        self.tokens.partition_point(|token| (*token as usize) < packed)
    }
}

impl Classes {
    /// Class of a token.
    fn of(&self, token: usize) -> usize {
        self.of_tokens.get(token).map_or(0, |class| usize::from(*class))
    }

    /// Blocks that each class needs where the first `packed` tokens lie in pages.
    pub(crate) fn blocks(&self, packed: usize) -> Vec<usize> {
        let mut counts = vec![0usize; self.blocks.len()];
        (0..packed).for_each(|token| counts[self.of(token)] += 1);
        counts.into_iter().map(|count| count.div_ceil(crate::PAGE_TOKENS)).collect()
    }
}

impl Sequence {
    /// Number of the sequence's window rings.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Cached tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The block table of a group of layers: block `i` holds tokens `128 i .. 128 (i + 1)`, or of a group whose layers see no
    /// more than so many tokens the last such tokens in turn. Empty where the scheme has classes.
    pub fn blocks(&self, group: usize) -> &[u32] {
        &self.blocks[group]
    }

    /// The first `len` tokens by their classes; empty where the scheme has none.
    pub fn class_tokens(&self, len: usize) -> Vec<ClassTokens> {
        let Some(classes) = &self.classes else { return Vec::new() };
        let empty = |blocks: &Vec<u32>| ClassTokens { tokens: Vec::new(), blocks: blocks.clone() };
        let mut all: Vec<ClassTokens> = classes.blocks.iter().map(empty).collect();
        (0..len).for_each(|token| all[classes.of(token)].tokens.push(token as u32));
        all
    }

    /// Blocks that the sequence holds, of all classes.
    pub fn num_blocks(&self) -> usize {
        let of_classes = self.classes.iter().flat_map(|classes| &classes.blocks);
        self.blocks.iter().chain(of_classes).map(Vec::len).sum()
    }
}

/// The block tables of a sequence: those of groups, and one for each class.
pub(crate) fn tables(sequence: &mut Sequence) -> impl Iterator<Item = &mut Vec<u32>> {
    sequence.blocks.iter_mut().chain(sequence.classes.iter_mut().flat_map(|classes| &mut classes.blocks))
}
