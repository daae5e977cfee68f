//! Short pieces as numbers. Replaces the `Token` that is the key of the maps in `plain`.
//! Faster: a piece of up to 15 bytes is compared and hashed in two registers, without a loop or memory of its own.
//! Gain: part of that of cache.rs and table.rs, which need it.

/// The bytes of a piece, zeros, and the length in the last byte. `default()` is that of the empty piece.
#[derive(Clone, Copy, Default, Eq, Debug)]
pub struct Key {
    low: u64,
    high: u64,
}

impl PartialEq for Key {
    /// One branch, not two.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        (self.low ^ other.low) | (self.high ^ other.high) == 0
    }
}

impl Key {
    /// Longer pieces have no key.
    pub const LONGEST: usize = 15;
    /// That of a longer piece.
    pub const NONE: Key = Key { low: 0, high: u64::MAX };

    /// The key of the first `len` bytes, at most LONGEST, of `text`.
    #[inline]
    pub fn of(text: &[u8], len: usize) -> Key {
        let mut padded = [0; 16];
        let window = text.first_chunk().unwrap_or_else(|| {
            padded[..len].copy_from_slice(&text[..len]);
            &padded
        });
        const MASKS: [u128; Key::LONGEST + 1] = {
            let mut masks = [0; Key::LONGEST + 1];
            let mut len = 1;
            while len <= Key::LONGEST {
                masks[len] = masks[len - 1] << 8 | 0xff;
                len += 1;
            }
            masks
        };
        let both = u128::from_le_bytes(*window) & MASKS[len];
        Key { low: both as u64, high: (both >> 64) as u64 | (len as u64) << 56 }
    }

    /// The bytes of the piece, zeros, and its length.
    pub fn bytes(self) -> ([u8; 16], usize) {
        (((self.high as u128) << 64 | self.low as u128).to_le_bytes(), (self.high >> 56) as usize)
    }

    #[inline]
    pub fn hash(self) -> u64 {
        let product = (self.low ^ 0x9e37_79b9_7f4a_7c15) as u128 * (self.high ^ 0xd1b5_4a32_d192_ed03) as u128;
        product as u64 ^ (product >> 64) as u64
    }
}
