//! Short pieces as numbers. Replaces the `Token` that is the key of the maps in `plain`.
//! Faster: a piece of up to 15 bytes is compared and hashed in two registers, without a loop or memory of its own.
//! Gain: part of that of cache.rs and table.rs, which need it.

/// A piece of up to SHORT bytes: the bytes, zeros, and the length in the last byte. A longer one: its hash, and LONG with a number.
#[derive(Clone, Copy, Default, Eq, Debug)]
pub struct Key {
    pub low: u64,
    pub high: u64,
}

impl PartialEq for Key {
    /// One branch, not two.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        (self.low ^ other.low) | (self.high ^ other.high) == 0
    }
}

impl Key {
    /// Pieces of up to this many bytes are their own keys.
    pub const SHORT: usize = 15;
    const LONG: u64 = 0xff << 56;
    /// The key of no piece; `default()` is that of the empty piece.
    pub const NONE: Key = Key { low: 0, high: u64::MAX };

    /// The key of the first `len` bytes, at most SHORT, of `text`.
    #[inline]
    pub fn short(text: &[u8], len: usize) -> Key {
        let mut padded = [0; 16];
        let window = text.first_chunk().unwrap_or_else(|| {
            padded[..len].copy_from_slice(&text[..len]);
            &padded
        });
        const MASKS: [u128; Key::SHORT + 1] = {
            let mut masks = [0; Key::SHORT + 1];
            let mut len = 1;
            while len <= Key::SHORT {
                masks[len] = masks[len - 1] << 8 | 0xff;
                len += 1;
            }
            masks
        };
        let both = u128::from_le_bytes(*window) & MASKS[len];
        Key { low: both as u64, high: (both >> 64) as u64 | (len as u64) << 56 }
    }

    /// The key of a longer piece with this hash.
    #[inline]
    pub fn long(hash: u64, number: u64) -> Key {
        Key { low: hash, high: Self::LONG | number }
    }

    /// The number of a longer piece.
    #[inline]
    pub fn number(self) -> Option<u64> {
        (self.high >= Self::LONG).then_some(self.high & !Self::LONG)
    }

    /// The bytes of a short piece.
    pub fn bytes(self) -> ([u8; 16], usize) {
        (((self.high as u128) << 64 | self.low as u128).to_le_bytes(), (self.high >> 56) as usize)
    }

    #[inline]
    pub fn hash(self) -> u64 {
        match self.number() {
            Some(_) => self.low,
            None => mix(self.low, self.high),
        }
    }
}

/// A hash of 16 bytes.
#[inline]
fn mix(a: u64, b: u64) -> u64 {
    let product = (a ^ 0x9e37_79b9_7f4a_7c15) as u128 * (b ^ 0xd1b5_4a32_d192_ed03) as u128;
    product as u64 ^ (product >> 64) as u64
}

/// The hash of a piece of 16 bytes or more.
pub fn hash_long(piece: &[u8]) -> u64 {
    let word = |at: usize| u64::from_le_bytes(*piece[at..].first_chunk().expect("8 bytes"));
    let last = piece.len() - 16;
    let chunks = (0..last).step_by(16).chain([last]);
    chunks.fold(piece.len() as u64, |hash, at| mix(hash ^ word(at), word(at + 8)))
}
