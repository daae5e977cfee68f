//! For the ablation bench: the crate without one of its ideas.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// What a build with the feature `ablation` can leave out (examples/speed.rs, `python -m dev.bench_ablation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Idea {
    Patterns,
    Window,
    Prefetch,
    HugePages,
    Waiting,
    Cache,
    Joins,
    Characters,
    Table,
    AtOnce,
    TwoBytes,
    Floor,
    Buckets,
}

impl Idea {
    pub const ALL: [Idea; 13] = {
        use Idea::*;
        [Patterns, Window, Prefetch, HugePages, Waiting, Cache, Joins, Characters, Table, AtOnce, TwoBytes, Floor, Buckets]
    };

    /// From now on. Without the feature it has no effect.
    pub fn leave_out(self) {
        LEFT_OUT.store(self as u8, Relaxed);
    }
}

static LEFT_OUT: AtomicU8 = AtomicU8::new(u8::MAX);

/// Whether that idea is left out: never, and at no cost, without the feature.
#[inline(always)]
pub fn without(idea: Idea) -> bool {
    cfg!(feature = "ablation") && LEFT_OUT.load(Relaxed) == idea as u8
}
