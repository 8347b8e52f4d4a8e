//! The window of recent tokens kept in 16 bit, and when tokens leave it.
//!
//! Everything here is a closed form of the number of cached tokens `len`, so that the state of a
//! cache is known from `len` alone, however the tokens came in.

use crate::PAGE_TOKENS;
use std::ops::Range;

/// When tokens leave the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// No window: every token is stored in its page at once.
    None,
    /// At least `tokens` recent tokens stay in 16 bit; keys and values of 128 tokens leave together.
    Guaranteed,
    /// KIVI's own: keys leave `tokens` at a time, as soon as there are so many; values one by one.
    Kivi,
}

/// A window of recent tokens in 16 bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// R, the window's nominal size in tokens.
    pub tokens: usize,
    /// When tokens leave it.
    pub schedule: Schedule,
}

impl Window {
    /// Keys that lie in pages once `len` tokens are cached.
    pub fn packed_keys(self, len: usize) -> usize {
        match self.schedule {
            Schedule::None => len,
            Schedule::Guaranteed => self.packed_values(len),
            Schedule::Kivi => len / self.tokens * self.tokens,
        }
    }

    /// Values that lie in pages once `len` tokens are cached.
    pub fn packed_values(self, len: usize) -> usize {
        match self.schedule {
            Schedule::None => len,
            Schedule::Guaranteed => len.saturating_sub(self.tokens) / PAGE_TOKENS * PAGE_TOKENS,
            Schedule::Kivi => len.saturating_sub(self.tokens),
        }
    }

    /// Slots of the key ring: the most keys outside pages at any moment, the one being added included.
    pub fn key_slots(self) -> usize {
        match self.schedule {
            Schedule::None => 1,
            Schedule::Guaranteed => self.tokens + PAGE_TOKENS,
            Schedule::Kivi => self.tokens,
        }
    }

    /// Slots of the value ring, counted like [`Window::key_slots`].
    pub fn value_slots(self) -> usize {
        match self.schedule {
            Schedule::None | Schedule::Guaranteed => self.key_slots(),
            Schedule::Kivi => self.tokens + 1,
        }
    }

    /// Keys, and values, that leave the window while a sequence grows from `cached.start` to `cached.end` tokens.
    pub fn leaving(self, cached: Range<usize>) -> [Range<usize>; 2] {
        [
            self.packed_keys(cached.start)..self.packed_keys(cached.end),
            self.packed_values(cached.start)..self.packed_values(cached.end),
        ]
    }

    /// Blocks whose keys are complete once a sequence grows from `cached.start` to `cached.end` tokens.
    pub fn filled_pages(self, cached: Range<usize>) -> Range<usize> {
        self.packed_keys(cached.start) / PAGE_TOKENS..self.packed_keys(cached.end) / PAGE_TOKENS
    }

    /// Keys that leave together, in a page. A state in 16 bit is rounded once for these.
    pub fn flush_tokens(self) -> usize {
        match self.schedule {
            Schedule::None => 1,
            Schedule::Guaranteed => PAGE_TOKENS,
            Schedule::Kivi => self.tokens.clamp(1, PAGE_TOKENS),
        }
    }

    /// Blocks of 128 token slots that hold the packed part of `len` cached tokens.
    pub fn blocks(self, len: usize) -> usize {
        self.packed_keys(len).max(self.packed_values(len)).div_ceil(PAGE_TOKENS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROMPTS: [usize; 5] = [5, 128, 256, 300, 1000];

    /// Counts of (packed, in 16 bit) after each step of the guaranteed schedule, simulated.
    fn guaranteed(prompt: usize, steps: usize) -> Vec<(usize, usize)> {
        let (mut packed, mut recent) = (0, prompt);
        let mut states = Vec::new();
        for step in 0..=steps {
            if step > 0 {
                recent += 1;
            }
            while recent >= 256 {
                packed += 128;
                recent -= 128;
            }
            states.push((packed, recent));
        }
        states
    }

    #[test]
    fn guaranteed_schedule_matches_a_simulation() {
        let window = Window { tokens: 128, schedule: Schedule::Guaranteed };
        for prompt in PROMPTS {
            for (step, (packed, recent)) in guaranteed(prompt, 700).into_iter().enumerate() {
                let len = prompt + step;
                assert_eq!(window.packed_keys(len), packed, "prompt {prompt}, step {step}");
                assert_eq!(window.packed_values(len), packed);
                assert_eq!(len - packed, recent);
                assert!(recent < window.key_slots());
                assert!(packed == 0 || recent >= 128);
            }
        }
    }

    #[test]
    fn kivi_schedule_matches_a_simulation() {
        let window = Window { tokens: 128, schedule: Schedule::Kivi };
        for prompt in PROMPTS {
            let mut keys = (prompt - prompt % 128, prompt % 128);
            let mut values = (prompt.saturating_sub(128), prompt.min(128));
            for step in 0..700 {
                let len = prompt + step;
                assert_eq!(
                    (window.packed_keys(len), len - window.packed_keys(len)),
                    keys,
                    "prompt {prompt}, step {step}"
                );
                assert_eq!((window.packed_values(len), len - window.packed_values(len)), values);
                keys.1 += 1;
                assert!(keys.1 <= window.key_slots());
                if keys.1 == 128 {
                    keys = (keys.0 + 128, 0);
                }
                values.1 += 1;
                assert!(values.1 <= window.value_slots());
                if values.1 == 129 {
                    values = (values.0 + 1, 128);
                }
            }
        }
    }

    #[test]
    fn kivi_example_of_the_code() {
        let window = Window { tokens: 128, schedule: Schedule::Kivi };
        assert_eq!((window.packed_keys(300), window.packed_values(300)), (256, 172));
        assert_eq!((window.packed_keys(384), window.packed_values(384)), (384, 256));
    }

    #[test]
    fn without_a_window_every_token_is_in_a_page() {
        let window = Window { tokens: 0, schedule: Schedule::None };
        for len in [0, 1, 127, 128, 129] {
            assert_eq!((window.packed_keys(len), window.packed_values(len)), (len, len));
        }
        assert_eq!((window.blocks(0), window.blocks(128), window.blocks(129)), (0, 1, 2));
    }

    #[test]
    fn blocks_cover_keys_and_values() {
        let kivi = Window { tokens: 128, schedule: Schedule::Kivi };
        assert_eq!((kivi.blocks(127), kivi.blocks(128), kivi.blocks(300)), (0, 1, 2));
        let guaranteed = Window { tokens: 128, schedule: Schedule::Guaranteed };
        assert_eq!((guaranteed.blocks(255), guaranteed.blocks(256), guaranteed.blocks(8192)), (0, 1, 63));
    }
}
