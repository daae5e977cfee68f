//! The same as [`crate::plain`], fast. Each file is one idea, and its head says which function of `plain` it replaces, why it is
//! faster, and by how much: the gain is that of the whole crate over a run without the idea (`python -m dev.bench_ablation`,
//! NOTES.md has the conditions, and the gains that are within the noise).

mod ablation;
mod cache;
mod candidates;
mod characters;
pub mod classes;
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

use ablation::without;
pub use ablation::Idea;
