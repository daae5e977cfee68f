//! The same as [`crate::plain`], fast. Each file is one idea, and its head says which function of `plain` it replaces, why it is
//! faster, and by how much: the gain is that of the whole crate over a run without the idea (`python -m dev.bench_ablation`,
//! NOTES.md has the conditions, and which gains are not measured yet).

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

mod cache;
mod candidates;
mod classes;
pub mod count;
pub mod documents;
pub mod encode;
mod joins;
pub mod key;
mod machine;
mod neighbours;
mod pairs;
pub mod patterns;
pub mod pool;
pub mod scan;
pub mod slots;
pub mod split;
mod table;
pub mod threads;
mod tokens;
pub mod train;
pub mod window;

/// What a build with the feature `ablation` can leave out (examples/speed.rs, `python -m dev.bench_ablation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idea {
    Patterns,
    Window,
    Prefetch,
    Waiting,
    Cache,
    Table,
    Floor,
    Buckets,
}

impl Idea {
    pub const ALL: [Idea; 8] = {
        use Idea::*;
        [Patterns, Window, Prefetch, Waiting, Cache, Table, Floor, Buckets]
    };

    /// From now on. Without the feature it has no effect.
    pub fn leave_out(self) {
        LEFT_OUT.store(self as u8, Relaxed);
    }
}

static LEFT_OUT: AtomicU8 = AtomicU8::new(u8::MAX);

/// Whether that idea is left out: never, and at no cost, without the feature.
#[inline(always)]
pub(crate) fn without(idea: Idea) -> bool {
    cfg!(feature = "ablation") && LEFT_OUT.load(Relaxed) == idea as u8
}
