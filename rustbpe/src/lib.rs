//! Byte-level byte-pair encoding: training on a stream of text, and encoding with the result.
//!
//! - [`plain`]: all of it, as simple as possible; read this first;
//! - [`fast`]: the same, fast.
//!
//! The Python module (`py.rs`, `reader.rs` and `arrow.rs`, enabled by the feature `python`) only converts arguments and releases the GIL.

#[cfg(feature = "python")]
mod arrow;
pub mod fast;
pub mod plain;
#[cfg(feature = "python")]
mod py;
#[cfg(feature = "python")]
mod reader;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;

/// Errors; every variant stems from the caller's data, not from a bug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern does not compile.
    Pattern(String),
    /// The split pattern failed on a text, e.g. because it backtracks too much.
    Split(String),
    /// Ranks that do not form a tokenizer.
    Ranks(String),
    /// A text that is not UTF-8.
    Text(String),
    /// A training setting out of range.
    Setting(String),
    /// A token id outside the vocabulary.
    UnknownId(u32),
    /// The caller asked to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern(why) => write!(f, "invalid split pattern: {why}"),
            Error::Split(why) => write!(f, "the split pattern failed on this text: {why}"),
            Error::Ranks(why) => write!(f, "invalid ranks: {why}"),
            Error::Text(why) => write!(f, "a text is not UTF-8: {why}"),
            Error::Setting(why) => f.write_str(why),
            Error::UnknownId(id) => write!(f, "unknown token id: {id}"),
            Error::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}

/// A text in memory, perhaps in another form than UTF-8. Threads convert it just before they use it.
pub trait Text: Sync {
    /// About the number of its bytes.
    fn size(&self) -> usize;

    fn utf8(&self) -> Result<Cow<'_, str>, Error>;
}

impl<T: AsRef<[u8]> + Sync + ?Sized> Text for T {
    fn size(&self) -> usize {
        self.as_ref().len()
    }

    fn utf8(&self) -> Result<Cow<'_, str>, Error> {
        std::str::from_utf8(self.as_ref()).map(Cow::Borrowed).map_err(|e| Error::Text(e.to_string()))
    }
}
