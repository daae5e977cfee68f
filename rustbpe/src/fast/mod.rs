//! The same as [`crate::plain`], fast. Each file is one idea, and its head says which function of `plain` it replaces, why it is
//! faster, and by how much: the gain is that of the whole crate over a build without the idea (`python -m dev.bench_ablation`,
//! NOTES.md has the conditions).

mod cache;
mod candidates;
mod classes;
pub mod count;
pub mod documents;
pub mod encode;
mod joins;
pub mod key;
mod lookback;
mod machine;
mod neighbours;
mod pairs;
pub mod patterns;
pub mod pool;
pub mod scan;
mod slots;
pub mod split;
mod table;
pub mod threads;
mod tokens;
pub mod train;
mod trie;
pub mod window;
pub mod words;

/// Whether this build leaves out the idea of that name, for the ablation bench: `WITHOUT=cache cargo build --release`.
pub(crate) const fn without(idea: &str) -> bool {
    let Some(left_out) = option_env!("WITHOUT") else { return false };
    let (a, b) = (left_out.as_bytes(), idea.as_bytes());
    let mut at = 0;
    while at < a.len() && at < b.len() && a[at] == b[at] {
        at += 1;
    }
    at == a.len() && at == b.len()
}
