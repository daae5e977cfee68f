//! One decoding step of a small GPT on a CPU: all layers in one call, on several threads.
//!
//! torch takes as long for the hundred calls of such a step as for reading ten million weights. `step` is the model, `kernel` its
//! products, `team` the threads, `py` the Python module.

pub mod kernel;
#[cfg(feature = "python")]
mod py;
pub mod step;
pub mod team;
#[cfg(test)]
mod tests;
