//! One decoding step of a small GPT on a CPU: all layers in one call, on several threads.
//!
//! torch takes as long for the hundred calls of such a step as for reading ten million weights. `step` is the model, `kernel` its
//! products, `team` the threads, `py` the Python module. On other machines than x86-64 there is nothing in it yet.
#![cfg(target_arch = "x86_64")]

pub mod kernel;
#[cfg(feature = "python")]
mod py;
pub mod step;
pub mod team;
#[cfg(test)]
mod tests;
